"""The loop around a jitted step: data by index, metrics as JSON lines, checkpoints, resume.

A batch is a function of its index, so a resumed run sees the data an uninterrupted one would.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp


def run(
    step: Callable[[Any, Any, Any], tuple[Any, dict]],
    state: Any,
    batch: Callable[[int], Any],
    *,
    steps: int,
    folder: Path,
    seed: int = 0,
    save_every: int = 100,
    log_every: int = 10,
    seconds: float | None = None,
) -> Any:
    """Runs `state, metrics = step(state, batch(i), key_i)` for i up to `steps`, resuming from what `folder` holds.

    Args:
      step: jitted; may donate its first argument.
      state: a pytree of arrays; the structure to restore into.
      batch: makes the batch of an index, on the host.
      steps: total number of steps, those before a resume counted.
      folder: gets `metrics.jsonl` and `state/<step>`.
      seed: names the keys given to the step.
      save_every: steps between checkpoints (the last two are kept).
      log_every: steps between metric lines.
      seconds: stop (and save) after this much wall time, even before `steps`.

    Returns:
      The last state.
    """
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    manager = ocp.CheckpointManager(folder / "state", options=ocp.CheckpointManagerOptions(max_to_keep=2))
    start = 0
    if manager.latest_step() is not None:
        start = manager.latest_step()
        state = manager.restore(start, args=ocp.args.StandardRestore(state))
    root = jax.random.key(seed)
    began = time.monotonic()
    done = start
    with open(folder / "metrics.jsonl", "a") as log:
        for i in range(start, steps):
            state, metrics = step(state, batch(i), jax.random.fold_in(root, i))
            done = i + 1
            if done % log_every == 0:
                line = {"step": done, "seconds": round(time.monotonic() - began, 1)}
                line |= {name: float(np.asarray(value)) for name, value in metrics.items()}
                log.write(json.dumps(line) + "\n")
                log.flush()
            if done % save_every == 0:
                manager.save(done, args=ocp.args.StandardSave(state))
            if seconds is not None and time.monotonic() - began > seconds:
                break
    if manager.latest_step() != done:
        manager.save(done, args=ocp.args.StandardSave(state))
    manager.wait_until_finished()
    manager.close()
    return state
