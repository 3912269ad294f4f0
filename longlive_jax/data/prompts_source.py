"""Prompts from files as a grain source: what distillation learns from, which needs no videos.

Line k of several .txt files belongs together (the prompts of a video that switches, in their order); a .jsonl line has
them all (`{"prompts": [..]}`).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from pathlib import Path
from typing import SupportsIndex

from longlive_jax.errors import UserError, collect, raise_all
from longlive_jax.prompts import read_schedules


class PromptSource:
    """Record i is the i-th video's prompts, a tuple of `prompts_a_video` texts.

    Args:
      paths: one .jsonl, or .txt files that are paired line by line.
      prompts_a_video: 1, or 2 with a switch; a .jsonl with more keeps the first ones.

    Raises:
      UserError: a file that is missing, empty or broken; files of unequal length; too few prompts in a line.
    """

    def __init__(self, paths: Sequence[str | Path], prompts_a_video: int):
        self.paths = tuple(str(path) for path in paths)
        if not self.paths:
            raise UserError("no prompt files are given; name one .jsonl, or one .txt for each prompt of a video")
        if any(path.lower().endswith(".jsonl") for path in self.paths):
            self.videos = self._jsonl(prompts_a_video)
        else:
            self.videos = self._paired(prompts_a_video)

    def __len__(self) -> int:
        return len(self.videos)

    def __repr__(self) -> str:
        return f"PromptSource({list(self.paths)}, {len(self)} videos)"

    def __getitem__(self, record_key: SupportsIndex) -> tuple[str, ...]:
        return self.videos[operator.index(record_key)]

    def _jsonl(self, count: int) -> list[tuple[str, ...]]:
        if len(self.paths) > 1:
            raise UserError(f"{', '.join(self.paths)}: a .jsonl holds all prompts of its videos; give it alone")
        videos = [schedule.prompts for schedule in read_schedules(self.paths[0])]
        for number, prompts in enumerate(videos, 1):
            if len(prompts) < count:
                raise UserError(f"{self.paths[0]}: video {number} has {len(prompts)} prompts, {count} are needed")
        return [prompts[:count] for prompts in videos]

    def _paired(self, count: int) -> list[tuple[str, ...]]:
        columns, faults = [], []
        for path in self.paths:
            with collect(faults):
                columns.append([schedule.prompts[0] for schedule in read_schedules(path)])
        raise_all(faults)
        if len(columns) < count:
            raise UserError(f"{len(columns)} prompt files are given; a video with {count} prompts needs {count}")
        if len({len(column) for column in columns}) > 1:
            counts = ", ".join(f"{path} has {len(column)}" for path, column in zip(self.paths, columns))
            raise UserError(f"prompt files are paired line by line, but {counts} prompts; make them equally long")
        blanks = [_blank_lines(path) for path in self.paths]
        if any(blank != blanks[0] for blank in blanks):
            first = min(set.symmetric_difference(*map(set, (blanks[0], next(b for b in blanks if b != blanks[0])))))
            raise UserError(
                f"line {first} is blank in one of {', '.join(self.paths)} only, so lines do not pair; mend it"
            )
        return list(zip(*columns[:count], strict=True))


def _blank_lines(path: str) -> list[int]:
    """Numbers of the blank lines before the last prompt."""
    lines = Path(path).read_text("utf-8-sig").rstrip().split("\n")
    return [number for number, line in enumerate(lines, 1) if not line.strip()]
