"""Products and attention on a CPU: of bfloat16 numbers only, both ways, and the same numbers as anywhere else."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from longlive_jax.models import products, rope
from longlive_jax.models.attention import attention
from longlive_jax.models.layers import Linear, run_layers, stack_layers

BF16 = jnp.bfloat16


def draw(*shape, seed=0, dtype=BF16):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def exact(tree):
    return jax.tree.map(lambda a: a.astype(jnp.float32), tree)


def close(made, expected, tolerance=2e-2):
    for one, two in zip(jax.tree.leaves(made), jax.tree.leaves(expected), strict=True):
        one, two = np.asarray(one, np.float32), np.asarray(two, np.float32)
        assert np.linalg.norm(one - two) < tolerance * np.linalg.norm(two)


def plain_attention(q, k, v, mask=None):
    return jax.nn.dot_product_attention(q, k, v, mask=None if mask is None else mask[None, None])


@pytest.mark.parametrize("bias", [True, False])
def test_linear_and_its_derivatives(bias):
    x, kernel = draw(2, 5, 16), draw(16, 24, seed=1, dtype=jnp.float32)
    b = draw(24, seed=2, dtype=jnp.float32) if bias else None
    fast = lambda x, kernel, b: jnp.sum(jnp.sin(products.linear(x, kernel, b).astype(jnp.float32)))
    slow = lambda x, kernel, b: jnp.sum(jnp.sin(x @ kernel + (0 if b is None else b)))
    arguments = (0, 1, 2) if bias else (0, 1)
    made = jax.jit(jax.value_and_grad(fast, arguments))(x, kernel, b)
    close(made, jax.value_and_grad(slow, arguments)(*exact((x, kernel, b))))
    assert made[1][0].dtype == BF16 and all(a.dtype == jnp.float32 for a in made[1][1:]), "sums of gradients"


def test_float32_products_are_left_alone():
    x, kernel, b = (a.astype(jnp.float32) for a in (draw(3, 16), draw(16, 8, seed=1), draw(8, seed=2)))
    assert (products.linear(x, kernel, b) == x @ kernel + b).all()
    assert not products.by_matrix_units(jnp.float32) and products.by_matrix_units(BF16)


@pytest.mark.parametrize("dtype, tolerance", [(BF16, 2e-2), (jnp.float32, 1e-5)])
@pytest.mark.parametrize("keys", [None, "length", "mask"])
def test_attention_and_its_derivatives(keys, dtype, tolerance):
    q, k, v = (draw(2, n, 3, 16, seed=seed, dtype=dtype) for seed, n in enumerate((6, 9, 9)))
    mask = {None: None, "length": jnp.arange(9)[None] < 7, "mask": jnp.tri(6, 9, 2, bool)}[keys]
    bias = None if mask is None else jnp.where(mask, 0.0, -1e30)
    mask = None if mask is None else jnp.broadcast_to(mask, (6, 9))
    fast = lambda q, k, v: jnp.sum(jnp.sin(products.attention(q, k, v, bias).astype(jnp.float32)))
    slow = lambda q, k, v: jnp.sum(jnp.sin(plain_attention(q, k, v, mask)))
    made = jax.jit(jax.value_and_grad(fast, (0, 1, 2)))(q, k, v)
    close(made, jax.value_and_grad(slow, (0, 1, 2))(*exact((q, k, v))), tolerance)


def test_it_is_the_attention_of_networks_on_a_cpu():
    q, k, v = (draw(2, n, 3, 16, seed=seed, dtype=jnp.float32) for seed, n in enumerate((6, 9, 9)))
    bias = jnp.where(jnp.arange(9)[None] < 7, 0.0, -1e30)
    made = attention(q, k, v, key_length=jnp.asarray(7))
    np.testing.assert_array_equal(made, products.attention(q, k, v, bias))
    close(made, jax.nn.dot_product_attention(q, k[:, :7], v[:, :7]), 2e-6)


def test_rotation_is_that_of_the_pairs(monkeypatch):
    x, turn = draw(1, 2, 4, 2, 32), rope.rotation(jnp.array([0, 700]), 2, 2, 32, 10000.0)
    made = rope.rotate(x, turn)
    monkeypatch.setattr(products, "by_matrix_units", lambda dtype: False)
    np.testing.assert_array_equal(np.asarray(made, np.float32), np.asarray(rope.rotate(x, turn), np.float32))


def test_no_product_mixes_dtypes():
    """What XLA would turn into a float32 product: any but one of two bfloat16 numbers into float32, one batch axis."""

    def loss(x, kernel, b, q):
        y = products.linear(x, kernel, b)
        return jnp.sum(y.astype(jnp.float32)) + jnp.sum(products.attention(q, q, q).astype(jnp.float32))

    text = jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(draw(5, 16), draw(16, 8), draw(8), draw(2, 6, 3, 16)).as_text()
    types = re.findall(
        r"stablehlo.dot_general .* : \(tensor<[\dx]*x(\w+)>, tensor<[\dx]*x(\w+)>\) -> tensor<[\dx]*x(\w+)>", text
    )
    assert len(types) == len(re.findall("stablehlo.dot_general", text)) == 3 + 7
    assert set(types) == {("bf16", "bf16", "f32")}
    assert not re.search(r"batching_dims = \[\d+, ", text)


@functools.partial(jax.jit, static_argnames="unroll")
def through_layers(params, x, unroll):
    layers = nnx.merge(nnx.split(nnx.eval_shape(make_layers))[0], params)
    return run_layers(layers, lambda layer, c, _: (jnp.tanh(layer(c)), c), x, None, unroll=unroll)


def make_layers():
    return stack_layers(lambda rngs: Linear(8, 8, rngs=rngs), 3, nnx.Rngs(0))


def test_a_written_out_scan_is_the_scan():
    params, x = nnx.to_pure_dict(nnx.state(make_layers())), draw(2, 8, dtype=jnp.float32)
    loops = [
        str(jax.make_jaxpr(lambda x, u=u: through_layers(params, x, u))(x)).count("unroll=1") for u in (False, True)
    ]
    assert loops == [1, 0], "the setting changes the program"
    for one, two in zip(*(jax.tree.leaves(through_layers(params, x, u)) for u in (False, True)), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)
