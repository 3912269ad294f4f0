"""From a Wan folder to a checkpoint: what is written, what is refused, and that nothing is left of a refusal."""

import json
import os

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from longlive_jax import checkpoint
from longlive_jax.config import SamplerConfig
from longlive_jax.conversion.convert import convert_wan
from longlive_jax.errors import UserError
from longlive_jax.tokenizer import PromptTokenizer, train_unigram


def message(*args, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        convert_wan(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


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
    names = list(states["transformer"])
    weight_map = {}
    for number, chosen in enumerate((names[::2], names[1::2]), 1):
        file = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        save_file({name: states["transformer"][name] for name in chosen}, wan / file)
        weight_map.update(dict.fromkeys(chosen, file))
    index = wan / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    convert_wan(wan, tmp_path / "out", dtype="float32")
    kernel = checkpoint.load(tmp_path / "out", "transformer")["patch_embedding"]["kernel"]
    np.testing.assert_array_equal(kernel, states["transformer"]["patch_embedding.weight"].reshape(32, -1).T)


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
    before = sorted(tmp_path.iterdir())
    text = message(wan, tmp_path / "out", loras=[(tmp_path / "lora.pt", 1.0), (tmp_path / "none.pt", 1.0)])
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
