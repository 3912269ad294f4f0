"""Curves of training runs: few points are kept, the last among them, and they make the same picture again."""

import importlib.util
import json
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "experiments" / "sprites" / "curves.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("curves", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_run(folder: Path, lines: int) -> Path:
    folder.mkdir()
    figures = [{"step": 10 * i, "phase": "a", "loss": 1 / i, "flops": 7.0} for i in range(1, lines + 1)]
    figures.insert(1, {"step": 10, "validation_error": 1.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in figures))
    return folder


def test_few_points_are_kept_and_the_last(script, tmp_path):
    kept = script.figures_of(write_run(tmp_path / "run", 1001))
    assert len(kept) <= script.POINTS + 1 and kept[-1]["step"] == 10010
    assert set(kept[0]) == {"step", "phase", "loss"} and kept[0]["loss"] == pytest.approx(
        10 / kept[0]["step"], abs=1e-5
    )


def test_a_file_of_figures_makes_the_picture_again(script, tmp_path, monkeypatch):
    runs = [f"one={write_run(tmp_path / 'a', 5)}", f"one={write_run(tmp_path / 'b', 9)}"]
    kept, pictures = tmp_path / "kept.json", [tmp_path / "1.png", tmp_path / "2.png"]
    for arguments, picture in ([*runs, "--json", str(kept)], pictures[0]), (["--from", str(kept)], pictures[1]):
        monkeypatch.setattr("sys.argv", ["curves.py", *arguments, "--plot", str(picture)])
        script.main()
    assert [run[-1]["step"] for run in json.loads(kept.read_text())["one"]] == [50, 90]
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    monkeypatch.setattr("sys.argv", ["curves.py", "one=nowhere"])
    with pytest.raises(SystemExit):
        script.main()
