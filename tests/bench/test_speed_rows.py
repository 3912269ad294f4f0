"""The driver of `experiments/speed`: rows that work, fail, hang and are gone on with; and what it may import."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPEED = ROOT / "experiments" / "speed"


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"speed_{name}", SPEED / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


h100 = load("h100")

WRITE = "import sys, json; out = open(sys.argv[1], 'a'); "
BODIES = {
    "works": WRITE + "out.write(json.dumps({'ms': 1}) + '\\n'); out.write(json.dumps({'fps': 2}) + '\\n')",
    "fails": WRITE + "out.write(json.dumps({'ms': 3}) + '\\n'); out.flush(); raise ValueError('no such kernel')",
    "hangs": WRITE + "out.write(json.dumps({'ms': 4}) + '\\n{\"half'); out.flush(); import time; time.sleep(60)",
}


def rows(*names, seconds=20.0):
    return [h100.Row(name, name, 1.5 if name == "hangs" else seconds) for name in names]


@pytest.fixture
def calls():
    """The processes that were started, and how a row's is."""
    started = []

    def words(row, into):
        started.append(row.name)
        return [sys.executable, "-S", "-c", BODIES[row.body], str(into)], {}

    return started, words


def test_a_row_that_fails_or_hangs_keeps_its_figures_and_the_rest_goes_on(calls, tmp_path):
    output, lines = tmp_path / "results.json", []
    h100.run_all(rows("fails", "hangs", "works"), output, 60, calls[1], {"rehearsal": True}, lines.append)
    results = json.loads(output.read_text())
    assert results["rehearsal"] and len(lines) == 3
    fails, hangs, works = results["rows"].values()
    assert (fails["status"], fails["figures"]) == ("failed", {"ms": 3}) and "no such kernel" in fails["error"]
    assert (hangs["status"], hangs["figures"]) == ("out of time", {"ms": 4}) and hangs["seconds"] < 20
    assert (works["status"], works["figures"]) == ("done", {"ms": 1, "fps": 2})


def test_it_goes_on_where_it_stopped_and_tries_what_failed_last(calls, tmp_path):
    started, words = calls
    output = tmp_path / "results.json"
    h100.run_all(rows("fails", "works"), output, 60, words, {}, print)
    started.clear()
    h100.run_all([*rows("fails", "works"), h100.Row("new", "works", 20)], output, 60, words, {}, print)
    assert started == ["new", "fails"]
    assert list(json.loads(output.read_text())["rows"]) == ["fails", "works", "new"]


def test_without_time_a_row_is_said_not_to_have_run(calls, tmp_path):
    started, words = calls
    results = h100.run_all(rows("works"), tmp_path / "results.json", 5, words, {}, print)
    assert started == [] and results["rows"]["works"]["status"] == "not run"
    results = h100.run_all(rows("works"), tmp_path / "results.json", 60, words, {}, print)
    assert results["rows"]["works"]["status"] == "done"


def test_every_row_has_a_body_and_a_variant_of_ours_is_one_line():
    module = load("rows")
    names = [row.name for row in h100.ROWS]
    assert len(set(names)) == len(names)
    for row in h100.ROWS:
        assert callable(getattr(module, row.body)), row.name
        assert row.variant is None or row.variant in h100.VARIANTS
    from longlive_jax.bench.ours import Variant

    for settings in h100.VARIANTS.values():
        Variant(**settings)


REFUSE = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {"tyro", "ftfy", "grain", "diffusers", "omegaconf", "imageio_ffmpeg", "easydict"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
# Not the installed package, but the source tree as rows.py finds it.
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in getattr(f, "__name__", type(f).__name__).lower()]
"""


def test_the_rows_need_no_packages_of_the_command_line(tmp_path):
    program = (
        REFUSE
        + f"""
sys.path.insert(0, {str(SPEED)!r})
import rows, h100
from longlive_jax.bench import official, published
import longlive_jax.conversion.official_repo as repo
assert repo.__file__.startswith({str(ROOT)!r})
settings = {{"body": "ours_gemms", "arguments": {{}}, "rehearse": True, "repo": None, "variant": {{}}}}
rows.main(settings, rows.Path("figures.jsonl"))
"""
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = h100.figures(tmp_path / "figures.jsonl")
    assert figures["float32"]["6x48x96"]["p50_ms"] > 0


def test_the_report_compares_the_fastest_and_names_what_failed(tmp_path):
    timed = lambda ms, flops=None: {"p50_ms": ms, "p95_ms": ms} | ({"flops_per_second": flops} if flops else {})
    done = lambda **figures: {"status": "done", "seconds": 1.0, "figures": figures}
    machine = {"device": "gpu"}, {"jax": "1"}, {"rows": 8, "dtype": "bfloat16", "flops_per_second": 8e14}
    rows = {
        "ceilings": done(hardware=machine[0], versions=machine[1], matmul=machine[2], copy={"bytes_per_second": 3e12}),
        "DiT, ours": done(block=timed(250.0, 4e14), block_5=timed(250.0), block_320=timed(252.0)),
        "DiT, ours: unrolled layers": done(block=timed(200.0, 6e14)),
        "DiT, stock with the LoRA merged": done(block=timed(600.0)),
        "DiT, stock merged and compiled": {"status": "failed", "error": "no\nkernel", "figures": {}},
        "DiT, stock as shipped (LoRA by peft)": done(block=timed(800.0)),
        "VAE, ours": done(decode=timed(100.0), weights="random"),
        "VAE, stock": done(**{"stock": timed(600.0), "block, channels-last": timed(300.0)}),
        "end to end, ours": done(block=timed(360.0), memory={"bytes": 2**34, "of": "device"}),
        "end to end, stock as shipped": done(ms_per_block=1400.0),
    }
    report, path = load("report"), tmp_path / "results.json"
    path.write_text(json.dumps({"rehearsal": False, "rows": rows}))
    report.main([str(path)])
    text = path.with_suffix(".md").read_text()
    for line in (
        "transformer, stock as shipped: 4.00", "transformer, fastest of PyTorch: 3.00", "VAE, fastest of PyTorch: 3.00",
        "end to end, stock as shipped: 3.89", "end to end, fastest parts of PyTorch: 2.50", "block 5 of ours: 1.01",
        "| DiT, ours | block | 250 | 250 | 400 | 50% |", "memory 16.00 GiB (device)",
        "DiT, stock merged and compiled: failed: no kernel",
    ):  # fmt: skip
        assert line in text, line
    assert path.with_suffix(".png").stat().st_size > 10_000
