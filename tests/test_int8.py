"""int8 from end to end: on the disk, on load, on a mesh, in a video; and what is refused.

Four devices need a process of their own: this file, run.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from longlive_jax import checkpoint, hub, memory, sharding
from longlive_jax.cli import main
from longlive_jax.config import ModelConfig, replace
from longlive_jax.conversion.export import export
from longlive_jax.conversion.quantize import quantize_folder
from longlive_jax.decoding.decoder import Decoder
from longlive_jax.errors import UserError
from longlive_jax.models.layers import structure
from longlive_jax.models.quantization import MATMULS, quantize_params, with_int8
from longlive_jax.models.transformer import WanTransformer
from longlive_jax.pipeline import LongLivePipeline
from longlive_jax.video import read_video

STAR = "a small red star stays still over a night sky"
BOTH = ("transformer", "text_encoder")


@pytest.fixture(scope="module")
def folder(tiny_checkpoint, tmp_path_factory) -> Path:
    """The tiny checkpoint, transformer and text encoder in int8."""
    output = tmp_path_factory.mktemp("int8") / "tiny"
    quantize_folder(tiny_checkpoint, output, BOTH)
    return output


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, two in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert one.dtype == two.dtype
        np.testing.assert_array_equal(one, two)


# On the disk


@pytest.mark.parametrize("part", BOTH)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_load_and_on_the_disk_are_the_same_bits(tiny_checkpoint, folder, part, dtype):
    on_load = checkpoint.load(tiny_checkpoint, part, dtype, quantization="int8")
    assert_equal(checkpoint.load(folder, part, dtype, quantization="int8"), on_load)
    kinds = {leaf.dtype.name for leaf in jax.tree.leaves(on_load)}
    assert kinds == {"int8", "float32", dtype}, "scales stay float32"


def test_stored_is_what_the_arrays_in_memory_become(tiny_checkpoint, folder):
    expected = quantize_params(checkpoint.load(tiny_checkpoint, "transformer"))
    assert_equal(checkpoint.load(folder, "transformer", quantization="int8"), expected)
    apart = checkpoint.load(folder, "transformer", quantization="int8", stacked=False)
    np.testing.assert_array_equal(apart["blocks"][1]["ffn"]["up"]["int8"], expected["blocks"]["ffn"]["up"]["int8"][1])


def test_what_is_not_quantised_is_as_it_was(tiny_checkpoint, folder):
    assert_equal(checkpoint.load(folder, "vae"), checkpoint.load(tiny_checkpoint, "vae"))
    ours, theirs = (checkpoint.load(f, "transformer", quantization="int8") for f in (folder, tiny_checkpoint))
    for name in ("patch_embedding", "text_embedding", "time_embedding", "time_projection", "head"):
        assert_equal(ours[name], theirs[name])
        assert not any(leaf.dtype == np.int8 for leaf in jax.tree.leaves(ours[name]))
    assert (folder / "tokenizer.json").read_bytes() == (tiny_checkpoint / "tokenizer.json").read_bytes()


def test_floats_of_an_int8_folder(tiny_checkpoint, folder):
    """For whatever knows nothing of int8: parity, training."""
    floats, original = (checkpoint.load(f, "transformer", np.float32) for f in (folder, tiny_checkpoint))
    assert jax.tree.structure(floats) == jax.tree.structure(original)
    for (path, ours), theirs in zip(jax.tree_util.tree_leaves_with_path(floats), jax.tree.leaves(original)):
        error = np.abs(ours - theirs).max()
        quantised = path[0].key == "blocks" and path[-1].key == "kernel"
        assert (0 < error <= np.abs(theirs).max() / 253) if quantised else error == 0


def test_the_shipped_model_is_smaller(tmp_path):
    report = quantize_folder(hub.find("sprites"), tmp_path / "int8")
    before, after = ((f / "transformer.safetensors").stat().st_size for f in (hub.find("sprites"), tmp_path / "int8"))
    assert after < 0.62 * before, "86 % of its numbers are in the blocks"
    assert report["summary"].endswith("parameters in bfloat16, blocks of the transformer in int8")
    assert report["parts"]["transformer"]["parameters"] == 1_588_928
    assert json.loads((tmp_path / "int8/config.json").read_text())["quantization"] == {"transformer": "int8"}
    assert checkpoint.load_provenance(tmp_path / "int8")["checkpoint"] == checkpoint.checkpoint_hash(
        hub.find("sprites")
    )


def test_once_is_enough(folder, tmp_path):
    with pytest.raises(UserError, match="is in int8 already; use it as it is$"):
        quantize_folder(folder, tmp_path / "again", BOTH)
    assert not list(tmp_path.iterdir())


def test_no_way_back_to_pytorch(folder, tmp_path):
    for to in ("torch", "diffusers"):
        with pytest.raises(
            UserError, match="is in int8, and what rounding took away .* convert the folder that it was"
        ):
            export(folder, tmp_path / "back", to)
    assert not list(tmp_path.iterdir())


# In memory


def test_the_estimate_knows_int8(tiny_config, folder):
    pipe = LongLivePipeline.from_pretrained(folder)
    assert pipe.quantization == dict.fromkeys(BOTH, "int8")
    assert pipe.params["transformer"]["blocks"]["self_attn"]["q"]["int8"].dtype == np.int8
    found = {"transformer": pipe.params["transformer"], "VAE": pipe.params["vae"], "text encoder": pipe._text_params}
    found = {name: sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for name, tree in found.items()}
    assert memory.weights(tiny_config, "float32", dict.fromkeys(BOTH, "int8")) == found
    wan = ModelConfig.t2v_1_3b()
    half, int8 = (memory.weights(wan, "bfloat16", q) for q in (None, {"transformer": "int8"}))
    assert 0.50 < int8["transformer"] / half["transformer"] < 0.52
    assert int8["text encoder"] == half["text encoder"]


class Mesh:
    """A mesh as `param_spec` sees it."""

    shape = {"data": 1, "fsdp": 2, "context": 1, "tensor": 2}


def test_a_mesh_cuts_int8_and_scales_as_the_kernels(tiny_config):
    def specs(quantization):
        tree = checkpoint.abstract_params("transformer", tiny_config.transformer, quantization)
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        names = {"/".join(str(p.key) for p in path): leaf.shape for path, leaf in leaves}
        return {name: tuple(sharding.param_spec(name, shape, Mesh)) for name, shape in names.items()}

    plain, int8 = specs(None), specs("int8")
    kernels = [name for name in plain if name.startswith("blocks/") and name.endswith("kernel")]
    assert len(kernels) == 10
    for kernel in kernels:
        layer = kernel.removesuffix("/kernel")
        layers, inputs, outputs = plain[kernel]
        assert {inputs, outputs} == {"fsdp", "tensor"}
        assert int8[f"{layer}/int8"] == (layers, outputs, inputs)
        assert int8[f"{layer}/scale"] == (layers, outputs)
    rest = set(plain) - set(kernels)
    assert {name: plain[name] for name in rest} == {name: int8[name] for name in rest}


def main_on_four_devices(folder: str) -> None:
    """The flow of the tiny transformer on one device and on a mesh of four, and the pieces of a layer."""
    cfg = checkpoint.load_config(folder).transformer
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    params = checkpoint.load(folder, "transformer", quantization="int8")
    placed = sharding.shard_params({"transformer": params}, mesh)["transformer"]
    layer = placed["blocks"]["ffn"]["up"]
    found = {name: layer[name].addressable_shards[0].data.shape for name in ("int8", "scale")}
    draw = np.random.default_rng(0).standard_normal
    x, prompt = jnp.asarray(draw((2, 2, 4, 4, 4)), jnp.float32), jnp.asarray(draw((2, 24, 16)), jnp.float32)
    for matmul in MATMULS:
        graph = structure(lambda: with_int8(WanTransformer(cfg, rngs=nnx.Rngs(0)), matmul))  # noqa: B023

        @jax.jit
        def flow(params, graph=graph):
            network = nnx.merge(graph, params)
            return network.bidirectional(x, jnp.full((2, 2), 500.0), network.text_kv(prompt))

        alone, spread = flow(params), flow(placed)
        found[matmul] = float(jnp.linalg.norm(alone - jnp.asarray(np.asarray(spread))) / jnp.linalg.norm(alone))
    print(json.dumps(found))


def test_four_devices_compute_the_same(folder):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, __file__, str(folder)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["int8"], found["scale"]) == ([2, 32, 16], [2, 32]), "of [2, 64, 32] and [2, 64]"
    assert found["weight_only"] < 1e-5
    assert found["w8a8"] < 5e-3, "a rounding may fall the other way"


# In a video


@pytest.fixture
def generate(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))

    def run(*args) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main(["generate", *(str(arg) for arg in args)])
        return ended.value.code, capsys.readouterr().err

    return run


def test_the_command(generate, tiny_checkpoint, folder):
    """One block of the tiny model; every video but the first two is made by programs that are compiled by then."""
    short, weight_only = (STAR, "--seconds", 0.5, "--scale", 1), ("--int8-matmul", "weight_only")
    options = {
        "float": ("--checkpoint", tiny_checkpoint),
        "load": ("--checkpoint", tiny_checkpoint, "--quantize", "int8", "--quantize-text-encoder", *weight_only),
        "stored": ("--checkpoint", folder, *weight_only),
        "again": ("--from", "load.json"),
    }
    videos, settings = {}, {}
    for name, chosen in options.items():
        code, error = generate(*(short if name != "again" else ("--scale", 1)), *chosen, "--output", f"{name}.mp4")
        assert code == 0, error
        assert ("in int8 (weight_only): not the numbers of the float weights" in error) == (name != "float")
        videos[name] = read_video(f"{name}.mp4")
        settings[name] = json.loads(Path(f"{name}.json").read_text())["settings"]
    assert videos["load"].std() > 1 and (videos["load"] != videos["float"]).any()
    np.testing.assert_array_equal(videos["stored"], videos["load"])
    np.testing.assert_array_equal(videos["again"], videos["load"])
    record = {"quantize": "int8", "quantize_text_encoder": True, "int8_matmul": "weight_only"}
    assert settings["load"] == settings["stored"] == settings["again"] == settings["float"] | record


def test_the_shipped_model():
    """A block of the sprites model in w8a8: pictures come out, and its latents are near those of float32."""
    settings = {"steps": (1000, 750, 500, 250), "rope": "absolute"}
    pipe = LongLivePipeline.from_pretrained("sprites", dtype="float32", quantize="int8", int8_matmul="w8a8")
    assert pipe.params["transformer"]["blocks"]["ffn"]["up"]["int8"].dtype == np.int8
    video = pipe(STAR, seconds=0.75, seed=3, decode="blocks", **settings)
    assert video.frames.shape == (1, 9, 64, 64, 3) and video.frames.std() > 5
    assert video.record["settings"]["int8_matmul"] == "w8a8"

    exact = LongLivePipeline.from_pretrained("sprites", dtype="float32")
    decoder = exact.decoder(replace(exact.config.sampler, **settings), 3)
    decoder = dataclasses.replace(decoder, vae=None)  # latents alone: the VAE need not be compiled again
    init, step = (jax.jit(method, static_argnums=0) for method in (Decoder.init, Decoder.step))
    state = init(decoder, exact.params, exact.encode_prompts([STAR]), jax.random.key(3)[None])
    _, out = step(decoder, exact.params, state)
    error = np.linalg.norm(video.latents - out.latents) / np.linalg.norm(out.latents)
    assert 1e-3 < error < 0.1


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--quantize", "int4"), "quantize is 'int4'; int8 is known, or leave it out"),
        (("--quantize", "int8", "--int8-matmul", "w4a4"), "int8_matmul is 'w4a4'; auto, weight_only and"),
        (("--int8-matmul", "w8a8"), "int8_matmul w8a8 is for int8 weights; add quantize int8, or leave it out"),
        (("--quantize-text-encoder",), "quantize_text_encoder goes with quantize int8; add that too"),
    ],
)
def test_options_that_cannot_be(generate, tmp_path, tiny_checkpoint, options, message):
    code, error = generate(STAR, "--checkpoint", tiny_checkpoint, *options, "--output", "a.mp4")
    assert code == 1
    assert len(error.splitlines()) == 1 and error.startswith(f"longlive: {message}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("label", [{"transformer": "int4"}, {"vae": "int8"}, "int8", [1]])
def test_an_unknown_label(folder, tmp_path, label):
    shutil.copytree(folder, tmp_path / "odd")
    config = json.loads((folder / "config.json").read_text()) | {"quantization": label}
    (tmp_path / "odd/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="config.json: quantization .* is not known; update longlive-jax"):
        LongLivePipeline.from_pretrained(tmp_path / "odd")


def test_label_and_tensors_that_differ(folder, tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "float")
    config = json.loads((tiny_checkpoint / "config.json").read_text()) | {"quantization": {"transformer": "int8"}}
    (tmp_path / "float/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="transformer.safetensors lacks .*q.int8.*; .*has unexpected .*q.kernel"):
        checkpoint.check(tmp_path / "float")
    shutil.copytree(folder, tmp_path / "wide")
    tensors = load_file(folder / "transformer.safetensors")
    tensors["blocks.0.ffn.up.int8"] = tensors["blocks.0.ffn.up.int8"].astype(np.float32)
    save_file(tensors, tmp_path / "wide/transformer.safetensors")
    with pytest.raises(UserError, match="blocks.0.ffn.up.int8 should be of type I8; convert the checkpoint again$"):
        checkpoint.check(tmp_path / "wide")


def test_numbers_that_have_no_int8(tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "broken")
    tensors = load_file(tiny_checkpoint / "transformer.safetensors")
    tensors["blocks.1.ffn.up.kernel"][3, 4] = np.inf
    save_file(tensors, tmp_path / "broken/transformer.safetensors")
    with pytest.raises(UserError, match="^blocks.1.ffn.up.kernel holds infinities or NaN and has no int8 form"):
        quantize_folder(tmp_path / "broken", tmp_path / "out")
    assert not (tmp_path / "out").exists()


if __name__ == "__main__":
    main_on_four_devices(*sys.argv[1:])
