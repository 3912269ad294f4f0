"""Checkpoints of a run: written in the background, complete or not there, and a full disk does not stop training.

OUTPUT/state/400/state/    arrays (orbax): parameters, optimisers, averages, key, step, streams in flight
OUTPUT/state/400/data/     position in the data (grain's; where our own iterator draws it is the step)
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from longlive_jax.errors import UserError
from longlive_jax.training.data import Batches

try:
    import grain.checkpoint as grain_checkpoint
except ModuleNotFoundError:  # then `Batches` are what runs draw
    grain_checkpoint = None


class Checkpoints:
    """The checkpoints of one run.

    Attributes:
      folder: where; a step's checkpoint is `folder / str(step)`.
      failed: saves that did not come about.
    """

    def __init__(self, folder: Path, *, keep: int, say: Callable[[str], None]):
        self.folder, self.failed = Path(folder).absolute(), 0
        self._keep, self._say = keep, say
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(max_to_keep=self._keep, cleanup_tmp_directories=True)
        handlers = {"state": ocp.StandardCheckpointHandler()}
        if grain_checkpoint is not None:
            handlers["data"] = grain_checkpoint.CheckpointHandler()
        return ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    @property
    def latest_path(self) -> Path | None:
        return None if self.latest is None else self.folder / str(self.latest)

    def save(self, step: int, state: Any, iterator: Any) -> None:
        """Starts to write; waits only for a copy of the arrays and for the save before, if that is still going on.

        What goes wrong (a full disk, mostly) is said and counted, here or when the next one is saved.
        """
        parts = {"state": ocp.args.StandardSave(state)}
        if not isinstance(iterator, Batches):
            parts["data"] = grain_checkpoint.CheckpointSave(iterator)
        self.wait()  # so that one that failed does not take this one along
        self._guarded(step, lambda: self._manager.save(step, args=ocp.args.Composite(**parts), force=True))

    def wait(self) -> None:
        """Until what is being written is on the disk, or has failed."""
        self._guarded(None, self._manager.wait_until_finished)

    def close(self) -> None:
        self.wait()
        self._manager.close()

    def restore(self, like: Any, iterator_at: Callable[[int], Any | None]) -> tuple[Any, Any | None]:
        """The newest checkpoint.

        Args:
          like: shapes of a state, with the places that are wanted.
          iterator_at: gives the data iterator that a step belongs to; grain's is set to its position. None for none.

        Returns:
          The state and the iterator.

        What streams carry may have been stored for another mesh.

        Raises:
          UserError: the checkpoint is of another model, or damaged.
        """
        step = self.latest
        wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        stored = self._stored_shapes(step)
        as_stored = lambda path, a: _as_stored(_name(path), a, stored)
        abstract = jax.tree_util.tree_map_with_path(as_stored, wanted)
        self._compare(step, stored, abstract)
        parts = {"state": ocp.args.StandardRestore(abstract)}
        iterator = iterator_at(step)
        if iterator is not None and not isinstance(iterator, Batches):
            self._find_position(step)
            parts["data"] = grain_checkpoint.CheckpointRestore(iterator)
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**parts))
        except (ValueError, KeyError, OSError) as error:
            reason = str(error).strip().splitlines()[0][:200]
            raise UserError(
                f"{self.folder / str(step)} cannot be read ({reason}); delete it to go on from the one before"
            ) from error
        return jax.tree.map(_regrouped, restored["state"], wanted), iterator

    def _find_position(self, step: int) -> None:
        """Refuses data positions that are not for grain, or not for as many processes."""
        data = self.folder / str(step) / "data"
        mine = f"process_{jax.process_index()}-of-{jax.process_count()}.json"  # as grain names them
        if (data / mine).exists():
            return
        by = "by another number of processes" if data.exists() else "without grain"
        raise UserError(
            f"{self.folder / str(step)} was written {by} and has no position for this one's data; give "
            "--run.workers 1, and our own processes draw the same data on from there"
        )

    def _stored_shapes(self, step: int) -> dict[str, tuple[int, ...]]:
        stored = self._manager.item_metadata(step)["state"]
        return _shapes(getattr(stored, "tree", stored))

    def _compare(self, step: int, found: dict[str, tuple[int, ...]], abstract: Any) -> None:
        """Refuses a checkpoint whose arrays have other names or shapes, naming the first that differs."""
        wanted = _shapes(abstract)
        wrong = [n for n in {**wanted, **found} if found.get(n) != wanted.get(n)]
        if wrong:
            name = wrong[0]
            raise UserError(
                f"{self.folder / str(step)} is of another model: {len(wrong)} arrays differ, such as {name} "
                f"({found.get(name, 'not there')}, expected {wanted.get(name, 'none')}); "
                "give the settings and checkpoints that the run began with"
            )

    def _guarded(self, step: int | None, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # tensorstore, orbax and the system each raise their own
            self.failed += 1
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            self._reopen()
            last = self.latest_path or "none"
            where = "a checkpoint" if step is None else f"the checkpoint of step {step}"
            self._say(
                f"warning: {where} could not be written ({reason}); training goes on, last good checkpoint: {last}"
            )

    def _reopen(self) -> None:
        """A manager that knows what is on the disk and nothing of the save that failed; what that left is removed."""
        try:
            self._manager.close()
        except Exception:  # it tells once more of the save that failed
            pass
        for left in self.folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(left, ignore_errors=True)
        self._manager = self._open()


# MARK: another mesh
#
# What streams carry is [times, devices, ...], so a run that goes on with other devices finds it grouped otherwise.
# Stream i is at (i // devices, i % devices) always: it is a reshape.


def _as_stored(name: str, wanted: jax.ShapeDtypeStruct, stored: dict[str, tuple[int, ...]]) -> jax.ShapeDtypeStruct:
    """What to read where as many streams are stored in other groups; else what is wanted, to be compared."""
    shape = stored.get(name, wanted.shape)
    same = shape[2:] == wanted.shape[2:] and math.prod(shape[:2]) == math.prod(wanted.shape[:2])
    if shape == wanted.shape or not same or not name.startswith("carry/"):
        return wanted
    place = wanted.sharding
    if isinstance(place, NamedSharding):
        # Cut up along any axis that can be: no device could hold what all of them carry.
        size = place.mesh.size
        axis = next((i for i, n in reversed(list(enumerate(shape))) if n % size == 0), None)
        spec = PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, place.mesh.axis_names)
        place = NamedSharding(place.mesh, spec)
    return jax.ShapeDtypeStruct(shape, wanted.dtype, sharding=place)


def _regrouped(array: Any, wanted: jax.ShapeDtypeStruct) -> Any:
    if array.shape == wanted.shape:
        return array
    regroup = lambda a: a.reshape(wanted.shape)
    return jax.jit(regroup, out_shardings=wanted.sharding)(array)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {_name(path): tuple(leaf.shape) for path, leaf in jax.tree.leaves_with_path(tree)}


def _name(path) -> str:
    return "/".join(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)
