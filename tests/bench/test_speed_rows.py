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


def test_a_try_that_is_cut_short_keeps_what_the_one_before_has_seen(calls, tmp_path):
    _, words = calls
    output = tmp_path / "results.json"
    before = {"status": "stopped", "seconds": 20.0, "figures": {"block": 250, "ms": 5}}
    output.write_text(json.dumps({"rows": {"hangs": before}}))
    row = h100.run_all(rows("hangs"), output, 60, words, {}, print)["rows"]["hangs"]
    assert row["figures"] == {"block": 250, "ms": 4} and row["status"] == h100.LATE


def test_without_time_a_row_is_said_not_to_have_run(calls, tmp_path):
    started, words = calls
    results = h100.run_all(rows("works"), tmp_path / "results.json", 5, words, {}, print)
    assert started == [] and results["rows"]["works"]["status"] == "not run"
    results = h100.run_all(rows("works"), tmp_path / "results.json", 60, words, {}, print)
    assert results["rows"]["works"]["status"] == "done"


PLACE = {"device": "gpu", "torch": "2", "rehearsal": False, "card": "GPU-1"}


@pytest.mark.parametrize("change", [{"device": "other gpu"}, {"torch": "3"}, {"rehearsal": True}])
def test_results_of_another_machine_are_not_gone_on_with(calls, tmp_path, change):
    started, words = calls
    output = tmp_path / "results.json"
    run = lambda place: h100.run_all(rows("fails", "works"), output, 60, words, {}, print, place)
    run(PLACE)
    before = output.read_text()
    assert json.loads(before)["rows"]["works"]["on"] == PLACE
    started.clear()
    with pytest.raises(h100.Elsewhere, match=next(iter(change))) as error:
        run(PLACE | change)
    assert started == [] and output.read_text() == before and "\n" not in str(error.value)
    run(PLACE | {"card": "GPU-2"})
    assert started == ["fails"]
    assert json.loads(output.read_text())["rows"]["fails"]["on"]["card"] == "GPU-2"


def test_every_call_ends_with_our_first_row_whose_time_is_kept_back(calls, tmp_path, monkeypatch):
    started, words = calls
    monkeypatch.setattr(h100, "least_left", lambda row: 1)
    output, closing = tmp_path / "results.json", h100.Row("again", "works", 3)
    table = [h100.Row("slow", "hangs", 5), h100.Row("later", "works", 5)]
    run = lambda budget: h100.run_all(table, output, budget, words, {}, print, {}, closing)
    found = run(6)["rows"]
    assert found["slow"]["status"] == "cut short" and found["slow"]["seconds"] < 5
    assert (found["later"]["status"], found["again, end of call 1"]["status"]) == ("not run", "done")
    started.clear()
    found = run(20)["rows"]
    assert started == ["slow", "later", "again"], "what the end of the budget cut short is no failure: it comes first"
    assert found["slow"]["status"] == "out of time" and found["again, end of call 2"]["status"] == "done"
    started.clear()
    run(3)
    assert started == [], "nothing was run, so there is nothing to repeat"


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
    assert h100.CLOSING.body == "ours_dit"
    # What the first call of ten minutes must reach, at worst without the rows after it.
    assert sum(row.seconds for row in h100.ROWS[:3]) + h100.CLOSING.seconds <= 560


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
    assert figures["float32"]["15x48x96"]["p50_ms"] > 0


def small_rows(body, variant=None, **arguments):
    """A row's figures at a rehearsal's shapes, in this process."""
    module, figures = load("rows"), {}
    settings = {"body": body, "arguments": arguments, "rehearse": True, "repo": None, "variant": variant}
    context = module.Context(module.Size.of(True), None, variant, lambda **more: figures.update(more), settings)
    getattr(module, body)(context, **arguments)
    return figures


def test_a_start_is_measured_from_a_checkpoint_without_and_with_compiled_programs():
    figures = small_rows("ours_start", {})
    cold, warm = figures["cold"], figures["warm"]
    assert {told["cache"] for told in cold["compiled"].values()} == {"miss"}
    assert {told["cache"] for told in warm["compiled"].values()} == {"hit"}
    assert 0 < warm["device_ready_seconds"] < warm["loaded_seconds"] < warm["first_frame_seconds"]


def test_a_block_after_a_switch_is_timed_and_variants_are_compared_by_a_pass():
    figures = small_rows("ours_video", {})
    assert figures["switched"]["p50_ms"] > 0 and figures["switched"]["calls"] >= 3
    figures = small_rows("ours_pass", {"transformer": {"split_kv": 2}})
    assert list(figures["passes"]) == [3, 6, 9, 12] and all(t["p50_ms"] > 0 for t in figures["passes"].values())
    assert "pass" in figures["compiled"] and not any(name.startswith("denoise") for name in figures["compiled"])


def test_int8_halves_the_weights_and_its_error_is_told():
    figures = {name: small_rows("ours_dit", {"quantize": name} if name else {}, brief=True)
               for name in (None, "w8a8", "weight_only")}  # fmt: skip
    size = {name: f["weight_bytes"]["transformer"] for name, f in figures.items()}
    assert size["w8a8"] == size["weight_only"] < 0.7 * size[None], "embeddings stay floats, and at this size they count"
    assert all(f["block"]["p50_ms"] > 0 for f in figures.values())
    exact, int8 = small_rows("ours_error", {}), small_rows("ours_error", {"quantize": "w8a8"})
    assert exact["flow_relative_l2"] < 1e-4 < int8["flow_relative_l2"] < 0.1


def test_the_report_compares_the_fastest_and_names_what_failed(tmp_path):
    timed = lambda ms, flops=None: {"p50_ms": ms, "p95_ms": ms} | ({"flops_per_second": flops} if flops else {})
    done = lambda **figures: {"status": "done", "seconds": 1.0, "figures": figures}
    machine = {"device": "gpu"}, {"jax": "1"}, {"rows": 8, "dtype": "bfloat16", "flops_per_second": 8e14}
    rows = {
        "ceilings": done(hardware=machine[0], versions=machine[1], matmul=machine[2], copy={"bytes_per_second": 3e12}),
        "DiT, ours": done(
            block=timed(250.0, 4e14),
            block_5=timed(250.0),
            block_320=timed(252.0),
            recache=timed(160.0),
            weight_bytes={"transformer": 2_840_000_000},
            passes={"3": timed(30.0), "12": timed(48.0)},
            memory_5={"bytes": 9, "now": 1000, "of": "device"},
            memory_320={"bytes": 9, "now": 1000, "of": "device"},
        ),
        "DiT, ours: unrolled layers": done(block=timed(200.0, 6e14)),
        "DiT, ours: int8, w8a8": done(block=timed(100.0), weight_bytes={"transformer": 1_450_000_000}),
        "pass, ours: keys in 2 parts": done(passes={"3": timed(50.0), "12": timed(40.0)}),
        "again: DiT, ours, end of call 1": done(block=timed(255.0)),
        "DiT, stock with the LoRA merged": done(block=timed(600.0), attention="CUDNN_ATTENTION by PyTorch"),
        "DiT, stock merged and compiled": {"status": "failed", "error": "no\nkernel", "figures": {}},
        "DiT, stock as shipped (LoRA by peft)": done(block=timed(800.0)),
        "VAE, ours": done(decode=timed(100.0), weights="random"),
        "VAE, stock": done(**{"stock": timed(600.0), "block, channels-last": timed(300.0)}),
        "end to end, ours": done(block=timed(360.0), memory={"bytes": 2**34, "of": "device"}),
        "end to end, stock as shipped": done(ms_per_block=1400.0, missing={"p95": "no arrival times"}),
        "start from a checkpoint, ours": done(warm={"first_frame_seconds": 9.0}),
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
        "Attention of the official transformer: CUDNN_ATTENTION by PyTorch.", "FPS is 12 frames over that time",
        "- p95: no arrival times", "end of call 1: 1.020 of the first", "weights of the transformer 1.45 GB",
        "- transformer, a block: 250 ms, aimed at no more than 250 ms: reached",
        "- transformer, stock as shipped over ours: 3.2, aimed at no less than 2.3: reached",
        "- end to end, fastest parts of PyTorch over ours: 2.5, aimed at no less than 1.3: reached",
        "- int8, a block: 100 ms, aimed at no more than 215 ms: reached",
        "- int8, weights over bfloat16's: 0.5106, aimed at no more than 0.52: reached",
        "- prompt switch, recache with the sink kept: 160 ms, aimed at no more than 150 ms: not reached",
        "- prompt switch, wait for the next block's frames: not measured, aimed at no more than 750 ms",
        "- growth, block 320 over block 5, memory: 1, aimed at no more than 1.02: reached",
        "- warm start to first frame: 9 s, aimed at no more than 10 s: reached", "warm: first_frame_seconds 9",
        "- pass, ours: keys in 2 parts: 1.200 times as fast as the default (40 ms a pass, default 48 ms)",
    ):  # fmt: skip
        assert line in text, line
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_the_report_does_without_the_ceilings(tmp_path):
    report, path = load("report"), tmp_path / "results.json"
    stopped = {"hardware": {"device": "gpu"}, "versions": {"jax": "1"}}
    block = {"block": {"p50_ms": 1.0, "p95_ms": 1.0, "flops_per_second": 1e12}}
    rows = {
        "ceilings": {"status": "out of time", "error": "stopped after 90 s", "figures": stopped},
        "DiT, ours": {"status": "done", "figures": block},
    }
    path.write_text(json.dumps({"rehearsal": False, "rows": rows}))
    report.main([str(path)])
    assert "| DiT, ours | block | 1 | 1 | 1 |  |" in path.with_suffix(".md").read_text()
