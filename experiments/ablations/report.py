"""Tables and plots of what `run.py` wrote down.

    python experiments/ablations/report.py runs/ablations

Of every STUDY.jsonl in the folder: STUDY.md (a table), STUDY.png (a plot), STUDY-frames-N.png (frames of clip N, a row
an arm) and STUDY.json (the figures). Only clips that all arms have are counted, so that arms are compared on the
same prompts and seeds. Shares have Wilson intervals; differences from the study's reference arm are paired.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from longlive_jax.config import FPS
from longlive_jax.data.sprites import ATTRIBUTES
from longlive_jax.errors import UserError
from longlive_jax.evaluation.intervals import mean_interval, paired_share_difference, wilson
from records import CHANGED
from run import SHOWN, parse_results
from studies import NO_SWITCH, STUDIES, Study

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402 - after the choice of a backend that needs no screen

Record = dict[str, Any]
DONE_WITHIN = 2.0  # seconds in which a switch is to be done (docs/sprites.md)


@dataclasses.dataclass(frozen=True)
class Measure:
    """A figure of a clip.

    Attributes:
      unit: "%" for shares, whose clips are right or wrong; any other is a mean.
      of: the clip's figure, or None where it has none.
    """

    name: str
    unit: str
    of: Callable[[Record], bool | float | None]


def measures_of(study: Study) -> list[Measure]:
    """The columns of a study's table."""
    if study.switch_at is None:
        at = f"{study.points[-1]:g}"
        shares = [Measure(name, "%", lambda r, name=name: r["at"][at]["right"][name]) for name in ATTRIBUTES]
        return [
            *shares,
            Measure("sprite seen", "%", lambda r: r["at"][at]["read"]["colour"] is not None),
            Measure("background error", "levels", lambda r: r["at"][at]["background_error"]),
            Measure("sprite error", "levels", lambda r: r["at"][at]["sprite_error"]),
        ]
    return [
        *(Measure(f"{name} right", "%", lambda r, n=name: r["last"]["right"][n]) for name in CHANGED),
        Measure(f"done in {DONE_WITHIN:g} s", "%", _done),
        *(Measure(f"{n} wrong after it", "s", lambda r, n=n: _wrong(r, n).sum() / FPS) for n in CHANGED),
        # Of the clips where it was right before the switch, which are the same in all arms.
        *(
            Measure(f"{name} kept", "%", lambda r, n=name: r["second"]["right"][n] if r["before"]["right"][n] else None)
            for name in ("shape", "size", "motion")
        ),
        Measure("step over the switch", "px", lambda r: r["step"]),
        Measure("largest step within 1 s", "px", lambda r: r["largest_jump"]),
    ]  # fmt: skip


def _wrong(record: Record, attribute: str) -> np.ndarray:
    """Frames after the switch that do not show the new prompt's value; without a switch, the prompt's."""
    wanted = "o" if record["arm"] == NO_SWITCH else "n"
    return np.array([letter != wanted for letter in record["timeline"][attribute][record["switch_frame"] :]])


def _done(record: Record) -> bool:
    """Whether both attributes are right from then on."""
    first = round(DONE_WITHIN * FPS)
    return not any(_wrong(record, name)[first:].any() for name in CHANGED)


def figure(measure: Measure, records: list[Record]) -> dict[str, Any]:
    """Value, interval and number of clips; shares are between 0 and 1."""
    values = [v for v in map(measure.of, records) if v is not None]
    if not values:
        return {"value": None, "interval": None, "clips": 0}
    if measure.unit == "%":
        return {"value": float(np.mean(values)), "interval": wilson(sum(values), len(values)), "clips": len(values)}
    value, *interval = mean_interval(values)
    return {"value": value, "interval": interval, "clips": len(values)}


def difference(measure: Measure, records: list[Record], reference: list[Record]) -> tuple[float, float, float] | None:
    """Difference from the reference on the same clips, and its interval; both lists are in the order of the clips."""
    pairs = [(measure.of(a), measure.of(b)) for a, b in zip(records, reference, strict=True)]
    pairs = [(a, b) for a, b in pairs if a is not None and b is not None]
    if not pairs:
        return None
    ours, theirs = zip(*pairs)
    return paired_share_difference(ours, theirs) if measure.unit == "%" else mean_interval(np.subtract(ours, theirs))


def read_study(path: Path) -> tuple[Study, dict[str, list[Record]]]:
    """A study and the records of its arms, of the clips that all arms have, in the order of the clips."""
    setup, records = parse_results(path.read_text(), path)
    if setup is None or setup["study"] not in STUDIES:
        raise UserError(f"{path} holds no results of a study that is known; delete it or run it again")
    study = STUDIES[setup["study"]]
    arms = {arm.name: {r["clip"]: r for r in records if r["arm"] == arm.name} for arm in study.arms}
    arms = {name: of_clip for name, of_clip in arms.items() if of_clip}
    common = sorted(set.intersection(*(set(of_clip) for of_clip in arms.values()))) if arms else []
    if not common:
        raise UserError(f"{path} holds no clip that all of its arms have; run it on")
    return study, {name: [of_clip[i] for i in common] for name, of_clip in arms.items()}


def summarise(study: Study, arms: dict[str, list[Record]]) -> dict[str, Any]:
    """Every figure of the table."""
    reference = arms.get(study.reference)
    figures: dict[str, dict[str, Any]] = {name: {} for name in arms}
    for measure in measures_of(study):
        for name, records in arms.items():
            one = figure(measure, records) | {"unit": measure.unit}
            # What never switches is another question: its prompt is the first.
            if reference is not None and name not in (study.reference, NO_SWITCH):
                one["difference"] = difference(measure, records, reference)
            figures[name][measure.name] = one
    clips = len(next(iter(arms.values())))
    return {"study": study.name, "clips": clips, "reference": study.reference, "arms": figures}


def table(summary: dict[str, Any]) -> str:
    """A row an arm: value (interval); below it the difference from the reference, bold if its interval leaves 0 out."""
    names = list(next(iter(summary["arms"].values())))
    units = {name: next(iter(summary["arms"].values()))[name]["unit"] for name in names}
    head = [f"{summary['clips']} clips an arm", *(f"{name}, {units[name]}" for name in names)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for arm, figures in summary["arms"].items():
        lines.append("| " + " | ".join([arm, *(_cell(figures[name], summary["clips"]) for name in names)]) + " |")
    return "\n".join(lines) + "\n"


def _cell(one: dict[str, Any], clips: int) -> str:
    if one["value"] is None:
        return "-"
    scale, digits = (100, 0) if one["unit"] == "%" else (1, 1)
    low, high = one["interval"]
    text = f"{scale * one['value']:.{digits}f} ({scale * low:.{digits}f} to {scale * high:.{digits}f})"
    if one["clips"] < clips:
        text += f", of {one['clips']}"
    if one.get("difference"):
        value, low, high = (scale * x for x in one["difference"])
        mark = "**" if low > 0 or high < 0 else ""
        text += f"<br>{mark}{value:+.1f} ({low:+.1f} to {high:+.1f}){mark}"
    return text


# Plots ----------------------------------------------------------------------------------------------------------------


def plot(study: Study, arms: dict[str, list[Record]]) -> plt.Figure:
    """The picture of a study: through the switch, over time, or one row an arm."""
    if study.switch_at is not None:
        return plot_switch(study, arms)
    return plot_over_time(study, arms) if len(study.points) > 1 else plot_arms(study, arms)


def plot_switch(study: Study, arms: dict[str, list[Record]]) -> plt.Figure:
    """Share of clips that read as the new prompt, frame by frame; and how far the sprite steps at the switch."""
    figure_, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for axis, attribute in zip(axes, CHANGED):
        for number, (name, records) in enumerate(arms.items()):
            letters = np.array([list(r["timeline"][attribute]) for r in records])
            time = (np.arange(letters.shape[1]) - records[0]["switch_frame"]) / FPS
            right = letters == ("o" if name == NO_SWITCH else "n")
            label = f"{name}: the first prompt's" if name == NO_SWITCH else name
            style = {"color": "0.6", "ls": ":"} if name == NO_SWITCH else {"color": f"C{number}"}
            axis.plot(time[time >= -1], 100 * right.mean(0)[time >= -1], label=label, **style)
        axis.axvline(0, color="0.8", lw=0.8)
        axis.set(title=f"{attribute} reads as the new prompt's", xlabel="seconds from the switch", ylabel="% of clips")
        axis.set_ylim(-3, 103)
    axes[1].legend(fontsize=8, loc="lower right")
    for number, (name, records) in enumerate(arms.items()):
        steps = np.array([r["step"] for r in records if r["step"] is not None])
        scatter = number + np.random.default_rng(0).uniform(-0.15, 0.15, len(steps))
        axes[2].plot(scatter, steps, ".", ms=4, alpha=0.5, color="0.6" if name == NO_SWITCH else f"C{number}")
        value, low, high = mean_interval(steps)
        axes[2].errorbar(number, value, [[value - low], [high - value]], fmt="_", color="k", ms=14, capsize=4)
    axes[2].set_xticks(range(len(arms)), [name.replace(", ", ",\n") for name in arms], fontsize=8)
    axes[2].set(title="step of the sprite over the switch (bar: mean)", ylabel="pixels")
    return figure_


def plot_over_time(study: Study, arms: dict[str, list[Record]]) -> plt.Figure:
    """Shares and colour errors against the time at which they are read."""
    figure_, axes = plt.subplots(2, 4, figsize=(14, 6.4), layout="constrained")
    for axis, attribute in zip(axes.flat, ATTRIBUTES):
        for number, (name, records) in enumerate(arms.items()):
            rights = [[r["at"][f"{t:g}"]["right"][attribute] for r in records] for t in study.points]
            _line(axis, study, number, name, [(np.mean(x), *wilson(sum(x), len(x))) for x in rights], 100)
        axis.set(title=f"{attribute} right", ylabel="% of clips", ylim=(-3, 103))
    for axis, part in zip(axes.flat[len(ATTRIBUTES) :], ("background", "sprite")):
        for number, (name, records) in enumerate(arms.items()):
            errors = [[r["at"][f"{t:g}"][f"{part}_error"] for r in records] for t in study.points]
            errors = [mean_interval([e for e in at if e is not None]) for at in errors]
            _line(axis, study, number, name, errors, 1)
        axis.set(title=f"colour error of the {part}", ylabel="levels of 255")
        axis.set_ylim(bottom=0)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    axes.flat[-1].axis("off")
    axes.flat[-1].legend(handles, labels, loc="center", fontsize=9)
    for axis in axes.flat[:-1]:
        axis.set_xlabel("seconds of video")
    return figure_


def _line(axis, study: Study, number: int, name: str, points: list[tuple[float, float, float]], scale: float) -> None:
    """A line of values with intervals; arms are moved apart a little so that their bars can be seen."""
    value, low, high = scale * np.array(points, float).T
    moved = np.array(study.points) + (number - 0.5) * 0.01 * study.seconds
    bars = np.nan_to_num([value - low, high - value], posinf=0.0)
    axis.errorbar(moved, value, bars, marker="o", ms=3, lw=1.2, capsize=2, color=f"C{number}", label=name)


def plot_arms(study: Study, arms: dict[str, list[Record]]) -> plt.Figure:
    """A panel an attribute, a row an arm."""
    names = list(arms)
    size = (13, 1.2 + 0.32 * len(names))
    figure_, axes = plt.subplots(1, len(ATTRIBUTES), figsize=size, sharey=True, layout="constrained")
    for axis, attribute in zip(axes, ATTRIBUTES):
        for row, name in enumerate(names):
            rights = [r["at"][f"{study.points[-1]:g}"]["right"][attribute] for r in arms[name]]
            value, low, high = 100 * np.array([np.mean(rights), *wilson(sum(rights), len(rights))])
            axis.errorbar(value, row, xerr=[[value - low], [high - value]], fmt="o", ms=4, capsize=3, color="C0")
        axis.set(title=attribute, xlabel="% of clips right", xlim=(-3, 103))
        axis.grid(alpha=0.3)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    return figure_


def frames_sheet(folder: Path, names: list[str], clip: int) -> plt.Figure | None:
    """The strips of a clip that `run.py` kept, a row an arm; None if there are none."""
    files = {name: folder / f"{name}-{clip}.png" for name in names}
    strips = {name: plt.imread(path) for name, path in files.items() if path.exists()}
    if not strips:
        return None
    height, width = (max(strip.shape[side] for strip in strips.values()) / 80 for side in (0, 1))
    figure_, axes = plt.subplots(len(strips), 1, figsize=(width + 1.6, height * len(strips)), squeeze=False)
    for axis, (name, strip) in zip(axes[:, 0], strips.items()):
        axis.imshow(strip, interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    figure_.subplots_adjust(left=1.5 / (width + 1.6), right=0.99, top=0.99, bottom=0.01, hspace=0.03)
    return figure_


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    try:
        files = [args.folder / f"{name}.jsonl" for name in STUDIES if (args.folder / f"{name}.jsonl").exists()]
        if not files:
            raise UserError(f"{args.folder} holds no results; run experiments/ablations/run.py --output {args.folder}")
        for path in files:
            report(path)
    except UserError as error:
        sys.exit(f"error: {error}")


def report(path: Path) -> None:
    """Table, plots and figures of one study, beside its results."""
    study, arms = read_study(path)
    summary = summarise(study, arms)
    path.with_suffix(".json").write_text(json.dumps(summary, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(summary))
    plot(study, arms).savefig(path.with_suffix(".png"), dpi=80)
    for clip in range(SHOWN):
        sheet = frames_sheet(path.parent / "frames" / study.name, list(arms), clip)
        if sheet is not None:
            sheet.savefig(path.with_name(f"{path.stem}-frames-{clip}.png"), dpi=80)
    plt.close("all")
    print(f"{study.name}\n{table(summary)}")


if __name__ == "__main__":
    main()
