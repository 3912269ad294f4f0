"""A mesh changes where numbers are computed, not which. Eight devices need a process of their own: this file, run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax import checkpoint, sharding
from longlive_jax.config import ModelConfig
from longlive_jax.decoding.state import block_noise
from longlive_jax.errors import UserError
from longlive_jax.pipeline import LongLivePipeline

GOLDEN = Path(__file__).parent / "golden" / "sprites_specs.json"
"""Axes of every parameter of the sprites transformer on the mesh below. After a change that is meant: copy the
`specs` that a failing test shows."""

TIMELINES = [
    [(0, "a small red star stays still"), (1, "a large blue disc")],
    [(0, "a large blue disc"), (1, "a green square over a night sky")],
    [(0, "a green square over a night sky"), (1, "a large blue disc")],
    [(0, "a large blue disc"), (1, "a small red star stays still")],
]


def main(folder: str, output: str) -> None:
    """Runs on 8 devices: the same videos without and with a mesh, and what is where."""
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    arrays = {}
    for name, where in (("alone", None), ("mesh", mesh)):
        pipe = LongLivePipeline.from_pretrained(folder, mesh=where)
        video = pipe(TIMELINES, seconds=2, seed=[1, 2, 3, 4])
        keys = sharding.shard_batch(jnp.stack([jax.random.key(seed) for seed in range(4)]), where)
        noise = jax.jit(block_noise, static_argnums=(2, 3, 4))(keys, jnp.int32(6), 2, 2, (4, 4, 4))
        arrays |= {f"{name}_frames": video.frames, f"{name}_latents": video.latents, f"{name}_noise": noise}
        kernel = pipe.params["transformer"]["blocks"]["self_attn"]["q"]["kernel"]
        arrays[f"{name}_shard"] = np.array([kernel.addressable_shards[0].data.shape, kernel.shape])
        arrays[f"{name}_devices"] = np.array(len(keys.sharding.device_set))
    np.savez(output, **arrays)
    shapes = checkpoint.abstract_params("transformer", ModelConfig.sprites().transformer)
    specs = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        name = "/".join(str(p.key) for p in path)
        specs[name] = list(sharding.param_spec(name, leaf.shape, mesh))
    print(json.dumps(specs))


@pytest.fixture(scope="module")
def eight_devices(tiny_checkpoint, tmp_path_factory):
    """The arrays of `main`, and the specs it prints."""
    output = tmp_path_factory.mktemp("sharding") / "arrays.npz"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    command = [sys.executable, __file__, str(tiny_checkpoint), str(output)]
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with np.load(output) as arrays:
        return dict(arrays), json.loads(done.stdout)


def test_videos_are_the_same_on_a_mesh(eight_devices):
    arrays, _ = eight_devices
    np.testing.assert_allclose(arrays["mesh_latents"], arrays["alone_latents"], atol=1e-5)
    levels = np.abs(arrays["mesh_frames"].astype(int) - arrays["alone_frames"].astype(int))
    assert levels.max() <= 1
    assert arrays["alone_latents"].shape == (4, 8, 4, 4, 4)
    assert np.abs(np.diff(arrays["alone_latents"], axis=0)).max(axis=(1, 2, 3, 4)).min() > 0.1, "four different videos"


def test_noise_is_bit_equal_on_a_mesh(eight_devices):
    arrays, _ = eight_devices
    np.testing.assert_array_equal(arrays["mesh_noise"], arrays["alone_noise"])


def test_eight_devices_share_the_work(eight_devices):
    arrays, _ = eight_devices
    assert arrays["mesh_devices"] == 8
    shard, whole = arrays["mesh_shard"].tolist()
    assert (shard, whole) == ([2, 16, 16], [2, 32, 32]), "inputs over fsdp, outputs over tensor"
    shard, whole = arrays["alone_shard"].tolist()
    assert shard == whole


def test_specs_of_the_sprites_transformer(eight_devices):
    _, specs = eight_devices
    assert specs == json.loads(GOLDEN.read_text())


def test_a_mesh_of_one_device():
    assert dict(sharding.make_mesh().shape) == {"data": 1, "fsdp": 1, "context": 1, "tensor": 1}


def test_too_few_devices():
    message = "^mesh data 4 x fsdp 1 x context 1 x tensor 2 needs 8 devices, there are 1; make an axis smaller$"
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(data=4, tensor=2, devices=jax.devices()[:1])


def test_an_empty_axis():
    with pytest.raises(UserError, match="^mesh data 0 x .* has an empty axis; every axis needs 1 or more$"):
        sharding.make_mesh(data=0)


class FakeMesh:
    """A mesh as `param_spec` sees it."""

    shape = {"data": 1, "fsdp": 4, "context": 1, "tensor": 8}


def test_dimensions_that_an_axis_does_not_divide_stay_whole():
    spec = sharding.param_spec("blocks/self_attn/q/kernel", (2, 12, 12), FakeMesh)
    assert tuple(spec) == (None, "fsdp", None)
    assert tuple(sharding.param_spec("blocks/ffn/up/bias", (2, 16), FakeMesh)) == (None, "tensor")
    assert tuple(sharding.param_spec("blocks/cross_norm/weight", (2, 16), FakeMesh)) == ()


if __name__ == "__main__":
    main(*sys.argv[1:])
