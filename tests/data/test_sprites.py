"""The sprites world: split, drawing, motion, schedules, prompts and the grain source."""

import re
import zlib

import grain
import numpy as np
import pytest

from longlive_jax.data.sprite_prompts import all_prompts, canonical, matches, paraphrase, parse
from longlive_jax.data.sprite_source import SpriteSource, clip_combination, make_clip
from longlive_jax.data.sprites import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    SHAPES,
    SIZES,
    Combination,
    MotionState,
    all_combinations,
    background_rows,
    combinations_of,
    is_test,
    motion_track,
    random_start,
    render,
    render_crowd,
    render_schedule,
)
from longlive_jax.errors import UserError


def combination(**changes: str) -> Combination:
    base = {"background": "night", "colour": "red", "shape": "circle", "size": "small", "motion": "still"}
    return Combination(**(base | changes))


def values(c: Combination) -> dict[str, str]:
    return {attribute: getattr(c, attribute) for attribute in ATTRIBUTES}


def sprite_mask(frames: np.ndarray, c: Combination) -> np.ndarray:
    return (frames != np.rint(background_rows(c.background)).astype(np.uint8)[:, None]).any(-1)


# Combinations and split


def test_split_is_the_crc_rule():
    assert len(set(all_combinations())) == 2016
    for c in all_combinations()[::37]:
        name = f"{c.background}|{c.colour}|{c.shape}|{c.size}|{c.motion}"
        assert is_test(c) == (zlib.crc32(name.encode()) % 10 == 0)
    train, test = set(combinations_of("train")), set(combinations_of("test"))
    assert not train & test and len(train) + len(test) == 2016
    assert len(test) == 202


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_unknown_value_names_the_choices(attribute):
    with pytest.raises(UserError, match=f"{attribute} 'plaid' does not exist; choose one of"):
        combination(**{attribute: "plaid"})


def test_unknown_split():
    with pytest.raises(UserError, match="choose train or test"):
        combinations_of("validation")


# Drawing


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_background_is_the_exact_gradient(background):
    frame = render(combination(background=background), 1, np.random.default_rng(0), start=MotionState(32.0, 32.0))[0]
    top, bottom = BACKGROUNDS[background]
    assert (frame[0] == top).all() and (frame[-1] == bottom).all()
    expected = np.asarray(top) + (np.asarray(bottom) - np.asarray(top)) * np.arange(64)[:, None] / 63
    assert np.abs(frame[:, 0] - expected).max() <= 0.5 + 1e-4


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
def test_sprite_colour_is_exact_and_inside_its_circle(shape, size):
    for colour, rgb in COLOURS.items():
        c = combination(shape=shape, size=size, colour=colour)
        frame = render(c, 1, np.random.default_rng(0), start=MotionState(32.3, 31.6))[0]
        y, x = np.mgrid[:64, :64] + 0.5
        away = np.hypot(x - 32.3, y - 31.6)
        assert (frame[away < 0.35 * c.radius] == rgb).all()
        assert not sprite_mask(frame[None], c)[0][away > c.radius + 1.5].any()


@pytest.mark.parametrize(
    ("shape", "unit_area"), [("circle", np.pi), ("square", 2.0), ("triangle", 1.299), ("star", 10 * 0.45 * 0.5 * 0.588)]
)
def test_area_is_that_of_the_inscribed_shape(shape, unit_area):
    for size, radius in SIZES.items():
        c = combination(shape=shape, size=size)
        frame = render(c, 1, np.random.default_rng(0), start=MotionState(31.7, 32.2))[0].astype(float)
        rows = background_rows(c.background)[:, None]
        share = ((frame - rows)[..., 0] / (COLOURS["red"][0] - rows)[..., 0]).sum()
        assert share == pytest.approx(unit_area * radius**2, rel=0.03)


def test_triangle_points_up():
    c = combination(shape="triangle", size="large")
    mask = sprite_mask(render(c, 1, np.random.default_rng(0), start=MotionState(32.0, 32.0)), c)[0]
    widths = mask.sum(1)[mask.any(1)]
    assert widths[0] <= 3 and widths[-1] >= 20
    assert np.flatnonzero(mask.any(1))[0] == 20


def test_a_sprite_at_the_edge_is_drawn_on_the_torus():
    c = combination(shape="star", size="large")
    rng = np.random.default_rng(0)
    middle = render(c, 1, rng, start=MotionState(32.25, 32.5))
    corner = render(c, 1, rng, start=MotionState(0.25, 0.5))
    assert np.array_equal(np.roll(sprite_mask(middle, c), (-32, -32), (1, 2)), sprite_mask(corner, c))


# Motion


def path(c: Combination, frames: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return motion_track(c, random_start(c, rng), np.arange(float(frames)), rng)[0]


@pytest.mark.parametrize(
    ("motion", "step"),
    [("still", (0, 0)), ("left", (-0.75, 0)), ("right", (0.75, 0)), ("up", (0, -0.75)), ("down", (0, 0.75))],
)
def test_drifts_move_by_three_quarters_of_a_pixel(motion, step):
    assert np.allclose(np.diff(path(combination(motion=motion), 100), axis=0), step)


@pytest.mark.parametrize("size", SIZES)
def test_bounce_stays_inside_and_reflects(size):
    c = combination(motion="bounces", size=size)
    for seed in range(20):
        track = path(c, 400, seed)
        assert track.min() >= c.radius - 1e-9 and track.max() <= 64 - c.radius + 1e-9
        steps = np.abs(np.diff(track, axis=0))
        assert steps.max() <= 0.75 + 1e-9 and np.median(steps) == pytest.approx(0.75)
        assert np.ptp(track, axis=0).min() > 64 - 2 * c.radius - 1.5  # it crosses the whole room on both axes


def test_orbit_has_its_radius_period_and_sense():
    track = path(combination(motion="orbits", size="large"), 65)
    from_centre = track - 32
    assert np.allclose(np.hypot(*from_centre.T), 16)
    assert np.allclose(track[0], track[64]) and not np.allclose(track[0], track[32])
    # With y downwards a growing angle is clockwise to the eye.
    cross = from_centre[:-1, 0] * from_centre[1:, 1] - from_centre[:-1, 1] * from_centre[1:, 0]
    assert (cross > 0).all()


def test_starts_differ_and_frames_are_deterministic():
    c = combination(motion="bounces", shape="star")
    a, b, other = (render(c, 8, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(a, b) and not np.array_equal(a, other)
    assert a.shape == (8, 64, 64, 3) and a.dtype == np.uint8


# Schedules


def test_schedule_with_one_motion_is_the_same_path_in_other_colours():
    red, blue = combination(motion="bounces"), combination(motion="bounces", colour="blue")
    plain = render(red, 120, np.random.default_rng(5))
    switched = render_schedule([(0, red), (50, blue), (90, red)], 120, np.random.default_rng(5))
    assert np.array_equal(plain[:50], switched[:50]) and np.array_equal(plain[90:], switched[90:])
    # But for a faint edge pixel that rounds to the background in one colour and not in the other.
    apart = sprite_mask(plain, red) != sprite_mask(switched, blue)
    assert apart.sum((1, 2)).max() <= 4
    assert not np.array_equal(plain[50:90], switched[50:90])


@pytest.mark.parametrize("first", MOTIONS)
@pytest.mark.parametrize("second", MOTIONS)
def test_positions_continue_over_a_switch_and_reach_the_new_motion(first, second):
    before, after = combination(motion=first, size="small"), combination(motion=second, size="large")
    for seed in range(5):
        rng = np.random.default_rng(seed)
        start, state = motion_track(before, random_start(before, rng), np.arange(60.0), rng)
        track, _ = motion_track(after, state, np.arange(0.0, 120.0), rng)
        assert np.allclose((track[0] - start[-1] + 32) % 64, 32)
        # The fastest is the spiral from a corner onto the orbit: 45 px away, a 64th of a turn a frame.
        assert np.hypot(*np.diff(track, axis=0).T).max() < 4.8
        if second == "orbits":
            assert np.allclose(np.hypot(*(track[30:] - 32).T), 16)
        if second == "bounces":
            assert track[20:].min() >= 12 - 1e-9 and track[20:].max() <= 52 + 1e-9


@pytest.mark.parametrize("starts", [[], [1], [0, 5, 5], [0, 8, 4]])
def test_bad_schedules(starts):
    with pytest.raises(UserError, match="must start at 0 and grow"):
        render_schedule([(s, combination()) for s in starts], 10, np.random.default_rng(0))


def test_no_frames():
    with pytest.raises(UserError, match="ask for 1 or more"):
        render(combination(), 0, np.random.default_rng(0))


# Prompts


def test_canonical_is_the_specs_sentence():
    c = Combination("snow", "orange", "star", "large", "orbits")
    assert canonical(c) == "a large orange star moves in circles over a field of snow"
    c = Combination("night", "red", "circle", "small", "left")
    assert canonical(c) == "a small red circle drifts left over a night sky"


def test_canonical_reads_back():
    prompts = [canonical(c) for c in all_combinations()]
    assert len(set(prompts)) == 2016
    assert all(parse(p) == values(c) for p, c in zip(prompts, all_combinations(), strict=True))


def test_paraphrases_read_back_as_what_they_state():
    rng = np.random.default_rng(0)
    prompts, partial = set(), 0
    for i in range(4000):
        c = all_combinations()[(i * 5) % 2016]
        prompt, stated = paraphrase(c, rng)
        assert parse(prompt) == {a: v for a, v in values(c).items() if a in stated}, prompt
        assert stated and matches(c, parse(prompt))
        assert not re.search(r"\ba [aeiou]|[{}]|  |,,", prompt), prompt
        prompts.add(prompt)
        partial += len(stated) < 5
    assert len(prompts) > 3500
    assert 0.15 < partial / 4000 < 0.35


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        ("A GIANT red ball is bouncing across the ocean!", ("ocean", "red", "circle", "large", "bounces")),
        ("blue ocean", ("ocean", None, None, None, None)),
        ("it circles around a green, grassy meadow", ("meadow", None, None, None, "orbits")),
        ("tiny violet disks, not moving", (None, "purple", "circle", "small", "still")),
        ("", (None,) * 5),
        ("the quick fox 北 \x00", (None,) * 5),
    ],
)
def test_parse_takes_free_text(text, stated):
    expected = {a: v for a, v in zip(ATTRIBUTES, stated, strict=True) if v is not None}
    assert parse(text) == expected


def test_prompts_to_train_a_tokenizer_on():
    prompts = list(all_prompts(1))
    assert len(prompts) == 2 * 2016
    assert len({w for p in prompts for w in re.findall(r"[\w-]+", p)}) < 200


# Source


def test_clips_are_deterministic_and_of_their_split():
    clips = [make_clip(3, i, 4) for i in range(200)]
    again = make_clip(3, 17, 4)
    assert again["prompt"] == clips[17]["prompt"] and np.array_equal(again["frames"], clips[17]["frames"])
    assert not np.array_equal(make_clip(4, 17, 4)["frames"], clips[17]["frames"])
    shown = [clip_combination(3, i, "train") for i in range(200)]
    assert not any(map(is_test, shown))
    assert all(matches(c, parse(clip["prompt"])) for c, clip in zip(shown, clips, strict=True))
    plain = sum(clip["prompt"] == canonical(c) for c, clip in zip(shown, clips, strict=True))
    assert 70 < plain < 130
    held_out = [clip_combination(3, i, "test") for i in range(50)]
    assert all(map(is_test, held_out))
    assert all(make_clip(3, i, 1, "test")["prompt"] == canonical(c) for i, c in enumerate(held_out))


def test_longer_clips_begin_with_the_shorter():
    assert np.array_equal(make_clip(0, 5, 12)["frames"][:5], make_clip(0, 5, 5)["frames"])


def test_source_feeds_grain():
    source = SpriteSource(num_frames=5, length=32, seed=1)
    batch = grain.MapDataset.source(source).shuffle(seed=0).batch(4)[0]
    assert batch["frames"].shape == (4, 5, 64, 64, 3) and batch["frames"].dtype == np.uint8
    assert len(batch["prompt"]) == 4
    assert len(source) == 32 and source[np.int64(3)]["prompt"] == make_clip(1, 3, 5)["prompt"]
    with pytest.raises(IndexError):
        source[32]


def test_bad_source():
    with pytest.raises(UserError, match="must be 1 or more"):
        SpriteSource(num_frames=0)
    with pytest.raises(UserError, match="choose train or test"):
        SpriteSource(num_frames=4, split="all")
    with pytest.raises(UserError, match="0 or more"):
        make_clip(0, -1, 4)


def test_a_crowd_has_many_sprites_over_one_background():
    frames = render_crowd(3, 6, np.random.default_rng(4))
    assert frames.shape == (3, 64, 64, 3)
    assert np.array_equal(frames, render_crowd(3, 6, np.random.default_rng(4)))
    colours = {tuple(map(int, pixel)) for pixel in frames[0].reshape(-1, 3)} & set(COLOURS.values())
    assert len(colours) >= 3
    backgrounds = [int((frames[0] == np.rint(background_rows(b))[:, None]).all(-1).sum()) for b in BACKGROUNDS]
    assert max(backgrounds) > 64 * 64 / 3 and sorted(backgrounds)[-2] == 0
    assert not np.array_equal(frames[0], frames[1])
