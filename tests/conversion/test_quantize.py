"""Conversion to int8: from original files and from a checkpoint folder, and that --verify means something there."""

import json

import ml_dtypes
import numpy as np
import pytest

from longlive_jax import checkpoint
from longlive_jax.cli import main
from longlive_jax.conversion.convert import convert_wan
from longlive_jax.errors import UserError
from longlive_jax.models.quantization import quantize

BOTH = ["transformer", "text_encoder"]


def run(capsys, *args) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["convert", *(str(arg) for arg in args)])
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def test_from_original_files(wan, tmp_path, states):
    report = convert_wan(wan, tmp_path / "out", quantize=BOTH, verify=True)
    assert "in bfloat16, blocks of the transformer in int8, blocks of the text encoder in int8" in report["summary"]
    assert report["verified"] and report["layers"]["linear"]["worst"] > 1e-3, "rounding is seen"
    assert checkpoint.load_quantization(tmp_path / "out") == dict.fromkeys(BOTH, "int8")
    assert report["parts"]["transformer"]["parameters"] == sum(t.numel() for t in states["transformer"].values())
    layer = checkpoint.load(tmp_path / "out", "transformer", quantization="int8")["blocks"]["ffn"]["up"]
    values, scale = quantize(states["transformer"]["blocks.1.ffn.0.weight"].numpy().T)
    np.testing.assert_array_equal(layer["int8"][1], values, "of the source's float32, not of bfloat16")
    np.testing.assert_array_equal(layer["scale"][1], scale)
    assert layer["bias"].dtype == ml_dtypes.bfloat16


def test_verify_knows_what_rounding_may_do(wan, tmp_path, monkeypatch):
    def careless(kernel):
        values, scale = quantize(kernel)
        return values, scale * np.float32(1.05)

    monkeypatch.setattr(checkpoint, "quantize", careless)
    with pytest.raises(UserError, match="20 of .* linear layers .* rounding explains 0.0"):
        convert_wan(wan, tmp_path / "out", quantize=["transformer"], verify=True)
    assert not (tmp_path / "out").exists()


def test_command(wan, tmp_path, capsys):
    code, out, err = run(capsys, "--wan", wan, "--quantize", "int8", "--output", tmp_path / "int8")
    assert code == 0, err
    assert "parameters in bfloat16, blocks of the transformer in int8" in out
    assert run(capsys, "--wan", wan, "--output", tmp_path / "half")[0] == 0
    again = ["--checkpoint", tmp_path / "half", "--quantize", "int8", "--output", tmp_path / "later"]
    code, out, err = run(capsys, *again)
    assert code == 0, err
    assert "parameters in bfloat16, blocks of the transformer in int8" in out
    sizes = {f.parent.name: f.stat().st_size for f in tmp_path.glob("*/transformer.safetensors")}
    assert sizes["int8"] < sizes["half"] > sizes["later"]
    assert json.loads((tmp_path / "later/config.json").read_text())["quantization"] == {"transformer": "int8"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--checkpoint", "x", "--to", "torch", "--quantize", "int8"], "PyTorch files are not written in int8"),
        (["--checkpoint", "x", "--quantize", "int8", "--dtype", "float32"], "leave out --dtype"),
        (["--wan", "x", "--quantize-text-encoder"], "--quantize-text-encoder goes with --quantize int8; add that too"),
        (["--checkpoint", "no/such/folder", "--quantize", "int8"], "neither a folder"),
    ],
)
def test_options_that_do_not_go_together(options, expected, tmp_path, capsys):
    code, _, err = run(capsys, *options, "--output", tmp_path / "out")
    assert code == 1
    assert expected in err
    assert not (tmp_path / "out").exists()


def test_a_part_that_is_not_there(wan, tmp_path, capsys):
    (wan / "models_t5_umt5-xxl-enc-bf16.pth").unlink()
    assert run(capsys, "--wan", wan, "--output", tmp_path / "half")[0] == 0
    options = ["--quantize", "int8", "--quantize-text-encoder", "--output", tmp_path / "out"]
    code, _, err = run(capsys, "--checkpoint", tmp_path / "half", *options)
    assert code == 1 and "has no text encoder; leave that out" in err
