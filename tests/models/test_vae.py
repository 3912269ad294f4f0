"""The VAE: whole clips equal streamed ones, both convolutions agree, the first frame is treated as it should be."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longlive_jax.config import VAEConfig
from longlive_jax.models.vae import VAE, CausalConv
from longlive_jax.training.vae import inflate

CFG = VAEConfig(base_width=4, multipliers=(1, 2, 2, 2), res_blocks=1)


@functools.cache
def coder(impl: str = "2d"):
    """Jitted encode(video, cache, first) and decode(latents, cache, first) of one random VAE."""
    graph, params = nnx.split(VAE(CFG, impl=impl, rngs=nnx.Rngs(0)))
    encode = jax.jit(lambda x, c, first: nnx.merge(graph, params).encode(x, c, first=first), static_argnums=2)
    decode = jax.jit(lambda z, c, first: nnx.merge(graph, params).decode(z, c, first=first), static_argnums=2)
    return encode, decode


def in_chunks(code, x, sizes):
    """Output of coding `x` in chunks of the given numbers of frames, the caches handed on."""
    parts, cache, at = [], None, 0
    for size in sizes:
        part, cache = code(x[:, at : at + size], cache, at == 0)
        parts.append(part)
        at += size
    assert at == x.shape[1]
    return np.concatenate(parts, axis=1)


LATENTS = jax.random.normal(jax.random.key(1), (2, 6, 2, 3, 16))
VIDEO = jax.random.uniform(jax.random.key(2), (2, 21, 16, 24, 3), minval=-1)


@pytest.mark.parametrize("sizes", [[3, 3], [1, 1, 1, 1, 1, 1], [2, 4], [1, 5]])
def test_streamed_decoding_equals_whole(sizes):
    _, decode = coder()
    whole, _ = decode(LATENTS, None, True)
    assert whole.shape == (2, 21, 16, 24, 3)
    np.testing.assert_allclose(in_chunks(decode, LATENTS, sizes), whole, atol=1e-5)


@pytest.mark.parametrize("sizes", [[1, 4, 16], [9, 12], [5, 8, 8]])
def test_streamed_encoding_equals_whole(sizes):
    encode, _ = coder()
    whole, _ = encode(VIDEO, None, True)
    assert whole.shape == (2, 6, 2, 3, 16)
    np.testing.assert_allclose(in_chunks(encode, VIDEO, sizes), whole, atol=1e-5)


def test_sum_of_2d_convolutions_equals_3d():
    for fast, slow, x in zip(coder("2d"), coder("3d"), (VIDEO, LATENTS)):
        np.testing.assert_allclose(fast(x, None, True)[0], slow(x, None, True)[0], atol=1e-5)
    fast, slow = (in_chunks(coder(impl)[1], LATENTS, [2, 4]) for impl in ("2d", "3d"))
    np.testing.assert_allclose(fast, slow, atol=1e-5)


def test_no_frame_sees_the_future():
    encode, decode = coder()
    changed = LATENTS.at[:, 4:].add(1.0)
    before, after = decode(LATENTS, None, True)[0], decode(changed, None, True)[0]
    np.testing.assert_array_equal(before[:, :13], after[:, :13])  # latents 0..3 are frames 0..12
    assert np.abs(before[:, 13:17] - after[:, 13:17]).max() > 1e-3
    before, after = encode(VIDEO, None, True)[0], encode(VIDEO.at[:, 9:].add(1.0), None, True)[0]
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert np.abs(before[:, 3] - after[:, 3]).max() > 1e-3


def test_cache_does_not_grow():
    _, decode = coder()
    _, first = decode(LATENTS[:, :3], None, True)
    _, later = decode(LATENTS[:, 3:], first, False)
    assert jax.tree.map(jnp.shape, first) == jax.tree.map(jnp.shape, later)


def test_causal_convolution_against_its_definition():
    conv = CausalConv(2, 3, (3, 3, 3), impl="2d", rngs=nnx.Rngs(3))
    x = jax.random.normal(jax.random.key(0), (1, 4, 5, 6, 2))
    padded = np.pad(np.asarray(x), [(0, 0), (2, 0), (1, 1), (1, 1), (0, 0)])
    kernel = np.asarray(conv.kernel.get_value())
    expected = np.zeros((1, 4, 5, 6, 3))
    for t, i, j in np.ndindex(4, 5, 6):
        expected[0, t, i, j] = np.einsum("thwi,thwio->o", padded[0, t : t + 3, i : i + 3, j : j + 3], kernel)
    np.testing.assert_allclose(conv(x)[0], expected, atol=1e-5)


def test_inflated_vae_repeats_still_frames():
    graph, params = nnx.split(inflate(VAE(CFG, rngs=nnx.Rngs(0))))
    encode = jax.jit(lambda x: nnx.merge(graph, params).encode(x)[0])
    decode = jax.jit(lambda z: nnx.merge(graph, params).decode(z)[0])
    latents = encode(jnp.broadcast_to(VIDEO[:, :1], (2, 5, *VIDEO.shape[2:])))
    np.testing.assert_allclose(latents[:, 1], latents[:, 0], atol=1e-5)
    pixels = decode(latents)
    np.testing.assert_allclose(pixels[:, 1:], jnp.broadcast_to(pixels[:, :1], pixels[:, 1:].shape), atol=1e-5)


def test_bfloat16_computes_in_bfloat16():
    _, decode = coder()
    pixels, cache = decode(LATENTS.astype(jnp.bfloat16), None, True)
    assert pixels.dtype == jnp.bfloat16
    assert {a.dtype for a in jax.tree.leaves(cache)} == {jnp.dtype(jnp.bfloat16)}
    exact, _ = decode(LATENTS, None, True)
    assert float(jnp.mean(jnp.abs(pixels.astype(jnp.float32) - exact))) < 0.02
