"""A table and a plot of what `h100.py` measured; runs anywhere.

    python experiments/speed/report.py experiments/speed/results/h100-2026-12-01.json

Writes RESULTS.md and RESULTS.png beside the JSON. The plot shows how far each row is from the roofline: the share of
the matrix product that the same machine did in the same run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
    "Switched: the same from block to block, of blocks before which the prompt is switched (recache, sink kept). At 16 "
    "frames a second a block plays for 750 ms; a viewer waits for no frame if the next one comes sooner.",
    "Pass, ours: a forward pass by how many latent frames it attends; variants are compared by that of a full window.",
    "First frame: from prompt embedding to the first block's pixels on the host, all compiled; stock: one block.",
    "int8: the transformer's blocks only; not the same numbers as bfloat16, so never among the fastest of ours.",
)
"""What the figures include."""

NOT_MEASURED = (
    "TAEHV in either framework; the official code streaming (decoding block by block with its cache); "
    "float8 in the model (its products are); tokamax's attention and flash-attention itself; drift of latents over "
    "blocks, and keys and values after a block; A-B-A in one process (our block is repeated at each call's end instead)"
)


class Target(NamedTuple):
    """What is aimed at on one H100.

    Attributes:
      name, aim, unit: of it.
      least: whether `aim` is the least that will do; the most, otherwise.
    """

    name: str
    aim: float
    unit: str = ""
    least: bool = False

    def line(self, value: float | None) -> str:
        """What was measured, and whether it is enough."""
        aim = f"aimed at {'no less' if self.least else 'no more'} than {self.aim:.4g}{self.unit}"
        if value is None:
            return f"- {self.name}: not measured, {aim}"
        reached = value >= self.aim if self.least else value <= self.aim
        return f"- {self.name}: {value:.4g}{self.unit}, {aim}: {'reached' if reached else 'not reached'}"


TARGETS: Sequence[Target] = (
    Target("transformer, a block", 250.0, " ms"),
    Target("end to end, a block", 360.0, " ms"),
    Target("transformer, stock as shipped over ours", 2.3, least=True),
    Target("end to end, stock as shipped over ours", 3.0, least=True),
    Target("transformer, fastest of PyTorch over ours", 1.3, least=True),
    Target("end to end, fastest parts of PyTorch over ours", 1.3, least=True),
    Target("int8, a block", 215.0, " ms"),
    Target("int8, weights over bfloat16's", 0.52),  # half, but for embeddings, norms and scales
    Target("prompt switch, recache with the sink kept", 150.0, " ms"),
    Target("prompt switch, wait for the next block's frames", 750.0, " ms"),  # what 12 frames last at 16 a second
    Target("growth, block 320 over block 5, time", 1.02),
    Target("growth, block 320 over block 5, memory", 1.02),
    Target("warm start to first frame", 10.0, " s"),
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


class Measured:
    """Figures of the rows by what the ratios and targets are about; None where a row is missing."""

    def __init__(self, rows: dict[str, Any]):
        self.rows = rows
        exact = [name for name in rows if "int8" not in name]
        self.ours = self.figure("DiT, ours", "block", "p50_ms")
        self.fastest = least(self.figure(n, "block", "p50_ms") for n in exact if n.startswith("DiT, ours"))
        self.stock = self.figure("DiT, stock as shipped (LoRA by peft)", "block", "p50_ms")
        self.torch = least(self.figure(n, "block", "p50_ms") for n in rows if n.startswith("DiT, stock"))
        self.vae, self.torch_vae = (least(self._all(name)) for name in ("VAE, ours", "VAE, stock"))
        self.video = self.figure("end to end, ours", "block", "p50_ms")
        self.stock_video = self.figure("end to end, stock as shipped", "ms_per_block")
        self.torch_video = None if None in (self.torch, self.torch_vae) else self.torch + self.torch_vae

    def figure(self, row: str, *path: str) -> float | None:
        """One figure of a row."""
        found = self.rows.get(row, {}).get("figures", {})
        for name in path:
            found = found.get(name, {})
        return found if isinstance(found, (int, float)) else None

    def _all(self, start: str) -> list[float]:
        rows = [row["figures"] for name, row in self.rows.items() if name.startswith(start)]
        return [times["p50_ms"] for figures in rows for _, times in timed(figures)]


def least(values: Iterable[float | None]) -> float | None:
    """The least of those that are there."""
    return min((v for v in values if v is not None), default=None)


def over(one: float | None, other: float | None) -> float | None:
    """A ratio, of what is there."""
    return one / other if one is not None and other else None


def ratios(rows: dict[str, Any]) -> list[str]:
    """PyTorch's time over ours, where both are there."""
    found = Measured(rows)

    def line(name: str, theirs: float | None, mine: float | None) -> list[str]:
        return [f"- {name}: {theirs / mine:.2f} ({theirs:.4g} ms over {mine:.4g} ms)"] if theirs and mine else []

    block = lambda number: found.figure("DiT, ours", f"block_{number}", "p50_ms")
    lines = line("transformer, stock as shipped", found.stock, found.fastest)
    lines += line("transformer, fastest of PyTorch", found.torch, found.fastest)
    lines += line("transformer, fastest of PyTorch over our default", found.torch, found.ours)
    lines += line("VAE, fastest of PyTorch", found.torch_vae, found.vae)
    lines += line("end to end, stock as shipped", found.stock_video, found.video)
    lines += line("end to end, fastest parts of PyTorch", found.torch_video, found.video)
    lines += line("block 320 over block 5 of ours", block(320), block(5))
    head = ["PyTorch's time over ours (above 1: ours is faster), p50, fastest variant of each:", ""]
    return (head + lines if lines else []) + [""] + variants(rows) + drift(rows)


def variants(rows: dict[str, Any]) -> list[str]:
    """A pass of the default at a full window over the same of each variant."""
    full = {
        name: row["figures"]["passes"][max(row["figures"]["passes"], key=int)]["p50_ms"]
        for name, row in rows.items()
        if row.get("figures", {}).get("passes")
    }
    mine = full.get("DiT, ours")
    return [
        f"- {name}: {mine / ms:.3f} times as fast as the default ({ms:.4g} ms a pass, default {mine:.4g} ms)"
        for name, ms in full.items()
        if mine and name != "DiT, ours"
    ]


def drift(rows: dict[str, Any]) -> list[str]:
    """Our block at the end of each call over the same at the start of the first."""
    p50 = lambda row: row.get("figures", {}).get("block", {}).get("p50_ms")
    first = p50(rows.get("DiT, ours", {}))
    again = {name: p50(row) for name, row in rows.items() if name.startswith("again: DiT, ours")}
    return [f"- {name}: {ms / first:.3f} of the first ({ms:.4g} ms)" for name, ms in again.items() if ms and first]


def targets(rows: dict[str, Any]) -> list[str]:
    """What is aimed at on an H100, beside what was measured."""
    found = Measured(rows)
    of, mine = found.figure, "DiT, ours"
    int8 = [name for name in rows if name.startswith("DiT, ours: int8")]
    weights = lambda row: of(row, "weight_bytes", "transformer")
    values = (
        found.ours,
        found.video,
        over(found.stock, found.ours),
        over(found.stock_video, found.video),
        over(found.torch, found.ours),
        over(found.torch_video, found.video),
        least(of(name, "block", "p50_ms") for name in int8),
        over(least(map(weights, int8)), weights(mine)),
        of(mine, "recache", "p50_ms"),
        of("end to end, ours", "switched", "p95_ms"),
        over(of(mine, "block_320", "p50_ms"), of(mine, "block_5", "p50_ms")),
        over(of(mine, "memory_320", "now"), of(mine, "memory_5", "now")),
        of("start from a checkpoint, ours", "warm", "first_frame_seconds"),
    )
    lines = [target.line(value) for target, value in zip(TARGETS, values, strict=True)]
    return ["", "Targets on an H100, of our default:", "", *lines] if any(v is not None for v in values) else []


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
