"""The sprites evaluator against rendered truth: clean, blurred, noisy, switched, and garbage."""

import math
import warnings

import numpy as np
import pytest

from longlive_jax.data.sprites import (
    ATTRIBUTES,
    COLOURS,
    MOTIONS,
    Combination,
    MotionState,
    combinations_of,
    draw,
    render,
    render_schedule,
)
from longlive_jax.errors import UserError
from longlive_jax.evaluation.figures import adherence, colour_errors, continuity, switch_latencies
from longlive_jax.evaluation.sprites import read


def degrade(frames: np.ndarray, blur: float, noise: float, rng: np.random.Generator) -> np.ndarray:
    """Three-tap blur with side weight `blur` on both axes, then Gaussian noise; uint8 again."""
    picture = frames.astype(np.float32)
    for axis in (1, 2):
        pads = [(1, 1) if a == axis else (0, 0) for a in range(4)]
        a, b, c = (np.pad(picture, pads, "edge").take(range(o, o + 64), axis) for o in range(3))
        picture = blur * a + (1 - 2 * blur) * b + blur * c
    return np.clip(np.rint(picture + noise * rng.standard_normal(picture.shape)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("blur", "noise"), [(0.0, 0.0), (0.25, 0.0), (0.0, 10.0), (0.2, 8.0)])
def test_reads_every_attribute_of_held_out_clips(blur, noise):
    rng = np.random.default_rng(int(100 * blur + noise))
    pool = combinations_of("test")
    combinations = [pool[i] for i in rng.permutation(len(pool))[:100]]
    # The last second of a clip, as adherence is defined; wrapping sprites are then anywhere.
    readings = [read(degrade(render(c, 40, rng)[-16:], blur, noise, rng)) for c in combinations]
    shares = adherence(readings, combinations)
    assert all(shares[attribute] >= 0.99 for attribute in ATTRIBUTES), shares


@pytest.mark.parametrize("motion", MOTIONS)
@pytest.mark.parametrize("length", [8, 16, 80])
def test_motion_at_other_lengths(motion, length):
    rng = np.random.default_rng(length)
    for shape in ("star", "circle"):
        clip = render(Combination("dusk", "purple", shape, "large", motion), length, rng)
        assert read(degrade(clip, 0.2, 4.0, rng)).motion == motion


@pytest.mark.parametrize("motion", ["still", "left", "up", "bounces", "orbits"])
def test_motion_survives_what_a_model_does_to_it(motion):
    """A speed 15 % off, a trembling position, and one frame without a sprite."""
    rng = np.random.default_rng(1)
    c = Combination("snow", "blue", "square", "small", motion)
    times = np.arange(16)[:, None]
    path = {
        "still": np.array([30.0, 20.0]) + 0 * times,
        "left": np.array([5.0, 20.0]) + times * (-0.64, 0.02),
        "up": np.array([30.0, 4.0]) + times * (0.0, -0.86),
        "bounces": np.concatenate([40 + 0.7 * times, 10 + np.abs(0.7 * times - 3)], 1),
        "orbits": 33.5 + 15 * np.concatenate([np.cos(1 + 0.09 * times), np.sin(1 + 0.09 * times)], 1),
    }[motion]
    clip = draw(c, path + 0.2 * rng.standard_normal(path.shape))
    clip[7] = clip[7, :, :1]
    assert read(clip).motion == motion


def test_track_is_the_centre_on_the_torus():
    c = Combination("night", "yellow", "triangle", "large", "right")
    reading = read(render(c, 40, np.random.default_rng(0), start=MotionState(50.3, 1.6)))
    gap = (reading.track - np.stack([50.3 + 0.75 * np.arange(40), np.full(40, 1.6)], 1) + 32) % 64 - 32
    assert np.abs(gap).max() < 0.3
    assert reading.track.min() >= 0 and reading.track.max() < 64


def test_errors_of_a_clean_clip_are_zero_and_a_shift_is_measured():
    c = Combination("ocean", "green", "circle", "large", "still")
    clip = render(c, 16, np.random.default_rng(0))
    reading = read(clip)
    assert reading.background_error == pytest.approx(0) and reading.sprite_error == pytest.approx(0)
    shifted = read(clip + np.array([12, 0, 0], np.uint8))
    background, sprite = colour_errors(shifted, c)
    assert background.shape == sprite.shape == (16,)
    assert np.allclose(background, 12, atol=0.1) and np.allclose(sprite, 12, atol=0.1)
    assert shifted.background_error == pytest.approx(12, abs=0.1)
    # Against what the prompt asked, not against the nearest: the palette's green is far from its red.
    wrong = colour_errors(reading, {"colour": "red"})
    assert np.allclose(wrong[1], np.linalg.norm(np.subtract(COLOURS["red"], COLOURS["green"])))
    assert np.isnan(wrong[0]).all()


def garbage() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    stripes = np.zeros((16, 64, 64, 3), np.uint8)
    stripes[:, :, ::2] = 255
    return {
        "black": np.zeros((16, 64, 64, 3), np.uint8),
        "white": np.full((16, 64, 64, 3), 255, np.uint8),
        "noise": rng.integers(0, 256, (16, 64, 64, 3), dtype=np.uint8),
        "stripes": stripes,
        "blocks": np.kron(rng.integers(0, 256, (16, 8, 8, 3)), np.ones((1, 8, 8, 1))).astype(np.uint8),
        "one frame": rng.integers(0, 256, (1, 64, 64, 3), dtype=np.uint8),
    }


@pytest.mark.parametrize("kind", garbage())
def test_garbage_is_read_as_nothing(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reading = read(garbage()[kind])
    assert reading.motion is None and reading.shape is None and reading.size is None
    if kind in ("black", "white"):
        assert np.isnan(reading.track).all() and reading.colour is None and math.isnan(reading.sprite_error)


def test_a_sprite_that_vanishes_halfway_is_not_read():
    c = Combination("meadow", "red", "star", "large", "left")
    clip = render(c, 16, np.random.default_rng(0))
    clip[5:] = clip[5:6, :, 40:41] if not (clip[5, :, 40] == COLOURS["red"]).any() else clip[5:6, :, 8:9]
    reading = read(clip)
    assert reading.background == "meadow" and reading.shape is None and reading.motion is None


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((16, 32, 32, 3), np.uint8),
        np.zeros((16, 64, 64, 3), np.float32),
        np.zeros((0, 64, 64, 3), np.uint8),
        np.zeros((64, 64, 3), np.uint8),
    ],
)
def test_wrong_arrays_are_refused(frames):
    with pytest.raises(UserError, match=r"give uint8 \[T, 64, 64, 3\]"):
        read(frames)


def test_adherence_counts_only_what_is_stated():
    c = Combination("night", "red", "circle", "small", "still")
    reading = read(render(c, 16, np.random.default_rng(0)))
    shares = adherence([reading, reading], [c, {"colour": "blue", "shape": "circle"}])
    assert shares["colour"] == 0.5 and shares["shape"] == 1.0 and shares["size"] == 1.0 and shares["all"] == 0.5
    assert math.isnan(adherence([reading], [{"colour": "red"}])["size"])
    with pytest.raises(UserError, match="1 readings for 2 prompts"):
        adherence([reading], [c, c])


# Switches

BEFORE = Combination("night", "red", "circle", "small", "right")


@pytest.mark.parametrize(
    "changes",
    [
        {"colour": "yellow"},
        {"background": "snow", "shape": "star"},
        {"size": "large"},
        {"motion": "up"},
        {"motion": "bounces", "colour": "green"},
    ],
)
def test_a_true_switch_is_quick_and_smooth(changes):
    after = Combination(**(vars(BEFORE) | changes))
    for seed in range(3):
        reading = read(render_schedule([(0, BEFORE), (48, after)], 112, np.random.default_rng(seed)))
        latencies = switch_latencies(reading, 48, BEFORE, after)
        assert latencies.keys() == changes.keys()
        # A bounce that starts in the edge first comes in straight: within half a second it reads as a bounce.
        assert max(latencies.values()) <= 0.5
        smooth = continuity(reading, 48, BEFORE, after)
        assert smooth.kept == {a: True for a in ATTRIBUTES if a not in changes}
        assert smooth.median_jump == pytest.approx(0.75, abs=0.4) and smooth.largest_jump < 1.6


def test_latency_of_a_late_a_relapsing_and_a_missing_switch():
    after = Combination(**(vars(BEFORE) | {"colour": "blue", "motion": "down"}))
    rng = np.random.default_rng(0)
    late = read(render_schedule([(0, BEFORE), (80, after)], 144, rng))
    latencies = switch_latencies(late, 48, BEFORE, after)
    assert latencies["colour"] == pytest.approx(2.0) and latencies["motion"] == pytest.approx(2.0, abs=0.6)
    relapsing = read(render_schedule([(0, BEFORE), (48, after), (60, BEFORE), (70, after)], 144, rng))
    assert switch_latencies(relapsing, 48, BEFORE, after)["colour"] == pytest.approx(22 / 16)
    never = read(render(BEFORE, 144, rng))
    assert switch_latencies(never, 48, BEFORE, after) == {"colour": math.inf, "motion": math.inf}
    # Until the next switch counts, not beyond it.
    back = read(render_schedule([(0, BEFORE), (48, after), (96, BEFORE)], 144, rng))
    assert max(switch_latencies(back, 48, BEFORE, after, until=96).values()) <= 0.5
    assert switch_latencies(back, 48, BEFORE, after)["colour"] == math.inf


def test_a_cut_shows_as_a_jump_and_a_lost_attribute_as_not_kept():
    rng = np.random.default_rng(0)
    after = Combination(**(vars(BEFORE) | {"colour": "blue"}))
    wrong = Combination(**(vars(after) | {"shape": "square"}))
    cut = np.concatenate(
        [render(BEFORE, 48, rng, start=MotionState(10.0, 10.0)), render(wrong, 64, rng, start=MotionState(20.0, 40.0))]
    )
    figures = continuity(read(cut), 48, BEFORE, after)
    assert figures.largest_jump > 20 and figures.median_jump == pytest.approx(0.75, abs=0.05)
    assert not figures.kept["shape"] and figures.kept["size"] and figures.kept["background"]


def test_a_switch_outside_the_clip_is_refused():
    reading = read(render(BEFORE, 40, np.random.default_rng(0)))
    for frame in (0, 25, 40):
        with pytest.raises(UserError, match="16 after it"):
            switch_latencies(reading, frame, BEFORE, BEFORE)
