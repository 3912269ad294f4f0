"""FLOPs counted on the program equal those counted by hand."""

import jax
import jax.numpy as jnp
from flax import nnx

from longlive_jax.config import TransformerConfig
from longlive_jax.models.transformer import WanTransformer
from longlive_jax.training.flops import count_flops, peak_flops
from longlive_jax.training.remat import rematerialise


def test_products_convolutions_and_loops():
    a, b = jnp.zeros((2, 3, 4)), jnp.zeros((2, 4, 5))
    assert count_flops(lambda a, b: jax.nn.relu(a @ b), a, b) == 2 * 2 * 3 * 4 * 5
    x, kernel = jnp.zeros((1, 8, 8, 3)), jnp.zeros((3, 3, 3, 6))
    conv = lambda x, k: jax.lax.conv_general_dilated(x, k, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    assert count_flops(conv, x, kernel) == 2 * (4 * 4 * 6) * (3 * 3 * 3)
    w = jnp.zeros((4, 4))
    loop = lambda w: jax.lax.scan(lambda c, _: (jax.jit(jnp.dot)(w, c), None), w, None, length=7)[0]
    assert count_flops(loop, w) == 7 * 2 * 4**3


def test_a_gradient_costs_twice_its_function():
    w, x = jnp.zeros((4, 4)), jnp.zeros((8, 4))
    loss = lambda w, x: jnp.sum(jnp.tanh(x @ w) @ w)
    assert count_flops(jax.grad(loss, argnums=(0, 1)), w, x) == 3 * count_flops(loss, w, x)


def test_rematerialised_work_is_there_to_be_counted():
    w = jnp.zeros((4, 4))
    body = lambda w: jnp.sum(jnp.tanh(jnp.tanh(w @ w) @ w))
    plain, again = (count_flops(jax.grad(f), w) for f in (body, rematerialise("layer")(body)))
    assert again > plain


def test_the_transformer_by_its_formula():
    """A token and layer: 8 d^2 of self-attention, 4 d^2 of attention to the prompt, 4 d f; and 4 S d for S keys."""
    d, f, layers, t, n, text = 24, 40, 3, 2, 4, 6
    cfg = TransformerConfig(
        dim=d, ffn_dim=f, num_layers=layers, num_heads=2, in_channels=4, out_channels=4, text_dim=8, text_length=text,
        time_dim=16,
    )  # fmt: skip
    model = nnx.eval_shape(lambda: WanTransformer(cfg, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(model)
    kv = jax.ShapeDtypeStruct((layers, 1, text, 2, d // 2), jnp.float32)
    x = jax.ShapeDtypeStruct((1, t, 4, 4, 4), jnp.float32)
    forward = lambda p, x, k, v: nnx.merge(graph, p).bidirectional(x, jnp.zeros((1, t)), (k, v))
    tokens = t * n
    blocks = layers * tokens * (12 * d * d + 4 * d * f + 4 * tokens * d + 4 * text * d)
    ends = tokens * 2 * (16 * d + d * 16) + t * 2 * (16 * d + d * d + d * 6 * d)
    assert count_flops(forward, nnx.to_pure_dict(params), x, kv, kv) == blocks + ends


def test_peaks():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "float32") is None
    assert peak_flops("cpu", "bfloat16") is None
