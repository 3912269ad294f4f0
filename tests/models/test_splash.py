"""The TPU kernel, interpreted on the CPU, against XLA's attention. Compiled for TPUs: tests/test_tpu_aot.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.errors import UserError
from longlive_jax.models import splash
from longlive_jax.models.attention import attention

SMALL = splash.Tiles(32, 128, 128, False)
"""So that the lengths below take several tiles each."""


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    sizes = {False: SMALL, True: splash.Tiles(128, 256, 128, True)}
    monkeypatch.setattr(splash, "_tiles", lambda q, k, backward: sizes[backward])


def draw(t: int, s: int, dtype=jnp.float32, width: int = 128):
    """q, k and v of 2 videos and 2 heads."""
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (2, n, 2, width), dtype) for key, n in zip(keys, (t, s, s)))
    return 2 * q, k, v  # far from uniform attention


def kernel(q, k, v, key_length=None):
    return splash.on_mesh(q, k, v, key_length, interpret=True)


@pytest.mark.parametrize("dtype, atol", [(jnp.float32, 1e-5), (jnp.bfloat16, 0.02)])
@pytest.mark.parametrize("t, s", [(64, 256), (72, 300), (40, 17)])
def test_equals_xla(t, s, dtype, atol):
    q, k, v = draw(t, s, dtype)
    y = jax.jit(kernel)(q, k, v)
    assert (y.dtype, y.shape) == (dtype, q.shape)
    expected = attention(*(a.astype(jnp.float32) for a in (q, k, v)), implementation="xla")
    np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=atol)


def test_heads_of_another_multiple_of_128():
    q, k, v = draw(40, 140, width=384)
    np.testing.assert_allclose(jax.jit(kernel)(q, k, v), attention(q, k, v, implementation="xla"), atol=1e-5)


def test_key_length_is_honoured_without_recompilation():
    q, k, v = draw(72, 300)
    run = jax.jit(lambda *args: kernel(*args))  # a function of its own: the cache of `kernel` has other tests' shapes
    for length in (1, 100, 128, 129, 300):
        expected = attention(q, k[:, :length], v[:, :length], implementation="xla")
        np.testing.assert_allclose(run(q, k, v, jnp.int32(length)), expected, atol=1e-5)
    assert run._cache_size() == 1


@pytest.mark.parametrize("length", [None, 140])
def test_gradients_equal_xla(length):
    q, k, v = draw(72, 300)
    weights = jax.random.normal(jax.random.key(1), q.shape)
    length = None if length is None else jnp.int32(length)

    def gradients(attend):
        return jax.jit(jax.grad(lambda *qkv: jnp.sum(attend(*qkv, key_length=length) * weights), argnums=(0, 1, 2)))

    ours = gradients(kernel)(q, k, v)
    theirs = gradients(lambda *qkv, key_length: attention(*qkv, key_length=key_length, implementation="xla"))(q, k, v)
    for a, b in zip(ours, theirs):
        np.testing.assert_allclose(a, b, atol=1e-5)
        assert np.abs(b).max() > 0.1


def test_gradients_of_bfloat16_are_close():
    q, k, v = draw(72, 300, jnp.bfloat16)
    loss = lambda attend: jax.grad(lambda *qkv: jnp.sum(attend(*qkv).astype(jnp.float32) ** 2), argnums=(0, 1, 2))
    exact = loss(lambda *qkv: attention(*qkv, implementation="xla"))(*(a.astype(jnp.float32) for a in (q, k, v)))
    for a, b in zip(jax.jit(loss(kernel))(q, k, v), exact):
        assert np.linalg.norm(a.astype(np.float32) - b) < 0.02 * np.linalg.norm(b)


def test_works_under_remat_scan_and_vmap():
    q, k, v = draw(40, 140)

    def loss(attend, q):
        layer = jax.checkpoint(lambda x, _: (x + jax.vmap(lambda x: attend(x, k, v))(x), None))
        return jnp.sum(jax.lax.scan(layer, q[None], length=2)[0] ** 2)

    xla = functools.partial(attention, implementation="xla")
    ours, theirs = (jax.jit(jax.grad(functools.partial(loss, f)))(q) for f in (kernel, xla))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def tpu_mesh():
    """A mesh as a program for a TPU sees it."""
    device = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device))


def primitives(f, *args) -> str:
    return str(jax.make_jaxpr(f)(*args))


def test_chosen_on_a_tpu_only():
    q, k, v = draw(40, 140)
    assert "pallas_call" not in primitives(lambda: attention(q, k, v))
    with tpu_mesh():
        assert "pallas_call" in primitives(lambda: attention(q, k, v))
        assert "pallas_call" not in primitives(lambda: attention(q, k, v, mask=jnp.ones((40, 140), bool)))
        assert "pallas_call" not in primitives(lambda: attention(*draw(40, 140, width=32)))


def test_asked_for_by_name_it_runs_or_says_why_not():
    q, k, v = draw(40, 140)
    splash_of = lambda *qkv, **how: attention(*qkv, implementation="splash", **how)
    with pytest.raises(UserError, match='^attention "splash" cannot run: it needs a TPU; use implementation="xla"$'):
        splash_of(q, k, v)
    with tpu_mesh():
        with pytest.raises(UserError, match="heads 32 wide are no multiple of 128"):
            splash_of(*draw(40, 140, width=32))
        with pytest.raises(UserError, match="float16 is neither bfloat16 nor float32"):
            splash_of(*draw(40, 140, jnp.float16))
        with pytest.raises(UserError, match="a mask is not supported"):
            splash_of(q, k, v, mask=jnp.ones((40, 140), bool))


def test_tiles_of_a_decoded_block(monkeypatch):
    monkeypatch.undo()
    shapes = lambda t, s, width, dtype: [jax.ShapeDtypeStruct((1, n, 12, width), dtype) for n in (t, s)]
    block = shapes(4680, 18720, 128, jnp.bfloat16)
    assert splash._tiles(*block, backward=False) == splash.Tiles(784, 2688, 384, False), "6 to 4704, 7 to 18816"
    for t, s, width, dtype in [
        (4680, 512, 128, jnp.bfloat16),
        (6240, 6240, 384, jnp.float32),
        (48, 24, 128, jnp.float32),
    ]:
        for backward in (False, True):
            tiles = splash._tiles(*shapes(t, s, width, dtype), backward=backward)
            assert tiles.kv % tiles.kv_compute == 0 == tiles.kv_compute % 128
            assert tiles.q % (128 if backward else 16) == 0
            assert splash._round_up(t, tiles.q) < t + 640
