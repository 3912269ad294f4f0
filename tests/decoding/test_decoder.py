"""The decoder against a slow twin that keeps a list of frames: no ring, no scan, no scratch, no mask."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import nnx
from tiny import TRANSFORMER, by_layer, shaken, structure

from longlive_jax.cache import Window
from longlive_jax.config import SamplerConfig
from longlive_jax.decoding.decoder import Decoder
from longlive_jax.decoding.state import BlockInputs, block_noise
from longlive_jax.models import rope
from longlive_jax.models.attention import attention
from longlive_jax.models.layers import run_layers
from longlive_jax.models.transformer import WanTransformer
from longlive_jax.schedule import few_step_list, sigma_of

CFG = TRANSFORMER
SIZE = dict(height=32, width=48)


@functools.cache
def network(stacked: bool = True):
    """Structure and parameters; the list form has the same numbers as the stacked one."""
    model = WanTransformer(CFG, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)
    params = shaken(nnx.to_pure_dict(params))
    if not stacked:
        graph = structure(lambda: WanTransformer(CFG, stacked=False, rngs=nnx.Rngs(0)))
        params = by_layer(params, CFG.num_layers)
    return graph, params


def make(sampler: SamplerConfig, frames: int, *, stacked: bool = True, dtype: str = "float32"):
    graph, params = network(stacked)
    decoder = Decoder(graph, None, sampler, Window.of(sampler, frames), dtype)
    return decoder, {"transformer": params}


def case(sampler: SamplerConfig, frames: int, switches=(), batch: int = 1, prompts: int = 3):
    """Prompt embeddings, keys and block inputs."""
    blocks = np.arange(frames // sampler.block_frames)
    starts = np.asarray(switches, int)
    inputs = BlockInputs(
        switch=jnp.asarray(np.isin(blocks, starts)), prompt=jnp.asarray((blocks[:, None] >= starts).sum(1), jnp.int32)
    )
    embeds = jax.random.normal(jax.random.key(5), (prompts if len(starts) else 1, batch, 4, CFG.text_dim))
    keys = jnp.stack([jax.random.key(i) for i in range(batch)])
    return embeds, keys, inputs


def by_scan(sampler, frames, switches=(), **options):
    decoder, params = make(sampler, frames, **options)
    embeds, keys, inputs = case(sampler, frames, switches)
    state = jax.jit(decoder.init)(params, embeds[0], keys)
    state, out = jax.jit(decoder.scan)(params, state, inputs, embeds)
    return np.asarray(rearrange(out.latents, "n b f h w c -> b (n f) h w c"))


def by_blocks(sampler, frames, switches=(), **options):
    decoder, params = make(sampler, frames, **options)
    embeds, keys, inputs = case(sampler, frames, switches)
    step, switch = jax.jit(decoder.step, donate_argnums=1), jax.jit(decoder.switch, donate_argnums=1)
    state, latents = decoder.init(params, embeds[0], keys), []
    for i in range(len(inputs.switch)):
        if inputs.switch[i]:
            state = switch(params, state, embeds[inputs.prompt[i]])
        state, out = step(params, state)
        latents.append(out.latents)
    return np.concatenate(latents, axis=1)


class Twin:
    """The reference semantics, written down as they read: lists of frames with their keys and values."""

    def __init__(self, sampler: SamplerConfig, frames: int):
        graph, params = network()
        self.model = nnx.merge(graph, params)
        self.sampler, self.window = sampler, Window.of(sampler, frames)
        self.memory: list[tuple[int, list]] = []  # (absolute position, [(k, v) a layer]), sink first, by age
        self.relative = sampler.rope == "relative"

    def network(self, x, t, text_kv, past, positions):
        x, t = jnp.asarray(x), jnp.asarray(t, jnp.float32)
        flow, stored = self._network(x, t, text_kv, [kv for _, kv in past], jnp.asarray(positions))
        return flow, list(zip(positions, stored))

    @functools.partial(jax.jit, static_argnums=0)
    def _network(self, x, t, text_kv, past, positions):
        """Flow of the frames x, given the past; and their keys and values by frame, as they are to be stored."""
        model, frames = self.model, x.shape[1]
        rows, columns = x.shape[2] // 2, x.shape[3] // 2
        turn = lambda at: rope.rotation(jnp.asarray(at), rows, columns, CFG.head_dim, CFG.rope_theta)
        tokens, e, e6 = model._embed(x, jnp.full(x.shape[:2], t))
        stored, layer_index = [], iter(range(CFG.num_layers))

        def layer(block, tokens, kv):
            i = next(layer_index)

            def attend(q, k, v):
                if self.relative:
                    keys = jnp.concatenate([p[i][0] for p in past] + [k], axis=1)
                    order = list(range(keys.shape[1]))
                    keys, q = rope.rotate(keys, turn(order)), rope.rotate(q, turn(order[-frames:]))
                else:
                    q, k = rope.rotate(q, turn(positions)), rope.rotate(k, turn(positions))
                    keys = jnp.concatenate([p[i][0] for p in past] + [k], axis=1)
                values = jnp.concatenate([p[i][1] for p in past] + [v], axis=1)
                stored.append((k, v))
                flat = lambda a: rearrange(a, "b t n h d -> b (t n) h d")
                return attention(flat(q), flat(keys), flat(values)).reshape(q.shape), None

            return block(tokens, e6, kv, attend)

        as_list = nnx.List([nnx.merge(*self._layer(i)) for i in range(CFG.num_layers)])
        tokens, _ = run_layers(as_list, layer, tokens, text_kv)
        by_frame = [[(k[:, j : j + 1], v[:, j : j + 1]) for k, v in stored] for j in range(frames)]
        return model._unpatchify(model.head(tokens, e), x), by_frame

    def _layer(self, i):
        graph, params = nnx.split(self.model.blocks)
        return graph, jax.tree.map(lambda a: a[i], params)

    def past_of(self, memory, new: int):
        """What `new` frames see of the memory: sink and the newest, so that the window holds all."""
        room = self.window.slots - new
        return (
            memory
            if len(memory) <= room
            else memory[: self.window.sink] + memory[len(memory) - room + self.window.sink :]
        )

    def run(self, embeds, keys, inputs):
        s, f, latents = self.sampler, self.sampler.block_frames, []
        text_kv = self.model.text_kv(embeds[0])
        steps = few_step_list(s)
        sigmas = sigma_of(steps, s.shift)
        for i in range(len(inputs.switch)):
            start = i * f
            if inputs.switch[i]:
                text_kv = self.model.text_kv(embeds[inputs.prompt[i]])
                self.switch(latents, start, text_kv)
            past, positions = self.past_of(self.memory, f), list(range(start, start + f))
            noise = block_noise(keys, jnp.asarray(start), f, len(steps), (4, 6, CFG.in_channels))
            x = noise[0]
            for n, t in enumerate(steps):
                flow, _ = self.network(x, t, text_kv, past, positions)
                x0 = x - float(sigmas[n]) * flow
                if n + 1 < len(steps) and s.solver == "euler":
                    x = x + float(sigmas[n + 1] - sigmas[n]) * flow
                elif n + 1 < len(steps):
                    x = (1 - float(sigmas[n + 1])) * x0 + float(sigmas[n + 1]) * noise[n + 1]
            _, new = self.network(x0, s.context_noise, text_kv, past, positions)
            self.memory = past + new
            latents.append(x0)
        return np.concatenate(latents, axis=1)

    def switch(self, latents, start, text_kv):
        window, s = self.window, self.sampler
        if s.switch == "clear":
            self.memory = []
        if s.switch != "recache" or start == 0:
            return
        made = jnp.concatenate(latents, axis=1)
        keep = s.sink == "keep" and start > window.slots
        first = start - (window.ring if keep else min(window.slots, start))
        past = self.memory[: window.sink] if keep else []
        _, new = self.network(made[:, first:], s.context_noise, text_kv, past, list(range(first, start)))
        self.memory = past + new


SAMPLERS = {
    "default": SamplerConfig(steps=(1000, 500), rope="absolute", **SIZE),
    "blocks-of-1": SamplerConfig(window=4, sink_frames=1, block_frames=1, steps=(1000, 500), rope="absolute", **SIZE),
    "odd-window": SamplerConfig(window=7, sink_frames=2, block_frames=3, steps=(1000, 500), rope="absolute", **SIZE),
    "no-sink": SamplerConfig(window=5, sink_frames=0, block_frames=2, steps=(1000,), rope="absolute", **SIZE),
    "sink-past-block": SamplerConfig(
        window=9, sink_frames=5, block_frames=3, steps=(1000, 500), rope="absolute", **SIZE
    ),  # fmt: skip
    "all-past": SamplerConfig(window=-1, steps=(1000, 250), rope="absolute", **SIZE),
    "smallest": SamplerConfig(window=4, sink_frames=1, block_frames=3, steps=(1000, 250), rope="absolute", **SIZE),
    "relative": SamplerConfig(window=7, sink_frames=2, steps=(1000, 500), rope="relative", **SIZE),
    "context-noise": SamplerConfig(window=6, context_noise=100.0, steps=(1000, 0), rope="absolute", **SIZE),
    "euler": SamplerConfig(window=6, solver="euler", steps=(1000, 500, 100), rope="absolute", **SIZE),
    "unwarped": SamplerConfig(window=6, warp=False, shift=3.0, steps=(999.0, 333.3), rope="absolute", **SIZE),
}
FRAMES = {1: 9, 2: 12, 3: 18}


RARE = ("sink-past-block", "context-noise", "smallest")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in RARE else name for name in SAMPLERS]
)
def test_without_switch_equals_the_twin(name):
    sampler = SAMPLERS[name]
    frames = FRAMES[sampler.block_frames]
    expected = Twin(sampler, frames).run(*case(sampler, frames))
    np.testing.assert_allclose(by_scan(sampler, frames), expected, atol=2e-5)


SWITCHES = [
    ("odd-window", "recache", "keep"),
    ("odd-window", "recache", "refresh"),
    ("odd-window", "keep", "keep"),
    ("odd-window", "clear", "keep"),
    ("relative", "recache", "keep"),
    ("relative", "recache", "refresh"),
    ("no-sink", "recache", "keep"),
    ("blocks-of-1", "recache", "keep"),
]
MORE_SWITCHES = [
    ("relative", "clear", "keep"),
    ("blocks-of-1", "recache", "refresh"),
    ("all-past", "recache", "keep"),
    ("no-sink", "recache", "refresh"),
    ("context-noise", "recache", "keep"),
    ("sink-past-block", "recache", "keep"),
    ("sink-past-block", "clear", "keep"),
]


@pytest.mark.parametrize(
    "name, switch, sink", SWITCHES + [pytest.param(*case, marks=pytest.mark.slow) for case in MORE_SWITCHES]
)
def test_with_switches_equals_the_twin(name, switch, sink):
    sampler = dataclasses.replace(SAMPLERS[name], switch=switch, sink=sink)
    frames = FRAMES[sampler.block_frames]
    # Before the window is full, and after.
    switches = (1, frames // sampler.block_frames - 2)
    expected = Twin(sampler, frames).run(*case(sampler, frames, switches))
    np.testing.assert_allclose(by_scan(sampler, frames, switches), expected, atol=2e-5)


@pytest.mark.parametrize("name", ["default", "relative"])
def test_scan_equals_blocks(name):
    sampler, switches = SAMPLERS[name], (0, 2, 5)
    np.testing.assert_allclose(by_scan(sampler, 18, switches[1:]), by_blocks(sampler, 18, switches[1:]), atol=1e-5)


def test_switch_at_the_start_only_changes_the_text():
    sampler = SAMPLERS["default"]
    decoder, params = make(sampler, 6)
    embeds, keys, inputs = case(sampler, 6, (0,))
    state = decoder.init(params, embeds[0], keys)
    switched, _ = decoder.step(params, decoder.switch(params, state, embeds[1]))
    fresh, _ = decoder.step(params, decoder.init(params, embeds[1], keys))
    np.testing.assert_allclose(switched.recent, fresh.recent, atol=1e-6)


@pytest.mark.parametrize("name", ["default", "relative", "odd-window"])
def test_unrolled_layers_equal_scanned_layers(name):
    sampler = SAMPLERS[name]
    unrolled = by_blocks(sampler, 12, (2,), stacked=False)
    np.testing.assert_allclose(unrolled, by_blocks(sampler, 12, (2,)), atol=1e-5)


def test_unrolled_steps_equal_scanned_steps():
    sampler = SAMPLERS["default"]
    decoder, params = make(sampler, 6)
    embeds, keys, _ = case(sampler, 6)
    state = decoder.init(params, embeds[0], keys)
    _, scanned = decoder.step(params, state)
    _, unrolled = dataclasses.replace(decoder, unroll=True).step(params, state)
    np.testing.assert_allclose(unrolled.latents, scanned.latents, atol=1e-5)


def test_noise_depends_on_seed_and_place_alone():
    keys = jnp.stack([jax.random.key(i) for i in range(3)])
    together = block_noise(keys, jnp.asarray(6), 3, 2, (4, 6, 4))
    alone = block_noise(keys[1:2], jnp.asarray(6), 3, 2, (4, 6, 4))
    by_one = [block_noise(keys, jnp.asarray(6 + i), 1, 2, (4, 6, 4)) for i in range(3)]
    np.testing.assert_array_equal(together[:, 1:2], alone)
    np.testing.assert_array_equal(together, np.concatenate(by_one, axis=2))
    assert len(np.unique(np.asarray(together))) == together.size


def test_state_does_not_grow():
    sampler = SAMPLERS["default"]
    decoder, params = make(sampler, 3000)
    embeds, keys, _ = case(sampler, 6)
    before = decoder.init(params, embeds[0], keys)
    after = before
    for _ in range(6):
        after, _ = decoder.step(params, after)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, before)
    assert int(after.position) == 18


def test_bfloat16_stays_near_float32():
    sampler = SAMPLERS["default"]
    exact, rough = by_scan(sampler, 6), by_scan(sampler, 6, dtype="bfloat16")
    error = np.sqrt(np.mean((exact - rough) ** 2) / np.mean(exact**2))
    assert 1e-4 < error < 0.1, error
