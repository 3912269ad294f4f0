"""What a stage is to the trainer: networks, data, losses, and what it leaves behind."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
from flax import nnx

from longlive_jax.decoding.decoder import to_uint8
from longlive_jax.training import data
from longlive_jax.training.stage_config import StageConfig
from longlive_jax.training.step import Part, Turn


class Stage:
    """A stage. The trainer calls these in the order in which they stand here.

    Attributes:
      name: of the command.
      config: its settings.
      output: folder of the run.
      say: gets one-line messages.
      sources: hashes of the checkpoints it starts from, by role; a run goes on with the same only.
    """

    name: ClassVar[str]

    def __init__(self, config: StageConfig, output: Path, say: Callable[[str], None]):
        self.config, self.output, self.say = config, Path(output), say
        self.sources: dict[str, str] = {}

    def shapes(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Shapes of the parameters that `parameters` gives; allocates nothing."""
        raise NotImplementedError

    def activations(self, phase: Any) -> dict[str, int]:
        """Bytes that one stream needs besides parameters and gradients, about, by what needs them."""
        raise NotImplementedError

    def parameters(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """First parameters of what is trained, by learner and network; and of frozen networks by name."""
        raise NotImplementedError

    def rate(self, phase: Any, learner: str) -> float:
        """Peak learning rate of a learner."""
        return phase.rate

    def averages(self, learner: str) -> bool:
        """Whether a learner's weights are averaged (if the settings say so at all)."""
        return True

    def carry(self, phase: Any) -> Any:
        """What a stream needs of its past, before a phase's first step; leading axes [streams / devices, devices], but
        for what all streams share (`Parted`)."""
        return ()

    def source(self, phase: Any, seed: int) -> Any:
        """A source (as grain's) whose record i is a pure function of phase, seed and i."""
        raise NotImplementedError

    @staticmethod
    def collate(records: list[Any]) -> Any:
        """Records of one stream as a batch."""
        return jax.tree.map(lambda *leaves: np.stack(leaves), *records)

    @staticmethod
    def parted(batch: Any) -> Any:
        """A batch `[streams, b, ...]` with what all streams share put apart (`Parted`), where they share something."""
        return batch

    def turns(self, phase: Any, step: int, *, plain: bool = False) -> tuple[Turn, ...]:
        """The losses of a step, counted from the phase's start. Steps that compute the same get the same object.

        Args:
          phase, step: which.
          plain: in float32 and without rematerialisation, to count FLOPs.
        """
        raise NotImplementedError

    def parts(self, phase: Any, step: int) -> tuple[Part, ...]:
        """What a step's time goes to, in the order in which it happens; steps are counted from the phase's start."""
        return ()

    def validate(self, best: dict[str, Any], frozen: dict[str, Any]) -> tuple[dict[str, float], np.ndarray]:
        """Figures, and a video uint8 [T, H, W, 3] to look at.

        Args:
          best: parameters to hand on, by learner.
          frozen: as `parameters` gave.
        """
        raise NotImplementedError

    def finish(self, best: dict[str, Any], frozen: dict[str, Any], folder: Path, provenance: dict[str, Any]) -> None:
        """Writes the checkpoint folder that the next stage (and `longlive generate`) starts from."""
        raise NotImplementedError

    def data(self, phase: Any, position: int, mine: Sequence[int]) -> Iterator[Any]:
        """Batches `[streams, b, ...]` of a phase.

        Args:
          phase: which.
          position: batches that were drawn before; grain's iterator begins at 0 and is set by a checkpoint.
          mine: the streams of a batch that this process trains on.
        """
        run = self.config.run
        source = self.source(phase, 1000 * run.seed + self.config.phases.index(phase))
        size = phase.batch_size // run.streams
        if len(mine) < run.streams:
            source = data.Rows(source, run.streams, size, tuple(mine))
        drawn = None if run.workers else data.grain_batches(source, self.collate, len(mine), size)
        if drawn is not None:
            return drawn
        return data.Batches(source, self.collate, len(mine), size, position=position, workers=run.workers)


@functools.partial(jax.jit, static_argnums=0)
def decoded(graph: nnx.GraphDef, params: Any, latents: jax.Array) -> jax.Array:
    """Latents as pixels uint8 [B, T, H, W, 3], by a VAE."""
    pixels, _ = nnx.merge(graph, params).decode(latents)
    return to_uint8(pixels)


def side_by_side(videos: np.ndarray, columns: int) -> np.ndarray:
    """Videos [N, T, H, W, 3] as one, in rows of `columns`; missing ones are black."""
    missing = -len(videos) % columns
    videos = np.concatenate([videos, np.zeros((missing, *videos.shape[1:]), videos.dtype)])
    rows = [np.concatenate(list(videos[i : i + columns]), axis=2) for i in range(0, len(videos), columns)]
    return np.concatenate(rows, axis=1)
