"""Clips of the sprites world as cached latents: encoded once, trained on many times.

Half of the clips change their combination at the start of a block, so that a student also sees a past that its prompt
does not describe.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longlive_jax.config import TEMPORAL_FACTOR
from longlive_jax.data.sprites import Combination, combinations_of, render_schedule
from longlive_jax.errors import UserError
from longlive_jax.models.vae import VAE


def scheduled_clip(
    seed: int, index: int, latent_frames: int, block: int, *, draw: bool = True
) -> tuple[np.ndarray | None, tuple[Combination, Combination], int]:
    """One clip: uint8 frames [4F - 3, 64, 64, 3], its two combinations, and the latent frame the second begins at.

    Clips of odd index, or of one block, do not change: both combinations are the same. Without `draw` there are no
    frames.
    """
    rng = np.random.default_rng([seed, index])
    pool = combinations_of("train")
    first, second = (pool[int(rng.integers(len(pool)))] for _ in range(2))
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
    shard: int = 64,
    batch: int = 8,
) -> None:
    """Writes latents to `folder` in shards of `shard` clips (float16 npz), those already there kept."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    graph, params = nnx.split(vae)
    encode = jax.jit(lambda params, video: nnx.merge(graph, params).encode(video)[0])
    for start in range(0, clips, shard):
        path = folder / f"{start:06d}.npz"
        if path.exists():
            continue
        made = [scheduled_clip(seed, i, latent_frames, block) for i in range(start, start + shard)]
        latents = [
            encode(params, jnp.asarray(np.stack([m[0] for m in made[i : i + batch]]), jnp.float32) / 127.5 - 1)
            for i in range(0, shard, batch)
        ]
        temporary = path.with_suffix(".tmp.npz")
        np.savez(temporary, latents=np.concatenate(latents).astype(np.float16))
        temporary.rename(path)


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
) -> tuple[np.ndarray, list]:
    """Latents of clips [N, F, h, w, C] float16 with their plans, encoded now where they are not in `folder` yet.

    Raises:
      UserError: the folder has latents of another VAE or of other clips.
    """
    made_from = {"latent_frames": latent_frames, "block": block, "seed": seed, "vae": vae_hash}
    note = Path(folder) / "made_from.json"
    if note.exists() and (found := json.loads(note.read_text())) != made_from:
        wrong = ", ".join(
            f"{name} {found.get(name)}, now {made_from[name]}"
            for name in made_from
            if found.get(name) != made_from[name]
        )
        raise UserError(f"latents in {folder} are of others ({wrong}); delete the folder or give another")
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(made_from) + "\n")
    shard = min(64, clips)
    starts = range(0, clips, shard)
    if any(not (Path(folder) / f"{start:06d}.npz").exists() for start in starts):
        say(f"encoding {clips} clips of {latent_frames} latent frames into {folder}")
    encode_clips(
        vae, folder, clips=clips, latent_frames=latent_frames, block=block, seed=seed, shard=shard
    )  # fmt: skip
    parts = [np.load(Path(folder) / f"{start:06d}.npz")["latents"] for start in starts]
    latents = np.concatenate(parts)[:clips]
    plans = [scheduled_clip(seed, i, latent_frames, block, draw=False)[1:] for i in range(clips)]
    return latents, plans
