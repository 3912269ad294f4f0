"""`longlive convert`: PyTorch checkpoints in, a checkpoint folder out; and the way back."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from longlive_jax.conversion.progress import Progress, Stage
from longlive_jax.errors import UserError


@dataclasses.dataclass
class Convert:
    """Convert Wan / LongLive files (PyTorch) to a checkpoint folder, or a checkpoint folder to PyTorch files or int8.

    Attributes:
      output: the folder to write.
      wan: folder of Wan's original files (config.json, DiT, VAE, text encoder, tokeniser) or of diffusers' WanPipeline,
        or the hub id owner/name of one.
      generator: LongLive's or Self-Forcing's .pt whose DiT replaces Wan's; on the hub owner/name/path/to/file.
      generator_key: which entry of that file: generator, generator_ema or model; the first present by default.
      lora: LoRA files to merge, each FILE or FILE:scale, with the names of peft, diffusers, ComfyUI or kohya.
      lora_alpha: alpha of the LoRAs whose files do not say it; their rank by default.
      checkpoint: a checkpoint folder to convert back, or to int8.
      to: what to: torch (LongLive's and Wan's own files) or diffusers.
      dtype: of the tensors written; bfloat16 by default, on the way back as stored.
      quantize: int8 for the linear layers inside the transformer's blocks; halves it, at a small loss.
      quantize_text_encoder: with --quantize, the text encoder's blocks too.
      verify: read everything back, compare checksums and, with PyTorch, the numbers of each layer with the source's.
      overwrite: replace an output that exists.
    """

    output: Path
    wan: str | None = None
    generator: str | None = None
    generator_key: str | None = None
    lora: tuple[str, ...] = ()
    lora_alpha: float | None = None
    checkpoint: str | None = None
    to: Literal["torch", "diffusers"] | None = None
    dtype: Literal["bfloat16", "float32"] | None = None
    quantize: Literal["int8"] | None = None
    quantize_text_encoder: bool = False
    verify: bool = False
    overwrite: bool = False

    def run(self) -> int:
        self.check()
        run = self.convert if self.wan else self.export if self.to else self.to_int8
        with ConsoleProgress(Console(stderr=True)) as progress:
            report = run(progress)
        for warning in report.get("warnings", ()):
            print(f"warning: {warning}", file=sys.stderr)
        print(f"{self.output}: {report['summary']}")
        return 0

    def check(self) -> None:
        """Refuses options that do not go together."""
        if self.wan and (self.checkpoint or self.to):
            raise UserError(
                "--wan converts to a checkpoint, --checkpoint and --to convert one back; give one of the two"
            )
        if self.to and not self.checkpoint:
            raise UserError(f"--to {self.to} needs the checkpoint folder to convert; add --checkpoint DIR")
        if self.to and self.quantize:
            raise UserError("PyTorch files are not written in int8; leave out --to or --quantize")
        if self.checkpoint and not self.to and not self.quantize:
            raise UserError(
                "--checkpoint is converted to something; add --to torch or --to diffusers, or --quantize int8"
            )
        if self.quantize_text_encoder and not self.quantize:
            raise UserError("--quantize-text-encoder goes with --quantize int8; add that too")
        if self.checkpoint and self.quantize and self.dtype:
            raise UserError("--quantize leaves the rest of a --checkpoint as it is stored; leave out --dtype")
        if not self.wan and not self.checkpoint:
            raise UserError("nothing to convert; give --wan FOLDER, or --checkpoint DIR --to torch|diffusers")
        forward = ("generator", "generator_key", "lora", "lora_alpha", "verify")
        given = [f"--{name.replace('_', '-')}" for name in forward if getattr(self, name) not in (None, (), False)]
        if self.checkpoint and given:
            raise UserError(f"{', '.join(given)} only goes with --wan; convert with it first, then back without")

    def convert(self, progress: Progress) -> dict[str, Any]:
        from longlive_jax.conversion.convert import convert_wan

        return convert_wan(
            self.wan,
            self.output,
            generator=self.generator,
            generator_key=self.generator_key,
            loras=[parse_lora(text) for text in self.lora],
            lora_alpha=self.lora_alpha,
            dtype=self.dtype or "bfloat16",
            quantize=self._quantized_parts(),
            verify=self.verify,
            overwrite=self.overwrite,
            progress=progress,
        )

    def export(self, progress: Progress) -> dict[str, Any]:
        from longlive_jax import hub
        from longlive_jax.conversion.export import export

        folder = hub.find(self.checkpoint)
        return export(folder, self.output, self.to, dtype=self.dtype, overwrite=self.overwrite, progress=progress)

    def to_int8(self, progress: Progress) -> dict[str, Any]:
        from longlive_jax import hub
        from longlive_jax.conversion.quantize import quantize_folder

        folder, parts = hub.find(self.checkpoint), self._quantized_parts()
        return quantize_folder(folder, self.output, parts, overwrite=self.overwrite, progress=progress)

    def _quantized_parts(self) -> list[str]:
        return ["transformer"] * bool(self.quantize) + ["text_encoder"] * self.quantize_text_encoder


class ConsoleProgress(Progress):
    """On a terminal a bar over all stages, with the time left; elsewhere, such as in a log, a line a stage.

    Used as a context: the bar is gone at its end.
    """

    def __init__(self, console: Console):
        self.console = console
        self.bar = Bar(
            TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(),
            console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip

    def __enter__(self) -> ConsoleProgress:
        self.bar.start()
        return self

    def __exit__(self, *_) -> None:
        self.bar.stop()

    def plan(self, stages: Sequence[Stage]) -> None:
        self.stages = {stage.name: stage for stage in stages}
        self.items, self.nbytes = dict.fromkeys(self.stages, 0), dict.fromkeys(self.stages, 0)
        self.task = self.bar.add_task("", total=sum(stage.nbytes for stage in stages))
        self.started = time.monotonic()

    def advance(self, stage: str, nbytes: int, items: int = 1) -> None:
        self.items[stage] += items
        self.nbytes[stage] += nbytes
        planned, items, nbytes_done = self.stages[stage], self.items[stage], self.nbytes[stage]
        size = f"{nbytes_done / 1e9:.2f} of {planned.nbytes / 1e9:.2f} GB"
        text = f"{stage}: {items} of {planned.items} {planned.unit}, {size}"
        self.bar.update(self.task, description=text, completed=sum(self.nbytes.values()))
        if items == planned.items and not self.console.is_terminal:
            text = f"{stage}: {items} {planned.unit}, {size.partition(' of ')[2]}"
            now = time.monotonic()
            self.console.print(f"{text}, {now - self.started:.0f} s", markup=False, highlight=False, soft_wrap=True)
            self.started = now


def parse_lora(text: str) -> tuple[str, float]:
    """FILE or FILE:scale."""
    path, colon, scale = text.rpartition(":")
    if not colon:
        return text, 1.0
    try:
        return path, float(scale)
    except ValueError:
        if Path(text).exists():
            return text, 1.0
        raise UserError(f"--lora {text}: '{scale}' is not a scale; write FILE or FILE:0.8") from None
