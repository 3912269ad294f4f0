"""Clips of the sprites world as cached latents: encoded once, trained on many times.

Half of the clips change some attributes at the start of a block, so that a student also sees a past that its prompt
does not describe.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from longlive_jax.config import TEMPORAL_FACTOR
from longlive_jax.data.sprite_source import KEPT, changed
from longlive_jax.data.sprites import Combination, combinations_of, render_schedule
from longlive_jax.errors import UserError
from longlive_jax.files import whole_file
from longlive_jax.models.vae import VAE
from longlive_jax.training.data import in_parallel
from longlive_jax.training.vae import encoded

SHARD = 64
"""Clips a file."""


def scheduled_clip(
    seed: int, index: int, latent_frames: int, block: int, *, draw: bool = True
) -> tuple[np.ndarray | None, tuple[Combination, Combination], int]:
    """One clip: uint8 frames [4F - 3, 64, 64, 3], its two combinations, and the latent frame the second begins at.

    Clips of odd index, or of one block, do not change: both combinations are the same. Without `draw` there are no
    frames.
    """
    rng = np.random.default_rng([seed, index])
    pool = combinations_of("train")
    first = pool[int(rng.integers(len(pool)))]
    second = changed(first, rng)
    blocks = latent_frames // block
    change = block * int(rng.integers(1, max(blocks, 2)))
    if index % 2 or blocks == 1:
        second = first
    frames = TEMPORAL_FACTOR * (latent_frames - 1) + 1
    # Latent frame k > 0 stands for the pixel frames 4k - 3 .. 4k.
    schedule = [(0, first), (TEMPORAL_FACTOR * change - 3, second)]
    return render_schedule(schedule, frames, rng) if draw else None, (first, second), change


def encode_clips(
    vae: VAE,
    folder: Path,
    *,
    clips: int,
    latent_frames: int,
    block: int,
    seed: int = 0,
    batch: int = 8,
    workers: int = 0,
) -> None:
    """Writes latents to `folder` in shards of `SHARD` clips (float16 npz), those already there kept.

    Args:
      vae: encodes.
      folder: gets the shards.
      clips: how many; the last shard may have fewer than the others.
      latent_frames, block, seed: of the clips, see `scheduled_clip`.
      batch: clips encoded at once.
      workers: processes that draw; 0 for none but this one.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    missing = _missing(folder, clips)
    draw = functools.partial(_frames, seed, latent_frames, block)
    drawn = in_parallel(draw, [start + i for start, size in missing for i in range(size)], workers)
    for start, clips_here in missing:
        path, latents = folder / f"{start:06d}.npz", []
        for size in [batch] * (clips_here // batch) + [clips_here % batch] * (clips_here % batch > 0):
            video = np.stack(list(itertools.islice(drawn, size)))
            latents.append(np.asarray(encoded(vae, video)))
        with whole_file(path) as partial:
            np.savez(partial, latents=np.concatenate(latents).astype(np.float16))


def _missing(folder: Path, clips: int) -> list[tuple[int, int]]:
    """(first clip, how many) of the shards that are not there, or have fewer clips than are asked for."""
    asked = [(start, min(SHARD, clips - start)) for start in range(0, clips, SHARD)]
    return [(start, size) for start, size in asked if _length(folder / f"{start:06d}.npz") < size]


def _length(path: Path) -> int:
    return len(np.load(path)["latents"]) if path.exists() else 0


def _frames(seed: int, latent_frames: int, block: int, index: int) -> np.ndarray:
    return scheduled_clip(seed, index, latent_frames, block)[0]


def cached_latents(
    vae: VAE,
    folder: Path,
    *,
    clips: int,
    latent_frames: int,
    block: int,
    seed: int,
    vae_hash: str,
    say: Callable[[str], None],
    workers: int = 0,
) -> tuple[np.ndarray, list]:
    """Latents of clips [N, F, h, w, C] float16 with their plans, encoded now where they are not in `folder` yet.

    Raises:
      UserError: the folder has latents of another VAE or of other clips.
    """
    made_from = {"latent_frames": latent_frames, "block": block, "seed": seed, "vae": vae_hash, "kept": KEPT}
    note = Path(folder) / "made_from.json"
    if note.exists() and (found := json.loads(note.read_text())) != made_from:
        wrong = ", ".join(
            f"{name} {found.get(name)}, now {made_from[name]}"
            for name in made_from
            if found.get(name) != made_from[name]
        )
        raise UserError(f"latents in {folder} are of others ({wrong}); delete the folder or give another")
    if jax.process_index() == 0:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(made_from) + "\n")
    if jax.process_index() == 0 and _missing(Path(folder), clips):
        say(f"encoding {clips} clips of {latent_frames} latent frames into {folder}")
        encode_clips(
            vae, folder, clips=clips, latent_frames=latent_frames, block=block, seed=seed,
            batch=8 if jax.default_backend() == "cpu" else 32, workers=workers,
        )  # fmt: skip
    if jax.process_count() > 1:  # the first process encodes for all
        multihost_utils.sync_global_devices(f"latents in {folder}")
    parts = [np.load(Path(folder) / f"{start:06d}.npz")["latents"] for start in range(0, clips, SHARD)]
    latents = np.concatenate(parts)[:clips]  # a folder may have more
    plans = [scheduled_clip(seed, i, latent_frames, block, draw=False)[1:] for i in range(clips)]
    return latents, plans
