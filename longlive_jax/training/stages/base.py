"""What a stage is to the trainer: networks, data, losses, and what it leaves behind."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import grain
import jax
import numpy as np
from flax import nnx

from longlive_jax.decoding.decoder import to_uint8
from longlive_jax.training.stage_config import StageConfig
from longlive_jax.training.step import Turn


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

    def carry(self) -> Any:
        """What a stream needs of its past, before its first step; leading axes [streams / devices, devices]."""
        return ()

    def source(self, phase: Any, seed: int) -> Any:
        """A grain source whose record i is a pure function of phase, seed and i."""
        raise NotImplementedError

    def collate(self, records: list[Any]) -> Any:
        """Records of one stream as a batch."""
        return jax.tree.map(lambda *leaves: np.stack(leaves), *records)

    def turns(self, phase: Any, step: int, *, plain: bool = False) -> tuple[Turn, ...]:
        """The losses of a step, counted from the phase's start. Steps that compute the same get the same object.

        Args:
          phase, step: which.
          plain: in float32 and without rematerialisation, to count FLOPs.
        """
        raise NotImplementedError

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

    def data(self, phase: Any) -> grain.DatasetIterator:
        """Batches `[streams, b, ...]` of a phase; the iterator's position is part of a checkpoint."""
        run = self.config.run
        source = self.source(phase, 1000 * run.seed + self.config.phases.index(phase))
        dataset = grain.MapDataset.source(source).batch(phase.batch_size // run.streams, batch_fn=self.collate)
        # Two threads: a batch is drawn while the one before is computed. More would take the cores from a CPU run.
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
        return iter(dataset.batch(run.streams).to_iter_dataset(options))


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
