"""Sizes so small that a test is quick, and so odd that a wrong axis does not fit."""

import jax
from flax import nnx

from longlive_jax.config import TransformerConfig

TRANSFORMER = TransformerConfig(
    dim=24, ffn_dim=32, num_layers=2, num_heads=2, in_channels=4, out_channels=4, text_dim=8, text_length=6
)


def shaken(params):
    """Parameters moved by noise: at initialisation some parts are too small for a mistake in them to show."""
    return jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(a.size), a.shape), params)


def by_layer(params, num_layers: int):
    """Stacked parameters of a transformer as those of one with a list of layers."""
    return params | {"blocks": {i: jax.tree.map(lambda a, i=i: a[i], params["blocks"]) for i in range(num_layers)}}


def structure(make) -> nnx.GraphDef:
    """A network without its parameters."""
    return nnx.split(nnx.eval_shape(make))[0]
