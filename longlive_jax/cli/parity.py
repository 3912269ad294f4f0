"""`longlive parity`: a checkpoint against recorded outputs of the official implementation."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import tyro

from longlive_jax.errors import UserError


@dataclasses.dataclass
class Parity:
    """Run recorded cases on a checkpoint and report the differences, in float32.

    Attributes:
      case: .npz files of the official implementation's inputs and outputs.
      checkpoint: folder, converted with --dtype float32.
      atol: largest absolute error that passes (losses and gradients: 1e-4 and 1e-3 relative).
      critic: weights of the critic, .safetensors under the original names, for training cases.
      teacher: weights of the teacher, likewise.
      json_output: also write the report as JSON.
    """

    case: Annotated[tuple[Path, ...], tyro.conf.Positional]
    checkpoint: Path
    atol: float = 1e-4
    critic: Path | None = None
    teacher: Path | None = None
    json_output: Annotated[Path | None, tyro.conf.arg(name="json")] = None

    def run(self) -> int:
        """0 if all pass, 1 if any differs too much, 2 if a case cannot be run."""
        from longlive_jax.conversion.parity import run_case

        if not self.case:
            raise UserError("no case given; name one or more .npz files")
        networks = {"critic": self.critic, "teacher": self.teacher}
        networks = {name: path for name, path in networks.items() if path is not None}
        entries, code = [], 0
        for path in self.case:
            try:
                entry = run_case(self.checkpoint, path, self.atol, networks)
            except UserError as error:
                print(f"{path}: {error}")
                code = 2
                continue
            entries.append(entry)
            verdict = "ok  " if entry["ok"] else "FAIL"
            print(f"{verdict} {entry['case']:24} max {entry['max_abs']:.2e} rms {entry['rms']:.2e}")
            code = max(code, 0 if entry["ok"] else 1)
        if self.json_output is not None:
            self.json_output.parent.mkdir(parents=True, exist_ok=True)
            self.json_output.write_text(json.dumps(entries, indent=2) + "\n")
        return code
