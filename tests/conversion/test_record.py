"""The recorder, on a stand-in for the official repository (`stand_in/`), and `longlive parity --torch-repo`.

That it records the official code rightly is shown on a clone of that: tests/parity/test_recorder.py.
"""

import json
import os
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from safetensors.torch import load_file

from longlive_jax.cli import main as longlive
from longlive_jax.config import TransformerConfig
from longlive_jax.conversion import convert
from longlive_jax.conversion import record as recorder
from longlive_jax.conversion.convert import convert_wan
from longlive_jax.conversion.parity import read_case
from longlive_jax.conversion.record import record
from longlive_jax.conversion.recording import Inputs, Run, write_random_wan
from longlive_jax.conversion.rollout import rollout
from longlive_jax.conversion.side_by_side import psnr
from longlive_jax.errors import UserError

STAND_IN = Path(__file__).parent / "stand_in"
SMALL = {"frames": 6, "height": 32, "width": 48, "random_embeds": True, "device": "cpu"}


@pytest.fixture
def repo(tmp_path):
    """A stand-in that can be damaged."""
    return Path(shutil.copytree(STAND_IN, tmp_path / "repo", ignore=shutil.ignore_patterns("__pycache__")))


@pytest.fixture
def recorded(wan, tmp_path):
    """Records with the stand-in; gives the case and what `record` returned."""

    def run(name: str = "case", **settings):
        path = tmp_path / f"{name}.npz"
        told = record(STAND_IN, path, Run(wan=wan, **SMALL | settings))
        return read_case(path), told

    return run


def stand_in_latents(case, wan, prompt_of_block) -> np.ndarray:
    """What the stand-in makes of a case's inputs, step by step."""
    weights = load_file(wan / "diffusion_pytorch_model.safetensors")
    kernel, bias = weights["patch_embedding.weight"], weights["patch_embedding.bias"]
    noise, renoise, embeds = (torch.from_numpy(case.arrays[n]) for n in ("noise", "renoise", "prompt_embeds"))
    blocks = []
    for i, x in enumerate(noise.split(case.meta["num_frame_per_block"], dim=1)):
        for j, step in enumerate(case.meta["denoising_step_list"]):
            tokens = torch.nn.functional.conv3d(x.swapaxes(1, 2), kernel, bias, stride=(1, 2, 2))
            q = tokens.flatten(2).swapaxes(1, 2)[:, None]
            attended = torch.nn.functional.scaled_dot_product_attention(q, q, q)
            seen = attended.mean((1, 2, 3)) + embeds[prompt_of_block(i)].mean((1, 2)) + step / 1000
            x0 = 0.5 * x + seen[:, None, None, None, None]
            if j < renoise.shape[1]:
                x = x0 + renoise[i, j]
        blocks.append(x0)
    return torch.cat(blocks, dim=1).numpy()


def message(repo, path, **settings) -> str:
    with pytest.raises(UserError) as error:
        record(repo, path, Run(**settings))
    assert "\n" not in str(error.value)
    assert not path.exists()
    return str(error.value)


# What is recorded


def test_plain(recorded, wan):
    case, told = recorded(batch=2)
    assert case.kind == "rollout"
    assert {name: array.shape for name, array in case.arrays.items()} == {
        "noise": (2, 6, 16, 4, 6),
        "renoise": (2, 3, 2, 3, 16, 4, 6),
        "prompt_embeds": (1, 2, 8, 24),
        "switch_frames": (0,),
        "latents": (2, 6, 16, 4, 6),
        "pixels": (2, 21, 3, 32, 48),
    }
    assert {key: value for key, value in case.meta.items() if key != "recorded"} == {
        "kind": "rollout", "local_attn_size": 12, "sink_size": 3, "num_frame_per_block": 3,
        "denoising_step_list": [1000, 750, 500, 250], "warp_denoising_step": True, "timestep_shift": 5.0,
        "context_noise": 0.0, "global_sink": True, "rope": "absolute", "weights": "wan", "dtype": "float32",
    }  # fmt: skip
    assert case.meta["recorded"] == told
    assert told["pipeline"] == "CausalInferencePipeline"
    times = told["times"]
    assert {name: len(values) for name, values in times.items()} == {
        "dit_ms_per_block": 2, "vae_decode_ms": 1, "total_ms": 1
    }  # fmt: skip
    assert sum(times["dit_ms_per_block"]) + times["vae_decode_ms"][0] <= times["total_ms"][0]
    np.testing.assert_allclose(case.arrays["latents"], stand_in_latents(case, wan, lambda block: 0), atol=1e-5)
    assert 0.8 < case.arrays["noise"].std() < 1.2


def test_switches(recorded, wan):
    case, told = recorded(frames=12, switch_frames=(2, 9), sink="refresh", steps=(1000, 500))
    assert told["pipeline"] == "InteractiveCausalInferencePipeline"
    assert {name: len(values) for name, values in told["times"].items()} == {
        "dit_ms_per_block": 4, "recache_ms": 2, "vae_decode_ms": 1, "total_ms": 1
    }  # fmt: skip
    assert case.meta["global_sink"] is False
    assert case.arrays["switch_frames"].tolist() == [2, 9]
    np.testing.assert_allclose(case.arrays["latents"], stand_in_latents(case, wan, [0, 1, 1, 2].__getitem__), atol=1e-5)
    assert len({embeds.tobytes() for embeds in case.arrays["prompt_embeds"]}) == 3


def test_settings_that_the_file_says(recorded):
    case, _ = recorded(window=-1, sink_frames=0, block_frames=2, shift=3.0, rope="relative", decode=False)
    meta = case.meta
    assert (meta["local_attn_size"], meta["sink_size"], meta["num_frame_per_block"]) == (-1, 0, 2)
    assert (meta["timestep_shift"], meta["rope"]) == (3.0, "relative")
    assert "pixels" not in case.arrays and "vae_decode_ms" not in meta["recorded"]["times"]


def test_again_on_the_same_inputs(recorded, tmp_path):
    first, _ = recorded(frames=9, switch_frames=(4,), window=9, seed=7)
    again, told = recorded("again", random_embeds=False, inputs=tmp_path / "case.npz")
    assert told["max_abs"] == told["rms"] == 0
    for name, array in first.arrays.items():
        np.testing.assert_array_equal(again.arrays[name], array)
    assert again.meta["local_attn_size"] == 9
    other, _ = recorded("other", frames=9, switch_frames=(4,), window=9, seed=8)
    assert np.abs(other.arrays["noise"] - first.arrays["noise"]).max() > 1


def test_bfloat16(recorded):
    case, _ = recorded(dtype="bfloat16")
    assert case.meta["dtype"] == "bfloat16"
    for name in ("noise", "renoise", "prompt_embeds", "latents"):
        array = case.arrays[name]
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, torch.from_numpy(array).bfloat16().float(), "recorded as it was used")


@pytest.fixture
def tokenizer(monkeypatch):
    """What the official tokeniser imports, and a Wan folder that seems to have one."""
    import re

    for name, contents in (("regex", {"sub": re.sub}), ("transformers", {"AutoTokenizer": None})):
        module = types.ModuleType(name)
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(convert, "open_tokenizer", lambda source, folder: setattr(source, "tokenizer", object()))


def test_prompts_as_text(recorded, wan, tokenizer):
    case, told = recorded(prompts=("a", "b  c"), switch_frames=(3,), random_embeds=False)
    assert case.meta["prompts"] == ["a", "b  c"]
    table = torch.load(wan / "models_t5_umt5-xxl-enc-bf16.pth", weights_only=True)["token_embedding.weight"].float()
    expected = [table[[ord(c) % 90 for c in text.ljust(8)]] for text in ("a", "b c")]
    np.testing.assert_array_equal(case.arrays["prompt_embeds"][:, 0], torch.stack(expected))
    assert len(told["times"]["text_encode_ms"]) == 2


def test_nothing_is_left_behind(recorded, repo, wan, tmp_path, monkeypatch):
    mine = types.ModuleType("utils")
    monkeypatch.setitem(sys.modules, "utils", mine)
    before, draw, where = set(sys.modules), torch.randn_like, os.getcwd()
    recorded()
    (repo / "utils/wan_wrapper.py").write_text("import diffusers, nothing_of_that_name")
    message(repo, tmp_path / "x.npz", wan=wan, **SMALL)
    assert sys.modules["utils"] is mine
    assert not {name for name in set(sys.modules) - before if name.partition(".")[0] in ("pipeline", "utils", "wan")}
    assert not any(
        getattr(module, "__path__", None) == [] for name, module in sys.modules.items() if "diffusers" in name
    )
    assert (torch.randn_like, os.getcwd()) == (draw, where)


# What goes wrong


@pytest.mark.parametrize("package", ["transformers", "peft"])
def test_packages_that_some_runs_need(recorded, wan, tokenizer, tmp_path, monkeypatch, package):
    needing = {"transformers": {"prompts": ("a",), "random_embeds": False}, "peft": {"lora": tmp_path / "lora.pt"}}
    monkeypatch.setitem(sys.modules, package, None)
    assert f"pip install {package}" in message(STAND_IN, tmp_path / "x.npz", wan=wan, **SMALL | needing[package])
    recorded()


def test_clones_that_cannot_be_used(repo, wan, tmp_path):
    path = tmp_path / "x.npz"
    run = {"wan": wan, **SMALL}
    assert "there is no folder" in message(tmp_path / "none", path, **run)
    main_branch = tmp_path / "main"
    (main_branch / "pipeline").mkdir(parents=True)
    assert "not branch v1.0 of LongLive (main is LongLive 2.0" in message(main_branch, path, **run)

    wrapper = repo / "utils/wan_wrapper.py"
    code = wrapper.read_text()
    wrapper.write_text("import nothing_of_that_name\n" + code)
    assert "needs nothing_of_that_name: pip install nothing_of_that_name" in message(repo, path, **run)
    wrapper.write_text("import utils.gone\n" + code)
    assert "has no module utils.gone; take an unchanged clone" in message(repo, path, **run)
    wrapper.write_text(code.replace("class WanTextEncoder", "class TextEncoder"))
    assert "cannot import name 'WanTextEncoder'" in message(repo, path, **run)
    wrapper.write_text(code.replace("as CausalWanModelInfinity", "as Infinity"))
    assert "utils.wan_wrapper has no CausalWanModelInfinity" in message(repo, path, **run)
    wrapper.write_text(code)

    pipeline = repo / "pipeline/causal_inference.py"
    pipeline.write_text(pipeline.read_text().replace("if i < len(steps) - 1", "if i < len(steps) - 2"))
    assert "left 2 draws of noise" in message(repo, path, **run)
    pipeline.write_text(pipeline.read_text().replace("if i < len(steps) - 2", "if True"))
    assert "drew noise [3, 16, 4, 6] out of turn" in message(repo, path, **run)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"wan": None}, "give either --wan FOLDER or --random-weights"),
        ({"random_weights": True}, "give either --wan FOLDER or --random-weights"),
        ({"random_embeds": False}, "give one of --prompts, --random-embeds and --inputs"),
        ({"prompts": ("a", "b"), "random_embeds": False}, "2 prompts need 1 --switch-frames"),
        ({"prompts": ("a",), "random_embeds": False}, "so prompts cannot be read"),
        ({"frames": 7}, "7 latent frames are not whole blocks of 3"),
        ({"frames": 7, "batch": 0}, "2 faults: --batch is 0"),
        ({"switch_frames": (6,)}, "would take effect after the end"),
        ({"height": 40}, "height 40 is not a multiple of 16 pixels"),
        ({"window": 4}, "it must hold the sink and one block"),
        ({"rope": "relative", "batch": 2}, "relative positions work for a batch of 1"),
        ({"device": "cuda:99"}, "no such device; give --device cpu"),
        ({"device": "gpu"}, "is no device of PyTorch's"),
        ({"attention": "flash"}, "flash"),
        ({"generator": Path("none.pt")}, "cannot read none.pt"),
        ({"write_weights": Path("here")}, "--write-weights keeps random weights"),
    ],
)
def test_settings_that_are_refused(wan, tmp_path, change, expected):
    if "cuda" in str(change.get("device")) and torch.cuda.is_available():
        change = {"device": "xpu"}
    assert expected in message(STAND_IN, tmp_path / "x.npz", **{"wan": wan, **SMALL, **change})


def test_outputs_are_not_replaced(recorded, wan, tmp_path):
    recorded()
    run = Run(wan=wan, **SMALL)
    with pytest.raises(UserError, match="exists; give --overwrite"):
        record(STAND_IN, tmp_path / "case.npz", run)
    record(STAND_IN, tmp_path / "case.npz", run, overwrite=True)
    assert "must end in .npz" in message(STAND_IN, tmp_path / "case.json", wan=wan, **SMALL)
    assert not list(tmp_path.glob(".case*"))


def test_inputs_of_another_model(recorded, states, tmp_path):
    case, _ = recorded()
    arrays = case.arrays | {"meta": json.dumps(case.meta)}
    np.savez(tmp_path / "short.npz", **arrays | {"prompt_embeds": case.arrays["prompt_embeds"][:, :, :4]})
    with pytest.raises(UserError, match=r"embeddings are \[1, 4, 24\], the model's \[1, 8, 24\]"):
        recorded("x", random_embeds=False, inputs=tmp_path / "short.npz")
    np.savez(tmp_path / "few.npz", **arrays | {"renoise": case.arrays["renoise"][:1]})
    with pytest.raises(UserError, match=r"renoise is \[1, 3, .*expected \[2, 3"):
        recorded("x", random_embeds=False, inputs=tmp_path / "few.npz")


# Beside ours


def test_random_weights_are_a_wan_folder(tmp_path):
    write_random_wan(tmp_path / "wan", "sprites", 3, "float32")
    report = convert_wan(tmp_path / "wan", tmp_path / "model", dtype="float32")
    assert report["parts"]["transformer"]["parameters"] > 1e6
    inputs = Inputs.draw(Run(random_weights=True, frames=3, random_embeds=True), TransformerConfig.sprites())
    assert inputs.embeds.shape == (1, 1, 24, 96)


def test_arguments_give_the_run_back(wan):
    run = Run(wan=wan, switch_frames=(3, 6), decode=False, lora=Path("l.pt"), prompts=("a b", "c", "d"), shift=2.5)
    assert tyro.cli(Run, args=run.arguments(), config=(tyro.conf.FlagCreatePairsOff,)) == run


def test_psnr():
    expected = np.asarray([-1.0, 1.0])
    assert psnr(0.02, expected) == pytest.approx(40)
    assert psnr(0.0, expected) is None


def test_pixels_are_compared(recorded, wan, tmp_path):
    """Block by block, as whole clips; in the dtype of the recording."""
    convert_wan(wan, tmp_path / "model", dtype="float32")
    case, _ = recorded()
    outputs = rollout(tmp_path / "model", case)
    assert set(outputs) == {"latents", "pixels"}
    ours, expected = outputs["pixels"]
    assert ours.shape == expected.shape == (1, 21, 32, 48, 3)


def test_both_sides_by_command(wan, tmp_path, capsys, monkeypatch):
    """The stand-in computes something else, so the difference is large: what is tested is the way there."""
    monkeypatch.chdir(tmp_path)
    words = ["parity", "--torch-repo", str(STAND_IN), "--wan", str(wan), "--random-embeds", "--device", "cpu"]
    words += ["--frames", "6", "--height", "32", "--width", "48", "--switch-frames", "3"]
    words += ["--json", "report.json", "--output", "kept.npz"]
    with pytest.raises(SystemExit) as ended:
        longlive(words)
    assert ended.value.code == 1
    out = capsys.readouterr().out
    assert "FAIL kept" in out and "official (torch" in out and "ours (jax" in out
    (entry,) = json.loads(Path("report.json").read_text())
    assert (entry["kind"], entry["ok"]) == ("rollout", False)
    assert entry["quantities"]["latents"]["psnr"] < 30
    for side in ("official", "ours"):
        assert entry[side]["times"]["latents_ms"] > 0 and entry[side]["times"]["vae_decode_ms"] > 0
    assert read_case("kept.npz").meta["recorded"]["warmup"] == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--torch-repo", "none", "--random-weights", "--random-embeds"], "there is no folder none"),
        (["--torch-repo", "none"], "give either --wan FOLDER or --random-weights"),
        (["--torch-repo", "none", "--random-weights", "--random-embeds", "--output", "."], "exists; name another"),
        (["--torch-repo", "none", "case.npz"], "leave out the case files"),
        (["--wan", "x", "case.npz", "--checkpoint", "y"], "give --torch-repo too"),
        (["case.npz"], "no checkpoint given"),
    ],
)
def test_commands_that_cannot_be_run(words, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        longlive(["parity", *words])
    assert ended.value.code == 1
    assert expected in capsys.readouterr().err


def test_recorder_by_command(wan, tmp_path, capsys):
    words = ["--repo", str(STAND_IN), "--checkpoint", str(wan), "--output", str(tmp_path / "a.npz"), "--random-embeds"]
    words += ["--frames", "3", "--height", "32", "--width", "48", "--device", "cpu"]
    assert recorder.main(words) == 0
    assert "CausalInferencePipeline, float32 on" in capsys.readouterr().out
    assert recorder.main(words) == 1
    assert "record: " in capsys.readouterr().err
