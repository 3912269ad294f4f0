"""Prompts in, video out: what a video depends on and what it must not depend on, and every setting's effect."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longlive_jax.cache import Window
from longlive_jax.config import ProgramConfig, SamplerConfig, replace
from longlive_jax.decoding.decoder import Decoder, to_uint8
from longlive_jax.decoding.state import block_noise
from longlive_jax.errors import UserError
from longlive_jax.pipeline import LongLivePipeline
from longlive_jax.prompts import Schedule
from longlive_jax.video import read_video

STAR, DISC, SQUARE = "a small red star stays still", "a large blue disc", "a green square over a night sky"
SECONDS = 5
"""Of the videos of most tests: 20 latent frames, 10 blocks, 77 pixel frames; the window is full after 3 blocks."""

TIMELINE = [(0, STAR), (2.5, DISC)]
"""Switches at latent frame 10, the start of block 5; there 37 pixel frames are made."""

SHORT = [(0, STAR), (2, DISC)]
"""For 2.5 seconds: switches at latent frame 8 of 10, when the window has lost frames 2 and 3 already."""


class QuickDecoder(Decoder):
    """Shows the latents' first three channels instead of decoding them: no VAE to compile."""

    def pixels(self, params, latents, cache, first):
        pictures = jnp.repeat(jnp.repeat(jnp.repeat(latents[..., :3], 4, axis=1), 8, axis=2), 8, axis=3)
        return (jnp.clip(pictures, -1, 1) * 127 + 128).astype(jnp.uint8), cache

    def _vae_cache(self, params, batch):
        return None


class QuickPipeline(LongLivePipeline):
    """For tests that are about the latents."""

    def decoder(self, sampler, num_frames):
        decoder = super().decoder(sampler, num_frames)
        return QuickDecoder(**{f.name: getattr(decoder, f.name) for f in dataclasses.fields(decoder)})


@pytest.fixture(scope="module")
def quick(tiny_checkpoint):
    return QuickPipeline.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="module")
def video(tiny_pipeline):
    """The video that others are compared with."""
    return tiny_pipeline(TIMELINE, seconds=SECONDS, seed=7)


def levels(a, b) -> int:
    """The largest difference between pictures, in levels of 255."""
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b.astype(int)).max())


def changed_frames(a, b) -> list[int]:
    """Latent frames that differ."""
    return np.flatnonzero(np.abs(a - b).max(axis=(0, 2, 3, 4)) > 1e-4).tolist()


def all_blocks(stream):
    """Frames and latents of a stream's remaining blocks."""
    blocks = [(frames, stream.latents) for frames in stream]
    return tuple(np.concatenate(parts, axis=1) for parts in zip(*blocks))


# The video


def test_shapes_and_plan(video):
    assert video.frames.shape == (1, 77, 32, 32, 3) and video.frames.dtype == np.uint8
    assert video.latents.shape == (1, 20, 4, 4, 4) and video.latents.dtype == np.float32
    assert video.plans[0].prompts == (STAR, DISC) and video.plans[0].switch_blocks == (5,)
    assert video.plans[0].asked_seconds == video.plans[0].applied_seconds == (2.5,)
    assert video.seeds == (7,)
    assert video.frames.std() > 20, "the random VAE shows something"


def test_block_by_block_equals_the_scan(tiny_pipeline, video):
    blocks = tiny_pipeline(TIMELINE, seconds=SECONDS, seed=7, decode="blocks")
    np.testing.assert_allclose(blocks.latents, video.latents, atol=1e-5)
    assert levels(blocks.frames, video.frames) <= 1


def test_frames_are_the_latents_decoded_at_once(tiny_pipeline, video):
    vae = nnx.merge(tiny_pipeline._vae, tiny_pipeline.params["vae"])
    whole, _ = jax.jit(lambda z: vae.decode(z))(video.latents)
    assert levels(video.frames, np.asarray(to_uint8(whole))) <= 1


def test_blocks_arrive_one_by_one(tiny_pipeline):
    stream = tiny_pipeline.stream(STAR, seconds=1.5)
    assert stream.num_blocks == 3
    lengths, positions = zip(*((frames.shape[1], stream.position) for frames in stream))
    assert (lengths, positions) == ((5, 8, 8), (2, 4, 6))
    assert list(stream) == []


def test_alone_equals_in_a_batch(tiny_pipeline, video):
    others = [[(0, SQUARE), (2.5, STAR)], TIMELINE]
    batch = tiny_pipeline(others, seconds=SECONDS, seed=[3, 7])
    assert batch.frames.shape[0] == 2 and batch.seeds == (3, 7)
    np.testing.assert_allclose(batch.latents[1:], video.latents, atol=1e-5)
    assert levels(batch.frames[1:], video.frames) <= 1
    assert np.abs(batch.latents[0] - batch.latents[1]).max() > 0.1


def test_noise_is_bit_equal_alone_in_a_batch_and_in_other_blocks():
    draw = jax.jit(block_noise, static_argnums=(2, 3, 4))
    keys = jnp.stack([jax.random.key(seed) for seed in (3, 7, 9)])
    noise = np.asarray(draw(keys, jnp.int32(4), 6, 2, (4, 4, 4)))
    alone = draw(keys[1:2], jnp.int32(6), 2, 3, (4, 4, 4))
    np.testing.assert_array_equal(alone[:2], noise[:, 1:2, 2:4])
    assert noise.std() == pytest.approx(1, abs=0.03)
    assert len(np.unique(noise)) > 0.99 * noise.size, "no two places share their noise"


def test_the_first_part_does_not_know_of_the_switch(tiny_pipeline, video):
    without = tiny_pipeline.stream(STAR, seconds=SECONDS, seed=7)
    frames, latents = all_blocks(without)
    assert changed_frames(latents, video.latents) == list(range(10, 20))
    assert levels(frames[:, :37], video.frames[:, :37]) <= 1
    assert levels(frames[:, 37:], video.frames[:, 37:]) > 10


def test_a_longer_video_starts_the_same(quick):
    short, long = (quick(STAR, seconds=seconds, decode="blocks") for seconds in (2.5, SECONDS))
    np.testing.assert_array_equal(long.latents[:, :10], short.latents)


def test_seeds(quick):
    one, same, other = (quick(STAR, seconds=1.5, seed=seed, decode="blocks").latents for seed in (1, np.int64(1), 2))
    np.testing.assert_array_equal(one, same)
    assert changed_frames(one, other) == list(range(6))
    assert quick.stream(Schedule((STAR,), seed=2), seconds=1.5, seed=1).seeds == (2,), "a schedule's own goes first"
    assert quick.stream([STAR, DISC], seconds=1.5, seed=2).seeds == (2, 2)


@pytest.mark.parametrize(
    ("seed", "message"),
    [
        (-1, "seed is -1; it must be a whole number from 0 to 4294967295"),
        (2**32, "seed is 4294967296; it must be"),
        (1.5, "seed is 1.5; it must be"),
        (True, "seed is True; it must be"),
        ("1", "seed is '1'; it must be"),
        ([1, 2], "2 seeds for 1 videos; give one, or one each"),
    ],
)
def test_seeds_that_are_none(quick, seed, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        quick.stream(STAR, seconds=1, seed=seed)


# Prompts


def test_all_forms_of_a_schedule_mean_the_same(quick):
    pairs = [(0, STAR), (1.25, DISC)]
    timeline = quick(pairs, seconds=2.5)
    for prompts, seconds in (
        (Schedule((STAR, DISC)), 2.5),  # equal parts switch at 1.25 s
        (Schedule((STAR, DISC), (1.25,), seconds=2.5), None),
        ([Schedule((STAR, DISC), (1.25,))], 2.5),
        ([pairs], 2.5),
        ([[0, STAR], [1.25, DISC]], 2.5),
    ):
        same = quick(prompts, seconds=seconds)
        np.testing.assert_array_equal(same.latents, timeline.latents)
        assert same.plans == timeline.plans


def test_a_list_of_texts_is_a_video_each(quick):
    both = quick([STAR, DISC], seconds=1.5, seed=4, decode="blocks")
    for index, text in enumerate((STAR, DISC)):
        alone = quick(text, seconds=1.5, seed=4, decode="blocks")
        np.testing.assert_allclose(both.latents[index : index + 1], alone.latents, atol=1e-5)


def test_five_seconds_by_default(quick):
    assert quick.stream(STAR).num_blocks is None
    assert quick(STAR, decode="blocks").latents.shape[1] == 20
    own = quick(Schedule((STAR,), seconds=1.0), seconds=9, decode="blocks")
    assert own.latents.shape[1] == 4, "a schedule's own length goes first"


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("", "prompt 1 is empty"),
        (" \n", "prompt 1 is empty"),
        ([], "there is no prompt"),
        ([STAR, ""], "prompt 1 is empty"),
        ([3], "a prompt is a text, a Schedule or a timeline, not 3"),
        (None, "a prompt is a text, a Schedule or a timeline, not None"),
        ([(1, STAR)], "the first prompt must start at 0 s"),
        ([(0, STAR), (0.5, DISC), (0.5, STAR)], "switch times must rise"),
        ([(0, STAR), (30, DISC)], "the switch at 30 s (latent frame 120) would take effect after the end"),
        ([TIMELINE, STAR], "the videos of one batch must have one length and switch prompts at the same times"),
        ([Schedule((STAR,), seconds=1), Schedule((STAR,), seconds=2)], "the videos of one batch must have one length"),
    ],
)
def test_prompts_that_are_none(quick, prompts, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        quick(prompts, seconds=SECONDS)


def test_more_prompts_than_blocks(quick):
    with pytest.raises(UserError, match="^3 prompts do not fit into 1 s .* ask for --seconds 1.5 or more"):
        quick(Schedule((STAR, DISC, SQUARE)), seconds=1)


def test_a_prompt_that_is_too_long_is_cut_and_said(tiny_checkpoint, tiny_config):
    notes = []
    pipe = QuickPipeline.from_pretrained(tiny_checkpoint, note=notes.append)
    length = tiny_config.transformer.text_length
    long = " ".join(["red"] * (2 * length))
    embeds = pipe.encode_prompts([long, STAR])
    assert embeds.shape == (2, length, tiny_config.transformer.text_dim)
    assert notes == [f"prompt longer than {length} tokens, cut: {long[:60]}..."]
    cut = pipe.encode_prompts([" ".join(["red"] * (2 * length + 5))])
    np.testing.assert_allclose(cut[0], embeds[0], atol=1e-6)


def test_each_text_is_encoded_once(tiny_checkpoint, monkeypatch):
    pipe = QuickPipeline.from_pretrained(tiny_checkpoint)
    first = pipe.encode_prompts([STAR, STAR, DISC])
    monkeypatch.setattr("longlive_jax.pipeline._encode_text", None)
    np.testing.assert_array_equal(pipe.encode_prompts([DISC, STAR]), first[1:][::-1])


def test_old_prompts_are_forgotten(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr("longlive_jax.pipeline.REMEMBERED_PROMPTS", 2)
    pipe = QuickPipeline.from_pretrained(tiny_checkpoint)
    assert len(pipe.encode_prompts([STAR, DISC, "a third", STAR])) == 4 and list(pipe._embeds) == [DISC, "a third"]


def test_the_text_encoder_stays_on_the_device_or_comes_for_each_prompt(tiny_checkpoint, monkeypatch):
    load = lambda keep=None: QuickPipeline.from_pretrained(
        tiny_checkpoint, program=ProgramConfig(keep_text_encoder=keep)
    )
    on_device = lambda pipe: {isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(pipe._text_params)} == {True}
    pipes = [load(True), load(False)]
    assert [on_device(pipe) for pipe in pipes] == [True, False] and not on_device(load())
    np.testing.assert_array_equal(*(pipe.encode_prompts([STAR]) for pipe in pipes))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(pipes[0]._text_params))
    monkeypatch.setattr("longlive_jax.pipeline.jax.default_backend", lambda: "tpu")
    for free, kept in ((2 * size, True), (2 * size - 1, False), (None, False)):
        monkeypatch.setattr("longlive_jax.memory.available", lambda mesh=None, free=free: free)
        pipes[1].program = ProgramConfig()
        pipes[1]._text_params = pipes[1]._placed_text_encoder(jax.tree.map(np.asarray, pipes[0]._text_params))
        assert on_device(pipes[1]) == kept


@pytest.mark.parametrize("missing", ["text encoder", "tokeniser"])
def test_a_checkpoint_that_cannot_read_prompts(tiny_pipeline, missing):
    params = {**tiny_pipeline.params, "text_encoder": tiny_pipeline._text_params}
    tokenizer = tiny_pipeline._tokenizer
    if missing == "tokeniser":
        tokenizer = None
    else:
        del params["text_encoder"]
    pipe = LongLivePipeline(tiny_pipeline.config, params, tokenizer)
    with pytest.raises(UserError, match=f"^this checkpoint has no {missing}, so it cannot read prompts; convert again"):
        pipe(STAR, seconds=1)


# Streams


def test_a_prompt_set_live_equals_one_planned(tiny_pipeline, video):
    stream = tiny_pipeline.stream(STAR, seconds=SECONDS, seed=7)
    parts = [next(stream) for _ in range(5)]
    assert stream.set_prompt(SQUARE) == 2.5
    assert stream.set_prompt(DISC) == 2.5, "the second replaces the first"
    parts += list(stream)
    assert stream.applied == [(2.5, (DISC,))]
    assert levels(np.concatenate(parts, axis=1), video.frames) <= 1


def test_a_prompt_set_before_the_start(quick):
    stream = quick.stream(STAR, seconds=1.5, seed=1)
    assert stream.set_prompt(DISC) == 0
    _, latents = all_blocks(stream)
    np.testing.assert_array_equal(latents, quick(DISC, seconds=1.5, seed=1, decode="blocks").latents)
    assert stream.applied == [(0.0, (DISC,))]


def test_a_prompt_set_live_goes_before_the_plan(quick):
    stream = quick.stream([(0, STAR), (0.5, DISC)], seconds=1.5)
    next(stream)
    stream.set_prompt(SQUARE)
    list(stream)
    assert stream.applied == [(0.5, (SQUARE,))]


def test_prompts_set_live_for_a_batch(quick):
    stream = quick.stream([STAR, STAR], seconds=1.5, seed=[5, 5])
    next(stream)
    stream.set_prompt([DISC, STAR])
    _, latents = all_blocks(stream)
    alone = quick.stream(STAR, seconds=1.5, seed=5)
    next(alone)
    alone.set_prompt(DISC)
    np.testing.assert_allclose(latents[:1], all_blocks(alone)[1], atol=1e-5)
    assert np.abs(latents[0] - latents[1]).max() > 1e-3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "prompt 1 is empty"),
        ([STAR, DISC], "2 prompts for 1 videos; give one, or one each"),
        ([3], "prompt 1 is not a text but 3"),
    ],
)
def test_a_prompt_that_is_none_changes_nothing(quick, text, message):
    stream = quick.stream(STAR, seconds=1.5)
    next(stream)
    with pytest.raises(UserError, match=f"^{message}"):
        stream.set_prompt(text)
    list(stream)
    assert stream.applied == []


def test_an_endless_stream(quick):
    stream = quick.stream(TIMELINE)
    assert stream.num_blocks is None and stream.sampler.rope == "relative"
    size = lambda: [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(stream._state)]
    before = size()
    for _ in range(24):
        frames = next(stream)
        assert frames.shape[1] == (5 if stream.position == 2 else 8)
    assert stream.position == 48, "eight windows"
    assert stream.applied == [(2.5, (DISC,))]
    stream.set_prompt(SQUARE)
    next(stream)
    assert stream.applied == [(2.5, (DISC,)), (12.0, (SQUARE,))]
    assert size() == before, "the state does not grow"


def test_an_endless_stream_is_the_long_video(quick):
    stream = quick.stream(STAR, seed=3)
    latents = np.concatenate([(next(stream), stream.latents)[1] for _ in range(10)], axis=1)
    long = quick(STAR, seconds=SECONDS, seed=3, rope="relative", decode="blocks")
    np.testing.assert_array_equal(latents, long.latents)


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        (STAR, {"rope": "absolute"}, "an open-ended video does not fit the 1024 temporal positions (256 s); use rope"),
        (STAR, {"window": -1}, "a window of -1 remembers everything, so the video needs a length; give seconds"),
        (Schedule((STAR, DISC)), {}, "prompts in equal parts need a length; give seconds, or the times of the switche"),
    ],
)
def test_what_cannot_be_endless(quick, prompts, settings, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        quick.stream(prompts, **settings)


def test_relative_rope_past_1024_frames_is_said(tiny_checkpoint):
    notes = []
    pipe = QuickPipeline.from_pretrained(tiny_checkpoint, note=notes.append)
    assert pipe.stream(STAR, seconds=256).sampler.rope == "absolute" and notes == []
    assert pipe.stream(STAR, seconds=256.5).sampler.rope == "relative"
    assert notes == ["1026 latent frames are more than absolute RoPE's 1024: using rope=relative"]
    with pytest.raises(UserError, match="^window is 1026; 1024 latent frames have temporal positions"):
        pipe.stream(STAR, seconds=300, window=1026)
    for settings in ({"rope": "absolute"}, {"window": -1}):
        with pytest.raises(UserError, match="^1026 latent frames do not fit the 1024 temporal positions"):
            pipe.stream(STAR, seconds=256.5, **settings)


def test_a_scan_only_from_the_start(quick):
    stream = quick.stream(STAR, seconds=1.5)
    next(stream)
    with pytest.raises(UserError, match="^a scan makes a whole video"):
        stream.scan()
    with pytest.raises(UserError, match="^a scan makes a whole video"):
        quick.stream(STAR).scan()


# Settings

PERTURBED = {
    "height": 48,
    "width": 16,
    "window": 8,
    "sink_frames": 1,
    "block_frames": 3,
    "steps": (1000, 250),
    "warp": False,
    "shift": 3,
    "solver": "euler",
    "context_noise": 200,
    "switch": "keep",
    "sink": "refresh",
    "rope": "relative",
}
"""For every setting a value that is not the tiny model's own."""


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(SamplerConfig)])
def test_every_setting_changes_the_video(quick, name):
    prompts = SHORT if name in ("switch", "sink") else STAR
    usual, other = (quick(prompts, seconds=2.5, **settings) for settings in ({}, {name: PERTURBED[name]}))
    assert other.record["settings"][name] != usual.record["settings"][name]
    if name in ("height", "width"):
        sizes = {"height": 32, "width": 32, name: PERTURBED[name]}
        assert other.frames.shape[2:4] == (sizes["height"], sizes["width"])
    elif name == "block_frames":
        assert other.latents.shape[1] == 9 and changed_frames(other.latents, usual.latents[:, :9])
    else:
        # Frame 2 is the first that reads the cache, frame 6 the first that has lost one, frame 8 that of the switch.
        starts = {"context_noise": 2, "window": 6, "sink_frames": 6, "rope": 6, "switch": 8, "sink": 8}
        assert changed_frames(other.latents, usual.latents)[0] == starts.get(name, 0)


def test_all_policies_differ(quick):
    settings = [
        {"switch": "recache", "sink": "keep"},
        {"switch": "recache", "sink": "refresh"},
        {"switch": "keep"},
        {"switch": "clear"},
    ]
    latents = [quick(SHORT, seconds=2.5, **s).latents for s in settings]
    for i, a in enumerate(latents):
        for b in latents[i + 1 :]:
            assert changed_frames(a, b)[0] == 8, "alike before the switch, different after it"


def test_after_clear_the_past_is_gone(quick):
    """Two videos with different pasts go on alike after a switch that clears the cache."""
    a, b = (quick([(0, text), (2, DISC)], seconds=2.5, switch="clear").latents for text in (STAR, SQUARE))
    assert changed_frames(a, b) == list(range(8))


def test_a_window_of_minus_one_is_a_window_of_the_whole_video(quick):
    all_of_it, large = (quick(STAR, seconds=2.5, window=window).latents for window in (-1, 10))
    np.testing.assert_allclose(all_of_it, large, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"windw": 9}, "unknown setting 'windw'; did you mean 'window'?"),
        ({"sed": 9}, "unknown setting 'sed'; did you mean 'seed'?"),
        ({"window": 3}, "window is 3 latent frames; it must hold the sink and one block, so at least 4"),
        ({"height": 40}, "height 40 is not a multiple of 16 pixels; the nearest that is: 32 or 48"),
        ({"steps": [500, 1000]}, "steps [500.0, 1000.0] must fall"),
        ({"seconds": 0}, "seconds is 0; a length must be a number above 0"),
        ({"seconds": float("nan")}, "seconds is nan; a length must be"),
        ({"seconds": "5"}, "seconds is '5'; a length must be"),
        ({"decode": "fast"}, "decode is 'fast'; 'scan' and 'blocks' are known"),
    ],
)
def test_settings_that_are_refused(quick, settings, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        quick(STAR, **settings)


# Files


def test_save_and_repeat(tiny_pipeline, video, tmp_path):
    paths = video.save(tmp_path / "clip.mp4")
    assert paths == [tmp_path / "clip.mp4"]
    assert read_video(paths[0]).shape == (77, 480, 480, 3), "enlarged 15 times for viewing"
    with pytest.raises(UserError, match="clip.mp4 exists and is kept"):
        video.save(tmp_path / "clip.mp4")
    (tmp_path / "other.json").write_text("dear")
    with pytest.raises(UserError, match="other.json exists and is kept"):
        video.save(tmp_path / "other.mp4")
    assert not (tmp_path / "other.mp4").exists(), "a video without its sidecar"
    assert video.record["checkpoint"]["hash"] == tiny_pipeline.checkpoint_info["hash"]
    assert replace(tiny_pipeline.config.sampler, rope="absolute") == SamplerConfig(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in video.record["settings"].items() if k != "dtype"}
    )


def test_save_a_batch(quick, tmp_path):
    paths = quick([STAR, DISC], seconds=1.5).save(tmp_path / "clip.mp4")
    assert sorted(tmp_path.iterdir()) == sorted(p for path in paths for p in (path, path.with_suffix(".json")))
    assert [p.name for p in paths] == ["clip-0.mp4", "clip-1.mp4"]


def test_bfloat16(tiny_checkpoint, quick):
    half = QuickPipeline.from_pretrained(tiny_checkpoint, dtype="bfloat16")
    latents = half(STAR, seconds=1.5, decode="blocks").latents
    assert latents.dtype == np.float32 and {a.dtype for a in jax.tree.leaves(half.params)} == {jnp.dtype("bfloat16")}
    np.testing.assert_allclose(latents, quick(STAR, seconds=1.5, decode="blocks").latents, atol=0.2)
    assert Window.of(half.config.sampler, 6).slots == 6
