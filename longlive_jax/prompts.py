"""Prompts over time: schedules, the files they are read from, and the rules of length and time.

Users speak in seconds; the model counts latent frames in blocks. All conversions between the two live here:

    4 latent frames a second, f of them a block; the first latent frame decodes to 1 pixel frame, every other to 4
    s seconds      -> F = f max(1, round(4 s / f)) latent frames -> T = 4 (F - 1) + 1 pixel frames at 16 a second
    switch at t s  -> latent frame round(4 t), in force from the first block start at or after it

`round` is Python's: halves go to the even neighbour (2.5 -> 2, 3.5 -> 4), here and in the reference.
"""

import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Self

from longlive_jax.config import FPS, TEMPORAL_FACTOR, unknown_name
from longlive_jax.errors import UserError

LATENTS_PER_SECOND = FPS // TEMPORAL_FACTOR
DEFAULT_SECONDS = 5.0
MAX_SEED = 2**32 - 1  # what a JAX random key takes without 64-bit mode
KEYS = ("prompts", "switch_seconds", "switch_frame_indices", "seconds", "seed", "name")


def latent_frames(seconds: float, block_frames: int) -> int:
    """Latent frames F of a video asked to last `seconds`: whole blocks, at least one (5 s in blocks of 3 -> 21)."""
    if not (_is_number(seconds) and seconds > 0):
        raise UserError(f"seconds is {seconds!r}; a length must be a number above 0 and below 1e9, such as --seconds 5")
    if block_frames < 1:
        raise UserError(f"block_frames is {block_frames}; a block needs at least 1 latent frame")
    return block_frames * max(1, round(LATENTS_PER_SECOND * seconds / block_frames))


def pixel_frames(latent_frames: int) -> int:
    """Pixel frames T that `latent_frames` decode to (21 -> 81); T / 16 is the video's length in seconds."""
    return TEMPORAL_FACTOR * (latent_frames - 1) + 1


def switch_frame(seconds: float) -> int:
    """The latent frame in which a switch asked for at `seconds` falls."""
    if not (_is_number(seconds) and seconds >= 0):
        raise UserError(f"switch time {seconds!r} is not a time in the video; give seconds from 0 up")
    return round(LATENTS_PER_SECOND * seconds)


def applied_switch(frame: int, block_frames: int) -> int:
    """The first block start at or after latent frame `frame` (40 in blocks of 3 -> 42)."""
    return math.ceil(frame / block_frames) * block_frames


def plan_switches(asked_frames: Sequence[int], num_frames: int, block_frames: int) -> list[int]:
    """The blocks (counted from 0) at whose start each prompt switch takes effect.

    At most one switch takes effect at a block start: a second one due there lands a block later, as in LongLive.

    Args:
      asked_frames: latent frames of the switches, in order; equal ones are allowed (times may round together).
      num_frames: latent frames of the video, whole blocks.
      block_frames: latent frames a block.

    Returns:
      One block index a switch, strictly increasing.

    Raises:
      UserError: a frame is negative, before its predecessor, or takes effect only after the end.
    """
    if num_frames % block_frames:
        below = num_frames - num_frames % block_frames
        near = " or ".join(str(n) for n in (below, below + block_frames) if n)
        raise UserError(f"{num_frames} latent frames are not whole blocks of {block_frames}; the nearest: {near}")
    last = num_frames // block_frames - 1
    blocks: list[int] = []
    for index, frame in enumerate(asked_frames):
        if frame < 0:
            raise UserError(f"a prompt switch at {_at(frame)} is before the start; give times from 0 s up")
        if index and frame < asked_frames[index - 1]:
            before = asked_frames[index - 1]
            raise UserError(f"the switch at {_at(frame)} comes after one at {_at(before)}; give times in rising order")
        block = applied_switch(frame, block_frames) // block_frames
        if blocks:
            block = max(block, blocks[-1] + 1)
        if block > last:
            raise UserError(
                f"the switch at {_at(frame)} would take effect after the end: the video lasts "
                f"{pixel_frames(num_frames) / FPS:g} s and its last block starts at {_at(last * block_frames)}; "
                "switch earlier or ask for more --seconds"
            )
        blocks.append(block)
    return blocks


def _at(frame: int) -> str:
    return f"{frame / LATENTS_PER_SECOND:g} s (latent frame {frame})"


@dataclass(frozen=True)
class Plan:
    """A schedule laid on the blocks of one video.

    Attributes:
      prompts: the first prompt and those switched to, in order.
      num_frames: latent frames F.
      block_frames: latent frames a block.
      asked_seconds: when each switch was asked for, one fewer than prompts.
      switch_blocks: the block at whose start it takes effect.
    """

    prompts: tuple[str, ...]
    num_frames: int
    block_frames: int
    asked_seconds: tuple[float, ...]
    switch_blocks: tuple[int, ...]

    @property
    def applied_seconds(self) -> tuple[float, ...]:
        """When each switch takes effect: its block's first latent frame over 4. In pixels that is 3/16 s earlier."""
        return tuple(block * self.block_frames / LATENTS_PER_SECOND for block in self.switch_blocks)

    @property
    def seconds(self) -> float:
        """The video's length T / 16 in seconds."""
        return pixel_frames(self.num_frames) / FPS


@dataclass(frozen=True)
class Schedule:
    """What one video shows and when: its prompts and their switch times as asked for.

    Attributes:
      prompts: one or more, none empty.
      switch_seconds: start times of prompts 1.., rising; None means equal parts of the video.
      seconds: length asked for; None leaves it to the caller.
      seed: of the noise, 0 to 2**32 - 1; None leaves it to the caller.
      name: output name without suffix; None derives it from the first prompt.

    Raises:
      UserError: any of these is broken.
    """

    prompts: tuple[str, ...]
    switch_seconds: tuple[float, ...] | None = None
    seconds: float | None = None
    seed: int | None = None
    name: str | None = None

    def __post_init__(self):
        if isinstance(self.prompts, str) or not self.prompts:
            raise UserError("there is no prompt; give at least one, as a list of texts")
        object.__setattr__(self, "prompts", tuple(self.prompts))  # lists are welcome, but do not hash
        if self.switch_seconds is not None:
            object.__setattr__(self, "switch_seconds", tuple(self.switch_seconds))
        for number, prompt in enumerate(self.prompts, 1):
            if not isinstance(prompt, str):
                raise UserError(f"prompt {number} is not a text but {prompt!r}; write it in quotes")
            if not prompt.strip():
                raise UserError(f"prompt {number} is empty; write what is to be seen, or leave it out")
            if not _is_encodable(prompt):
                raise UserError(f"prompt {number} has half a character (a lone surrogate) in it; write it in UTF-8")
        if self.switch_seconds is not None:
            self._check_switches(self.switch_seconds)
        if self.seconds is not None:
            latent_frames(self.seconds, 1)
        if self.seed is not None and not (_is_int(self.seed) and 0 <= self.seed <= MAX_SEED):
            raise UserError(f"seed is {self.seed!r}; it must be a whole number from 0 to {MAX_SEED}")
        if self.name is not None and not _is_file_stem(self.name):
            raise UserError(f"name {self.name!r} does not make a file name; give one without folders and suffix")

    def _check_switches(self, times: tuple[float, ...]) -> None:
        if len(times) != len(self.prompts) - 1:
            raise UserError(
                f"{len(self.prompts)} prompts need {len(self.prompts) - 1} switch times (the first starts at 0), "
                f"but there are {len(times)}; give one fewer than prompts, or none for equal parts"
            )
        for time in times:
            switch_frame(time)
        for before, after in itertools.pairwise(times):
            if after <= before:
                raise UserError(f"switch times must rise, but {after:g} s comes after {before:g} s; put them in order")

    @classmethod
    def from_timeline(cls, timeline: Iterable[tuple[float, str]], **settings: Any) -> Self:
        """A schedule from (start second, prompt) pairs, the first at 0: `[(0, "a"), (5, "b")]`."""
        pairs = list(timeline)
        if not pairs or pairs[0][0] != 0:
            raise UserError(
                "the first prompt must start at 0 s: write [(0, first prompt), (seconds, next prompt), ...]"
            )
        return cls(tuple(text for _, text in pairs), tuple(start for start, _ in pairs[1:]), **settings)

    def plan(self, block_frames: int, seconds: float | None = None) -> Plan:
        """Lays the schedule on blocks of `block_frames` latent frames.

        `seconds` is the length for a schedule that has none (default 5 s). Equal parts are parts of the latent frames
        that are really made, so that the last prompt always gets its share, whatever was rounded.

        Raises:
          UserError: a switch lies beyond the end, or there are more prompts than blocks.
        """
        length = next(s for s in (self.seconds, seconds, DEFAULT_SECONDS) if s is not None)
        frames, count, asked = latent_frames(length, block_frames), len(self.prompts), self.switch_seconds
        if asked is None and count > frames // block_frames:
            shortest = count * block_frames / LATENTS_PER_SECOND
            raise UserError(
                f"{count} prompts do not fit into {length:g} s ({frames // block_frames} blocks, one prompt a block "
                f"at most); ask for --seconds {shortest:g} or more, or give fewer prompts"
            )
        if asked is None:
            asked = tuple(part * frames / (count * LATENTS_PER_SECOND) for part in range(1, count))
        blocks = plan_switches([switch_frame(time) for time in asked], frames, block_frames)
        return Plan(self.prompts, frames, block_frames, asked, tuple(blocks))


def length_note(seconds: float, block_frames: int) -> str | None:
    """One line saying how `seconds` was rounded to whole blocks, or None if the video lasts just as long as asked."""
    frames = latent_frames(seconds, block_frames)
    made = pixel_frames(frames) / FPS
    if made == seconds:
        return None
    return f"{seconds:g} s asked: {frames // block_frames} blocks, {pixel_frames(frames)} frames, {made:g} s made"


def slug(text: str, max_bytes: int = 60) -> str:
    """A short file name (no suffix) from any text: lower-case words joined by "-", letters of every script kept.

    Cut between words where possible, by bytes rather than characters since file systems allow 255 bytes a name.
    """
    text = re.sub(r"[\W_]+", "-", text.lower()).strip("-")
    short = text.encode()[:max_bytes].decode(errors="ignore")
    if short != text and text[len(short)] != "-" and "-" in short:
        short = short.rsplit("-", 1)[0]
    return short.strip("-") or "video"


def _is_file_stem(name: Any) -> bool:
    if not isinstance(name, str) or not name or name != name.strip() or not name.isprintable():
        return False
    return name[0] not in ".-" and not set(name) & set('/\\:*?"<>|') and not name.endswith(".mp4") and len(name) <= 60


def output_stems(schedules: Sequence[Schedule], seed: int) -> list[str]:
    """File names without suffix for a batch of videos, all different: its name, or `<slug>-<seed>`, or with "-2" .."""
    stems: list[str] = []
    for schedule in schedules:
        own_seed = seed if schedule.seed is None else schedule.seed
        stem = schedule.name or f"{slug(schedule.prompts[0])}-{own_seed}"
        tries = (stem if n == 1 else f"{stem}-{n}" for n in range(1, len(schedules) + 2))
        stems.append(next(name for name in tries if name.lower() not in {made.lower() for made in stems}))
    return stems


def read_schedules(path: str | Path) -> list[Schedule]:
    """Reads a prompt file: `.txt` has one prompt a line, `.jsonl` one JSON object a line; blank lines are skipped.

    jsonl keys: `prompts` (a list; LongLive's files have only this one, lists may differ in length), and optionally
    `switch_seconds` or `switch_frame_indices` (latent frames), one fewer than prompts; `seconds`, `seed`, `name`.

    Raises:
      UserError: naming file and line, for anything that cannot be read or is not understood.
    """
    path = Path(path)
    readers = {".txt": _from_text_line, ".jsonl": _from_json_line}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path} is neither .txt (one prompt a line) nor .jsonl (one JSON object a line); rename it")
    reader = readers[path.suffix.lower()]
    schedules, names = [], {}
    for number, line in _lines(path):
        try:
            schedule = reader(line)
            if schedule.name is not None and names.setdefault(schedule.name.lower(), number) != number:
                first = names[schedule.name.lower()]
                raise UserError(f"name {schedule.name!r} is already taken by line {first}; choose another")
        except UserError as error:
            raise UserError(f"{path}:{number}: {error}") from None
        schedules.append(schedule)
    if not schedules:
        raise UserError(f"{path} holds no prompts; write one a line")
    return schedules


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The non-blank lines of a UTF-8 file, numbered from 1."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error
    for number, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            line = raw.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise UserError(f"{path}:{number}: not UTF-8 text; save the file as UTF-8") from error
        if line:
            yield number, line


def _from_text_line(line: str) -> Schedule:
    return Schedule((line,))


def _from_json_line(line: str) -> Schedule:
    try:
        entry = json.loads(line, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (json.JSONDecodeError, RecursionError) as error:
        where = f"column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else "nested too deep"
        raise UserError(f'not valid JSON ({where}); a line looks like {{"prompts": ["first", "second"]}}') from None
    return schedule_from_dict(entry)


def schedule_from_dict(entry: Any) -> Schedule:
    """A schedule from the keys of a jsonl line; see `read_schedules`."""
    if not isinstance(entry, dict):
        raise UserError('not a JSON object; a line looks like {"prompts": ["first", "second"]}')
    for key in entry:
        if key not in KEYS:
            raise UserError(unknown_name("key", key, KEYS))
    prompts = entry.get("prompts")
    if not isinstance(prompts, list):
        raise UserError('"prompts" is missing or not a list; write {"prompts": ["first", "second"]}')
    settings = {key: entry[key] for key in (field.name for field in fields(Schedule)) if key in entry}
    if "switch_frame_indices" in entry:
        if "switch_seconds" in entry:
            raise UserError("both switch_seconds and switch_frame_indices are given; keep one of them")
        what = "latent frames (whole numbers from 0 up)"
        frames = _list_of(entry["switch_frame_indices"], "switch_frame_indices", lambda n: _is_int(n) and n >= 0, what)
        settings["switch_seconds"] = [frame / LATENTS_PER_SECOND for frame in frames]
    if "switch_seconds" in settings:
        settings["switch_seconds"] = tuple(
            _list_of(settings["switch_seconds"], "switch_seconds", _is_number, "seconds")
        )
    return Schedule(**(settings | {"prompts": tuple(prompts)}))


def _list_of(value: Any, key: str, accepts: Callable[[Any], bool], what: str) -> list:
    if not isinstance(value, list) or not all(accepts(item) for item in value):
        raise UserError(f"{key} is not a list of {what}; write it like [20, 40]")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entry = dict(pairs)
    if len(entry) != len(pairs):
        twice = next(key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1)
        raise UserError(f"key {twice!r} is given twice; keep one of them")
    return entry


def _no_constant(name: str) -> float:
    raise UserError(f"{name} is not a number here; write a finite one")


def _is_encodable(text: str) -> bool:
    try:
        return bool(text.encode())
    except UnicodeEncodeError:
        return False


def _is_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    return abs(value) < 1e9  # 30 years of video; false for nan and infinity too
