"""`longlive bench` on a tiny checkpoint: every key of the JSON, and what it says of what it did not measure."""

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from longlive_jax import checkpoint
from longlive_jax.bench import machine, report, timing
from longlive_jax.bench.ours import Ours, Variant
from longlive_jax.bench.report import KEYS
from longlive_jax.bench.timing import Pair, Times
from longlive_jax.cli import main

STAND_IN = Path(__file__).parents[1] / "conversion" / "stand_in"


def test_percentiles_and_pairs():
    times = Times.of(range(1, 101))
    assert (times.p50, times.p95, Times.of([3.0]).p95) == (50.5, 95, 3.0)
    # The machine becomes four times slower in the middle: each pair still says that b takes twice as long.
    pair = Pair(Times.of([1, 1, 4, 4]), Times.of([2, 5, 8]))
    assert pair.ratios == (2, 2, 2) and pair.ratio == 2


def test_ceilings_are_of_calls_that_together_take_a_while():
    assert [machine.at_once(ms, 0.05) for ms in (0.1, 10, 200)] == [machine.MOST_AT_ONCE, 5, 1]
    product, copy = machine.matmul_ceiling("float32", 0.002, largest=1024), machine.copy_ceiling(1, 0.002)
    assert product["flops_per_second"] == pytest.approx(2 * product["rows"] ** 3 / product["ms"] * 1000)
    assert copy["bytes_per_second"] == pytest.approx(2 * 2**20 / copy["ms"] * 1000) and copy["calls"] >= 1


def test_in_turn_begins_and_ends_with_the_first():
    order = []
    call = lambda name: lambda: order.append(name) or 1.0
    pair = timing.in_turn(call("a"), call("b"), warmup=0, pairs=4)
    assert "".join(order) == "ababababa" and len(pair.ratios) == 4
    order.clear()
    timing.in_turn(call("a"), call("b"), warmup=0, pairs=9, seconds=0)
    assert "".join(order) == "abababa"


def test_blocks_in_parts_are_the_same_blocks(tiny_checkpoint, tiny_config):
    params = {part: checkpoint.load(tiny_checkpoint, part, "float32") for part in ("transformer", "vae")}
    whole, parts = (
        Ours(tiny_config, params, "float32", variant=Variant(early_frames=early)) for early in (False, True)
    )  # fmt: skip
    frames = []
    for ours in (whole, parts):
        state, first = ours.step(ours.init(True), True, first=True)
        state, second = ours.step(state, True)
        frames.append(np.concatenate([first.frames, second.frames], axis=1).astype(int))
    assert np.abs(frames[0] - frames[1]).max() <= 1 and frames[0].std() > 1
    assert {name.split(",")[0] for name in parts.compiled} == {"init", "denoise", "pixels", "finish"}


def test_the_json_has_every_key(tiny_checkpoint, tmp_path, capsys):
    file = tmp_path / "bench.json"
    before = jax.config.jax_compilation_cache_dir
    with pytest.raises(SystemExit) as end:
        main(["bench", "--checkpoint", str(tiny_checkpoint), "--json", str(file), "--blocks", "3", "--seconds", "1",
              "--no-torch-compile", "--torch-repo", str(STAND_IN)])  # fmt: skip
    assert end.value.code == 0
    results = json.loads(file.read_text())
    assert set(KEYS) <= set(results)
    measured = [key for key in KEYS if results[key] is not None]
    # The stand-in for the official clone has no layers that a LoRA could lie over.
    assert set(KEYS) - set(measured) == {"end_to_end_vs_stock"} == set(results["missing"])
    shown = capsys.readouterr()
    assert results["missing"]["end_to_end_vs_stock"] in shown.err
    assert "dit_vs_torch" in shown.out and "FPS" in shown.out
    for key in measured[:-2]:
        assert math.isfinite(results[key]) and results[key] > 0, key
    # Blocks of 2 latent frames, 8 of pixels.
    assert results["end_to_end_fps"] == pytest.approx(8000 / results["end_to_end_ms_per_block"])
    compiled = results["compile"]
    assert {program["cache"] for program in compiled["programs"].values()} == {"miss"}
    assert {program["cache"] for program in compiled["programs_warm"].values()} == {"hit"}
    assert set(compiled["programs_warm"]) <= set(compiled["programs"])
    assert "8 pixel frames of 32 x 32" in results["definitions"]["block"]
    assert jax.config.jax_compilation_cache_dir == before


def test_without_diffusers_the_official_parts_count(monkeypatch, tiny_config):
    import dataclasses

    from longlive_jax.bench import official

    sampler = dataclasses.replace(tiny_config.sampler, rope="absolute")
    plan = report.Plan(
        tiny_config, sampler, "float32", "", dict, blocks=3, seconds=1, torch_repo=STAND_IN, torch_compile=False
    )
    # The stand-in has no VAE that could decode.
    calls = {"stock": lambda: lambda: None, "block, channels-last, compiled": lambda: 1 / 0}
    monkeypatch.setattr(official, "vae_decodes", lambda *_: calls)
    found = report._against_parts(plan, {"end_to_end_ms_per_block": 2.0}, lambda line: None)
    assert set(found["official_vae"]) == {"stock"}, "compiled only where it was asked for"
    vae = found["official_vae"]["stock"]["p50_ms"]
    assert found["end_to_end_vs_torch"] == pytest.approx((found["official_dit"]["p50_ms"] + vae) / 2)


def test_a_model_that_would_take_hours_is_refused(monkeypatch, capsys):
    ceilings = {"matmul": {"rows": 1, "dtype": "float32", "ms": 1.0, "flops_per_second": 1e11}}
    monkeypatch.setattr(machine, "ceilings", lambda dtype: ceilings)
    monkeypatch.setattr("longlive_jax.memory.check_weights", lambda *_: None)
    with pytest.raises(SystemExit) as end:
        main(["bench", "--preset", "t2v_1_3b"])
    assert end.value.code == 1
    told = capsys.readouterr().err
    assert "182.1 TFLOP, at least 30 minutes" in told and "--height 64" in told


def test_missing_packages_and_failures_are_reasons(tmp_path):
    missing = {}
    with report._reason(missing, "a", "b"):
        import no_such_package  # noqa: F401
    with report._reason(missing, "c"):
        raise RuntimeError("first line\nsecond")
    assert missing == {"a": "no_such_package is not installed", "b": "no_such_package is not installed",
                       "c": "RuntimeError: first line"}  # fmt: skip


@pytest.mark.parametrize(
    "words, told",
    [
        (["--blocks", "1"], "at least 3"),
        (["--preset", "sprites", "--checkpoint", "x"], "exclude"),
        (["--json", "/"], "is a folder"),
        (["--height", "50"], "not a multiple"),
    ],
)
def test_bad_input_is_one_line(words, told, capsys):
    with pytest.raises(SystemExit) as end:
        main(["bench", *words])
    error = capsys.readouterr().err
    assert end.value.code == 1 and told in error and error.count("\n") == 1
