"""Training sequences from cached latents of the sprites world, as a grain source: record i is a function of i."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import SupportsIndex

import numpy as np

from longlive_jax.config import MAX_ABSOLUTE_FRAMES
from longlive_jax.data.sprite_prompts import canonical, paraphrase
from longlive_jax.data.sprite_source import CANONICAL_SHARE
from longlive_jax.data.sprites import Combination

ClipPlan = tuple[tuple[Combination, Combination], int]
"""A clip's two combinations, and the latent frame at which the second begins."""


class LatentSource:
    """Records {"latents" [T, h, w, C], "positions" [T], "ids", "mask" [L], "learn" bool [T]} for `Batch`.

    Args:
      latents: of all clips, `[N, F, h, w, C]`.
      plans: of the same clips.
      tokenizer: prompt to `Tokens`.
      block: latent frames a block.
      frames: T.
      group: neighbouring records that share their positions (the clips of one stream).
      anywhere: sequences are the sink and a window from anywhere after it, up to four minutes into a video; else they
        begin with their clip.
      prompt_dropout: share of records with an empty prompt.
      seed, length: of the records.
    """

    def __init__(
        self,
        latents: np.ndarray,
        plans: Sequence[ClipPlan],
        tokenizer: Callable,
        *,
        block: int,
        frames: int,
        group: int,
        anywhere: bool,
        prompt_dropout: float,
        seed: int,
        length: int,
    ):
        self.latents, self.plans, self.tokenizer = latents, plans, tokenizer
        self.block, self.frames, self.group, self.anywhere = block, frames, group, anywhere
        self.prompt_dropout, self.seed, self.length = prompt_dropout, seed, length

    def __len__(self) -> int:
        return self.length

    def __repr__(self) -> str:
        # Grain puts this into the iterator's state and compares it on resume: no addresses, no arrays.
        return f"LatentSource(seed={self.seed}, frames={self.frames}, clips={len(self.plans)}, length={self.length})"

    def __getitem__(self, record_key: SupportsIndex) -> dict[str, np.ndarray]:
        index = operator.index(record_key)
        rng = np.random.default_rng([self.seed, index])
        gap = self._gap(index // self.group)
        clip = int(rng.integers(len(self.plans)))
        chosen = self._frames(rng, gap)
        prompt, learn = self._prompt(rng, clip, chosen)
        if self.prompt_dropout and rng.random() < self.prompt_dropout:
            prompt = ""
        tokens = self.tokenizer([prompt])
        steps = np.arange(self.frames)
        return {
            "latents": self.latents[clip][chosen].astype(np.float32),
            "positions": (steps + np.where(steps >= self.block, gap, 0)).astype(np.int32),
            "ids": tokens.ids[0],
            "mask": tokens.mask[0],
            "learn": learn,
        }

    def _gap(self, group: int) -> int:
        """Latent frames between sink and window."""
        rng = np.random.default_rng([self.seed, 1 << 20, group])
        if not self.anywhere or rng.random() < 0.5:
            return 0
        return int(rng.integers(0, MAX_ABSOLUTE_FRAMES - 2 * self.frames))

    def _frames(self, rng: np.random.Generator, gap: int) -> np.ndarray:
        """Frames of the clip: those of the sink, and a window after it."""
        last = (self.latents.shape[1] - self.frames) // self.block
        start = self.block * int(rng.integers(0, last + 1)) if self.anywhere and gap else 0
        return np.concatenate([np.arange(self.block), np.arange(start + self.block, start + self.frames)])[
            : self.frames
        ]

    def _prompt(self, rng: np.random.Generator, clip: int, chosen: np.ndarray) -> tuple[str, np.ndarray]:
        """The prompt is that of the end or of the beginning; frames of the other are past, not to be learnt."""
        combinations, change = self.plans[clip]
        second = chosen >= change
        shows_second = bool(second[-1]) and (bool(second.all()) or rng.random() < 0.7)
        combination = combinations[int(shows_second)]
        prompt = canonical(combination) if rng.random() < CANONICAL_SHARE else paraphrase(combination, rng)[0]
        same = combinations[0] == combinations[1]
        return prompt, np.ones(self.frames, bool) if same else second == shows_second
