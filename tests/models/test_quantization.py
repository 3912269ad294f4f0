"""int8 layers: what rounding may do and no more, both ways to multiply, and that the weights really are int8."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import TRANSFORMER, by_layer

from longlive_jax import checkpoint
from longlive_jax.config import ModelConfig
from longlive_jax.errors import UserError
from longlive_jax.models import quantization
from longlive_jax.models.layers import Linear, stack_layers, structure
from longlive_jax.models.quantization import MATMULS, Int8Linear, dequantize, quantize, quantize_params, with_int8
from longlive_jax.models.text_encoder import TextEncoder
from longlive_jax.models.transformer import WanTransformer

CFG = dataclasses.replace(TRANSFORMER, dim=48, ffn_dim=64)
LINEARS = {f"{a}/{n}" for a in ("self_attn", "cross_attn") for n in "qkvo"} | {"ffn/up", "ffn/down"}


def relative(a, b) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def size(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def random_params(part: str, cfg) -> checkpoint.Params:
    """Kernels of variance 1 / inputs, all else near what it is at initialisation; on the host, which is quick."""
    rng = np.random.default_rng(0)

    def values(path, leaf):
        name, x = path[-1].key, rng.standard_normal(leaf.shape, np.float32)
        return x / np.float32(np.sqrt(leaf.shape[-2])) if name == "kernel" else 0.1 * x + (name == "weight")

    return jax.tree_util.tree_map_with_path(values, checkpoint.abstract_params(part, cfg))


@pytest.fixture(scope="module")
def params():
    return random_params("transformer", CFG)


# A kernel


def test_rounding_is_at_most_half_a_scale():
    kernel = draw(3, 40, 7) * np.float32([1, 1e-3, 1e3, 1, 1, 1, 1])
    kernel[1, :, 4] = 0
    values, scale = quantize(kernel)
    assert (values.dtype, values.shape, scale.dtype, scale.shape) == (np.int8, (3, 7, 40), np.float32, (3, 7))
    error = np.abs(dequantize(values, scale) - kernel)
    assert (error <= scale[:, None] * 0.5001).all()
    assert not error[1, :, 4].any(), "a channel of zeros"
    largest = np.abs(values.astype(int)).max(-1)
    assert (np.delete(largest, 4, 1) == 127).all(), "each channel uses the whole range"


def test_numpy_and_jax_give_the_same_bits():
    kernel = draw(64, 32)
    for ours, theirs in zip(quantize(kernel), quantize(jnp.asarray(kernel))):
        np.testing.assert_array_equal(ours, theirs)


# A layer


@pytest.fixture(scope="module")
def linear():
    graph = structure(lambda: Linear(96, 80, rngs=nnx.Rngs(0)))
    return nnx.merge(graph, {"kernel": jnp.asarray(draw(96, 80) / 10), "bias": jnp.asarray(draw(80, seed=1))})


@pytest.mark.parametrize(("matmul", "bound"), [("weight_only", 0.008), ("w8a8", 0.013)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_layer_is_near_the_float_one(linear, matmul, bound, dtype):
    x = jnp.asarray(draw(5, 3, 96, seed=2), dtype)
    y = Int8Linear(linear, matmul)(x)
    assert (y.shape, y.dtype) == ((5, 3, 80), jnp.dtype(dtype))
    error = relative(y, linear(x.astype(jnp.float32)))
    assert bound / 3 < error < bound + (0.004 if dtype == "bfloat16" else 0), "int8, no less and no more"


def test_weight_only_is_the_dequantised_product(linear):
    x = draw(5, 96, seed=2)
    kernel = dequantize(*quantize(np.asarray(linear.kernel.get_value())))
    expected = x.astype(np.float64) @ kernel + np.asarray(linear.bias.get_value())
    np.testing.assert_allclose(Int8Linear(linear, "weight_only")(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-5)


def test_w8a8_is_what_whole_numbers_give(linear):
    x = draw(5, 96, seed=2) * np.float32([1, 1e-4, 1e4, 3, 0])[:, None]
    values, scale = (np.asarray(a) for a in quantize(np.asarray(linear.kernel.get_value())))
    x_scale = np.maximum(np.abs(x).max(-1, keepdims=True) * np.float32(1 / 127), np.float32(1e-38))
    whole = np.rint(x / x_scale).astype(np.int64) @ values.T.astype(np.int64)
    expected = whole * x_scale.astype(np.float64) * scale + np.asarray(linear.bias.get_value())
    np.testing.assert_allclose(Int8Linear(linear, "w8a8")(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("matmul", MATMULS)
def test_a_token_does_not_depend_on_its_batch(linear, matmul):
    x = jnp.asarray(draw(6, 96, seed=3))
    layer = Int8Linear(linear, matmul)
    np.testing.assert_allclose(layer(x)[:2], layer(x[:2]), rtol=1e-6, atol=1e-6)
    louder = x.at[5].mul(100)
    np.testing.assert_allclose(layer(louder)[:5], layer(x)[:5], rtol=1e-6, atol=1e-6)


# A network


@pytest.mark.parametrize("stacked", [True, False])
def test_the_parameters_fit_the_structure(params, stacked):
    make = lambda: with_int8(WanTransformer(CFG, stacked=stacked, rngs=nnx.Rngs(0)))
    expected = nnx.to_pure_dict(nnx.state(nnx.eval_shape(make)))
    ours = quantize_params(params)
    ours = ours if stacked else by_layer(ours, CFG.num_layers)
    describe = lambda tree: jax.tree.map(lambda a: (a.shape, str(a.dtype)), tree)
    assert describe(ours) == describe(expected)


def test_all_linear_layers_of_the_blocks_and_no_others(params):
    quantised = {
        "/".join(p.key for p in path[:-1])
        for path, leaf in jax.tree_util.tree_leaves_with_path(quantize_params(params))
        if leaf.dtype == jnp.int8
    }
    assert quantised == {f"blocks/{name}" for name in LINEARS}


def test_a_layer_of_another_shape_and_name_is_quantised_too():
    """As a fused q, k and v would be."""

    class Fused(nnx.Module):
        def __init__(self, rngs):
            self.qkv = Linear(8, 24, bias=False, rngs=rngs)

    class Network(nnx.Module):
        def __init__(self):
            self.blocks = stack_layers(Fused, 2, nnx.Rngs(0))

    network = with_int8(Network())
    assert network.blocks.qkv.int8.shape == (2, 24, 8)
    assert network.blocks.qkv.bias is None


@pytest.fixture(scope="module")
def flow(params):
    """The flow of the network, float or quantised, stacked or not."""
    x, t = jnp.asarray(draw(1, 2, 4, 4, 4, seed=4)), jnp.full((1, 2), 500.0)
    prompt = jnp.asarray(draw(1, 6, 8, seed=5))

    def run(matmul=None, stacked=True):
        make = lambda: WanTransformer(CFG, stacked=stacked, rngs=nnx.Rngs(0))
        graph = structure((lambda: with_int8(make(), matmul)) if matmul else make)
        tree = quantize_params(params) if matmul else params
        tree = tree if stacked else by_layer(tree, CFG.num_layers)

        def function(tree):
            network = nnx.merge(graph, tree)
            return network.bidirectional(x, t, network.text_kv(prompt))

        return jax.jit(function)(tree)

    return run


@pytest.mark.parametrize(("matmul", "bound"), [("weight_only", 0.01), ("w8a8", 0.02)])
def test_a_network_is_near_the_float_one(flow, matmul, bound):
    ours = flow(matmul)
    assert bound / 10 < relative(ours, flow()) < bound
    np.testing.assert_allclose(flow(matmul, stacked=False), ours, atol=1e-4 if matmul == "weight_only" else 0.02)


def test_half_the_bytes():
    config = ModelConfig.t2v_1_3b()
    for part, share in (("transformer", 0.52), ("text_encoder", 0.6)):
        cfg = getattr(config, part)
        half = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), checkpoint.abstract_params(part, cfg)
        )
        int8 = jax.tree.map(
            lambda a: a if a.dtype == jnp.int8 else jax.ShapeDtypeStruct(a.shape, jnp.bfloat16),
            checkpoint.abstract_params(part, cfg, "int8"),
        )
        assert 0.5 < size(int8) / size(half) < share


def test_the_text_encoder(tiny_config):
    cfg = tiny_config.text_encoder
    make, params = lambda: TextEncoder(cfg, rngs=nnx.Rngs(0)), random_params("text_encoder", cfg)
    ids, mask = np.arange(6)[None] + 3, np.array([[1, 1, 1, 1, 1, 0]])
    run = jax.jit(lambda graph, tree: nnx.merge(graph, tree)(jnp.asarray(ids), jnp.asarray(mask)), static_argnums=0)
    embeds = run(structure(make), params)
    error = relative(run(structure(lambda: with_int8(make())), quantize_params(params)), embeds)
    assert 1e-4 < error < 0.02


# Which way


@pytest.mark.parametrize(
    ("backend", "flags", "expected"),
    [
        ("cpu", "flags : avx2 fma", "weight_only"),
        ("cpu", "flags : avx2 avx_vnni", "w8a8"),
        ("cpu", "flags : avx512f amx_tile amx_int8", "w8a8"),
        ("cpu", None, "weight_only"),
        ("gpu", None, "w8a8"),
        ("tpu", None, "w8a8"),
    ],
)
def test_auto(monkeypatch, tmp_path, backend, flags, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(quantization, "CPU_FLAGS", tmp_path / "cpuinfo")
    if flags:
        (tmp_path / "cpuinfo").write_text(flags)
    assert quantization.resolve_matmul("auto") == expected
    assert quantization.resolve_matmul("weight_only") == "weight_only"


def test_an_unknown_way():
    with pytest.raises(UserError, match="^int8_matmul is 'w4a4'; auto, weight_only and w8a8 are known$"):
        quantization.resolve_matmul("w4a4")
