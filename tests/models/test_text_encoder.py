"""The umT5 encoder against T5's definition and its own twins. Parity with the official code: tests/parity."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longlive_jax.config import TextEncoderConfig
from longlive_jax.models.text_encoder import Attention, TextEncoder, relative_buckets

TINY = TextEncoderConfig(vocab_size=40, dim=24, attention_dim=32, ffn_dim=40, num_heads=4, num_layers=2)
IDS = jnp.asarray([[5, 9, 9, 2, 7, 1], [3, 8, 1, 0, 0, 0]], jnp.int32)
MASK = jnp.asarray([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]], jnp.int32)


_run = jax.jit(
    lambda graph, params, ids, mask, dtype: nnx.merge(graph, params)(ids, mask, dtype), static_argnums=(0, 4)
)


def encode(encoder, ids, mask, dtype=jnp.float32):
    return _run(*nnx.split(encoder), ids, mask, dtype)


@pytest.fixture(scope="module")
def encoder():
    return TextEncoder(TINY, rngs=nnx.Rngs(0))


def bucket(offset: int, buckets: int = 32, farthest: int = 128) -> int:
    """T5's definition, one distance at a time; whole powers decide the bounds exactly."""
    half = buckets // 2
    side, distance, exact = half if offset > 0 else 0, abs(offset), half // 2
    if distance < exact:
        return side + distance
    # the number of steps s with exact * (farthest / exact)^(s / exact) <= distance, in whole numbers
    steps = [s for s in range(half - exact) if (exact**exact) * (farthest // exact) ** s <= distance**exact]
    return side + exact + steps[-1]


def test_buckets_are_t5s():
    got = relative_buckets(300, 32, 128)
    assert got.dtype == np.int32
    expected = [[bucket(k - q) for k in range(300)] for q in (0, 150, 299)]
    np.testing.assert_array_equal(got[[0, 150, 299]], expected)
    assert set(np.unique(got)) == set(range(32)) - {16}, "distance 0 counts as before"


def test_shapes_and_zero_padding(encoder):
    y = encode(encoder, IDS, MASK)
    assert y.shape == (2, 6, TINY.dim)
    assert y.dtype == jnp.float32
    assert np.all(np.asarray(y[1, 3:]) == 0)
    assert np.all(np.abs(np.asarray(y[MASK == 1])).max(-1) > 0)


def test_padding_is_not_seen(encoder):
    other = IDS.at[1, 3:].set(17)
    np.testing.assert_array_equal(encode(encoder, IDS, MASK), encode(encoder, other, MASK))
    short = encode(encoder, IDS[1:, :3], MASK[1:, :3])
    np.testing.assert_allclose(short[0], encode(encoder, IDS, MASK)[1, :3], atol=1e-5)


def test_an_empty_prompt_is_zero_not_nan(encoder):
    assert np.all(np.asarray(encode(encoder, IDS, jnp.zeros_like(MASK))) == 0)


def test_position_matters(encoder):
    swapped = IDS[:, jnp.asarray([1, 0, 2, 3, 4, 5])]
    assert float(jnp.abs(encode(encoder, IDS, MASK)[0, 2] - encode(encoder, swapped, MASK)[0, 2]).max()) > 1e-3


def test_list_of_blocks_is_the_same(encoder):
    apart = TextEncoder(TINY, stacked=False, rngs=nnx.Rngs(1))
    params = nnx.to_pure_dict(nnx.state(encoder))
    blocks = params["blocks"]
    params["blocks"] = {i: jax.tree.map(lambda leaf: leaf[i], blocks) for i in range(TINY.num_layers)}  # noqa: B023
    apart = nnx.merge(nnx.split(apart)[0], params)
    np.testing.assert_allclose(encode(apart, IDS, MASK), encode(encoder, IDS, MASK), atol=1e-5)


def test_bfloat16(encoder):
    y = encode(encoder, IDS, MASK, jnp.bfloat16)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), encode(encoder, IDS, MASK), atol=0.1)


def test_initial_scale():
    """T5's initialisation keeps the logits near 1 without an attention scale."""
    cfg = dataclasses.replace(TINY, dim=256, attention_dim=256)
    attn = Attention(cfg, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (64, 256))
    q, k = (linear(x).reshape(64, 4, 64) for linear in (attn.q, attn.k))
    assert 0.7 < float(jnp.std(jnp.einsum("qhd,khd->hqk", q, k))) < 1.4


def test_it_trains(encoder):
    """A few steps of gradient descent lower a loss, through every parameter."""
    graph, params = nnx.split(encoder)
    target = jax.random.normal(jax.random.key(2), (2, 6, TINY.dim)) * MASK[..., None]
    value_and_grad = jax.value_and_grad(lambda p: jnp.mean(jnp.square(nnx.merge(graph, p)(IDS, MASK) - target)))

    @jax.jit
    def step(params, _):
        loss, grads = value_and_grad(params)
        largest = jax.tree.map(lambda g: jnp.abs(g).max(), grads)
        return jax.tree.map(lambda p, g: p - 0.3 * g, params, grads), (loss, largest)

    _, (losses, largest) = jax.lax.scan(step, params, None, length=20)
    assert all(float(leaf[0]) > 0 for leaf in jax.tree.leaves(largest))
    assert float(losses[-1]) < 0.7 * float(losses[0])


@pytest.mark.parametrize("change", [{"eps": 0.1}, {"max_distance": 9}, {"num_heads": 2}, {"num_buckets": 8}])
def test_every_setting_counts(encoder, change):
    """No setting is dead: it changes the parameters' shapes, or with the same parameters the output."""
    changed = nnx.eval_shape(lambda: TextEncoder(dataclasses.replace(TINY, **change), rngs=nnx.Rngs(0)))
    graph, params = nnx.split(encoder)
    new_graph, new_params = nnx.split(changed)
    if jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, new_params):
        ids, mask = jnp.arange(30, dtype=jnp.int32)[None] % 40, jnp.ones((1, 30), jnp.int32)
        one, two = (_run(g, params, ids, mask, jnp.float32) for g in (graph, new_graph))
        assert float(jnp.abs(one - two).max()) > 1e-4
