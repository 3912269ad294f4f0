"""Reads the attributes of the sprites world off decoded frames.

Every frame is read by itself first (background, sprite colour, shape, size, centroid); a clip's reading is the vote of
its frames, and its motion comes from the centroid track. The sprite is whatever differs from its row's median colour,
so a drifted background still segments. Nothing here raises on garbage: what cannot be read is None.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from longlive_jax.data.sprites import (
    BACKGROUNDS,
    COLOURS,
    DRIFTS,
    MOTIONS,
    ORBIT_FRAMES,
    ORBIT_RADIUS,
    PICTURE,
    SHAPES,
    SIZES,
    SPEED,
    background_rows,
    coverage,
)
from longlive_jax.errors import UserError

MOTION_WINDOW = 16  # frames over which motion is read; a still sprite and a drifting one part by 12 pixels in that time
MIN_MOTION_FRAMES = 6
VOTE = 5  # frames of the running vote behind per-frame readings, so that one bad frame is no event
MAX_BACKGROUND_ERROR = 60.0  # RGB distance beyond which no palette colour is named; palettes are 70 and more apart
MAX_COLOUR_ERROR = 90.0
MIN_CONTRAST = 30.0  # RGB distance from the background that counts as sprite; the palette's least contrast is 80
MIN_OVERLAP = 0.5  # least intersection over union with a template
MAX_FOREGROUND = 0.35  # of the picture; a large circle takes 0.11, and beyond this there is no background to speak of
MAX_TRACK_ERROR = 2.0  # pixels, mean distance from the best motion
_HALF = 15  # the patch around the centroid that is compared with the templates: 31 x 31 pixels
_RADII = (5.5, 6.25, 7.0, 8.0, 9.5, 11.0, 12.0, 13.0)  # generated sprites come between the sizes too


@dataclass(frozen=True)
class Reading:
    """What a clip of T frames shows. Attributes are None where they cannot be read.

    Attributes:
      background, colour, shape, size: values of `ATTRIBUTES`, by vote over the frames.
      motion: value of `ATTRIBUTES`; needs `MIN_MOTION_FRAMES` frames, reliable from 12 on.
      background_error, sprite_error: mean RGB distance (Euclidean, 0 to 441) to the palette colour that was read; nan
        where none was.
      track: [T, 2] centroid (x, y) in pixels on the torus [0, 64), nan where no sprite is seen.
      frames: attribute -> per-frame value, T each, before any vote; motion over the `MOTION_WINDOW` frames from there.
      background_rgb: [T, 64, 3] each row's background colour.
      sprite_rgb: [T, 3] the sprite's colour inside, nan where no sprite is seen.
    """

    background: str | None
    colour: str | None
    shape: str | None
    size: str | None
    motion: str | None
    background_error: float
    sprite_error: float
    track: np.ndarray
    frames: dict[str, list[str | None]]
    background_rgb: np.ndarray
    sprite_rgb: np.ndarray


# Segmentation ---------------------------------------------------------------------------------------------------------


def _segment(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Background rows [T, 64, 3], sprite colour [T, 3], sprite centroid [T, 2] and aligned coverage [T, 31, 31]."""
    # A sprite is at most 24 of 64 pixels wide, so the median of a row is background.
    rows = np.median(pixels, axis=2)
    difference = pixels - rows[:, :, None]
    distance = np.sqrt((difference**2).sum(-1))
    mask = distance > np.maximum(MIN_CONTRAST, 0.5 * np.quantile(distance, 0.99, axis=(1, 2)))[:, None, None]
    seen = (mask.sum((1, 2)) >= 20) & (mask.mean((1, 2)) <= MAX_FOREGROUND)
    centroid = _centroid(_near(_peak(mask), 14.0) * mask)
    # Inside pixels only: edges are mixed with the background.
    colour = np.full((len(pixels), 3), np.nan)
    near = _near(centroid, 14.0) & mask
    for t in np.flatnonzero(seen & near.any((1, 2))):
        inside = near[t] & (distance[t] >= 0.75 * np.quantile(distance[t][near[t]], 0.9))
        colour[t] = np.median(pixels[t][inside], axis=0)
    seen = ~np.isnan(colour[:, 0])
    contrast = np.where(seen[:, None, None], colour[:, None] - rows, 1.0)  # [T, 64, 3]
    share = (difference * contrast[:, :, None]).sum(-1) / np.maximum((contrast**2).sum(-1), 1.0)[:, :, None]
    # Noise averages out of the overlap only if it is not rectified into area: faint pixels are dropped.
    share = np.clip(np.where(share > 0.2, share, 0.0), 0.0, 1.0) * _near(centroid, 14.0)
    centroid = _centroid(share)
    centroid[~seen] = np.nan
    return rows, colour, centroid, _aligned(share, np.nan_to_num(centroid))


def _peak(mask: np.ndarray) -> np.ndarray:
    """Centre (x, y) of the 17 x 17 box, on the torus, that holds most of the mask: the sprite, not a stray ghost."""
    box = np.zeros((PICTURE, PICTURE))
    box[np.ix_(np.arange(-8, 9), np.arange(-8, 9))] = 1.0
    held = np.fft.irfft2(np.fft.rfft2(mask) * np.fft.rfft2(box), s=(PICTURE, PICTURE))
    y, x = np.unravel_index(np.argmax(np.rint(held).reshape(len(mask), -1), axis=1), (PICTURE, PICTURE))
    return np.stack([x, y], -1) + 0.5


def torus(difference: np.ndarray) -> np.ndarray:
    """The short way round: differences of positions brought into [-32, 32)."""
    return (difference + PICTURE / 2) % PICTURE - PICTURE / 2


def _near(centres: np.ndarray, radius: float) -> np.ndarray:
    """Pixels within the radius of each centre, on the torus: bool [T, 64, 64]."""
    pixel = np.arange(PICTURE) + 0.5
    offsets = torus(pixel[None, :, None] - centres[:, None, :])
    return offsets[:, None, :, 0] ** 2 + offsets[:, :, None, 1] ** 2 <= radius**2


def _centroid(weights: np.ndarray) -> np.ndarray:
    """Centre of mass (x, y) on the torus of [T, 64, 64] weights: circular mean first, then exact around it."""
    pixel = np.arange(PICTURE) + 0.5
    marginals = np.stack([weights.sum(1), weights.sum(2)], 1).astype(np.float64)  # [T, 2, 64]
    turns = np.exp(2j * np.pi * pixel / PICTURE)
    centre = np.angle(marginals @ turns) / (2 * np.pi) * PICTURE
    offsets = torus(pixel - centre[..., None])
    shift = (marginals * offsets).sum(-1) / np.maximum(marginals.sum(-1), 1e-6)
    return (centre + shift) % PICTURE


def _aligned(share: np.ndarray, centroid: np.ndarray) -> np.ndarray:
    """Coverage resampled bilinearly so that the centroid falls on the centre of a [T, 31, 31] patch."""
    corner = centroid - 0.5
    base = np.floor(corner).astype(np.int64)
    fx, fy = (corner - base)[:, 0, None, None], (corner - base)[:, 1, None, None]
    cells = (base[:, None, :] + np.arange(-_HALF, _HALF + 2)[None, :, None]) % PICTURE
    patch = share[np.arange(len(share))[:, None, None], cells[:, :, None, 1], cells[:, None, :, 0]]
    patch = patch[:, :-1] * (1 - fy) + patch[:, 1:] * fy
    return patch[:, :, :-1] * (1 - fx) + patch[:, :, 1:] * fx


# Attributes of single frames ------------------------------------------------------------------------------------------


@functools.cache
def _templates() -> np.ndarray:
    """Coverage templates [shape, radius, 31 * 31], softened as the half-pixel resampling softens what they meet."""
    at = np.arange(-_HALF, _HALF + 1, dtype=np.float32)
    shots = [
        np.mean([coverage(shape, r, at[None, :] + dx, at[:, None] + dy) for dx in (-0.3, 0.3) for dy in (-0.3, 0.3)], 0)
        for shape in SHAPES
        for r in _RADII
    ]
    return np.stack(shots).reshape(len(SHAPES), len(_RADII), -1)


@functools.cache
def _unit_area(shape: str) -> float:
    """Area of the shape in the unit circle."""
    at = np.arange(-_HALF, _HALF + 1, dtype=np.float32)
    return float(coverage(shape, 12.0, at[None, :], at[:, None]).sum()) / 144.0


def _read_form(patches: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Overlap with each shape at its best radius [T, 4], and area in square pixels [T]."""
    templates = _templates()
    flat = patches.reshape(len(patches), 1, -1)
    overlap = np.zeros((len(patches), len(SHAPES)))
    for i in range(len(SHAPES)):
        both = np.minimum(flat, templates[i]).sum(-1)
        overlap[:, i] = (both / np.maximum(np.maximum(flat, templates[i]).sum(-1), 1e-6)).max(-1)
    return overlap * seen[:, None], flat[:, 0].sum(-1)


def _size_of(shape: str | None, area: float) -> str | None:
    """Size by area, given the shape: the nearer on a logarithmic scale; None beyond a factor 2 of both."""
    if shape is None or area <= 0:
        return None
    gaps = {size: abs(math.log(area / (_unit_area(shape) * r * r))) for size, r in SIZES.items()}
    best = min(gaps, key=gaps.get)
    return best if gaps[best] < math.log(2.0) else None


def background_distances(rows: np.ndarray) -> np.ndarray:
    """Mean RGB distance of each frame's rows [T, 64, 3] to every background: [T, 6]."""
    palette = np.rint([background_rows(name) for name in BACKGROUNDS])
    return np.sqrt(((rows[:, None] - palette) ** 2).sum(-1)).mean(-1)


def colour_distances(colours: np.ndarray) -> np.ndarray:
    """RGB distance of sprite colours [T, 3] to every palette colour: [T, 6], nan where no sprite is seen."""
    return np.sqrt(((colours[:, None] - np.array(list(COLOURS.values()), float)) ** 2).sum(-1))


def _nearest(distances: np.ndarray, names: Sequence[str], limit: float) -> list[str | None]:
    """Name of the least distance of each row, or None beyond the limit."""
    distances = np.where(np.isnan(distances), np.inf, distances)
    best = distances.argmin(-1)
    return [names[b] if row[b] <= limit else None for b, row in zip(best, distances, strict=True)]


# Motion ---------------------------------------------------------------------------------------------------------------


def _bounce_residual(axis: np.ndarray) -> np.ndarray:
    """Distance of one axis [W, N] from its best bounce at one place: [W, N]; at most one reflection in the window."""
    count = axis.shape[1]
    times = np.arange(count)
    turns = np.arange(0, count, 0.5)[:, None]  # reflections at half frames too; turn 0 is the way back alone
    paths = SPEED * np.concatenate([turns - np.abs(times - turns), np.abs(times - turns) - turns])  # [C, N]
    gaps = axis[:, None] - paths
    gaps = gaps - np.median(gaps, axis=-1, keepdims=True)
    best = np.abs(gaps).mean(-1).argmin(-1)
    return gaps[np.arange(len(axis)), best]


def _orbit_residual(path: np.ndarray) -> np.ndarray:
    """Vectors [W, N, 2] from the best orbit: its phase is free, its centre within 3 pixels of the picture's."""
    turn = 2 * np.pi / ORBIT_FRAMES * np.arange(path.shape[1])
    from_centre = (path - PICTURE / 2) @ np.array([1, 1j])
    phase = np.angle((from_centre * np.exp(-1j * turn)).sum(-1, keepdims=True))
    gaps = from_centre - ORBIT_RADIUS * np.exp(1j * (turn + phase))
    gaps = np.stack([gaps.real, gaps.imag], -1)
    return gaps - np.clip(np.median(gaps, axis=1, keepdims=True), -3.0, 3.0)


def motion_errors(windows: Float[np.ndarray, "w n 2"]) -> Float[np.ndarray, "w 7"]:
    """Mean distance in pixels of centroid windows from the best path of each motion, in the order of `MOTIONS`.

    Args:
      windows: [W, N, 2] positions (x, y) on the torus, N <= about 40 frames: one reflection an axis at most.
    """
    steps = torus(np.diff(windows, axis=1))
    # Unwrapped from the window's own start, which lies in the picture: an orbit is at home there.
    path = windows[:, :1] + np.concatenate([np.zeros_like(windows[:, :1]), np.cumsum(steps, axis=1)], axis=1)
    times = np.arange(path.shape[1])[:, None]
    errors = []
    for motion in MOTIONS:
        if motion == "bounces":
            gaps = np.stack([_bounce_residual(path[..., 0]), _bounce_residual(path[..., 1])], -1)
        elif motion == "orbits":
            gaps = _orbit_residual(path)
        else:
            gaps = path - SPEED * np.array(DRIFTS.get(motion, (0, 0))) * times
            gaps = gaps - np.median(gaps, axis=1, keepdims=True)
        # Limited, so that one misread frame does not outweigh fifteen good ones.
        errors.append(np.minimum(np.sqrt((gaps**2).sum(-1)), 6.0).mean(-1))
    return np.stack(errors, -1)


def _filled(track: np.ndarray) -> np.ndarray | None:
    """The track with gaps interpolated the short way round the torus; None if over 40 % of it is missing."""
    seen = np.flatnonzero(~np.isnan(track[:, 0]))
    if len(track) < MIN_MOTION_FRAMES or len(seen) < 0.6 * len(track):
        return None
    path = track[seen[0]] + np.concatenate([np.zeros((1, 2)), np.cumsum(torus(np.diff(track[seen], axis=0)), axis=0)])
    return np.stack([np.interp(np.arange(len(track)), seen, path[:, i]) for i in (0, 1)], -1) % PICTURE


def _read_motion(track: np.ndarray) -> tuple[str | None, list[str | None]]:
    """Motion of the whole track [T, 2], and for each frame that of the window that starts there (or ends the clip)."""
    filled = _filled(track)
    if filled is None:
        return None, [None] * len(track)
    width = min(MOTION_WINDOW, len(track))
    windows = np.lib.stride_tricks.sliding_window_view(filled, width, axis=0).transpose(0, 2, 1)
    errors = motion_errors(windows)
    each = _nearest(errors, MOTIONS, MAX_TRACK_ERROR)
    return _nearest(errors.mean(0, keepdims=True), MOTIONS, MAX_TRACK_ERROR)[0], each + [each[-1]] * (width - 1)


# Reading a clip -------------------------------------------------------------------------------------------------------


def vote(values: Sequence[str | None]) -> list[str | None]:
    """Running vote over `VOTE` frames, centred; a tie keeps the frame's own value."""
    voted = []
    for t, own in enumerate(values):
        near = values[max(0, t - VOTE // 2) : t + VOTE // 2 + 1]
        voted.append(max([own, *near], key=near.count))
    return voted


def read(frames: np.ndarray) -> Reading:
    """Reads the attributes of the sprites world off frames.

    Args:
      frames: uint8 [T, 64, 64, 3], 16 a second, of one prompt; typically the last second. Motion is read over windows
        of 16 frames, and a longer clip averages over all of its windows. For a clip with a switch use the per-frame
        values, or read the parts.
    """
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != (PICTURE, PICTURE, 3) or not len(frames):
        raise UserError(f"sprite evaluator: frames {frames.dtype} {frames.shape}; give uint8 [T, 64, 64, 3], T >= 1")
    parts = []
    for first in range(0, len(frames), 64):  # four minutes at once would take gigabytes
        rows, colours, track, patches = _segment(frames[first : first + 64].astype(np.float32))
        parts.append((rows, colours, track, *_read_form(patches, ~np.isnan(track[:, 0]))))
    rows, colours, track, overlap, area = (np.concatenate(part) for part in zip(*parts, strict=True))
    seen = ~np.isnan(track[:, 0])
    mostly = seen.mean() >= 0.5

    places, tints = background_distances(rows), colour_distances(colours)
    place = places.mean(0)
    tint = tints[seen].mean(0) if mostly else np.full(len(COLOURS), np.nan)
    form = overlap[seen].mean(0) if mostly else np.zeros(len(SHAPES))
    shapes = _nearest(-overlap, SHAPES, -MIN_OVERLAP)
    shape = _nearest(-form[None], SHAPES, -MIN_OVERLAP)[0]
    motion, motions = _read_motion(track)
    background = _nearest(place[None], tuple(BACKGROUNDS), MAX_BACKGROUND_ERROR)[0]
    colour = _nearest(tint[None], tuple(COLOURS), MAX_COLOUR_ERROR)[0]
    return Reading(
        background=background,
        colour=colour,
        shape=shape,
        size=_size_of(shape, float(np.median(area[seen]))) if mostly else None,
        motion=motion,
        background_error=float(place.min()) if background else math.nan,
        sprite_error=float(tint.min()) if colour else math.nan,
        track=track,
        frames={
            "background": _nearest(places, tuple(BACKGROUNDS), MAX_BACKGROUND_ERROR),
            "colour": _nearest(tints, tuple(COLOURS), MAX_COLOUR_ERROR),
            "shape": shapes,
            "size": [_size_of(s, float(a)) for s, a in zip(shapes, area, strict=True)],
            "motion": motions,
        },
        background_rgb=rows,
        sprite_rgb=colours,
    )
