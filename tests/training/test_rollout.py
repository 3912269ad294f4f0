"""The rollout, its gradient and its switch against twins and the decoder; and nothing compiled twice."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import nnx
from tiny import TRANSFORMER, shaken
from training_twin import Twin

from longlive_jax.config import SamplerConfig
from longlive_jax.decoding.decoder import Decoder
from longlive_jax.decoding.state import BlockInputs
from longlive_jax.models.transformer import WanTransformer
from longlive_jax.training.config import DistillationConfig, Quirks
from longlive_jax.training.rollout import Rollout
from longlive_jax.training.state import Prompts, RolloutDraws
from longlive_jax.training.straight_through import reading_with_gradient

SAMPLER = SamplerConfig(
    height=16, width=32, window=6, sink_frames=2, block_frames=2, steps=(1000, 500, 250), rope="absolute"
)
CONFIG = DistillationConfig(chunk_frames=8, new_frames=6, max_frames=26)
LATENT = (2, 4, TRANSFORMER.in_channels)
RUN = jax.jit(Rollout.run, static_argnums=0)


@functools.cache
def network():
    graph, params = nnx.split(WanTransformer(TRANSFORMER, rngs=nnx.Rngs(0)))
    return graph, shaken(nnx.to_pure_dict(params))


def make(**quirks) -> Rollout:
    return Rollout(network()[0], SAMPLER, dataclasses.replace(CONFIG, quirks=Quirks(**quirks)))


def prompts_of(switch_frame: int) -> Prompts:
    embeds = jax.random.normal(jax.random.key(5), (2, 1, 4, TRANSFORMER.text_dim))
    return Prompts(embeds=embeds, negative=embeds[0], switch_frame=jnp.asarray(switch_frame))


def draws_of(index: int, exit_step: int) -> RolloutDraws:
    blocks = (CONFIG.new_frames if index else CONFIG.chunk_frames) // SAMPLER.block_frames
    noise = jax.random.normal(jax.random.key(index), (blocks, len(SAMPLER.steps) + 1, 1, 2, *LATENT))
    return RolloutDraws(exit_step=jnp.asarray(exit_step), noise=noise)


def by_rollout(rollout, switch_frame: int, exit_steps):
    """Latents of some chunks, and the last state."""
    state, made = rollout.init(network()[1], 1, *LATENT[:2]), []
    for index, exit_step in enumerate(exit_steps):
        state, tape = RUN(rollout, network()[1], state, prompts_of(switch_frame), draws_of(index, exit_step))
        made.append(rearrange(tape.latents, "n b f h w c -> b (n f) h w c"))
    return np.concatenate(made, axis=1), state


def by_twin(rollout, switch_frame: int, exit_steps):
    twin = Twin(rollout, network()[1], prompts_of(switch_frame).embeds, switch_frame)
    return np.concatenate([twin.chunk(e, draws_of(i, e).noise) for i, e in enumerate(exit_steps)], axis=1)


@pytest.mark.parametrize(
    ("quirks", "switch_frame"),
    [
        ({}, 10),  # within the second chunk
        pytest.param({}, 100, marks=pytest.mark.slow),
        pytest.param({"noisy_context": False}, 8, marks=pytest.mark.slow),
        pytest.param({"sink": "refresh"}, 14, marks=pytest.mark.slow),
        pytest.param({"sink": "zero"}, 4, marks=pytest.mark.slow),
        # All frames so far are within reach: the sink is made again.
        pytest.param({"sink": "zero"}, 8, marks=pytest.mark.slow),
        pytest.param({"sink": "zero"}, 14, marks=pytest.mark.slow),
    ],
)
def test_equals_the_twin(quirks, switch_frame):
    exit_steps = (2, 0, 1)
    rollout = make(**quirks)
    latents, _ = by_rollout(rollout, switch_frame, exit_steps)
    np.testing.assert_allclose(latents, by_twin(rollout, switch_frame, exit_steps), atol=2e-5)


@pytest.mark.parametrize("sink", ["keep", pytest.param("refresh", marks=pytest.mark.slow)])
def test_switch_equals_the_decoders(sink):
    rollout = make(sink=sink, noisy_context=False)
    last = len(SAMPLER.steps) - 1
    latents, state = by_rollout(rollout, 10, (last, last))
    sampler = dataclasses.replace(SAMPLER, sink=sink)
    decoder = Decoder(network()[0], None, sampler, rollout.window)
    noise = jnp.concatenate([draws_of(i, last).noise[:, :-1] for i in range(2)])
    params, prompts = {"transformer": network()[1]}, prompts_of(10)
    start = decoder.init(params, prompts.embeds[0], jax.random.split(jax.random.key(0), 1))
    inputs = BlockInputs.plan(7, [5]).replace(noise=noise)
    _, out = jax.jit(decoder.scan)(params, start, inputs, prompts.embeds)
    np.testing.assert_allclose(latents, rearrange(out.latents, "n b f h w c -> b (n f) h w c"), atol=1e-5)
    assert (int(state.position), bool(state.switched)) == (14, True)


def test_a_switch_inside_the_last_block_of_a_chunk_comes_with_the_next():
    """By a recache, and the chunk learns with its own prompt; the official code does neither (docs/training.md)."""
    rollout, params, prompts = make(), network()[1], prompts_of(7)
    state, tape = RUN(rollout, params, rollout.init(params, 1, *LATENT[:2]), prompts, draws_of(0, 0))
    assert rollout.learning(tape).all() and not tape.prompt.any() and not state.switched
    state, tape = RUN(rollout, params, state, prompts, draws_of(1, 0))
    assert rollout.learning(tape).all() and tape.prompt.all() and state.switched


def gradient(rollout, switch_frame: int, exit_steps):
    """Of a weighted sum of the last chunk's latents."""
    params, prompts = network()[1], prompts_of(switch_frame)
    state = rollout.init(params, 1, *LATENT[:2])
    for index, exit_step in enumerate(exit_steps[:-1]):
        state, _ = RUN(rollout, params, state, prompts, draws_of(index, exit_step))
    draws = draws_of(len(exit_steps) - 1, exit_steps[-1])

    def loss(params):
        _, tape = rollout.run(params, state, prompts, draws)
        latents = rollout.with_gradient(params, state, prompts, draws, tape)
        return jnp.sum(latents * jnp.sin(jnp.arange(latents.size).reshape(latents.shape)))

    return jax.jit(jax.grad(loss))(params)


def twin_gradient(rollout, switch_frame: int, exit_steps):
    def loss(params):
        twin = Twin(rollout, params, prompts_of(switch_frame).embeds, switch_frame)
        latents = [twin.chunk(e, draws_of(i, e).noise) for i, e in enumerate(exit_steps)][-1]
        return jnp.sum(latents * jnp.sin(jnp.arange(latents.size).reshape(latents.shape)))

    return jax.grad(loss)(network()[1])


def distance(a, b) -> float:
    """Relative L2 over all parameters."""
    square = lambda tree: sum(float(jnp.sum(jnp.square(leaf))) for leaf in jax.tree.leaves(tree))
    return (square(jax.tree.map(jnp.subtract, a, b)) / square(b)) ** 0.5


@pytest.mark.parametrize(
    ("cache_gradient", "switch_frame", "exit_steps"),
    [
        ("detach", 4, (1,)),
        pytest.param("straight_through", 4, (1,), marks=pytest.mark.slow),
        pytest.param("detach", 8, (1, 0), marks=pytest.mark.slow),
        pytest.param("straight_through", 8, (1, 0), marks=pytest.mark.slow),
    ],
)
def test_gradient_equals_the_twins(cache_gradient, switch_frame, exit_steps):
    rollout = make(cache_gradient=cache_gradient)
    ours, twins = gradient(rollout, switch_frame, exit_steps), twin_gradient(rollout, switch_frame, exit_steps)
    assert distance(ours, twins) < 1e-5


@pytest.mark.slow
def test_straight_through_adds_what_flows_through_the_cache():
    straight, detached = (gradient(make(cache_gradient=c), 100, (1,)) for c in ("straight_through", "detach"))
    assert distance(straight, detached) > 1e-3
    # The head has no part in keys and values.
    assert distance(straight["head"], detached["head"]) < 1e-5


@pytest.mark.parametrize(
    ("exit_step", "position", "place", "expected"),
    [
        # 3 frames of the second chunk (frames 8 to 10) are made; the official cache has room for 14.
        (0, 10, 2, [None, None, 0, 1]),
        (1, 10, 2, [None, None, 0, 1]),
        # Full: with exit step 0 the record moves with the frames, else it stays in its slot.
        (0, 14, 6, [2, 3, 4, 5]),
        (1, 14, 6, [0, 1, 2, 3]),
    ],
)
def test_whom_the_official_record_names(exit_step, position, place, expected):
    """Which frame of the chunk gets the gradient of each frame read, oldest first."""
    window = dataclasses.replace(make().window, slots=8)
    buffers = jnp.zeros((1, 8, 1, 1, 1))
    read = functools.partial(
        reading_with_gradient, window=window, chunk_frames=6, count=jnp.asarray(position),
        position=jnp.asarray(position), made=jnp.asarray(place), first=jnp.asarray(0),
        exit_step=jnp.asarray(exit_step),
    )  # fmt: skip
    by_slot = jax.jacobian(lambda written: read(buffers, written).reshape(-1))(jnp.zeros((1, 6, 1, 1, 1)))
    by_slot = np.asarray(by_slot).reshape(8, 6)
    newest = [int(window.slot(jnp.asarray(position - 4 + i))) for i in range(4)]
    named = [int(by_slot[s].argmax()) if by_slot[s].any() else None for s in newest]
    assert named == expected
    assert not by_slot[:2].any(), "the sink is of the first chunk"


def test_nothing_is_compiled_again():
    rollout, traces = make(sink="zero"), []

    def loss(params, state, prompts, draws):
        traces.append(1)
        _, tape = rollout.run(params, state, prompts, draws)
        return jnp.sum(rollout.with_gradient(params, state, prompts, draws, tape))

    run = jax.jit(jax.grad(loss))
    params = network()[1]
    state = rollout.init(params, 1, *LATENT[:2])
    first = run(params, state, prompts_of(100), draws_of(0, 0))
    for exit_step, switch_frame in ((1, 4), (2, 0)):
        other = run(params, state, prompts_of(switch_frame), draws_of(0, exit_step))
        assert distance(other, first) > 1e-3
    assert len(traces) == 1
