"""`longlive parity`: a checkpoint against outputs of the official implementation, recorded before or on the spot."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import tyro

from longlive_jax.conversion.recording import Run
from longlive_jax.errors import UserError


@dataclasses.dataclass
class Parity:
    """Run recorded cases on a checkpoint, or the official code beside it, and report the differences.

    Attributes:
      case: .npz files of the official implementation's inputs and outputs.
      checkpoint: folder, converted with --dtype float32; with --torch-repo it may be left out.
      atol: largest absolute error that passes (losses and gradients: 1e-4 and 1e-3 relative).
      critic: weights of the critic, .safetensors under the original names, for training cases.
      teacher: weights of the teacher, likewise.
      json_output: also write the report as JSON.
      torch_repo: in place of cases, a clone of the official repository (branch v1.0) to run now on the options below.
      output: with --torch-repo, keep the recorded case here.
      official: what the official code runs on.
    """

    case: Annotated[tuple[Path, ...], tyro.conf.Positional]
    checkpoint: Path | None = None
    atol: float = 1e-4
    critic: Path | None = None
    teacher: Path | None = None
    json_output: Annotated[Path | None, tyro.conf.arg(name="json")] = None
    torch_repo: Path | None = None
    output: Path | None = None
    official: tyro.conf.OmitArgPrefixes[Run] = dataclasses.field(default_factory=Run)

    def run(self) -> int:
        """0 if all pass, 1 if any differs too much, 2 if a case cannot be run."""
        entries, code = self._both() if self.torch_repo is not None else self._recorded()
        if self.json_output is not None:
            self.json_output.parent.mkdir(parents=True, exist_ok=True)
            self.json_output.write_text(json.dumps(entries, indent=2) + "\n")
        return code

    def _recorded(self) -> tuple[list[dict], int]:
        from longlive_jax.conversion.parity import run_case

        if self.official != Run() or self.output is not None:
            raise UserError(
                "these options say what the official code runs on; give --torch-repo too, or leave them out"
            )
        if not self.case:
            raise UserError("no case given; name one or more .npz files, or --torch-repo")
        if self.checkpoint is None:
            raise UserError("no checkpoint given; name a folder by --checkpoint")
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
            self._print(entry)
            code = max(code, 0 if entry["ok"] else 1)
        return entries, code

    def _both(self) -> tuple[list[dict], int]:
        from longlive_jax.conversion.side_by_side import report, side_by_side

        if self.case:
            raise UserError("--torch-repo records a case of its own; leave out the case files, or give one by --inputs")
        entry = side_by_side(self.torch_repo, self.official, self.checkpoint, self.output, self.atol)
        self._print(entry)
        print(report(entry))
        return [entry], 0 if entry["ok"] else 1

    @staticmethod
    def _print(entry: dict) -> None:
        verdict = "ok  " if entry["ok"] else "FAIL"
        print(f"{verdict} {entry['case']:24} max {entry['max_abs']:.2e} rms {entry['rms']:.2e}")
