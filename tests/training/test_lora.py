"""Adapters: beside the layer or merged into it, the same numbers; only they are trained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import TRANSFORMER, shaken

from longlive_jax import checkpoint
from longlive_jax.conversion.lora_file import read_factors
from longlive_jax.models.transformer import WanTransformer
from longlive_jax.training import lora

RANK, ALPHA = 3, 6.0


@pytest.fixture(scope="module")
def adapted():
    model = lora.adapt(WanTransformer(TRANSFORMER, rngs=nnx.Rngs(0)), rank=RANK, alpha=ALPHA, rngs=nnx.Rngs(1))
    graph, params = nnx.split(model)
    return graph, nnx.to_pure_dict(params)


def flow(graph, params):
    x = jax.random.normal(jax.random.key(0), (1, 2, 2, 4, TRANSFORMER.in_channels))
    prompt = jax.random.normal(jax.random.key(1), (1, 4, TRANSFORMER.text_dim))

    @jax.jit
    def run(params):
        model = nnx.merge(graph, params)
        return model.bidirectional(x, jnp.full((1, 2), 500.0), model.text_kv(prompt))

    return run(params)


def plain():
    graph, params = nnx.split(WanTransformer(TRANSFORMER, rngs=nnx.Rngs(0)))
    return graph, nnx.to_pure_dict(params)


def test_begins_as_the_model_it_adapts(adapted):
    np.testing.assert_allclose(flow(*adapted), flow(*plain()), atol=1e-6)


def test_merged_equals_adapter(adapted):
    graph, params = adapted[0], shaken(adapted[1])
    merged = lora.merge(params, ALPHA / RANK)
    assert jax.tree.structure(merged) == jax.tree.structure(plain()[1])
    beside = flow(graph, params)
    np.testing.assert_allclose(flow(plain()[0], merged), beside, atol=1e-5)
    assert np.abs(beside - flow(plain()[0], lora.merge(params, 0.0))).max() > 1e-3
    again = lora.merge(lora.split(params), ALPHA / RANK)
    jax.tree.map(np.testing.assert_array_equal, again, merged)


def test_ten_layers_a_block_and_nothing_else(adapted):
    parts = lora.split(adapted[1])
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(parts.trained)]
    assert len(names) == 2 * 10
    assert all("blocks" in name for name in names)
    jax.tree.map(np.testing.assert_array_equal, lora.join(*lora.parts(parts)), adapted[1])
    assert lora.parts(adapted[1]) == (adapted[1], {})


def test_the_file_beside_merged_weights(adapted, tmp_path):
    """Its pairs, added as they are, are what was merged: the scale is in them."""
    parts = lora.split(shaken(adapted[1]))
    lora.keep(parts.trained, ALPHA / RANK, tmp_path)
    factors = read_factors(tmp_path)
    assert len(factors) == 10 * TRANSFORMER.num_layers
    tensors = lambda params: {t.name: t.make() for t in checkpoint.lazy_tensors(params)}
    before, merged = tensors(lora.merge(parts, 0.0)), tensors(lora.merge(parts, ALPHA / RANK))
    for name, (a, b) in factors.items():
        assert a.shape[1] == b.shape[0] == RANK
        np.testing.assert_allclose(before[name] + a @ b, merged[name], atol=1e-5)
