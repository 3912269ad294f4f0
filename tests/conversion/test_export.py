"""The way back to LongLive's and Wan's own files: bit for bit, all of it or nothing."""

import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from longlive_jax import checkpoint
from longlive_jax.cli import main
from longlive_jax.config import SamplerConfig, replace
from longlive_jax.conversion import export as exporting
from longlive_jax.conversion import torch_files
from longlive_jax.conversion.convert import convert_wan
from longlive_jax.conversion.export import export
from longlive_jax.conversion.lora import lora_faults, open_lora
from longlive_jax.conversion.lora_file import write_lora
from longlive_jax.errors import UserError
from longlive_jax.tokenizer import train_unigram
from longlive_jax.training import lora

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FILES = {"vae": "Wan2.1_VAE.pth", "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth"}


@pytest.fixture
def ours(wan, tmp_path):
    """A checkpoint in float32, with a tokeniser."""
    train_unigram(["a red square moves left"], 80).save(wan / "google/umt5-xxl")
    convert_wan(wan, tmp_path / "ours", dtype="float32")
    return tmp_path / "ours"


def message(*args, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        export(*args, **kwargs)
    return str(error.value)


def assert_equal(loaded, original, dtype):
    assert loaded.keys() == original.keys()
    for name, value in original.items():
        assert loaded[name].dtype == dtype
        assert torch.equal(loaded[name], value.to(dtype)), name


# MARK: LongLive's and Wan's files


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_there_and_back(wan, tmp_path, states, dtype):
    text_state = {name: tensor.bfloat16() for name, tensor in states["text_encoder"].items()}  # as the file has it
    convert_wan(wan, tmp_path / "ours", dtype=dtype)
    report = export(tmp_path / "ours", tmp_path / "back", "torch")
    assert f"parameters in {dtype}" in report["summary"]
    kind = DTYPES[dtype]
    assert_equal(load_file(tmp_path / "back/diffusion_pytorch_model.safetensors"), states["transformer"], kind)
    assert_equal(torch.load(tmp_path / "back" / FILES["vae"]), states["vae"], kind)
    assert_equal(torch.load(tmp_path / "back" / FILES["text_encoder"]), text_state, kind)
    generator = torch.load(tmp_path / "back/longlive_base.pt", mmap=True)
    assert list(generator) == ["generator"]
    assert all(name.startswith("model.") for name in generator["generator"])
    plain = {name.removeprefix("model."): tensor for name, tensor in generator["generator"].items()}
    assert_equal(plain, states["transformer"], kind)
    hash = checkpoint.checkpoint_hash(tmp_path / "ours")
    for name, kwargs in (("again", {}), ("generator", {"generator": tmp_path / "back/longlive_base.pt"})):
        assert convert_wan(tmp_path / "back", tmp_path / name, dtype=dtype, **kwargs)["hash"] == hash


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_to_diffusers_to_ours(wan, tmp_path, dtype):
    convert_wan(wan, tmp_path / "ours", dtype=dtype)
    report = export(tmp_path / "ours", tmp_path / "pipeline", "diffusers")
    assert "transformer: text_length is 8" in " ".join(report["warnings"])
    again = convert_wan(tmp_path / "pipeline", tmp_path / "again", dtype=dtype)
    assert again["hash"] == checkpoint.checkpoint_hash(tmp_path / "ours")


def test_what_the_files_cannot_say_comes_back(tmp_path, ours, states):
    """Settings that neither format has a place for: the sampler's, and sizes that Wan's code has built in."""
    config = checkpoint.load_config(ours)
    config = replace(
        config,
        sampler=SamplerConfig(height=64, width=96, steps=(1000.0, 500.0), window=-1),
        vae=replace(config.vae, latent_mean=[0.0] * 16),
        text_encoder=replace(config.text_encoder, max_distance=99),
        transformer=replace(config.transformer, rope_theta=5000.0),
    )
    parts = {part: checkpoint.load(ours, part) for part in states}
    checkpoint.save(tmp_path / "odd", config, parts)
    for to in ("torch", "diffusers"):
        report = export(tmp_path / "odd", tmp_path / to, to)
        said = " ".join(report["warnings"])
        assert "no tokeniser" in said
        assert "rope_theta is 5000.0, but 10000.0 is what the code that reads" in said
        assert ("latent_mean" in said) == ("max_distance" in said) == (to == "torch")
        convert_wan(tmp_path / to, tmp_path / f"from_{to}", dtype="float32")
        assert checkpoint.load_config(tmp_path / f"from_{to}") == config


def test_tokenizer(ours, tmp_path):
    export(ours, tmp_path / "back", "torch")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back/google/umt5-xxl")
    assert tokenizer("a red square").input_ids[-1] == 1  # </s>, which Wan's code leaves to the tokeniser
    assert tokenizer.pad_token_id == 0


def test_wan_config(ours, tmp_path):
    export(ours, tmp_path / "back", "torch")
    settings = json.loads((tmp_path / "back/config.json").read_text())
    expected = {"model_type": "t2v", "dim": 32, "ffn_dim": 48, "num_heads": 2, "num_layers": 2, "text_len": 8}
    assert expected.items() <= settings.items()


def test_shards(ours, tmp_path, states, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 30_000)
    export(ours, tmp_path / "back", "torch")
    assert not (tmp_path / "back/diffusion_pytorch_model.safetensors").exists()
    assert len(list((tmp_path / "back").glob("diffusion_pytorch_model-*.safetensors"))) > 2
    plain = {f"model.{name}": tensor for name, tensor in states["transformer"].items()}
    assert_equal(torch.load(tmp_path / "back/longlive_base.pt")["generator"], plain, torch.float32)


def test_a_cast_if_asked(ours, tmp_path, states):
    export(ours, tmp_path / "back", "torch", dtype="bfloat16")
    assert_equal(torch.load(tmp_path / "back" / FILES["vae"]), states["vae"], torch.bfloat16)


def test_pickles_hold_one_storage_a_tensor(ours, tmp_path):
    """Saved views of one mapped file must not drag the whole file into the pickle, nor leave the file behind."""
    export(ours, tmp_path / "back", "torch")
    state = torch.load(tmp_path / "back" / FILES["vae"])
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in state.values())
    assert not [path for path in (tmp_path / "back").rglob("*") if path.name.startswith(".")]


# MARK: all or nothing


def test_outputs_are_kept(ours, tmp_path):
    export(ours, tmp_path / "back", "torch")
    assert "exists and is kept" in message(ours, tmp_path / "back", "diffusers")
    export(ours, tmp_path / "back", "diffusers", overwrite=True)
    assert (tmp_path / "back/model_index.json").is_file()
    assert not (tmp_path / "back/longlive_base.pt").exists()
    assert "is not a folder that `longlive convert --to` made" in message(ours, ours, "torch", overwrite=True)
    assert checkpoint.check(ours)


def test_nothing_is_left_of_a_failure(ours, tmp_path, monkeypatch):
    before = sorted(tmp_path.iterdir())

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "torch_save", full)
    assert "No space left on device" in message(ours, tmp_path / "back", "torch")
    assert sorted(tmp_path.iterdir()) == before


def test_a_damaged_checkpoint(ours, tmp_path):
    (ours / "vae.safetensors").unlink()
    assert "vae.safetensors is missing" in message(ours, tmp_path / "back", "torch")
    assert not (tmp_path / "back").exists()


def test_without_pytorch(ours, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert 'pip install "longlive-jax[convert]"' in message(ours, tmp_path / "back", "torch")
    assert not (tmp_path / "back").exists()
    export(ours, tmp_path / "back", "diffusers")  # needs none


def test_broken_extras(ours, tmp_path):
    export(ours, tmp_path / "back", "torch")
    path = tmp_path / "back/longlive.json"
    for text, expected in (
        ("{", "is not valid JSON"),
        ("{}", "does not name its format"),
        ('{"format": "torch", "sampler": {"stepz": 1}}', "did you mean 'steps'"),
        ('{"format": "torch", "vae": {"latent_mean": [1]}}', "need 16 entries"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=expected):
            convert_wan(tmp_path / "back", tmp_path / "again")


# MARK: command line


def run(capsys, *args) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["convert", *map(str, args)])
    return end.value.code, *capsys.readouterr()


def test_command(ours, tmp_path, capsys):
    code, out, err = run(capsys, "--checkpoint", ours, "--to", "diffusers", "--output", tmp_path / "back")
    assert code == 0, err
    assert "parameters in float32" in out
    assert "warning: transformer: text_length is 8" in err
    code, out, err = run(capsys, "--wan", tmp_path / "back", "--output", tmp_path / "again")
    assert code == 0, err
    assert "parameters in bfloat16" in out


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--to", "torch"], "add --checkpoint DIR"),
        (["--checkpoint", "x"], "add --to torch or --to diffusers"),
        (["--checkpoint", "x", "--to", "torch", "--wan", "y"], "give one of the two"),
        (["--wan", "y", "--to", "torch"], "give one of the two"),
        (["--checkpoint", "x", "--to", "torch", "--verify", "--lora", "z"], "--lora, --verify only goes with --wan"),
        (["--checkpoint", "no/such/folder", "--to", "torch"], "neither a folder"),
        ([], "nothing to convert"),
    ],
)
def test_options_that_do_not_go_together(options, expected, tmp_path, capsys):
    code, _, err = run(capsys, *options, "--output", tmp_path / "back")
    assert code == 1
    assert expected in err
    assert not (tmp_path / "back").exists()


# MARK: LoRA


@pytest.fixture
def factors():
    """A LoRA of rank 4 on two kernels of two layers, by the names of our files."""
    draw = np.random.default_rng(0).standard_normal
    shapes = {"self_attn.q": (32, 32), "ffn.down": (48, 32)}
    return {
        f"blocks.{i}.{name}.kernel": (draw((n, 4), np.float32), draw((4, m), np.float32))
        for i in range(2)
        for name, (n, m) in shapes.items()
    }


def test_lora_there_and_back(factors, configs, tmp_path):
    path = tmp_path / "new/lora.pt"
    write_lora(path, {"generator_lora": factors, "critic_lora": factors}, configs["transformer"])
    saved = torch.load(path)
    assert {entry: len(tensors) for entry, tensors in saved.items()} == {"generator_lora": 8, "critic_lora": 8}
    assert saved["generator_lora"]["base_model.model.blocks.1.ffn.2.lora_A.weight"].shape == (4, 48)
    read = open_lora(path)
    theirs = {"self_attn.q": "self_attn.q", "ffn.down": "ffn.2"}
    for name, (a, b) in factors.items():
        layer, kernel = name.removesuffix(".kernel").split(".", 2)[1:]
        sides = read.sides[f"blocks.{layer}.{theirs[kernel]}.weight"]
        np.testing.assert_array_equal(read.reader.read(sides[0]), a.T)
        np.testing.assert_array_equal(read.reader.read(sides[1]), b.T)
    assert [path.name for path in path.parent.iterdir()] == ["lora.pt"]


def test_a_written_lora_merges_as_its_formula_says(factors, configs, wan, tmp_path):
    write_lora(tmp_path / "lora.pt", {"generator_lora": factors}, configs["transformer"])
    weights = {"blocks.0.self_attn.q.weight": (32, 32), "blocks.1.self_attn.q.weight": (32, 32)}
    weights |= {"blocks.0.ffn.2.weight": (32, 48), "blocks.1.ffn.2.weight": (32, 48)}
    assert lora_faults(open_lora(tmp_path / "lora.pt"), weights) == []
    convert_wan(wan, tmp_path / "plain", dtype="float32")
    convert_wan(wan, tmp_path / "merged", dtype="float32", loras=[(tmp_path / "lora.pt", 1.0)], lora_alpha=8.0)
    a, b = factors["blocks.1.ffn.down.kernel"]
    plain, merged = (checkpoint.load(tmp_path / n, "transformer")["blocks"]["ffn"]["down"] for n in ("plain", "merged"))
    np.testing.assert_allclose(merged["kernel"][1], plain["kernel"][1] + 2 * a @ b, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_stacked_lora_is_the_same_file(factors, configs, tmp_path, dtype):
    stacked = {
        f"blocks.{name}.kernel": tuple(
            np.stack([factors[f"blocks.{i}.{name}.kernel"][k] for i in range(2)]) for k in (0, 1)
        )
        for name in ("self_attn.q", "ffn.down")
    }
    for name, pairs in (("one", factors), ("two", stacked)):
        write_lora(tmp_path / f"{name}.pt", {"generator_lora": pairs}, configs["transformer"], dtype=dtype)
    one, two = (torch.load(tmp_path / f"{name}.pt")["generator_lora"] for name in ("one", "two"))
    assert_equal(one, two, DTYPES[dtype])


def test_a_checkpoint_trained_as_a_lora(factors, ours, states, configs, tmp_path, capsys):
    """Its LoRA comes out as `generator_lora`, the scale in it, beside the merged generator."""
    trained: dict = {}
    for name, (a, b) in factors.items():
        node = trained
        for key in name.removesuffix(".kernel").split("."):
            node = node.setdefault(key, {})
        node |= {"lora_a": a, "lora_b": b}
    lora.keep(trained, 0.5, ours)
    with pytest.raises(SystemExit) as ended:
        main(["convert", "--checkpoint", str(ours), "--to", "torch", "--output", str(tmp_path / "out")])
    assert ended.value.code == 0
    assert "warning: longlive_base.pt has the LoRA merged" in capsys.readouterr().err
    saved = torch.load(tmp_path / "out/lora.pt")
    assert list(saved) == ["generator_lora"]
    a, b = factors["blocks.1.ffn.down.kernel"]
    module = "base_model.model.blocks.1.ffn.2"
    np.testing.assert_array_equal(saved["generator_lora"][f"{module}.lora_A.weight"], a.T)
    np.testing.assert_array_equal(saved["generator_lora"][f"{module}.lora_B.weight"], 0.5 * b.T)
    weights = {name: tuple(tensor.shape) for name, tensor in states["transformer"].items()}
    assert lora_faults(open_lora(tmp_path / "out/lora.pt"), weights) == []
    assert not any("LoRA" in text for text in export(ours, tmp_path / "diffusers", "diffusers")["warnings"])
    save_file({"blocks.0.ffn.up.lora_a": torch.ones(2, 2)}, ours / checkpoint.LORA)
    assert "has blocks.0.ffn.up.lora_a, which are no pairs" in message(ours, tmp_path / "two", "torch")


def test_lora_faults_at_once(factors, configs, tmp_path):
    cfg, path = configs["transformer"], tmp_path / "lora.pt"
    a, b = factors["blocks.0.self_attn.q.kernel"]
    wrong = factors | {
        "blocks.7.ffn.up.kernel": (a, b),
        "blocks.0.ffn.up.kernel": (a, b),
        "blocks.ffn.up.kernel": (a, b),
    }
    with pytest.raises(UserError) as error:
        write_lora(path, {"generator_lora": wrong}, cfg)
    for part in (
        "blocks.7.ffn.up.kernel is no kernel",
        "does not fit blocks.0.ffn.up.kernel [32, 48]",
        "need a leading axis of 2 layers",
    ):
        assert part in str(error.value)
    assert not path.exists()
    write_lora(path, {"generator_lora": factors}, cfg)
    with pytest.raises(UserError, match="exists and is kept"):
        write_lora(path, {"generator_lora": factors}, cfg)
    write_lora(path, {"critic_lora": factors}, cfg, overwrite=True)
    assert list(torch.load(path)) == ["critic_lora"]


def test_mapped_files_are_views(tmp_path):
    tensors = [torch_files.LazyTensor("a", (3,), np.dtype(np.float32), lambda: np.arange(3))]
    torch_files.write_safetensors(tmp_path / "a.safetensors", tensors)
    array = torch_files.mapped(tmp_path / "a.safetensors")["a"]
    assert isinstance(array, np.memmap)
    np.testing.assert_array_equal(array, np.arange(3))
    assert torch_files.as_torch(array).data_ptr() == array.ctypes.data
