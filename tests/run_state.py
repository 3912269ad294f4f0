"""What a run has left on the disk, to compare runs by."""

import json
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from longlive_jax.training.checkpointing import Checkpoints


def stored_state(folder: Path, step: int | None = None):
    """All arrays of a run's checkpoint, by name, and the data's position; of the newest, or of a step's."""
    checkpoints = Checkpoints(folder / "state", keep=2, say=print)
    step = checkpoints.latest if step is None else step
    stored = checkpoints._manager.item_metadata(step)["state"]
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # wherever it was written
    like = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here)
    like = jax.tree.map(like, getattr(stored, "tree", stored))
    everything = ocp.args.Composite(state=ocp.args.StandardRestore(like))
    restored = checkpoints._manager.restore(step, args=everything)["state"]
    positions = [json.loads(path.read_text()) for path in (folder / "state" / str(step) / "data").glob("*.json")]
    checkpoints.close()
    return {jax.tree_util.keystr(p): np.asarray(a) for p, a in jax.tree_util.tree_leaves_with_path(restored)}, positions


def assert_same_state(one: Path, two: Path):
    """Bit for bit."""
    (arrays, positions), (others, other_positions) = stored_state(one), stored_state(two)
    assert arrays.keys() == others.keys() and positions == other_positions
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, others[name], err_msg=name)
