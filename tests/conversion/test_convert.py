"""From a Wan folder to a checkpoint: what is written, what is refused, and that nothing is left of a refusal."""

import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from longlive_jax import checkpoint
from longlive_jax.cli import main
from longlive_jax.cli.convert import ConsoleProgress
from longlive_jax.config import SamplerConfig, TextEncoderConfig
from longlive_jax.conversion import convert, tables
from longlive_jax.conversion.convert import convert_wan
from longlive_jax.conversion.export import export
from longlive_jax.conversion.progress import Progress
from longlive_jax.errors import UserError
from longlive_jax.tokenizer import PromptTokenizer, train_unigram


def message(*args, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        convert_wan(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def shard(tensors, folder):
    """Writes a DiT as two shards and their index."""
    names = list(tensors)
    weight_map = {}
    for number, chosen in enumerate((names[::2], names[1::2]), 1):
        file = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in chosen}, folder / file)
        weight_map.update(dict.fromkeys(chosen, file))
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


def leaves(folder, part):
    return jax.tree.leaves(checkpoint.load(folder, part))


def test_a_whole_folder(wan, tmp_path, configs, states):
    tokenizer = train_unigram(["a red square moves left"], 80)
    tokenizer.save(wan / "google/umt5-xxl")
    report = convert_wan(wan, tmp_path / "out", dtype="float32", verify=True)
    assert report["warnings"] == []
    assert report["verified"]
    assert report["hash"] == checkpoint.checkpoint_hash(tmp_path / "out")
    assert "float32, verified" in report["summary"]
    assert {part: values["tensors"] for part, values in report["parts"].items()} == {
        part: len(tensors) for part, tensors in states.items()
    }
    config = checkpoint.check(tmp_path / "out")
    assert {part: getattr(config, part) for part in configs} == configs
    assert config.sampler == SamplerConfig()
    loaded = checkpoint.load(tmp_path / "out", "transformer")
    np.testing.assert_array_equal(
        loaded["blocks"]["ffn"]["up"]["kernel"][1], states["transformer"]["blocks.1.ffn.0.weight"].T
    )
    read = PromptTokenizer.from_folder(tmp_path / "out", 64)
    np.testing.assert_array_equal(read("a red square").ids, tokenizer("a red square").ids)


def test_provenance(wan, tmp_path):
    convert_wan(wan, tmp_path / "out")
    provenance = checkpoint.load_provenance(tmp_path / "out")
    assert provenance["dtype"] == "bfloat16"
    assert [source["file"] for source in provenance["sources"]] == [
        "diffusion_pytorch_model.safetensors", "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth",
    ]  # fmt: skip
    assert all(len(source["sha256"]) == 64 and source["bytes"] > 0 for source in provenance["sources"])
    assert str(tmp_path) not in (tmp_path / "out/config.json").read_text()


def test_bfloat16(wan, tmp_path, states):
    convert_wan(wan, tmp_path / "out")
    for part in states:
        assert {leaf.dtype for leaf in leaves(tmp_path / "out", part)} == {np.dtype(ml_dtypes.bfloat16)}
    expected = states["transformer"]["head.head.weight"].bfloat16().T.float()
    kernel = checkpoint.load(tmp_path / "out", "transformer")["head"]["linear"]["kernel"]
    np.testing.assert_array_equal(kernel.astype(np.float32), expected)


def test_a_folder_without_text_encoder_or_tokenizer(wan, tmp_path):
    (wan / "models_t5_umt5-xxl-enc-bf16.pth").unlink()
    report = convert_wan(wan, tmp_path / "out")
    assert len(report["warnings"]) == 2
    assert "models_t5_umt5-xxl-enc-bf16.pth is missing" in report["warnings"][0]
    assert "tokenizer.json is missing" in report["warnings"][1]
    assert checkpoint.load_config(tmp_path / "out").text_encoder is None
    assert not (tmp_path / "out/tokenizer.json").exists()


def test_a_sharded_transformer(wan, tmp_path, states):
    (wan / "diffusion_pytorch_model.safetensors").unlink()
    shard(states["transformer"], wan)
    convert_wan(wan, tmp_path / "out", dtype="float32")
    kernel = checkpoint.load(tmp_path / "out", "transformer")["patch_embedding"]["kernel"]
    np.testing.assert_array_equal(kernel, states["transformer"]["patch_embedding.weight"].reshape(32, -1).T)


def test_fourteen_billion_in_small(wan, tmp_path, configs, states):
    """Nothing is assumed to be 1.3B: more layers, wider, other head count, in shards, half precision."""
    (wan / "diffusion_pytorch_model.safetensors").unlink()
    cfg = dataclasses.replace(configs["transformer"], dim=60, ffn_dim=52, num_layers=3, num_heads=5)
    shapes = tables.WAN["transformer"](cfg).torch_shapes(checkpoint.tensor_shapes("transformer", cfg))
    tensors = {name: torch.randn(shape).half() for name, shape in shapes.items()}
    shard(tensors, wan)
    settings = json.loads((wan / "config.json").read_text())
    settings.update(dim=60, ffn_dim=52, num_layers=3, num_heads=5)
    (wan / "config.json").write_text(json.dumps(settings))
    report = convert_wan(wan, tmp_path / "out", verify=True)
    assert checkpoint.load_config(tmp_path / "out").transformer == cfg
    assert report["layers"]["linear"]["allowed"] > 1e-3  # bfloat16 cannot hold float16
    assert [s["file"] for s in report["sources"]][:2] == [
        f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)
    ]


# MARK: generator and LoRA


def test_generator_replaces_the_transformer(wan, tmp_path, states):
    (wan / "diffusion_pytorch_model.safetensors").unlink()
    wrapped = {f"model._fsdp_wrapped_module.{n}": t + 1 for n, t in states["transformer"].items()}
    torch.save({"generator_ema": wrapped, "step": 3}, tmp_path / "base.pt")
    report = convert_wan(wan, tmp_path / "out", generator=tmp_path / "base.pt", dtype="float32")
    assert report["transformer"] == "base.pt [generator_ema]"
    bias = checkpoint.load(tmp_path / "out", "transformer")["head"]["linear"]["bias"]
    np.testing.assert_array_equal(bias, states["transformer"]["head.head.bias"] + 1)
    text = message(wan, tmp_path / "two", generator=tmp_path / "base.pt", generator_key="generator")
    assert "no entry 'generator'; it has generator_ema" in text
    assert "--generator" in message(wan, tmp_path / "two", generator_key="model")


def test_lora_is_merged_before_the_cast(wan, tmp_path, states, lora):
    torch.save({"generator_lora": lora}, tmp_path / "lora.pt")
    loras = [(tmp_path / "lora.pt", 1.0), (tmp_path / "lora.pt", -0.25)]
    report = convert_wan(wan, tmp_path / "out", loras=loras, lora_alpha=8.0)
    assert [(entry["scale"], entry["rank"], entry["alpha"]) for entry in report["loras"]] == [(1, 4, 8), (-0.25, 4, 8)]
    assert "2 LoRA merged" in report["summary"]
    a, b = (lora[f"base_model.model.blocks.0.self_attn.q.lora_{side}.weight"] for side in "AB")
    merged = states["transformer"]["blocks.0.self_attn.q.weight"] + 1.5 * (b @ a)
    blocks = checkpoint.load(tmp_path / "out", "transformer")["blocks"]["self_attn"]["q"]["kernel"]
    np.testing.assert_allclose(blocks[0].astype(np.float32), merged.bfloat16().float().T, rtol=0.01)
    assert (blocks[0].astype(np.float32) == merged.bfloat16().float().T.numpy()).mean() > 0.99
    untouched = states["transformer"]["blocks.1.self_attn.q.weight"].bfloat16().float().T
    np.testing.assert_array_equal(blocks[1].astype(np.float32), untouched)


@pytest.mark.parametrize("form", ["generator", "generator_ema", "bare", "safetensors"])
def test_self_forcing_files(wan, tmp_path, states, form):
    """`generator` goes before `generator_ema`; what else such a file has is left alone."""
    tensors = {f"model.{name}": tensor + 1 for name, tensor in states["transformer"].items()}
    other = {f"model.{name}": tensor - 1 for name, tensor in states["transformer"].items()}
    path = tmp_path / ("dmd.safetensors" if form == "safetensors" else "dmd.pth")
    if form == "safetensors":
        save_file(tensors, path)
    else:
        entries = {"generator": {"generator": tensors, "generator_ema": other}, "generator_ema": {form: tensors}}
        torch.save({"critic": other, "step": 9, **entries[form]} if form in entries else tensors, path)
    convert_wan(wan, tmp_path / "out", generator=path, dtype="float32")
    bias = checkpoint.load(tmp_path / "out", "transformer")["head"]["linear"]["bias"]
    np.testing.assert_array_equal(bias, states["transformer"]["head.head.bias"] + 1)


def test_user_loras_of_three_kinds(wan, tmp_path, states, lora):
    torch.save({"generator_lora": lora}, tmp_path / "lora.pt")
    name = "blocks.0.self_attn.q.weight"
    a, b = (lora[f"base_model.model.blocks.0.self_attn.q.lora_{side}.weight"] for side in "AB")
    kohya = {
        "lora_unet_blocks_0_self_attn_q.lora_down.weight": a[:2].contiguous(),
        "lora_unet_blocks_0_self_attn_q.lora_up.weight": b[:, :2].contiguous(),
        "lora_unet_blocks_0_self_attn_q.alpha": torch.tensor(1.0),
    }
    save_file(kohya, tmp_path / "kohya.safetensors")
    diffusers = {f"transformer.blocks.0.attn1.to_q.lora_{side}.weight": t for side, t in (("A", a), ("B", b))}
    save_file(diffusers, tmp_path / "diffusers.safetensors")
    loras = [(tmp_path / "lora.pt", 1.0), (str(tmp_path / "kohya.safetensors"), 2.0)]
    loras.append((tmp_path / "diffusers.safetensors", -0.5))
    report = convert_wan(wan, tmp_path / "out", loras=loras, lora_alpha=8.0, dtype="float32", verify=True)
    assert [(entry["rank"], entry["alpha"]) for entry in report["loras"]] == [(4, 8), (2, 1), (4, 8)]
    merged = states["transformer"][name] + 2 * b @ a + b[:, :2] @ a[:2] - b @ a
    kernel = checkpoint.load(tmp_path / "out", "transformer")["blocks"]["self_attn"]["q"]["kernel"][0]
    np.testing.assert_allclose(kernel, merged.T, atol=1e-5)
    assert report["layers"]["linear"]["worst"] < 1e-5
    only = [(tmp_path / "kohya.safetensors", 1.0)]
    assert "--lora-alpha is for LoRAs that do not say their alpha" in message(
        wan, tmp_path / "two", loras=only, lora_alpha=1.0
    )


def test_a_lora_with_whole_differences(wan, tmp_path, states, lora):
    diffs = {
        "diffusion_model.blocks.1.ffn.2.diff_b": torch.randn(32),
        "diffusion_model.blocks.0.self_attn.norm_k.diff": torch.randn(32),
        "diffusion_model.blocks.0.modulation.diff": torch.randn(1, 6, 32),
    }
    save_file({**lora, **diffs}, tmp_path / "lora.safetensors")
    loras = [(tmp_path / "lora.safetensors", 0.5)]
    report = convert_wan(wan, tmp_path / "out", loras=loras, dtype="float32", verify=True)
    assert report["loras"][0]["weights"] == 5
    assert all(kind["worst"] < 1e-5 for kind in report["layers"].values())
    blocks = checkpoint.load(tmp_path / "out", "transformer")["blocks"]
    for name, ours in (
        ("blocks.1.ffn.2.bias", blocks["ffn"]["down"]["bias"][1]),
        ("blocks.0.self_attn.norm_k.weight", blocks["self_attn"]["norm_k"]["weight"][0]),
        ("blocks.0.modulation", blocks["modulation"][None, 0]),
    ):
        diff = next(t for key, t in diffs.items() if name.startswith(key.split(".", 1)[1].rpartition(".")[0]))
        np.testing.assert_allclose(ours, states["transformer"][name] + 0.5 * diff, atol=1e-6)


def test_lora_that_matches_nothing(wan, tmp_path, lora):
    torch.save({name.replace("blocks", "layers"): tensor for name, tensor in lora.items()}, tmp_path / "lora.pt")
    assert "matches nothing" in message(wan, tmp_path / "out", loras=[(tmp_path / "lora.pt", 1.0)])
    assert not (tmp_path / "out").exists()


# MARK: faults


def test_all_faults_at_once_and_nothing_written(wan, tmp_path, lora):
    path = wan / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["img_emb.proj.weight"] = tensors.pop("blocks.1.norm3.bias")
    tensors["head.head.bias"] = torch.ones(7)
    tensors["time_embedding.0.bias"] = torch.ones(32, dtype=torch.int64)
    save_file(tensors, path)
    os.truncate(wan / "Wan2.1_VAE.pth", 300)
    text_encoder = torch.load(wan / "models_t5_umt5-xxl-enc-bf16.pth")
    del text_encoder["norm.weight"]
    torch.save(text_encoder, wan / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save({"generator_lora": {}}, tmp_path / "lora.pt")
    half = {name: tensor[:, :-1] for name, tensor in lora.items() if "ffn.2.lora_A" not in name}
    torch.save(half, tmp_path / "half.pt")
    before = sorted(tmp_path.iterdir())
    loras = [(tmp_path / name, 1.0) for name in ("lora.pt", "none.pt", "half.pt")]
    text = message(wan, tmp_path / "out", loras=loras)
    for part in (
        "nothing was written",
        "lacks blocks.1.norm3.bias",
        "unexpected img_emb.proj.weight",
        "head.head.bias is [7], expected [64]",
        "time_embedding.0.bias hold no floating-point numbers",
        "Wan2.1_VAE.pth is cut off or damaged",
        "lacks norm.weight",
        "lora.pt [generator_lora] is an empty LoRA",
        "none.pt: No such file",
        "half.pt has half a pair for blocks.1.ffn.2.weight",
        "half.pt: B [32, 3] times A [4, 31] does not fit blocks.0.self_attn.q.weight",
    ):
        assert part in text
    assert sorted(tmp_path.iterdir()) == before


def test_an_empty_folder_lists_what_is_expected(tmp_path):
    (tmp_path / "wan").mkdir()
    text = message(tmp_path / "wan", tmp_path / "out")
    for name in ("config.json", "diffusion_pytorch_model.safetensors", "Wan2.1_VAE.pth"):
        assert str(tmp_path / "wan" / name) in text
    assert "there is no folder" in message(tmp_path / "none", tmp_path / "out")


def test_parts_must_fit_each_other(wan, tmp_path, states):
    narrow = {}
    for name, tensor in states["text_encoder"].items():
        tensor = tensor[..., :20] if tensor.shape[-1] == 24 else tensor
        narrow[name] = tensor[:20] if tensor.shape[0] == 24 else tensor
    torch.save(narrow, wan / "models_t5_umt5-xxl-enc-bf16.pth")
    assert "gives 20 numbers a token, the transformer expects 24" in message(wan, tmp_path / "out")


def test_tokenizer_must_fit_the_text_encoder(wan, tmp_path):
    train_unigram([f"word{i} thing{i}" for i in range(90)], 200).save(wan / "google/umt5-xxl")
    assert "use the tokeniser that belongs to it" in message(wan, tmp_path / "out")
    (wan / "google/umt5-xxl/tokenizer.json").write_text("{")
    assert "no tokenizer file" in message(wan, tmp_path / "out")


def test_output_and_dtype_are_checked_first(wan, tmp_path):
    assert "choose bfloat16 or float32" in message(wan, tmp_path / "out", dtype="bloat16")
    (tmp_path / "out").mkdir()
    assert "exists and is kept" in message(wan, tmp_path / "out")
    assert "not a checkpoint folder" in message(wan, wan, overwrite=True)
    assert (wan / "config.json").exists()
    convert_wan(wan, tmp_path / "out", overwrite=True)
    first = checkpoint.checkpoint_hash(tmp_path / "out")
    convert_wan(wan, tmp_path / "out", overwrite=True, dtype="float32")
    assert checkpoint.checkpoint_hash(tmp_path / "out") != first


def test_unsafe_pickle(wan, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save({"generator": {"w": torch.ones(2)}, "x": Evil()}, tmp_path / "base.pt")
    assert "refused" in message(wan, tmp_path / "out", generator=tmp_path / "base.pt")
    assert not (tmp_path / "harm").exists()


def test_verify_finds_what_the_disk_lost(wan, tmp_path, monkeypatch):
    written = checkpoint.write_safetensors

    def lossy(path, tensors, metadata=None):
        hashes = written(path, tensors, metadata)
        with open(path, "r+b") as file:
            file.seek(-2, os.SEEK_END)
            file.write(b"\xff\xff")
        return hashes

    monkeypatch.setattr(checkpoint, "write_safetensors", lossy)
    text = message(wan, tmp_path / "out", verify=True)
    assert "the disk did not keep what was written" in text
    assert [path.name for path in tmp_path.iterdir()] == ["wan"]


# MARK: proof


def test_the_report_in_the_folder(wan, tmp_path, states):
    report = convert_wan(wan, tmp_path / "out", verify=True)
    written = json.loads((tmp_path / "out/conversion.json").read_text())
    assert written == {name: value for name, value in report.items() if name not in ("output", "warnings")}
    assert str(tmp_path) not in (tmp_path / "out/conversion.json").read_text()
    files = checkpoint.open_part(tmp_path / "out", "vae", checkpoint.load_config(tmp_path / "out").vae)
    assert set(written["parts"]["vae"]["sha256"]) == set(files.shapes)
    layers = written["layers"]
    assert set(layers) == {
        "linear", "patch_embedding", "point_convolution", "conv3d", "conv2d",
        "rms_norm", "layer_norm", "channel_norm", "embedding", "parameter",
    }  # fmt: skip
    layer = lambda name: name.rpartition(".")[0] if name.endswith((".weight", ".bias", ".gamma")) else name
    assert sum(kind["modules"] for kind in layers.values()) == sum(len(set(map(layer, s))) for s in states.values())
    assert all(1e-5 < kind["allowed"] < 0.01 for name, kind in layers.items() if name != "embedding")
    assert layers["embedding"]["worst"] == 0  # bfloat16 on both sides
    assert all(0 < kind["worst"] < 0.004 for name, kind in layers.items() if name != "embedding")
    assert checkpoint.check(tmp_path / "out")
    exact = convert_wan(wan, tmp_path / "exact", dtype="float32", verify=True)
    assert all(kind["worst"] < kind["allowed"] == 1e-5 for kind in exact["layers"].values())
    assert convert_wan(wan, tmp_path / "quick")["layers"] is None


MISTAKES = {
    tables.LINEAR: lambda w: w.T if w.shape[0] == w.shape[1] else w,
    tables.PATCHIFY: lambda w: w[::-1],
    tables.POINT3D: lambda w: w[:, ::-1],
    tables.CONV3D: lambda w: w[::-1],
    tables.CONV2D: lambda w: w.swapaxes(0, 1),
    tables.GAMMA3D: lambda w: w[::-1],
    tables.ONE_FIRST: lambda w: w[::-1],
    tables.SAME: lambda w: w[::-1],
}
"""In the layout of a tensor, such as no checksum or shape shows."""


def test_verify_finds_wrong_layouts(wan, tmp_path, monkeypatch):
    right = tables.Transform.to_ours

    def to_ours(self, array, **sizes):
        return MISTAKES.get(self, lambda w: w)(right(self, array, **sizes))

    monkeypatch.setattr(tables.Transform, "to_ours", to_ours)
    text = message(wan, tmp_path / "out", verify=True)
    assert "converted layers differ from PyTorch's, nothing was written" in text
    for kind in (
        "linear", "patch_embedding", "point_convolution", "conv3d", "conv2d",
        "rms_norm", "layer_norm", "channel_norm", "embedding", "parameter",
    ):  # fmt: skip
        assert f" {kind} layers (worst" in text
    assert [path.name for path in tmp_path.iterdir()] == ["wan"]


def test_verify_finds_a_wrong_merge_and_what_is_no_number(wan, tmp_path, states, lora, monkeypatch):
    torch.save(lora, tmp_path / "lora.pt")
    right = convert.merge
    monkeypatch.setattr(convert, "merge", lambda name, values, loras: right(name, values, loras * 2))
    text = message(wan, tmp_path / "out", loras=[(tmp_path / "lora.pt", 1.0)], verify=True)
    assert "2 of " in text and "linear layers (worst blocks." in text
    monkeypatch.undo()
    vae = {**states["vae"], "decoder.head.2.bias": torch.tensor([0.0, float("nan"), 0.0])}
    torch.save(vae, wan / "Wan2.1_VAE.pth")
    assert "1 of" in (text := message(wan, tmp_path / "out", verify=True))
    assert "worst decoder.head.2: relative error nan" in text


def test_verify_without_torch(wan, tmp_path, states, monkeypatch):
    for part, name in (("vae", "Wan2.1_VAE"), ("text_encoder", "models_t5_umt5-xxl-enc-bf16")):
        (wan / f"{name}.pth").unlink()
        save_file(states[part], wan / f"{name}.safetensors")
    monkeypatch.setitem(sys.modules, "torch", None)
    report = convert_wan(wan, tmp_path / "out", verify=True)
    assert (report["verified"], report["layers"]) == (True, None)
    assert "only checksums were compared" in report["warnings"][-1]
    assert report["summary"].endswith("verified")


KILLED = """
import os, signal, sys
from longlive_jax.conversion.convert import convert_wan
from longlive_jax.conversion.progress import Progress
class Killer(Progress):
    def advance(self, stage, nbytes, items=1):
        if stage == "writing vae":
            os.kill(os.getpid(), signal.SIGKILL)
convert_wan(sys.argv[1], sys.argv[2], overwrite=True, progress=Killer())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_conversion_that_is_killed(wan, tmp_path):
    """Not even then is there a part of a checkpoint by its name, and an earlier one stays."""
    convert_wan(wan, tmp_path / "earlier", dtype="float32")
    before = checkpoint.checkpoint_hash(tmp_path / "earlier")
    for name in ("new", "earlier"):
        done = subprocess.run([sys.executable, "-c", KILLED, str(wan), str(tmp_path / name)], capture_output=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "new").exists()
    assert checkpoint.checkpoint_hash(tmp_path / "earlier") == before
    left = [path.name for path in tmp_path.iterdir() if path.name not in ("wan", "earlier")]
    assert sorted(name.split(".")[1] for name in left) == ["earlier", "new"]
    assert all(name.endswith(".tmp") for name in left)


# MARK: progress


class Told(Progress):
    """Notes what it is told, and that no stage does more than was planned."""

    def plan(self, stages):
        self.stages = {stage.name: stage for stage in stages}
        self.left = {stage.name: [stage.items, stage.nbytes] for stage in stages}
        self.order = []

    def advance(self, stage, nbytes, items=1):
        self.left[stage] = [self.left[stage][0] - items, self.left[stage][1] - nbytes]
        self.order += [stage] if stage not in self.order else []
        assert min(self.left[stage]) >= 0


def test_progress_comes_out_even(wan, tmp_path):
    """Every stage is told, in order, and ends with all of its tensors and bytes done."""
    told = Told()
    report = convert_wan(wan, tmp_path / "out", verify=True, progress=told)
    parts = ["writing transformer", "writing vae", "writing text encoder"]
    assert told.order == list(told.stages) == ["hashing sources", *parts, "reading back", "comparing layers"]
    assert set(map(tuple, told.left.values())) == {(0, 0)}
    assert told.stages["writing vae"].nbytes == report["parts"]["vae"]["bytes"]
    export(tmp_path / "out", tmp_path / "torch", "torch", progress=told)
    assert told.order == list(told.stages)
    assert told.order[:2] == ["writing transformer", "writing longlive_base.pt"]
    assert set(map(tuple, told.left.values())) == {(0, 0)}
    export(tmp_path / "out", tmp_path / "diffusers", "diffusers", progress=told)
    assert told.order == list(told.stages) == parts
    assert set(map(tuple, told.left.values())) == {(0, 0)}


def test_progress_in_a_log(wan, tmp_path, capsys):
    """No terminal: a line a stage, and standard output has the summary alone."""
    with pytest.raises(SystemExit) as ended:
        main(["convert", "--wan", str(wan), "--output", str(tmp_path / "out")])
    out, err = capsys.readouterr()
    assert ended.value.code == 0
    assert len(out.splitlines()) == 1
    lines = [line for line in err.splitlines() if not line.startswith("warning")]
    assert [line.split(":")[0] for line in lines] == [
        "hashing sources", "writing transformer", "writing vae", "writing text encoder",
    ]  # fmt: skip
    assert all(re.fullmatch(r".+: \d+ (files|tensors), \d+\.\d\d GB, \d+ s", line) for line in lines), lines
    assert "\x1b" not in err


def test_progress_on_a_terminal(wan, tmp_path):
    """One line that is written over, with tensors, bytes and the time left."""
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=150)
    with ConsoleProgress(console) as progress:
        convert_wan(wan, tmp_path / "out", progress=progress)
        progress.bar.refresh()
        assert progress.bar.tasks[0].finished
    text = terminal.getvalue()
    assert "writing text encoder: " in text
    assert " tensors, 0.00 of 0.00 GB" in text
    assert "100%" in text
    assert "0:00:00" in text


MEMORY = """
import sys
from longlive_jax.conversion.convert import convert_wan
def peak():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines["VmHWM"].split()[0]) / 1024
for folder in sys.argv[1:]:
    convert_wan(folder, folder + "-out")
    print(peak())
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory in use is read from Linux's /proc")
def test_a_large_file_does_not_count_as_memory(wan, tmp_path):
    """Text encoders of 140 and 370 MB with equal layers of 46 MB, so the largest tensor is the same: an equal peak."""
    dit = load_file(wan / "diffusion_pytorch_model.safetensors")
    dit["text_embedding.0.weight"] = torch.randn(32, 1024)
    save_file(dit, wan / "diffusion_pytorch_model.safetensors")
    sizes = {}
    for layers in (3, 8):
        folder = shutil.copytree(wan, tmp_path / f"{layers}-layers")
        cfg = TextEncoderConfig(
            vocab_size=90, dim=1024, attention_dim=1024, ffn_dim=2560, num_heads=4, num_layers=layers
        )
        shapes = tables.WAN["text_encoder"](cfg).torch_shapes(checkpoint.tensor_shapes("text_encoder", cfg))
        path = folder / "models_t5_umt5-xxl-enc-bf16.pth"
        torch.save({name: torch.randn(shape) for name, shape in shapes.items()}, path)
        sizes[folder] = path.stat().st_size / 2**20
    done = subprocess.run([sys.executable, "-c", MEMORY, *map(str, sizes)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    small, large = map(float, done.stdout.split())
    print(f"files {list(sizes.values())} MB, peaks {small:.0f} and {large:.0f} MB")
    assert large - small < (max(sizes.values()) - min(sizes.values())) / 4


# MARK: from the hub

OFFLINE = """
import socket, sys
def refuse(*_): raise AssertionError("the network was asked")
if "online" in sys.argv:
    socket.getaddrinfo = socket.socket.connect = refuse
from longlive_jax.cli import main
main([argument for argument in sys.argv[1:] if argument != "online"])
"""


@pytest.mark.parametrize("mode", ["HF_HUB_OFFLINE", "online"])
def test_by_hub_ids_from_the_cache(wan, tmp_path, lora, states, hub_cache, mode):
    """All three sources by id in a new process, without network: by HF_HUB_OFFLINE, or since all is on the disk."""
    train_unigram(["a red square moves left"], 80).save(wan / "google/umt5-xxl")
    torch.save({"generator": states["transformer"]}, tmp_path / "base.pt")
    torch.save({"generator_lora": lora}, tmp_path / "lora.pt")
    hub_cache("Wan-AI/Wan-tiny", wan)
    hub_cache("org/long", tmp_path / "base.pt", "models/base.pt")
    hub_cache("org/long", tmp_path / "lora.pt", "models/lora.pt")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {"HF_HOME": str(tmp_path / "home")}
    if mode != "online":
        environment["HF_HUB_OFFLINE"] = "1"
    arguments = ["--wan", "Wan-AI/Wan-tiny", "--generator", "org/long/models/base.pt"]
    arguments += ["--lora", "org/long/models/lora.pt:0.5", "--output", str(tmp_path / "out")]
    command = [sys.executable, "-c", OFFLINE, "convert", *arguments, *(["online"] if mode == "online" else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1 LoRA merged" in done.stdout
    provenance = checkpoint.load_provenance(tmp_path / "out")
    assert [source["hub"].partition("@")[0] for source in provenance["sources"]] == [
        "org/long", "Wan-AI/Wan-tiny", "Wan-AI/Wan-tiny", "org/long", "Wan-AI/Wan-tiny",
    ]  # fmt: skip
    assert provenance["sources"][0]["file"] == "base.pt"
    assert provenance["loras"][0]["scale"] == 0.5
    assert str(tmp_path) not in (tmp_path / "out/conversion.json").read_text()
