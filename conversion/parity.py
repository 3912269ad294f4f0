"""Runs recorded cases of the official PyTorch implementation on a checkpoint and measures the difference.

A case is an `.npz` with a JSON string `meta`, whose `kind` says which part it is for, inputs, and expected outputs; the
arrays are channels-first as in PyTorch. `KINDS` has a function a kind. Everything is computed in float32, but for a
rollout that was recorded in bfloat16.
"""

from __future__ import annotations

import contextlib
import dataclasses
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from longlive_jax import checkpoint, schedule
from longlive_jax.config import unknown_name
from longlive_jax.conversion.rollout import rollout
from longlive_jax.conversion.training_parity import streaming_training
from longlive_jax.errors import UserError, listed
from longlive_jax.json_files import parse_json
from longlive_jax.models.layers import structure


@dataclasses.dataclass(frozen=True)
class Case:
    """A recorded case.

    Attributes:
      path: the file.
      kind: which function of `KINDS` runs it.
      meta: its settings, under the official names.
      arrays: inputs and expected outputs.
      networks: files of further networks, by name ("critic", "teacher").
    """

    path: Path
    kind: str
    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]
    networks: dict[str, Path] = dataclasses.field(default_factory=dict)

    def get(self, name: str, pattern: str) -> np.ndarray:
        """An array; `pattern` names its axes, such as "b f c h w". Raises UserError if it is not there or differs."""
        if name not in self.arrays:
            raise UserError(f"{self.path} has no '{name}', which a {self.kind} case needs; record it again")
        array = self.arrays[name]
        if array.ndim != len(pattern.split()):
            raise UserError(f"{self.path}: '{name}' is {list(array.shape)}, expected axes ({pattern})")
        return array

    def frames(self, name: str) -> jax.Array:
        """A video or latents [B, F, C, h, w] as ours: float32 [B, F, h, w, C]."""
        return jnp.asarray(rearrange(self.get(name, "b f c h w"), "b f c h w -> b f h w c"), jnp.float32)


SMALL = 64 * 10**6
"""Bytes of arrays that any case may have, ..."""

INFLATION = 20
"""... and how many times its file's size a larger one: noise does not compress, but padded embeddings do."""


def read_case(path: str | Path) -> Case:
    """Reads an `.npz`; pickled arrays are refused. Raises UserError for a file that is no case."""
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as file:
            size = sum(member.file_size for member in file.infolist())  # as declared; no more is inflated
        if size > max(SMALL, INFLATION * path.stat().st_size):
            raise UserError(
                f"{path} claims {size / 1e9:.3g} GB in a file of {path.stat().st_size / 1e6:.3g} MB, which no recorded "
                "case does; record it again"
            )
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        text = str(arrays.pop("meta", "")).encode("utf-8").decode("utf-8")  # an array may hold what is no character
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"there is no case {path}") from error
    except Exception as error:  # of zipfile, zlib, numpy's headers, or the memory that a damaged one asks for
        raise UserError(f"{path} is damaged or no .npz file; copy it again") from error
    odd = [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]
    if odd:
        raise UserError(f"{path} has {listed(odd)}, which are no arrays; copy it again")
    meta = parse_json(text, f"{path} is no parity case: its 'meta'", "copy it again")
    if not isinstance(meta.get("kind"), str):
        raise UserError(f"{path} has no 'meta' with a kind, so it is no parity case")
    return Case(path, meta["kind"], meta, arrays)


Outputs = dict[str, tuple]
"""(ours, expected) of every quantity that is compared; or (ours, expected, rtol) where the relative error decides."""


def load_part(folder: str | Path, part: str) -> Callable[..., Any]:
    """A part of a checkpoint, float32, as `call(function, *arrays)`, which runs `function(module, *arrays)` jitted."""
    params = checkpoint.load(folder, part, np.float32)
    cfg = getattr(checkpoint.load_config(folder), part)
    graph = structure(lambda: checkpoint.MODULES[part](cfg, rngs=nnx.Rngs(0)))
    return lambda function, *arrays: jax.jit(lambda p, *a: function(nnx.merge(graph, p), *a))(params, *arrays)


def bidirectional(folder: str | Path, case: Case) -> Outputs:
    """The DiT with full attention and one timestep a sample: the flow, and x0 from it."""
    call = load_part(folder, "transformer")
    x, timestep = case.frames("x"), case.get("timestep", "b")
    prompt = jnp.asarray(case.get("prompt_embeds", "b l e"), jnp.float32)
    timesteps = jnp.broadcast_to(jnp.asarray(timestep, jnp.float32)[:, None], x.shape[:2])
    flow = call(lambda net, x, t, prompt: net.bidirectional(x, t, net.text_kv(prompt)), x, timesteps, prompt)
    sigma = schedule.sigma_of(timestep, case.meta.get("timestep_shift", 5.0)).astype(np.float32)
    x0 = schedule.to_x0(x, flow, sigma[:, None, None, None, None])
    return {"flow": (flow, case.frames("flow")), "x0": (x0, case.frames("x0"))}


def vae(folder: str | Path, case: Case) -> Outputs:
    """The VAE both ways, whole clips."""
    call = load_part(folder, "vae")
    pixels = call(lambda vae, latents: vae.decode(latents)[0], case.frames("latents"))
    encoded = call(lambda vae, video: vae.encode(video)[0], case.frames("video"))
    return {"pixels": (pixels, case.frames("pixels")), "encoded": (encoded, case.frames("encoded"))}


def text(folder: str | Path, case: Case) -> Outputs:
    """The text encoder on token ids."""
    call = load_part(folder, "text_encoder")
    ids, mask = (jnp.asarray(case.get(name, "b l"), jnp.int32) for name in ("ids", "mask"))
    embeds = call(lambda encoder, ids, mask: encoder(ids, mask), ids, mask)
    return {"prompt_embeds": (embeds, case.get("prompt_embeds", "b l e"))}


KINDS: dict[str, Callable[[str | Path, Case], Outputs]] = {
    "bidirectional": bidirectional,
    "rollout": rollout,
    "streaming_training": streaming_training,
    "text": text,
    "vae": vae,
}
"""What runs a case of each kind on a checkpoint folder."""


def run_case(
    checkpoint_folder: str | Path,
    case_file: str | Path,
    atol: float = 1e-4,
    networks: dict[str, Path] | None = None,
) -> dict[str, Any]:
    """Runs one case.

    Args:
      checkpoint_folder: converted from the weights that `meta.weights` of the case names.
      case_file: the `.npz`.
      atol: the largest absolute error that is ok.
      networks: files of the networks that the case needs besides the checkpoint, by name.

    Returns:
      `{"case", "kind", "max_abs", "rms", "ok", "quantities": {name: {"max_abs", "rms", "rel", "ok"}}}`; max_abs is the
      worst over the quantities, rms over all their values, rel the error's norm over that of the expected values.

    Raises:
      UserError: the case or the checkpoint cannot be read, or they do not fit each other.
    """
    case = dataclasses.replace(read_case(case_file), networks=networks or {})
    if case.kind not in KINDS:
        raise UserError(f"{case_file}: {unknown_name('kind', str(case.kind), KINDS)}")
    with exact(case, checkpoint_folder):
        outputs = KINDS[case.kind](checkpoint_folder, case)
    return compare(case, outputs, atol)


@contextlib.contextmanager
def exact(case: Case, checkpoint_folder: str | Path) -> Iterator[None]:
    """Exact matrix products, and a UserError where the case's sizes are not the checkpoint's."""
    # TF32, the default of a GPU, has an error of 1e-3.
    with jax.default_matmul_precision("highest"):
        try:
            yield
        except (TypeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{case.path} does not fit the checkpoint {checkpoint_folder}: {reason}") from error


def compare(case: Case, outputs: Outputs, atol: float) -> dict[str, Any]:
    """The entry of a case that has been run, see `run_case`."""
    quantities, squares, count = {}, 0.0, 0
    for name, (ours, expected, *rtol) in outputs.items():
        if ours.shape != expected.shape:
            raise UserError(f"{case.path}: '{name}' is {list(expected.shape)}, ours {list(ours.shape)}")
        expected = np.asarray(expected, np.float64)
        error = np.asarray(ours, np.float64) - expected
        worst = float(np.max(np.abs(error)))
        rel = float(np.linalg.norm(error) / max(np.linalg.norm(expected), 1e-30))
        quantities[name] = {
            "max_abs": worst,
            "rms": float(np.sqrt(np.mean(error**2))),
            "rel": rel,
            "ok": bool(rel <= rtol[0] if rtol else worst <= atol),
        }
        squares, count = squares + float(np.sum(error**2)), count + error.size
    return {
        "case": case.path.stem,
        "kind": case.kind,
        "max_abs": float(np.max([quantity["max_abs"] for quantity in quantities.values()])),  # NaN wins, unlike in max
        "rms": float(np.sqrt(squares / count)),
        "ok": all(quantity["ok"] for quantity in quantities.values()),
        "quantities": quantities,
    }
