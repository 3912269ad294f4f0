"""Losses of training runs as one picture, and thinned out in a JSON that is small enough to keep.

    python experiments/sprites/curves.py teacher=runs/teacher init=runs/init --json results.json --plot curves.png
    python experiments/sprites/curves.py --from results.json --plot curves.png      # the picture again

A name that several runs share is one curve of runs that followed each other. Dotted lines are where a phase ends.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

KEPT = ("step", "phase", "loss", "critic_loss", "sprite", "grad_norm", "seconds")
POINTS = 120
"""The most that a run keeps."""


def figures_of(run: Path) -> list[dict[str, Any]]:
    """A run's lines that have a loss, each the mean of its steps; every so many, and the last."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line or "critic_loss" in line]
    every = -(-len(lines) // POINTS)
    chosen = lines[every - 1 :: every]
    chosen += [lines[-1]] if lines and lines[-1] is not chosen[-1] else []
    rounded = lambda v: round(v, 5) if isinstance(v, float) else v
    return [{name: rounded(line[name]) for name in KEPT if name in line} for line in chosen]


def plot(curves: dict[str, list[list[dict[str, Any]]]], path: Path) -> None:
    """A row of panels, one a name."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(curves), figsize=(3.4 * len(curves), 3), squeeze=False)
    for panel, (name, runs) in zip(panels[0], curves.items()):
        began = 0
        for run in runs:
            for quantity, colour in (("loss", "C0"), ("critic_loss", "C1")):
                there = [line for line in run if quantity in line]
                label = quantity.replace("_", " ") if run is runs[0] and there else None
                steps = [began + line["step"] for line in there]
                panel.plot(steps, [line[quantity] for line in there], colour, linewidth=1, label=label)
            ends = [a["step"] for a, b in zip(run, run[1:]) if a["phase"] != b["phase"]] + [run[-1]["step"]]
            for end in ends:
                panel.axvline(began + end, color="0.6", linestyle=":", linewidth=0.8)
            began += run[-1]["step"]
        panel.set(title=name, xlabel="step")
        panel.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="NAME=RUN")
    parser.add_argument("--from", type=Path, dest="source", help="figures that --json kept")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    if bool(args.runs) == bool(args.source):
        parser.error("give runs as NAME=RUN, or --from a file that --json made")
    curves: dict[str, list] = json.loads(args.source.read_text()) if args.source else {}
    for run in args.runs:
        name, found, folder = run.partition("=")
        if not found or not (Path(folder) / "metrics.jsonl").exists():
            parser.error(f"'{run}' is no NAME=RUN whose RUN has a metrics.jsonl")
        curves.setdefault(name, []).append(figures_of(Path(folder)))
    if args.json:
        text = ",\n".join(
            f'"{name}": [\n' + ",\n".join("[\n" + ",\n".join(map(json.dumps, run)) + "]" for run in runs) + "]"
            for name, runs in curves.items()
        )
        args.json.write_text("{" + text + "}\n")
    if args.plot:
        plot(curves, args.plot)


if __name__ == "__main__":
    main()
