"""`longlive bench`: how fast a model is here, and beside PyTorch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from longlive_jax.errors import UserError


@dataclasses.dataclass
class Bench:
    """Measure speed on this machine: blocks, frames a second, prompt switches, compilation, and PyTorch beside it.

    Attributes:
      preset: sprites (shipped weights) or t2v_1_3b (random weights); the first on a CPU, else the second, by default.
      checkpoint: a checkpoint in place of a preset.
      json_output: write all figures here.
      height, width: of the picture; the preset's own by default.
      dtype: bfloat16 on an accelerator, float32 on a CPU by default.
      blocks: to be timed.
      seconds: no measurement goes on much longer than this.
      processor_time: time by the processor time of this process; for a machine that others load, on one core.
      torch: compare with PyTorch (diffusers) if it is installed.
      torch_compile: try torch.compile too.
      torch_repo: clone of the official repository (branch v1.0), to compare with it.
    """

    preset: Literal["sprites", "t2v_1_3b"] | None = None
    checkpoint: str | None = None
    json_output: Annotated[Path | None, tyro.conf.arg(name="json")] = None
    height: int | None = None
    width: int | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    blocks: int = 20
    seconds: float = 20.0
    processor_time: bool = False
    torch: bool = True
    torch_compile: bool = True
    torch_repo: Path | None = None

    def run(self) -> int:
        if self.preset is not None and self.checkpoint is not None:
            raise UserError("--preset and --checkpoint exclude each other")
        if self.blocks < 3:
            raise UserError(f"--blocks is {self.blocks}; at least 3 are needed to time anything")
        if self.json_output is not None and self.json_output.is_dir():
            raise UserError(f"--json {self.json_output} is a folder; name a file")
        console = Console(stderr=True)
        from longlive_jax.bench import machine, report, timing

        plan = self._plan()
        if self.processor_time:
            if machine.cores() > 1:
                raise UserError(
                    "--processor-time adds up what several cores do; take one: taskset -c 0 longlive bench ..."
                )
            timing.use_processor_time()
        results = report.run(plan, lambda line: console.print(line, markup=False, highlight=False))
        for name, reason in results["missing"].items():
            console.print(f"not measured: {name}: {reason}", markup=False, highlight=False, soft_wrap=True)
        Console().print(report.table(results))
        if self.json_output is not None:
            self.json_output.parent.mkdir(parents=True, exist_ok=True)
            self.json_output.write_text(json.dumps(results, indent=1) + "\n")
        return 0

    def _plan(self):
        """What to measure, checked as far as no file is read."""
        import jax

        from longlive_jax import checkpoint, hub, memory
        from longlive_jax.bench import report, weights
        from longlive_jax.config import ModelConfig, replace
        from longlive_jax.conversion.official_repo import check_repo

        on_cpu = jax.default_backend() == "cpu"
        dtype = self.dtype or ("float32" if on_cpu else "bfloat16")
        preset = self.preset or ("sprites" if on_cpu else "t2v_1_3b")
        if self.checkpoint is not None or preset == "sprites":
            folder = hub.find(self.checkpoint or "sprites")
            config = checkpoint.load_config(folder)
            load = lambda: {part: checkpoint.load(folder, part, dtype) for part in ("transformer", "vae")}
            told = self.checkpoint or "sprites, as shipped"
        else:
            config = ModelConfig.t2v_1_3b()
            load = lambda: weights.ours(config, dtype)
            told = f"{preset}, {weights.DESCRIPTION}"
        if self.torch_repo is not None:
            check_repo(self.torch_repo)
        config = dataclasses.replace(config, text_encoder=None)
        size = {name: value for name in ("height", "width") if (value := getattr(self, name)) is not None}
        sampler = replace(config.sampler, **size, switch="recache", sink="keep")
        sampler.check_size(config.transformer.patch)
        if sampler.window == -1:
            raise UserError("this model remembers all of a video, so its blocks have no time of their own")
        memory.check_weights(config, dtype)
        return report.Plan(
            config, sampler, dtype, told, load, self.blocks, self.seconds, self.torch, self.torch_compile,
            self.torch_repo, "processor time of one core" if self.processor_time else "wall",
        )  # fmt: skip
