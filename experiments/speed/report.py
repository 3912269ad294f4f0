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


DEFINITIONS = (
    "A block is 3 latent frames, 12 pixel frames of 480 x 832 (smaller in a rehearsal), batch of 1, window of 12 "
    "latent frames, full, 3 of them sink; 4 denoising steps and a clean pass.",
    "DiT, block: the transformer's five passes and their noise, no VAE; each block is waited for.",
    "VAE: the full Wan VAE decoding a block in the middle of a video; ours to uint8, PyTorch's to clamped float32; "
    "pixels stay on the device.",
    "End to end, ours: from block to block as its uint8 pixels arrive on the host, transformer with clean pass and "
    "full VAE, the next block already on its way. FPS is 12 frames over that time. No prompt encoding, no video file.",
    "End to end, stock: the official script's call, noise to uint8 pixels on the host, for 20 blocks, decoded at the "
    "end; the mean a block, first blocks (whose window is not yet full, so cheaper) included, and FPS is 12 over that. "
    "Its `block` adds up a block's passes and decoding with the window full, without the way to the host.",
    "First frame: from prompt embedding to the first block's pixels on the host, all compiled; stock: one block.",
    "int8: the transformer's blocks only; not the same numbers as bfloat16, so never among the fastest of ours.",
)
"""What the figures include."""

NOT_MEASURED = (
    "TAEHV in either framework; the official code streaming (decoding block by block with its cache); "
    "float8 in the model (its products are); tokamax's attention and flash-attention itself; drift of latents over "
    "blocks, and keys and values after a block; A-B-A in one process (our block is repeated at each call's end instead)"
)

TARGETS = {"DiT, ours": 250.0, "int8": 215.0, "end to end": 360.0, "start": 10.0}
"""What is aimed at on one H100: milliseconds a block, and seconds of a warm start."""


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
        lines += [f"{gpu['device']}; " + ", ".join(f"{name} {v}" for name, v in versions.items() if v)]
        if ceiling:  # that row can be stopped before it has them
            product, copy = machine["matmul"], machine["copy"]
            lines += [
                f"Ceilings: matrix product {ceiling / 1e12:.4g} TFLOP/s ({product['rows']} rows, {product['dtype']}), "
                f"copy {copy['bytes_per_second'] / 1e9:.4g} GB/s."
            ]
        lines += [""]
    cards = {row["on"]["card"] for row in rows.values() if row.get("on", {}).get("card")}
    lines += [f"**Rows are of {len(cards)} cards of this kind.**", ""] if len(cards) > 1 else []
    attention = {str(v) for r in rows.values() for k, v in r.get("figures", {}).items() if k == "attention"}
    lines += [f"Attention of the official transformer: {'; '.join(sorted(attention))}.", ""] if attention else []
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
    notes = {f"- {k}: {v}" for r in rows.values() for k, v in r.get("figures", {}).get("missing", {}).items()}
    words = ["What the figures include:", "", *(f"- {line}" for line in DEFINITIONS), ""]
    words += ["Not measured:", "", f"- {NOT_MEASURED}", *sorted(notes), ""]
    aims = [] if results.get("rehearsal") else targets(rows)
    return "\n".join([*lines, "", *ratios(rows), *aims, "", *words, EXTERNAL, ""])


def other(figures: dict[str, Any]) -> list[str]:
    """Memory, compilation, attention, errors and frame rates."""
    found = []
    for name, value in figures.items():
        if isinstance(value, dict) and value.get("of") in ("device", "process"):
            now = f", {value['now'] / 2**30:.2f} now" if "now" in value else ""
            found.append(f"{name} {value['bytes'] / 2**30:.2f} GiB ({value['of']}){now}")
        elif name == "compiled":
            found += [f"compiled {p}: {c['seconds']:.1f} s ({c['cache']})" for p, c in value.items()]
        elif name == "weight_bytes":
            found += [f"weights of the {part} {size / 1e9:.3g} GB" for part, size in value.items()]
        elif name in ("cold", "warm"):
            found += [f"{name}: {line}" for line in other(value)]
        elif name.startswith("attention"):
            found.append(f"{name}: {value}")
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

    exact = [name for name in rows if "int8" not in name]
    dits = [p50(name, "block") for name in exact if name.startswith("DiT, ours")]
    torch_dits = [p50(name, "block") for name in rows if name.startswith("DiT, stock")]
    vaes = [t["p50_ms"] for name in rows if name.startswith("VAE, ours") for _, t in timed(rows[name]["figures"])]
    torch_vaes = [t["p50_ms"] for n in rows if n.startswith("VAE, stock") for _, t in timed(rows[n]["figures"])]
    video, best = p50("end to end, ours", "block"), (least(torch_dits), least(torch_vaes))
    stock = rows.get("end to end, stock as shipped", {}).get("figures", {}).get("ms_per_block")
    found = line("transformer, stock as shipped", p50("DiT, stock as shipped (LoRA by peft)", "block"), least(dits))
    found += line("transformer, fastest of PyTorch", best[0], least(dits))
    found += line("transformer, fastest of PyTorch over our default", best[0], p50("DiT, ours", "block"))
    found += line("VAE, fastest of PyTorch", best[1], least(vaes))
    found += line("end to end, stock as shipped", stock, video)
    found += line("end to end, fastest parts of PyTorch", sum(best) if None not in best else None, video)
    long, short = p50("DiT, ours", "block_320"), p50("DiT, ours", "block_5")
    found += line("block 320 over block 5 of ours", long, short)
    head = ["PyTorch's time over ours (above 1: ours is faster), p50, fastest variant of each:", ""]
    return (head + found if found else []) + [""] + drift(rows)


def drift(rows: dict[str, Any]) -> list[str]:
    """Our block at the end of each call over the same at the start of the first."""
    p50 = lambda row: row.get("figures", {}).get("block", {}).get("p50_ms")
    first = p50(rows.get("DiT, ours", {}))
    again = {name: p50(row) for name, row in rows.items() if name.startswith("again: DiT, ours")}
    return [f"- {name}: {ms / first:.3f} of the first ({ms:.4g} ms)" for name, ms in again.items() if ms and first]


def targets(rows: dict[str, Any]) -> list[str]:
    """What is aimed at on an H100, beside what was measured."""
    figures = lambda name: rows.get(name, {}).get("figures", {})
    int8 = [figures(n)["block"]["p50_ms"] for n in rows if n.startswith("DiT, ours: int8") and "block" in figures(n)]
    found = {
        "DiT, ours": figures("DiT, ours").get("block", {}).get("p50_ms"),
        "int8": min(int8, default=None),
        "end to end": figures("end to end, ours").get("block", {}).get("p50_ms"),
        "start": figures("start from a checkpoint, ours").get("warm", {}).get("first_frame_seconds"),
    }
    units = {name: "s" if name == "start" else "ms" for name in found}
    lines = [
        f"- {name}: {value:.4g} {units[name]}, aimed at {TARGETS[name]:.4g} on an H100: "
        + ("reached" if value <= TARGETS[name] else "not reached")
        for name, value in found.items()
        if value is not None
    ]
    return ["", "Targets:", "", *lines] if lines else []


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
