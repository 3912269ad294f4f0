"""`longlive convert`: PyTorch checkpoints in, a checkpoint folder out."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rich.console import Console

from longlive_jax.errors import UserError


@dataclasses.dataclass
class Convert:
    """Convert Wan / LongLive files (PyTorch) to a checkpoint folder.

    Attributes:
      wan: folder of Wan's original files (config.json, DiT, VAE, text encoder, tokeniser), or its hub id owner/name.
      output: the checkpoint folder to write.
      generator: LongLive's or Self-Forcing's .pt whose DiT replaces Wan's; on the hub owner/name/path/to/file.
      generator_key: which entry of that file: generator, generator_ema or model; the first present by default.
      lora: LoRA files to merge, each FILE or FILE:scale, with the names of peft, diffusers, ComfyUI or kohya.
      lora_alpha: alpha of the LoRAs whose files do not say it; their rank by default.
      dtype: of the tensors written, bfloat16 or float32.
      verify: read everything back, compare checksums and, with PyTorch, the numbers of each layer with the source's.
      overwrite: replace an output that exists.
    """

    wan: str
    output: Path
    generator: str | None = None
    generator_key: str | None = None
    lora: tuple[str, ...] = ()
    lora_alpha: float | None = None
    dtype: str = "bfloat16"
    verify: bool = False
    overwrite: bool = False

    def run(self) -> int:
        from longlive_jax.conversion.convert import convert_wan

        report = convert_wan(
            self.wan,
            self.output,
            generator=self.generator,
            generator_key=self.generator_key,
            loras=[parse_lora(text) for text in self.lora],
            lora_alpha=self.lora_alpha,
            dtype=self.dtype,
            verify=self.verify,
            overwrite=self.overwrite,
        )
        console = Console(stderr=True)
        for warning in report.get("warnings", ()):
            console.print(f"warning: {warning}", highlight=False)
        print(f"{self.output}: {report['summary']}")
        return 0


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
