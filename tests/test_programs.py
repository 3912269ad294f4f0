"""How programs are built: every way gives the same video; and none copies, calls the host, or is compiled again."""

import importlib.util
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.config import ProgramConfig
from longlive_jax.decoding.switch import how_to_recache
from longlive_jax.errors import UserError
from longlive_jax.pipeline import LongLivePipeline

STAR, DISC, SQUARE = "a small red star stays still", "a large blue disc", "a green square over a night sky"
SHORT = [(0, STAR), (2, DISC)]
"""For 2.5 seconds: switches at latent frame 8 of 10, when the window of 6 has lost frames 2 and 3 already."""

WAYS = {
    "layers": ProgramConfig(unroll_layers=True),
    "parts": ProgramConfig(early_frames=True),
    "keys and convolutions": ProgramConfig(split_kv=3, vae_conv="3d"),
}


@pytest.fixture(scope="module")
def plain(tiny_pipeline):
    return tiny_pipeline(SHORT, seconds=2.5, seed=3, decode="blocks")


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_same_video(tiny_checkpoint, plain, way):
    pipe = LongLivePipeline.from_pretrained(tiny_checkpoint, program=WAYS[way])
    other = pipe(SHORT, seconds=2.5, seed=3, decode="blocks")
    np.testing.assert_allclose(other.latents, plain.latents, atol=1e-5)
    assert np.abs(other.frames.astype(int) - plain.frames).max() <= 1


def test_what_is_left_to_the_backend():
    choose = lambda backend, **asked: ProgramConfig(**asked).decided(backend)
    assert choose("cpu") == ProgramConfig(unroll_layers=False, early_frames=False, vae_conv="2d")
    assert choose("gpu") == ProgramConfig(unroll_layers=True, early_frames=True, vae_conv="3d")
    assert choose("gpu", unroll_layers=False, vae_conv="2d", split_kv=2) == ProgramConfig(False, True, 2, "2d")
    for asked, message in (
        ({"vae_conv": "4d"}, "unknown vae_conv value '4d'"),
        ({"split_kv": 0}, "split_kv is 0; 1 or more"),
    ):
        with pytest.raises(UserError, match=message):
            ProgramConfig(**asked)


def test_the_device_is_one_block_ahead(tiny_pipeline, plain):
    stream = tiny_pipeline.stream(SHORT, seconds=2.5, seed=3)
    blocks, begun = zip(*((frames, stream.position) for frames in stream.ahead()))
    np.testing.assert_array_equal(np.concatenate(blocks, axis=1), plain.frames)
    assert begun == (2, 6, 8, 10, 10), "the first at once, then with the next one begun"
    assert stream.applied == [(2.0, (DISC,))] and list(stream.ahead()) == []


def test_a_prompt_set_ahead_waits_for_the_next_block_to_begin(tiny_pipeline):
    stream = tiny_pipeline.stream(STAR, seconds=2.5, seed=3)
    ahead = stream.ahead()
    next(ahead), next(ahead)
    assert stream.set_prompt(DISC) == 1.5
    list(ahead)
    assert stream.applied == [(1.5, (DISC,))]


@pytest.fixture
def compiled():
    """A list that grows with every compilation."""
    events = []

    def listen(event, seconds, **_):
        if "backend_compile" in event:
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("early", [False, True])
def test_nothing_is_compiled_twice(tiny_checkpoint, compiled, early):
    """After the first blocks and the first switch of a full window, other blocks, prompts and videos are ready."""
    pipe = LongLivePipeline.from_pretrained(tiny_checkpoint, program=ProgramConfig(early_frames=early))

    def video(prompts):
        stream = pipe.stream(STAR)
        for text in prompts:
            for _ in range(4):
                next(stream)
            stream.set_prompt(text)
        next(stream)

    video([DISC])
    assert compiled, "or this would test nothing"
    compiled.clear()
    video([SQUARE, STAR])
    assert compiled == []


def test_a_prepared_switch_waits_for_no_compiler(tiny_checkpoint, compiled):
    """Neither early nor in a full window; and what was prepared leaves no trace in the video."""
    pipe = LongLivePipeline.from_pretrained(tiny_checkpoint)

    def video(prepared):
        stream = pipe.stream(STAR, seconds=4, seed=3, context_noise=3.0)  # programs that no other test has
        yield next(stream)
        yield next(stream)
        compiled.clear()
        if prepared:
            stream.prepare_switch()
            assert compiled, "or this would test nothing"
        compiled.clear()
        for text, blocks in ((DISC, 5), (SQUARE, 1)):
            stream.set_prompt(text)
            for _ in range(blocks):
                yield next(stream)

    blocks = list(video(prepared=True))
    assert compiled == []
    for one, other in zip(blocks, video(prepared=False)):
        np.testing.assert_array_equal(one, other)


def test_buffers_are_written_in_place_and_the_host_is_not_called(tiny_pipeline):
    """All that a block's programs hand on lies where they got it, and they run without the host."""
    stream = tiny_pipeline.stream(STAR, seconds=2.5)
    decoder, params, state = stream.decoder, tiny_pipeline.params, stream._state
    embeds, latents = stream._embeds[0], jnp.zeros((1, 2, 4, 4, 4))
    programs = {
        "step": (decoder.step, (params, state), (1,), ()),
        "denoise": (decoder.denoise, (params, state), (1,), ()),
        "finish": (decoder.finish, (params, state), (1,), ()),
        "window": (decoder.switch, (params, state, embeds, 2), (1,), (3,)),
        "pixels": (decoder.pixels, (params, latents, state.vae, False), (), (3,)),
    }
    for name, (function, args, donated, static) in programs.items():
        compiled = jax.jit(function, donate_argnums=donated, static_argnums=static).lower(*args).compile()
        handed_on = () if name == "pixels" else (state.cache.k, state.cache.v, state.recent, state.vae)
        least = sum(leaf.nbytes for leaf in jax.tree.leaves(handed_on))
        assert compiled.memory_analysis().alias_size_in_bytes >= least, name
        calls = re.findall(r'custom_call_target="([^"]*)"', compiled.as_text())
        assert not [c for c in calls if "callback" in c], name
        assert not re.search(r"\b(infeed|outfeed|send|recv)\(", compiled.as_text()), name


def test_the_census_counts_what_runs():
    """Of `experiments/speed/aot.py`, on a program for a CPU."""
    path = Path(__file__).parents[1] / "experiments" / "speed" / "aot.py"
    spec = importlib.util.spec_from_file_location("aot", path)
    aot = importlib.util.module_from_spec(spec)
    sys.modules["aot"] = aot
    spec.loader.exec_module(aot)

    def program(x, w):
        y, _ = jax.lax.scan(lambda y, _: (jnp.tanh(y @ w), None), x, None, length=7)
        return y, jnp.flip(x, 0)

    x, w = jnp.ones((512, 512)), jnp.ones((512, 512))
    count = aot.census(jax.jit(program).lower(x, w).compile().as_text())
    assert count["loops, trips"] == [7] and count["launches"] >= 8
    moved = count["moved, 1 MB or more"]
    assert sum(n for what, n in moved.items() if "reverse" in what and "bytes" not in what) == 1, moved
    assert 7 * 3 * x.nbytes / 1e9 <= count["GB read and written"]["all"] < 0.2
    assert aot.type_bytes("(bf16[2,3]{1,0}, s32[], pred[5])") == 12 + 4 + 5


def test_host_and_device_choose_the_same_recache(tiny_pipeline):
    decoder = tiny_pipeline.stream(STAR, seconds=2.5).decoder
    ways = {p: how_to_recache(decoder.sampler, decoder.window, p) for p in (0, 2, 6, 8, 80)}
    assert ways == {0: 0, 2: 1, 6: 1, 8: 2, 80: 2}
    traced = {p: int(how_to_recache(decoder.sampler, decoder.window, jnp.asarray(p))) for p in ways}
    assert traced == ways
