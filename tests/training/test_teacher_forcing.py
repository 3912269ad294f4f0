"""Teacher forcing: who sees whom, what is learnt, and that a tiny student learns it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny import TRANSFORMER, structure

from longlive_jax.config import TextEncoderConfig
from longlive_jax.models.text_encoder import TextEncoder
from longlive_jax.models.transformer import WanTransformer
from longlive_jax.training.batch import Batch
from longlive_jax.training.flow_matching import draw_sigma
from longlive_jax.training.forced_attention import forced_attention
from longlive_jax.training.teacher_forcing import teacher_forcing_loss, teacher_forcing_mask

CFG = TRANSFORMER
TEXT = TextEncoderConfig(vocab_size=20, dim=8, attention_dim=8, ffn_dim=16, num_heads=2, num_layers=1)


def networks():
    return WanTransformer(CFG, rngs=nnx.Rngs(0)), TextEncoder(TEXT, rngs=nnx.Rngs(1))


def batch(frames: int = 4) -> Batch:
    return Batch(
        latents=jax.random.normal(jax.random.key(0), (2, frames, 4, 4, 4)),
        positions=jnp.arange(frames),
        ids=jnp.array([[3, 4, 1, 0, 0, 0], [5, 1, 0, 0, 0, 0]]),
        mask=jnp.array([[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]]),
        learn=jnp.ones((2, frames), bool),
    )


@functools.partial(jax.jit, static_argnames=("context_noise",))
def loss(params, example, key, context_noise=0.0):
    graphs = [structure(make) for make in (lambda: networks()[0], lambda: networks()[1])]
    model, text = (nnx.merge(graph, p) for graph, p in zip(graphs, params))
    return teacher_forcing_loss(model, text, example, key, block=2, shift=5.0, context_noise=context_noise)


def start():
    return tuple(nnx.to_pure_dict(nnx.split(net)[1]) for net in networks())


def test_mask_as_drawn():
    drawn = """
        x.....
        xx....
        xxx...
        ...x..
        x...x.
        xx...x"""
    expected = np.array([[c == "x" for c in line.strip()] for line in drawn.split()])
    np.testing.assert_array_equal(teacher_forcing_mask(3, 1), expected)
    np.testing.assert_array_equal(teacher_forcing_mask(6, 2), np.kron(expected, np.ones((2, 2), bool)))


def test_frames_not_to_learn_have_no_gradient():
    example, params, key = batch(), start(), jax.random.key(1)
    grad = lambda learn: jax.grad(loss)(params, dataclasses.replace(example, learn=learn), key)
    nothing = grad(jnp.zeros((2, 4), bool))
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(nothing)) == 0.0
    # The last block is the past of nobody: what it shows does not matter while only the first is learnt.
    first = jnp.asarray([[True, True, False, False]] * 2)
    other = dataclasses.replace(example, learn=first, latents=example.latents.at[:, 2:].add(3.0))
    here = dataclasses.replace(example, learn=first)
    np.testing.assert_allclose(loss(params, other, key), loss(params, here, key), rtol=1e-5)
    assert (
        abs(float(loss(params, dataclasses.replace(other, learn=example.learn), key) - loss(params, example, key)))
        > 1e-3
    )


def test_past_is_noised_only_when_asked():
    example, params, key = batch(), start(), jax.random.key(1)
    assert float(loss(params, example, key)) != float(loss(params, example, key, context_noise=0.5))


def test_noise_levels_follow_the_shift():
    sigma = np.asarray(draw_sigma(jax.random.key(0), (20000,), 5.0))
    assert 0 <= sigma.min() and sigma.max() <= 1
    np.testing.assert_allclose(np.median(sigma), 5 / 6, atol=0.01)


def test_a_tiny_student_learns():
    example, params = batch(), start()
    optimizer = optax.adam(3e-3)
    opt = optimizer.init(params)

    @jax.jit
    def step(params, opt, key):
        value, grads = jax.value_and_grad(loss)(params, example, key)
        updates, opt = optimizer.update(grads, opt)
        return optax.apply_updates(params, updates), opt, value

    values = []
    for i in range(150):
        params, opt, value = step(params, opt, jax.random.key(i))
        values.append(float(value))
    assert np.mean(values[-20:]) < 0.75 * np.mean(values[:20])


def masked_attention(q, k, v, *, frames, block):
    """The slow twin: all pairs of blocks, and a mask."""
    mask = teacher_forcing_mask(frames, block)
    tokens = q.shape[1] // (2 * frames)
    mask = np.repeat(np.repeat(mask, tokens, axis=0), tokens, axis=1)
    return jax.nn.dot_product_attention(q, k, v, mask=mask[None, None])


@pytest.mark.parametrize(("frames", "block"), [(12, 3), (3, 3), (4, 1)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_attention_of_blocks_is_that_of_the_mask(frames, block, dtype, tolerance):
    q, k, v = (
        jax.random.normal(jax.random.key(i), (2, 2 * frames * 4, 2, 16)).astype(dtype).astype(jnp.float32)
        for i in range(3)
    )
    fast = lambda q, k, v: forced_attention(q.astype(dtype), k.astype(dtype), v.astype(dtype), frames // block)
    slow = functools.partial(masked_attention, frames=frames, block=block)
    value = lambda attend: lambda *qkv: jnp.sum(jnp.sin(attend(*qkv).astype(jnp.float32)))
    made = fast(q, k, v), jax.grad(value(fast), (0, 1, 2))(q, k, v)
    expected = slow(q, k, v), jax.grad(value(slow), (0, 1, 2))(q, k, v)
    for one, two in zip(jax.tree.leaves(made), jax.tree.leaves(expected), strict=True):
        assert jnp.linalg.norm(one.astype(jnp.float32) - two) < tolerance * jnp.linalg.norm(two)
