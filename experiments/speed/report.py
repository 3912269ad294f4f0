"""A table and a plot of what `h100.py` measured; runs anywhere.

    python experiments/speed/report.py experiments/speed/results/h100-2026-12-01.json

Writes RESULTS.md and RESULTS.png beside the JSON. The plot shows how far each row is from the roofline: the share of
the matrix product that the same machine did in the same run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

EXTERNAL = (
    "Not measured here, for orientation only: FlashDreams logs 334 ms a block for the transformer and 340 ms with a "
    "small decoder on its own H100; LongLive's paper says 20.7 FPS (580 ms)."
)


def timed(figures: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every timed thing in a row's figures, with the words on the way to it."""
    if not isinstance(figures, dict):
        return
    if "p50_ms" in figures:
        yield ", ".join(path), figures
        return
    for name, inner in figures.items():
        yield from timed(inner, (*path, str(name)))


def markdown(results: dict[str, Any]) -> str:
    """The results as a table, what failed, and the ratios."""
    rows = results["rows"]
    machine = rows.get("ceilings", {}).get("figures", {})
    ceiling = machine.get("matmul", {}).get("flops_per_second")
    lines = [f"# {'Rehearsal at small shapes' if results.get('rehearsal') else 'Speed'}", ""]
    if machine:
        gpu, versions = machine["hardware"], machine["versions"]
        lines += [
            f"{gpu['device']}; " + ", ".join(f"{name} {v}" for name, v in versions.items() if v),
            f"Ceilings: matrix product {ceiling / 1e12:.4g} TFLOP/s ({machine['matmul']['rows']} rows, "
            f"{machine['matmul']['dtype']}), copy {machine['copy']['bytes_per_second'] / 1e9:.4g} GB/s.",
            "",
        ]
    weights = {r["figures"]["weights"] for r in rows.values() if "weights" in r.get("figures", {})}
    lines += [f"Weights: {'; '.join(sorted(weights))}.", ""] if weights else []
    lines += ["| row | what | p50 ms | p95 ms | TFLOP/s | of ceiling |", "|---|---|---|---|---|---|"]
    for name, row in rows.items():
        for what, times in timed(row["figures"]):
            speed = times.get("flops_per_second")
            share = f"{speed / ceiling:.0%}" if speed and ceiling else ""
            speed = f"{speed / 1e12:.4g}" if speed else ""
            lines.append(f"| {name} | {what} | {times['p50_ms']:.4g} | {times['p95_ms']:.4g} | {speed} | {share} |")
    lines += ["", "| row | other figures |", "|---|---|"]
    lines += [f"| {name} | {', '.join(other(row['figures']))} |" for name, row in rows.items()]
    faults = [
        f"- {name}: {row['status']}: {row.get('error', '')}" for name, row in rows.items() if row["status"] != "done"
    ]
    lines += ["", "Rows that are not there:", ""] + [line.replace("\n", " ")[:400] for line in faults] if faults else []
    return "\n".join([*lines, "", *ratios(rows), "", EXTERNAL, ""])


def other(figures: dict[str, Any]) -> list[str]:
    """Memory, compilation, errors and frame rates."""
    found = []
    for name, value in figures.items():
        if isinstance(value, dict) and value.get("of") in ("device", "process"):
            found.append(f"{name} {value['bytes'] / 2**30:.2f} GiB ({value['of']})")
        elif name == "compiled":
            found += [f"compiled {p}: {c['seconds']:.1f} s ({c['cache']})" for p, c in value.items()]
        elif isinstance(value, float):
            found.append(f"{name} {value:.4g}")
    return found


def ratios(rows: dict[str, Any]) -> list[str]:
    """PyTorch's time over ours, where both are there."""

    def p50(row: str, *path: str) -> float | None:
        found = rows.get(row, {}).get("figures", {})
        for name in path:
            found = found.get(name, {})
        return found.get("p50_ms")

    def least(values: Sequence[float | None]) -> float | None:
        return min((v for v in values if v is not None), default=None)

    def line(name: str, theirs: float | None, mine: float | None) -> list[str]:
        return [f"- {name}: {theirs / mine:.2f} ({theirs:.4g} ms over {mine:.4g} ms)"] if theirs and mine else []

    dits = [p50(name, "block") for name in rows if name.startswith("DiT, ours")]
    torch_dits = [p50(name, "block") for name in rows if name.startswith("DiT, stock")]
    vaes = [t["p50_ms"] for name in rows if name.startswith("VAE, ours") for _, t in timed(rows[name]["figures"])]
    torch_vaes = [t["p50_ms"] for n in rows if n.startswith("VAE, stock") for _, t in timed(rows[n]["figures"])]
    video, best = p50("end to end, ours", "block"), (least(torch_dits), least(torch_vaes))
    stock = rows.get("end to end, stock as shipped", {}).get("figures", {}).get("ms_per_block")
    found = line("transformer, stock as shipped", p50("DiT, stock as shipped (LoRA by peft)", "block"), least(dits))
    found += line("transformer, fastest of PyTorch", best[0], least(dits))
    found += line("VAE, fastest of PyTorch", best[1], least(vaes))
    found += line("end to end, stock as shipped", stock, video)
    found += line("end to end, fastest parts of PyTorch", sum(best) if None not in best else None, video)
    long, short = p50("DiT, ours", "block_320"), p50("DiT, ours", "block_5")
    found += line("block 320 over block 5 of ours", long, short)
    return (
        ["PyTorch's time over ours (above 1: ours is faster), p50, fastest variant of each:", "", *found]
        if found
        else []
    )


def plot(results: dict[str, Any], path: Path) -> None:
    """Share of the ceiling, a bar a timed thing."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    matmul = results["rows"].get("ceilings", {}).get("figures", {}).get("matmul")
    bars = []
    for name, row in results["rows"].items():
        for what, times in timed(row["figures"]):
            if matmul and "flops_per_second" in times and name != "ceilings":
                bars.append((f"{name}: {what}", times["flops_per_second"] / matmul["flops_per_second"]))
    figure, axes = plt.subplots(figsize=(10, 1 + 0.22 * max(1, len(bars))), layout="constrained")
    colours = ["#888888" if "stock" in name or "PyTorch" in name else "#1f77b4" for name, _ in bars]
    axes.barh([name for name, _ in bars], [share for _, share in bars], color=colours)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel("share of a large matrix product on the same machine (blue: ours, grey: PyTorch)")
    figure.savefig(path, dpi=150)


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    options = parser.parse_args(args)
    results = json.loads(options.results.read_text())
    options.results.with_suffix(".md").write_text(markdown(results))
    plot(results, options.results.with_suffix(".png"))
    print(markdown(results))


if __name__ == "__main__":
    main()
