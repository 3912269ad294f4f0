"""Tokens of one video over devices, and the TPU kernel on a mesh. Four devices need a process of their own: this."""

import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import TRANSFORMER, shaken

from longlive_jax import sharding
from longlive_jax.cache import Window
from longlive_jax.config import SamplerConfig
from longlive_jax.decoding.decoder import Decoder
from longlive_jax.models import splash
from longlive_jax.models.transformer import WanTransformer

SAMPLER = SamplerConfig(
    height=32, width=32, window=4, sink_frames=2, block_frames=2, steps=(1000.0, 500.0), rope="absolute"
)
CACHE = (2, 2, 4, 4, 2, 12)
"""Layers, videos, slots, tokens, heads, channels."""


def decode(mesh) -> dict[str, np.ndarray]:
    """Three blocks of two videos (the ring goes round), what is where, and the collectives of a step."""
    graph, params = nnx.split(WanTransformer(TRANSFORMER, rngs=nnx.Rngs(0)))
    params = sharding.shard_params({"transformer": shaken(nnx.to_pure_dict(params))}, mesh)
    decoder = Decoder(graph, None, SAMPLER, Window.of(SAMPLER, 6))
    embeds = jax.random.normal(jax.random.key(5), (2, 4, TRANSFORMER.text_dim))
    embeds, keys = sharding.shard_batch((embeds, jax.random.split(jax.random.key(0), 2)), mesh)
    blocks = []
    with sharding.using(mesh):
        state = jax.jit(Decoder.init, static_argnums=0)(decoder, params, embeds, keys)
        step = jax.jit(Decoder.step, static_argnums=0).lower(decoder, params, state).compile()
        for _ in range(3):
            state, out = jax.jit(Decoder.step, static_argnums=0)(decoder, params, state)
            blocks.append(np.asarray(out.latents))
    count = lambda kind: np.array(len(re.findall(rf" {kind}(?:-start)?\(", step.as_text())))
    return {
        "latents": np.stack(blocks), "cache": np.array(state.cache.k.addressable_shards[0].data.shape),
        "all-to-all": count("all-to-all"),
    }  # fmt: skip


def kernel(mesh) -> dict[str, np.ndarray]:
    """Splash, interpreted: four videos of four heads; and each video by itself under a vmap, as streams in training."""
    q, k, v = (jax.random.normal(jax.random.key(i), (4, n, 4, 128)) for i, n in enumerate((40, 140, 140)))
    attend = functools.partial(splash.on_mesh, interpret=True)
    with sharding.using(mesh):
        out = {"plain": jax.jit(attend)(q, k, v, jnp.int32(130))}
        axes = () if mesh is None else ("data", "fsdp")
        one = jax.grad(lambda q, k, v: jnp.sum(attend(q, k, v) ** 2))
        streams = jax.jit(jax.vmap(one, spmd_axis_name=axes or None))
        with sharding.taken(*axes):
            out["streams"] = streams(*(a.reshape(2, 2, *a.shape[1:]) for a in (q, k, v)))
    return {name: np.asarray(a) for name, a in out.items()}


def main(output: str) -> None:
    meshes = {"alone": None, "mesh": sharding.make_mesh(data=2, context=2)}
    arrays = {f"{name} {key}": a for name, mesh in meshes.items() for key, a in (decode(mesh) | kernel(mesh)).items()}
    np.savez(output, **arrays)


@pytest.fixture(scope="module")
def four_devices(tmp_path_factory):
    output = tmp_path_factory.mktemp("context") / "arrays.npz"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    paths = os.pathsep.join(sys.path)
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, __file__, str(output)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with np.load(output) as arrays:
        return dict(arrays)


def test_latents_are_the_same_with_tokens_cut_up(four_devices):
    np.testing.assert_allclose(four_devices["mesh latents"], four_devices["alone latents"], atol=2e-5)
    assert np.abs(np.diff(four_devices["alone latents"], axis=0)).max() > 0.1


def test_the_cache_is_cut_up_by_heads(four_devices):
    layers, videos, slots, tokens, heads, channels = CACHE
    assert tuple(four_devices["alone cache"]) == CACHE
    assert tuple(four_devices["mesh cache"]) == (layers, videos // 2, slots, tokens, heads // 2, channels)


def test_heads_and_tokens_change_places_by_all_to_all(four_devices):
    assert four_devices["alone all-to-all"] == 0 < four_devices["mesh all-to-all"]


@pytest.mark.parametrize("what", ["plain", "streams"])
def test_splash_is_the_same_on_a_mesh(four_devices, what):
    np.testing.assert_allclose(four_devices[f"mesh {what}"], four_devices[f"alone {what}"], atol=1e-5)


if __name__ == "__main__":
    main(*sys.argv[1:])
