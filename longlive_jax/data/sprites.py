"""The sprites world: 64 x 64 clips of one sprite over one background, drawn by a program at 16 frames a second.

A clip is named by a `Combination` of five attributes; everything about it can be read back off its pixels.

Coordinates are in pixels with y downwards; pixel (row i, column j) covers [j, j+1) x [i, i+1), so the picture spans
[0, 64) on both axes, its centre is (32, 32), and a sprite's position is its centre of mass. Every sprite is drawn on
the torus; a bouncing one never reaches the edge. Anti-aliasing is signed-distance coverage over a one-pixel band, so
pixels half a pixel or more inside the outline have exactly the palette's colour.
"""

import functools
import itertools
import math
import zlib
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

import numpy as np
from jaxtyping import Float, UInt8

from longlive_jax.errors import UserError

PICTURE = 64  # pixels a side
FPS = 16
SPEED = 0.75  # pixels a frame, per moving axis
ORBIT_RADIUS = 16.0  # pixels
ORBIT_FRAMES = 64  # frames a turn
ORBIT_ENTRY_SPEED = 1.5  # pixels a frame towards the orbit, when a schedule switches to it from elsewhere
STAR_INNER = 0.45  # inner over outer radius; the pentagram's 0.38 leaves points thinner than a pixel at radius 7

BACKGROUNDS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "night": ((16, 20, 64), (34, 40, 96)),
    "meadow": ((70, 150, 60), (50, 120, 45)),
    "desert": ((214, 180, 120), (196, 158, 98)),
    "ocean": ((30, 110, 160), (20, 80, 130)),
    "snow": ((235, 240, 245), (215, 222, 232)),
    "dusk": ((150, 80, 120), (90, 50, 100)),
}
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 35, 35),
    "orange": (245, 140, 30),
    "yellow": (245, 220, 40),
    "green": (30, 220, 90),
    "blue": (45, 85, 235),
    "purple": (150, 50, 200),
}
SHAPES = ("circle", "square", "triangle", "star")
SIZES: dict[str, float] = {"small": 7.0, "large": 12.0}  # radius of the enclosing circle, pixels
DRIFTS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
MOTIONS = ("still", *DRIFTS, "bounces", "orbits")

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "background": tuple(BACKGROUNDS),
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "size": tuple(SIZES),
    "motion": MOTIONS,
}


@dataclass(frozen=True)
class Combination:
    """One clip's attributes, each a value of `ATTRIBUTES` (sprites world)."""

    background: str
    colour: str
    shape: str
    size: str
    motion: str

    def __post_init__(self) -> None:
        for field in fields(self):
            value, allowed = getattr(self, field.name), ATTRIBUTES[field.name]
            if value not in allowed:
                choices = ", ".join(allowed)
                raise UserError(f"sprites world: {field.name} {value!r} does not exist; choose one of {choices}")

    @property
    def radius(self) -> float:
        """Radius of the enclosing circle in pixels."""
        return SIZES[self.size]


@dataclass(frozen=True)
class MotionState:
    """Where a sprite is at one frame and which way it heads, so that a clip can go on from there.

    Attributes:
      x, y: position in pixels, on the torus [0, 64).
      direction: signs (x, y) of the velocity; a 0 lets the next motion choose where it needs a sign.
    """

    x: float
    y: float
    direction: tuple[int, int] = (0, 0)


@functools.cache
def all_combinations() -> tuple[Combination, ...]:
    """All 2016 combinations of the sprites world, in a fixed order."""
    return tuple(Combination(*values) for values in itertools.product(*ATTRIBUTES.values()))


def is_test(combination: Combination) -> bool:
    """Whether the combination is held out: crc32 of its "|"-joined values is divisible by 10 (sprites world)."""
    return zlib.crc32("|".join(astuple(combination)).encode()) % 10 == 0


@functools.cache
def combinations_of(split: str) -> tuple[Combination, ...]:
    """The combinations of the split "train" or "test"."""
    if split not in ("train", "test"):
        raise UserError(f"sprites world: split {split!r} does not exist; choose train or test")
    return tuple(c for c in all_combinations() if is_test(c) == (split == "test"))


@functools.cache
def background_rows(background: str) -> Float[np.ndarray, "64 3"]:
    """RGB in [0, 255] of each row of a background, top to bottom, before rounding to whole numbers."""
    top, bottom = (np.asarray(colour, np.float32) for colour in BACKGROUNDS[background])
    rows = top + (bottom - top) * np.linspace(0.0, 1.0, PICTURE, dtype=np.float32)[:, None]
    rows.setflags(write=False)  # cached and shared
    return rows


# Shapes ---------------------------------------------------------------------------------------------------------------


@functools.cache
def _vertices(shape: str) -> np.ndarray | None:
    """Outline of a shape inscribed in the unit circle, [k, 2] (x, y), or None for the circle."""
    if shape == "circle":
        return None
    count = {"square": 4, "triangle": 3, "star": 10}[shape]
    # A square stands on its side; triangle and star have a point straight up (y is downwards, so up is -90 degrees).
    first = -math.pi / 4 if shape == "square" else -math.pi / 2
    angles = first + 2 * math.pi * np.arange(count) / count
    radii = np.where(np.arange(count) % 2 == 1, STAR_INNER, 1.0) if shape == "star" else np.ones(count)
    return (radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], -1)).astype(np.float32)


def coverage(shape: str, radius: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Share of each pixel that a shape covers, in [0, 1].

    Args:
      shape: one of `SHAPES`, inscribed in the enclosing circle.
      radius: radius of the enclosing circle, pixels.
      x, y: float32 offsets of the pixel centres from the sprite's position, pixels; they broadcast.
    """
    outline = _vertices(shape)
    if outline is None:
        return np.clip(radius + 0.5 - np.sqrt(x * x + y * y), 0.0, 1.0)
    squared, inside = None, None
    corners = outline * np.float32(radius)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, 0), strict=True):
        ex, ey = bx - ax, by - ay
        dx, dy = x - ax, y - ay
        along = np.clip((dx * ex + dy * ey) / (ex * ex + ey * ey), 0.0, 1.0)
        distance = (dx - along * ex) ** 2 + (dy - along * ey) ** 2
        # Even-odd rule: the upward ray from the pixel crosses this edge where x lies between its ends.
        crosses = ((x >= ax) != (x >= bx)) & ((dx * ey > dy * ex) == (ex > 0))
        squared = distance if squared is None else np.minimum(squared, distance)
        inside = crosses if inside is None else inside ^ crosses
    distance = np.sqrt(squared)
    return np.clip(0.5 + np.where(inside, distance, -distance), 0.0, 1.0)


# Motion ---------------------------------------------------------------------------------------------------------------


def random_start(combination: Combination, rng: np.random.Generator) -> MotionState:
    """Random start position, direction and phase. Still and bouncing sprites start inside the picture."""
    signs = tuple(int(s) for s in rng.choice((-1, 1), 2))
    if combination.motion == "orbits":
        phase = rng.uniform(0, 2 * math.pi)
        x, y = (PICTURE / 2 + ORBIT_RADIUS * f(phase) for f in (math.cos, math.sin))
    else:
        margin = 0.0 if combination.motion in DRIFTS else combination.radius
        x, y = rng.uniform(margin, PICTURE - margin, 2)
    return MotionState(float(x), float(y), signs)


def _reflected(position: float, sign: int, radius: float, times: np.ndarray) -> tuple[np.ndarray, int]:
    """One axis of a bounce: positions at the times, and the direction at the last of them.

    A sprite that a schedule hands over across the edge first comes in at the same speed; only then it reflects.
    """
    span = PICTURE - 2 * radius
    offset = position - radius
    if not 0 <= offset <= span:
        sign = 1 if offset < 0 else -1
    # Measured along the way the sprite heads, so that both directions are one case.
    way = (offset if sign > 0 else span - offset) + SPEED * times
    folded = np.where(way < 0, way, span - np.abs(span - np.mod(way, 2 * span)))
    heading = 1 if way[-1] < 0 or way[-1] % (2 * span) < span else -1
    return radius + (folded if sign > 0 else span - folded), sign * heading


def motion_track(
    combination: Combination, state: MotionState, times: Float[np.ndarray, " t"], rng: np.random.Generator
) -> tuple[Float[np.ndarray, "t 2"], MotionState]:
    """Positions (x, y) in pixels, not wrapped, at `times` frames after `state`, and the state at the last time.

    A sprite handed over from off the orbit spirals in at `ORBIT_ENTRY_SPEED`, so that positions stay continuous.
    """
    x, y, direction, motion = state.x, state.y, state.direction, combination.motion
    if motion == "bounces":
        signs = [s or int(r) for s, r in zip(direction, rng.choice((-1, 1), 2), strict=True)]
        xs, sx = _reflected(x, signs[0], combination.radius, times)
        ys, sy = _reflected(y, signs[1], combination.radius, times)
        direction = (sx, sy)
    elif motion == "orbits":
        dx, dy = x - PICTURE / 2, y - PICTURE / 2
        away = math.hypot(dx, dy) - ORBIT_RADIUS
        radii = ORBIT_RADIUS + math.copysign(1, away) * np.maximum(abs(away) - ORBIT_ENTRY_SPEED * times, 0.0)
        angles = math.atan2(dy, dx) + 2 * math.pi / ORBIT_FRAMES * times  # with y downwards, growing is clockwise
        xs, ys = PICTURE / 2 + radii * np.cos(angles), PICTURE / 2 + radii * np.sin(angles)
        direction = (int(np.sign(-np.sin(angles[-1]))), int(np.sign(np.cos(angles[-1]))))
    else:
        vx, vy = DRIFTS.get(motion, (0, 0))
        xs, ys = x + SPEED * vx * times, y + SPEED * vy * times
        direction = (vx, vy)
    return np.stack([xs, ys], -1), MotionState(float(xs[-1] % PICTURE), float(ys[-1] % PICTURE), direction)


# Drawing --------------------------------------------------------------------------------------------------------------


def draw(
    combination: Combination, positions: Float[np.ndarray, "t 2"], out: UInt8[np.ndarray, "t 64 64 3"] | None = None
) -> UInt8[np.ndarray, "t 64 64 3"]:
    """Frames of the combination's sprite at the given positions (x, y) in pixels, wrapped on the torus."""
    rows = background_rows(combination.background)
    frames = np.empty((len(positions), PICTURE, PICTURE, 3), np.uint8) if out is None else out
    frames[:] = np.rint(rows).astype(np.uint8)[:, None, :]
    _paint(frames, combination, positions, rows)
    return frames


def _paint(frames: np.ndarray, combination: Combination, positions: np.ndarray, rows: np.ndarray | None = None) -> None:
    """Puts a sprite on frames [t, 64, 64, 3], over the background's `rows` or over what is there."""
    # Only a patch around the sprite is drawn: one pixel more than the enclosing circle on every side.
    half = math.ceil(combination.radius) + 1
    cells = np.floor(positions).astype(np.int64)[:, None, :] + np.arange(-half, half + 1)[None, :, None]
    offsets = (cells + 0.5 - positions[:, None, :]).astype(np.float32)  # [t, patch, 2]
    share = coverage(combination.shape, combination.radius, offsets[:, None, :, 0], offsets[:, :, None, 1])
    columns, lines = cells[..., 0] % PICTURE, cells[..., 1] % PICTURE
    place = np.arange(len(frames))[:, None, None], lines[:, :, None], columns[:, None, :]
    under = frames[place] if rows is None else rows[lines][:, :, None, :]
    patch = under + (np.asarray(COLOURS[combination.colour], np.float32) - under) * share[..., None]
    frames[place] = np.rint(patch)


def render_crowd(num_frames: int, count: int, rng: np.random.Generator) -> UInt8[np.ndarray, "t 64 64 3"]:
    """A clip of `count` sprites of all kinds over one background, each with its own motion, later ones in front.

    Not of the sprites world, but made of its colours and shapes: most pixels of a clip of one sprite are background,
    so a VAE learns shapes several times faster from crowds.
    """
    pool = combinations_of("train")
    crowd = [pool[int(i)] for i in rng.integers(len(pool), size=count)]
    frames = np.empty((num_frames, PICTURE, PICTURE, 3), np.uint8)
    frames[:] = np.rint(background_rows(crowd[0].background)).astype(np.uint8)[:, None, :]
    for combination in crowd:
        start = random_start(combination, rng)
        positions, _ = motion_track(combination, start, np.arange(num_frames), rng)
        _paint(frames, combination, positions)
    return frames


def render_schedule(
    schedule: Sequence[tuple[int, Combination]],
    num_frames: int,
    rng: np.random.Generator,
    *,
    start: MotionState | None = None,
) -> UInt8[np.ndarray, "t 64 64 3"]:
    """The truth of a clip whose prompt switches: attributes change at the given frames, the position goes on.

    Args:
      schedule: (first frame, combination) in growing order, the first at frame 0.
      num_frames: frames to render, 16 a second.
      rng: draws the start where `start` is None, and the side a bounce takes where the last motion leaves it open.
      start: state at frame 0.
    """
    firsts = [first for first, _ in schedule]
    if not firsts or firsts[0] != 0 or any(a >= b for a, b in itertools.pairwise(firsts)):
        raise UserError(f"sprites world: schedule frames {firsts} must start at 0 and grow; sort them and drop doubles")
    if num_frames < 1:
        raise UserError(f"sprites world: cannot render {num_frames} frames; ask for 1 or more")
    frames = np.empty((num_frames, PICTURE, PICTURE, 3), np.uint8)
    state = random_start(schedule[0][1], rng) if start is None else start
    for (first, combination), end in zip(schedule, [*firsts[1:], num_frames], strict=True):
        end = min(end, num_frames)
        if first >= end:
            break
        # The state handed over is that of the frame before, hence one frame on; the clip's own start is frame 0.
        times = np.arange(end - first) + (1.0 if first else 0.0)
        positions, state = motion_track(combination, state, times, rng)
        draw(combination, positions, out=frames[first:end])
    return frames


def render(
    combination: Combination, num_frames: int, rng: np.random.Generator, *, start: MotionState | None = None
) -> UInt8[np.ndarray, "t 64 64 3"]:
    """A clip of one combination (sprites world), 16 frames a second, from a random start position and phase.

    Args:
      combination: what to draw.
      num_frames: frames to render, 1 or more.
      rng: the source of randomness; the same generator state gives the same clip.
      start: state at frame 0 in place of a random one; an orbit spirals in from a start that is off it.
    """
    return render_schedule([(0, combination)], num_frames, rng, start=start)
