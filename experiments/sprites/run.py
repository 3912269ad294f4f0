"""All stages of the sprites model in one command: VAE, teacher and student, distillation, streaming, evaluation.

    python experiments/sprites/run.py --output runs/gpu                          # one GPU, budgeted at 25 minutes
    python experiments/sprites/run.py --output runs/rehearsal --rehearse         # the same at tiny sizes, on a CPU
    python experiments/sprites/run.py --output runs/cpu --recipe cpu             # a model of the size that ships: hours
    python experiments/sprites/run.py --output runs/further --recipe further     # goes on from the model that ships

Call it again to go on: a stage whose checkpoint is there is left out, one that was cut off goes on from its own state.
`--stop-after SECONDS` ends a call in time, saved (exit status 3: there is more to do); leave a minute for a program
that is being compiled just then. Every call that ends by itself leaves OUTPUT/package: a .tar.gz a finished stage, each
under 16 MiB, and one of the figures. `--restore FOLDER` unpacks those on another machine. Data, latents and compiled
programs are made again there; a stage that was under way begins again.

Settings are in gpu/*.yaml, cpu/*.yaml and further/*.yaml. `minutes` of those for a GPU are shares of the budget: where
the steps of a phase would take longer, it has fewer. Needs neither grain nor tyro, ftfy, ffmpeg or a network.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
import tarfile
import time
from pathlib import Path

from longlive_jax.errors import UserError

BUDGET, OVERHEAD = 25.0, 10.0
"""Minutes in all on a GPU; and those for compiling, latents, validation, evaluation: the rest is for the phases."""

MARGIN = 25.0
"""Seconds before --stop-after at which training stops, to write its state."""

LIMIT = 16 * 2**20
"""Bytes of a packed file."""


KIND = {"decoder": "vae", "student": "ar"}
"""Stages that are not named after their command."""


BEGIN = "--from"
"""In a table of stages, the checkpoint that a recipe goes on from."""

CPU = {
    "vae": {},
    "decoder": {"init": "vae/checkpoint"},
    "teacher": {"vae": "decoder/checkpoint"},
    "ar": {"vae": "decoder/checkpoint", "init": "teacher/checkpoint"},
    "init": {"vae": "decoder/checkpoint", "init": "ar/checkpoint", "teacher": "teacher/checkpoint"},
    "long": {
        "vae": "decoder/checkpoint",
        "init": "init/checkpoint",
        "teacher": "teacher/checkpoint",
        "critic": "init/critic",
    },
}

GPU = {
    "vae": {},
    "ar": {"vae": "vae/checkpoint"},
    "teacher": {"vae": "vae/checkpoint", "init": "ar/checkpoint"},
    "student": {"vae": "vae/checkpoint", "init": "teacher/checkpoint"},
    "init": {"vae": "vae/checkpoint", "init": "student/checkpoint", "teacher": "teacher/checkpoint"},
    "long": {
        "vae": "vae/checkpoint",
        "init": "init/checkpoint",
        "teacher": "teacher/checkpoint",
        "critic": "init/critic",
    },
}

FURTHER = {
    "teacher": {"vae": BEGIN, "init": BEGIN},
    "student": {"vae": BEGIN, "init": "teacher/checkpoint"},
    "init": {"vae": BEGIN, "init": "student/checkpoint", "teacher": "teacher/checkpoint"},
    "long": {"vae": BEGIN, "init": "init/checkpoint", "teacher": "teacher/checkpoint", "critic": "init/critic"},
}
"""The table of a recipe that has a model to begin with, whose VAE stays."""

RECIPES = {"gpu": GPU, "cpu": CPU, "further": FURTHER}
"""The stages of a recipe in order, and what each begins with."""


class Log:
    """A `trainer.Reporter` on standard output; what a stage says goes into OUTPUT/log.jsonl too."""

    def __init__(self, output: Path):
        self.path, self.stage, self.began = output / "log.jsonl", "", time.monotonic()

    def say(self, line: str) -> None:
        at = round(time.monotonic() - self.began, 1)
        print(f"[{at:7.1f} s] {self.stage}: {line}", flush=True)
        with open(self.path, "a") as file:
            file.write(json.dumps({"seconds": at, "stage": self.stage, "line": line}) + "\n")

    def progress(self, done: int, total: int, phase: str, figures: dict[str, float]) -> None:
        losses = ", ".join(f"{n} {v:.4g}" for n, v in figures.items() if n.endswith("loss"))
        left = figures["seconds"] * (total - done)
        at = time.monotonic() - self.began
        print(f"[{at:7.1f} s] {phase}: step {done} of {total}, {losses}, {left:.0f} s left", flush=True)


@dataclasses.dataclass
class Run:
    """One call.

    Attributes:
      output: folder of all stages.
      budget: minutes of all calls together; None for what the settings say.
      deadline: time.monotonic() at which this one must have ended; None for none.
      rehearse: tiny sizes.
      log: is told.
      recipe: which of `RECIPES`.
      begin: the checkpoint that recipe "further" goes on from.
    """

    output: Path
    budget: float | None
    deadline: float | None
    rehearse: bool
    log: Log
    recipe: str = "gpu"
    begin: str = "sprites"

    @property
    def starts(self) -> dict[str, dict[str, str]]:
        return RECIPES[self.recipe]

    @property
    def left(self) -> float:
        """Seconds that may still be trained."""
        return float("inf") if self.deadline is None else self.deadline - MARGIN - time.monotonic()

    def done(self, stage: str) -> bool:
        folder = self.output / stage
        if stage == "evaluate":
            return (folder / "evaluation.json").exists()
        if stage == "package":
            return False
        # The critic is written after the student.
        last = folder / ("critic" if stage in ("init", "long") else "checkpoint")
        return (last / "config.json").exists()

    def stage(self, stage: str) -> bool:
        """Does a stage; whether it came to its end."""
        self.log.stage = stage
        if self.done(stage):
            self.log.say("is there")
            return True
        if self.left <= 0:
            return False
        self.log.say("begins")
        if stage == "evaluate":
            return self.evaluate()
        return self.train(stage)

    def config(self, stage: str):
        from longlive_jax.training.config_files import read_config
        from longlive_jax.training.stage_config import STAGES as KINDS

        folder = Path(__file__).parent / self.recipe
        settings = {name: read_config(folder / f"{name}.yaml", KINDS[KIND.get(name, name)]) for name in self.starts}
        config, workers = settings[stage], os.cpu_count() or 1
        if self.budget is not None:
            minutes = sum(phase.minutes for other in settings.values() for phase in other.phases)
            share = (self.budget - OVERHEAD) / minutes
            phases = tuple(dataclasses.replace(p, minutes=p.minutes * share) for p in config.phases)
            config = dataclasses.replace(config, phases=phases)
        if self.rehearse:
            config, workers = config.shrunk(), int(stage == "vae")  # a process takes as long to start as its data
        starts = {
            name: self._begin(name) if path == BEGIN else str(self.output / path)
            for name, path in self.starts[stage].items()
        }
        if self.rehearse and starts.get("init") == self.begin:
            del starts["init"]  # it has its own size
        if KIND.get(stage, stage) in ("teacher", "ar"):
            starts["latents"] = str(self.output / "latents")
        run = dataclasses.replace(config.run, workers=min(config.run.workers, workers))
        return dataclasses.replace(config, run=run, **starts)

    def _begin(self, part: str) -> str:
        """The checkpoint that recipe "further" goes on from; one without a VAE has the shipped one's."""
        from longlive_jax import hub

        with_vae = part != "vae" or (hub.find(self.begin) / "vae.safetensors").exists()
        return self.begin if with_vae else "sprites"

    def train(self, stage: str) -> bool:
        from longlive_jax.training.runs import stored_config
        from longlive_jax.training.stages import stage_of
        from longlive_jax.training.trainer import train

        folder, config = self.output / stage, self.config(stage)
        resume = (folder / "run.json").exists()
        if resume:
            config = dataclasses.replace(stored_config(folder, type(config)), run=config.run)
        minutes = None if self.deadline is None else self.left / 60
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, minutes=minutes))
        made = stage_of(config, folder, self.log.say)
        if train(made, folder, self.log, resume=resume) is None:
            return False
        shutil.rmtree(folder / "state")  # what a run goes on from; this one has ended
        self.log.say("is done")
        return True

    # MARK: figures

    def evaluate(self) -> bool:
        """Adherence of student, few-step student and streaming student, after 5 s; of the last two after 30 s too."""
        import numpy as np
        from evaluate import evaluate

        from longlive_jax.pipeline import LongLivePipeline
        from longlive_jax.video import contact_sheet, save_image

        folder, clips, long_clips = self.output / "evaluate", 200, 64
        if self.rehearse:
            clips, long_clips = 2, 2
        reports: dict[str, dict] = {}
        partial = folder / "partial.json"
        if partial.exists():
            reports = json.loads(partial.read_text())
        folder.mkdir(parents=True, exist_ok=True)
        student = self.starts["init"]["init"].removesuffix("/checkpoint")
        after_5 = [(stage, 5, clips) for stage in (student, "init", "long")]
        for stage, seconds, count in (*after_5, ("init", 30, long_clips), ("long", 30, long_clips)):
            name = f"{stage}-{seconds}s"
            if name in reports:
                continue
            if self.left <= 0:
                return False
            pipe = LongLivePipeline.from_pretrained(str(self.output / stage / "checkpoint"))
            reports[name], seen = evaluate(pipe, count, 1 if self.rehearse else seconds, min(50, count))
            save_image(contact_sheet(np.concatenate([sheet for sheet, *_ in seen[:16]]), 14), folder / f"{name}.png")
            shares = {n: round(f["share"], 3) for n, f in reports[name]["adherence"].items()}
            self.log.say(f"{name}: {shares}")
            partial.write_text(json.dumps(reports, indent=1) + "\n")
        os.replace(partial, folder / "evaluation.json")
        return True

    # MARK: taking it home

    def package(self) -> None:
        """OUTPUT/package: checkpoints in bfloat16, without the VAE but for the last; and the figures."""
        self.log.stage, folder = "package", self.output / "package"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for stage in self.starts:
            if not self.done(stage):
                continue
            for part in ("checkpoint", "critic") if stage == "init" else ("checkpoint",):
                packed = folder / "checkpoint"
                self._halved(self.output / stage / part, packed, whole=stage in ("vae", "long"))
                self._tar(f"{stage}-{part}", {packed: f"{stage}/{part}"})
                shutil.rmtree(packed)
        report = {path: str(path.relative_to(self.output)) for path in self._report()}
        self._tar("report", report)

    def _report(self) -> list[Path]:
        found = [self.output / "log.jsonl", *self.output.glob("*/metrics.jsonl"), *self.output.glob("*/run.json")]
        found += [*self.output.glob("evaluate/*")]
        for stage in self.starts:
            found += sorted((self.output / stage / "validation").glob("*.png"))[-3:]
        return [path for path in found if path.exists()]

    def _halved(self, source: Path, target: Path, *, whole: bool) -> None:
        import jax.numpy as jnp

        from longlive_jax import checkpoint
        from longlive_jax.tokenizer import PromptTokenizer

        config = checkpoint.load_config(source)
        parts = [p for p in checkpoint.MODULES if (source / f"{p}.safetensors").exists()]
        params = {part: checkpoint.load(source, part) for part in parts if whole or part != "vae"}
        tokenizer = None
        if (source / "tokenizer.json").exists():
            tokenizer = PromptTokenizer.from_folder(source, config.transformer.text_length)
        provenance = checkpoint.load_provenance(source)
        checkpoint.save(target, config, params, tokenizer, provenance, dtype=jnp.bfloat16)

    def _tar(self, name: str, files: dict[Path, str]) -> None:
        path = self.output / "package" / f"{name}.tar.gz"
        with tarfile.open(path, "w:gz", compresslevel=6) as tar:
            for file, inside in files.items():
                tar.add(file, inside)
        size = path.stat().st_size
        self.log.say(f"{path.name}: {size / 2**20:.1f} MiB{'' if size < LIMIT else ', TOO LARGE TO BRING BACK'}")

    def restore(self, folder: Path) -> None:
        """Unpacks what another machine packed; checkpoints that were packed without their VAE get it again."""
        for path in sorted(folder.glob("*.tar.gz")):
            if path.name != "report.tar.gz":
                with tarfile.open(path) as tar:
                    tar.extractall(self.output, filter="data")
        vae = self.output / "vae" / "checkpoint" / "vae.safetensors"
        for config in self.output.glob("*/*/config.json"):
            if not (config.parent / "vae.safetensors").exists():
                shutil.copy(vae, config.parent)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--recipe", choices=list(RECIPES), default="gpu")
    parser.add_argument(
        BEGIN,
        dest="begin",
        metavar="CHECKPOINT",
        help="recipe further only; sprites by default, whose VAE one without gets",
    )
    parser.add_argument("--budget-minutes", type=float, help=f"{BUDGET:g} by default; recipe gpu only")
    parser.add_argument("--stages", nargs="+", metavar="STAGE", help="all by default")
    parser.add_argument("--stop-after", type=float, metavar="SECONDS")
    parser.add_argument("--restore", type=Path, metavar="FOLDER")
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    began = time.monotonic()
    gpu = args.recipe == "gpu"
    if not gpu and (args.budget_minutes is not None or args.restore is not None):
        parser.error(f"recipe {args.recipe} has the steps of its settings and is not packed: no budget, no --restore")
    if args.begin is not None and args.recipe != "further":
        parser.error(f"recipe {args.recipe} begins with nothing: no {BEGIN}; recipe further goes on from a model")
    budget = (BUDGET if args.budget_minutes is None else args.budget_minutes) if gpu else None
    if budget is not None and budget <= OVERHEAD:
        parser.error(f"--budget-minutes must be above {OVERHEAD:g}, which go for compiling and evaluation")
    stages = [*RECIPES[args.recipe], "evaluate", *["package"] * gpu]
    if unknown := [stage for stage in args.stages or () if stage not in stages]:
        parser.error(f"recipe {args.recipe} has no stage {', '.join(unknown)}; it has {', '.join(stages)}")
    chosen = [stage for stage in stages if args.stages is None or stage in args.stages]

    args.output.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(args.output.absolute() / "compiled"))
    if args.rehearse:
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # what runs a few times is mostly compiled
    deadline = None if args.stop_after is None else began + args.stop_after
    begin = args.begin or "sprites"
    run = Run(args.output, budget, deadline, args.rehearse, Log(args.output), args.recipe, begin)
    if args.restore is not None:
        run.restore(args.restore)
    complete = True
    try:
        for stage in chosen:
            if stage != "package":
                complete = run.stage(stage)
                if not complete:
                    run.log.say("there is more to do: the same command goes on")
                    break
        if "package" in chosen:
            run.package()
    except UserError as error:
        run.log.say(str(error))
        return 1
    except KeyboardInterrupt:  # the trainer has saved its state, if it was its
        run.log.say("stopped: the same command goes on")
        return 130
    return 0 if complete else 3


if __name__ == "__main__":
    sys.exit(main())
