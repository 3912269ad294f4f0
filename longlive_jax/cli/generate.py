"""`longlive generate`: prompts to mp4 files, written while they are made."""

from __future__ import annotations

import dataclasses
import functools
import time
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from longlive_jax.compilation import keep_compiled_programs
from longlive_jax.config import FPS, SamplerConfig
from longlive_jax.errors import UserError
from longlive_jax.official import OfficialRun, read_official
from longlive_jax.prompts import (
    DEFAULT_SECONDS,
    Schedule,
    length_note,
    output_stems,
    pixel_frames,
    read_schedules,
)
from longlive_jax.sidecar import load_sidecar, record_schedule, sidecar_path, write_sidecar
from longlive_jax.video import VideoWriter, require_free

SamplerOverrides = dataclasses.make_dataclass(
    "SamplerOverrides",
    [(f.name, f"{f.type} | None", dataclasses.field(default=None)) for f in dataclasses.fields(SamplerConfig)],
    namespace={"__doc__": SamplerConfig.__doc__},
)
"""`SamplerConfig` with every field optional: what is left out is the checkpoint's own."""

QUANTIZATION = ("quantize", "quantize_text_encoder", "int8_matmul")
"""Options that go to `LongLivePipeline.from_pretrained`, and what the sidecar calls them."""


MAX_SIDE = 8192
"""Pixels of an enlarged picture's side; beyond, players and encoders of mp4 give up."""


@dataclasses.dataclass
class Generate:
    """Make videos from prompts. Several prompts make one video that switches between them.

    Attributes:
      prompt: what is to be seen; more than one switches in equal parts or at --switch-at.
      prompts: a file of prompts instead, .txt (one a line) or .jsonl; one video a line, into the folder --output.
      switch_at: when each prompt after the first starts, in seconds of the video.
      seconds: length, 5 by default; rounded to whole blocks.
      seed: of the noise, 0 by default.
      checkpoint: "sprites" by default (ships with the package), a checkpoint folder, or a Hugging Face id.
      output: FILE.mp4 (or a folder with --prompts); outputs/<slug>-<seed>.mp4 by default.
      overwrite: replace outputs that exist.
      skip_existing: leave out videos that are there with their JSON, to go on with --prompts that was interrupted.
      from_json: make the video of this sidecar FILE.json again.
      config: settings from a LongLive v1.0 YAML file.
      scale: whole-number enlargement of small pictures for viewing; chosen by itself if 0.
      dtype: float32 or bfloat16.
      quantize: int8 for the weights of the transformer's blocks; half the memory, slightly other videos.
      quantize_text_encoder: with --quantize, the text encoder's blocks too.
      int8_matmul: weight_only, w8a8 (activations in int8 too) or auto, w8a8 on hardware with int8 units.
      sampler: settings of the sampler; the checkpoint's own by default.
    """

    prompt: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    prompts: Path | None = None
    switch_at: tuple[float, ...] = ()
    seconds: float | None = None
    seed: int | None = None
    checkpoint: str | None = None
    output: Path | None = None
    overwrite: bool = False
    skip_existing: bool = False
    from_json: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    config: Path | None = None
    scale: int = 0
    dtype: str | None = None
    quantize: str | None = None
    quantize_text_encoder: bool = False
    int8_matmul: str | None = None
    sampler: Annotated[SamplerOverrides, tyro.conf.arg(name="")] = dataclasses.field(default_factory=SamplerOverrides)

    def __post_init__(self):
        self._recorded_hash: str | None = None
        self._elsewhere: dict[str, str] = {}

    def run(self) -> int:
        if self.scale < 0:
            raise UserError(f"--scale is {self.scale}; give 1 or more, or 0 to choose by itself")
        jobs, settings, checkpoint, quantization = self._jobs()
        if self.dtype not in (None, "float32", "bfloat16"):
            raise UserError(f"dtype is {self.dtype!r}; float32 and bfloat16 are known")
        console = Console(stderr=True)
        say = functools.partial(console.print, markup=False, emoji=False, highlight=False, soft_wrap=True)
        if self.skip_existing:
            if self.overwrite:
                raise UserError("--skip-existing keeps what --overwrite replaces; give one of them")
            missing = [job for job in jobs if not (job[1].exists() and sidecar_path(job[1]).exists())]
            say(f"{len(jobs) - len(missing)} of {len(jobs)} videos are there")
            jobs = missing
        for _, target in jobs:
            require_free(target, self.overwrite)
            require_free(sidecar_path(target), self.overwrite)
        if not jobs:
            return 0
        for key, place in self._elsewhere.items():
            say(f"{self.config}: {key} has no say here: {place}")
        keep_compiled_programs()
        # Imported here: `longlive --help` and bad input must not wait for jax.
        from longlive_jax.pipeline import LongLivePipeline

        started = time.monotonic()
        pipe = LongLivePipeline.from_pretrained(checkpoint, dtype=self.dtype, note=say, **quantization)
        if pipe.quantization:
            say(f"{' and '.join(pipe.quantization)} in int8 ({pipe.int8_matmul}): not the numbers of the float weights")
        loaded = time.monotonic() - started
        if self._recorded_hash not in (None, pipe.checkpoint_info["hash"]):
            say(f"warning: {checkpoint} is not the checkpoint that made {self.from_json}; the video will differ")
        for schedule, _ in jobs:  # all of them, so that a fault in the last is told before the first is made
            sampler, *_ = pipe.prepare(schedule, **settings)
            if self.scale * max(sampler.height, sampler.width) > MAX_SIDE:
                most = MAX_SIDE // max(sampler.height, sampler.width)
                raise UserError(
                    f"--scale {self.scale} makes pictures wider than {MAX_SIDE} pixels; give {most} at most"
                )
        for schedule, target in jobs:
            self._one(pipe, schedule, target, settings, {"load_seconds": round(loaded, 3)}, console, say)
        return 0

    def _jobs(self) -> tuple[list[tuple[Schedule, Path]], dict[str, Any], str, dict[str, Any]]:
        """The videos to make with their files, the sampler's settings, the checkpoint, and what of it is quantised."""
        settings = {k: v for k, v in dataclasses.asdict(self.sampler).items() if v is not None}
        sources = [bool(self.prompt), self.prompts is not None, self.from_json is not None]
        if sum(sources) != 1:
            what = (
                "nothing says what to show" if not any(sources) else "prompts, --prompts and --from exclude each other"
            )
            raise UserError(f'{what}; write longlive generate "a prompt", or --prompts FILE, or --from FILE.json')
        if self.switch_at and not self.prompt:
            raise UserError("--switch-at goes with prompts on the command line; files say their own times")
        official = OfficialRun({}) if self.config is None else read_official(self.config)
        self._elsewhere = official.elsewhere
        settings = official.sampler | settings
        seed = next(s for s in (self.seed, official.seed, 0) if s is not None)
        checkpoint = self.checkpoint or "sprites"
        asked = {name: getattr(self, name) for name in QUANTIZATION}
        quantization = {name: value for name, value in asked.items() if value}
        if self.from_json is not None:
            record = load_sidecar(self.from_json)
            own = {k: v for k, v in record["settings"].items() if k not in ("dtype", *QUANTIZATION)}
            quantization = {k: v for k, v in record["settings"].items() if k in QUANTIZATION} | quantization
            self.dtype = self.dtype or record["settings"].get("dtype")
            self._recorded_hash = record["checkpoint"].get("hash")
            self.scale = self.scale or record.get("scale", 0)
            schedules = [record_schedule(record, self.from_json)]
            settings, checkpoint = own | settings, self.checkpoint or str(record["checkpoint"].get("name", "sprites"))
        elif self.prompts is not None:
            schedules = read_schedules(self.prompts)
        else:
            schedules = [Schedule(self.prompt, self.switch_at or None)]
        schedules = [self._completed(s, official, seed) for s in schedules]
        return list(zip(schedules, self._targets(schedules, seed))), settings, checkpoint, quantization

    def _completed(self, schedule: Schedule, official: OfficialRun, seed: int) -> Schedule:
        """The command line goes before what a prompt file says, and that before a YAML file."""
        times = schedule.switch_seconds
        if times is None and len(schedule.prompts) > 1:
            times = official.switch_seconds
        seconds = next(
            (s for s in (self.seconds, schedule.seconds, official.seconds) if s is not None), DEFAULT_SECONDS
        )
        own = schedule.seed if self.seed is None and schedule.seed is not None else seed
        return dataclasses.replace(schedule, switch_seconds=times, seconds=seconds, seed=own)

    def _targets(self, schedules: list[Schedule], seed: int) -> list[Path]:
        if self.prompts is not None:
            folder = self.output or Path("outputs")
            if folder.suffix.lower() == ".mp4":
                raise UserError(f"--prompts makes one video a line, so --output must be a folder, not {folder}")
            if folder.exists() and not folder.is_dir():
                raise UserError(f"--output {folder} is a file; --prompts makes one video a line and needs a folder")
            return [folder / f"{stem}.mp4" for stem in output_stems(schedules, seed)]
        if self.output is None:
            return [Path("outputs") / f"{stem}.mp4" for stem in output_stems(schedules, seed)]
        if self.output.suffix.lower() != ".mp4":
            raise UserError(f"--output is {self.output}; a video's name must end in .mp4")
        return [self.output]

    def _one(self, pipe, schedule: Schedule, target: Path, settings, timings: dict[str, Any], console, say) -> None:
        from longlive_jax import memory

        sampler, (plan,), _, _ = pipe.prepare(schedule, **settings)
        if note := length_note(schedule.seconds, sampler.block_frames):
            say(note)
        for asked, applied, text in zip(plan.asked_seconds, plan.applied_seconds, plan.prompts[1:]):
            say(f"switch at {asked:g} s takes effect at {applied:g} s: {text}")
        if 0 in plan.switch_blocks:
            say("warning: a switch at the start leaves nothing of the first prompt")
        parts = memory.estimate(pipe.config, sampler, 1, plan.num_frames, pipe.dtype, switches=bool(plan.switch_blocks))
        say(f"memory beside the weights: {memory.describe(parts)}")
        stream = pipe.stream(schedule, **settings)
        started = time.monotonic()
        marks = []
        total = pixel_frames(plan.num_frames)
        bar = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(), console=console, transient=False,
        )  # fmt: skip
        with bar, VideoWriter(target, scale=self.scale or "auto", overwrite=self.overwrite) as writer:
            task = bar.add_task(target.name, total=total, rate="compiling")
            try:
                for frames in stream.ahead():
                    writer.write(frames[0])
                    marks.append((time.monotonic() - started, writer.frames_written))
                    bar.update(task, completed=writer.frames_written, rate=_rate(marks))
            except KeyboardInterrupt:
                if marks:
                    say(f"{target} keeps the first {writer.frames_written} of {total} frames, and has no JSON")
                raise
        timings |= measured(marks)
        from longlive_jax.pipeline import record_of

        record = record_of(plan, stream.seeds[0], stream.run_record(timings)) | {"scale": self.scale}
        write_sidecar(target, record, overwrite=self.overwrite)
        rate = f", then {timings['frames_per_second']:.1f} frames a second" if len(marks) > 1 else ""
        say(
            f"{target}: {total} frames, {total / FPS:g} s of video; first frame after "
            f"{timings['first_frame_seconds']:.1f} s{rate}"
        )


def _rate(marks: list[tuple[float, int]]) -> str:
    """Frames a second since the first block, whose time is mostly compilation."""
    if len(marks) < 2:
        return ""
    (start, before), (end, after) = marks[0], marks[-1]
    return f"{(after - before) / max(end - start, 1e-9):.1f} fps"


def measured(marks: list[tuple[float, int]]) -> dict[str, float]:
    """Timings for the sidecar. Blocks after the first (compilation); pixels on the host and written included."""
    (start, before), (end, after) = marks[0], marks[-1]
    rate = (after - before) / (end - start) if len(marks) > 1 else after / start
    return {
        "first_frame_seconds": round(start, 3),
        "seconds": round(end, 3),
        "frames_per_second": round(rate, 2),
    }
