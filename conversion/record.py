"""Records a parity case: runs the official PyTorch code from a clone and writes what went in and what came out.

    python -m longlive_jax.conversion.record --repo LongLive --wan Wan2.1-T2V-1.3B --generator longlive_base.pt \
        --prompts "a cat on a table" "a dog on a table" --switch-frames 12 --output case.npz

The file is what `longlive parity` reads; `meta` also says under `recorded` what it ran on and how long its parts took.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from longlive_jax.conversion.recording import Inputs, Run, write_random_wan
from longlive_jax.errors import UserError, raise_all
from longlive_jax.files import whole_file


@dataclasses.dataclass(kw_only=True)
class Record(Run):
    """Run the official PyTorch code (NVlabs/LongLive, branch v1.0) and write a parity case.

    Attributes:
      repo: clone of the official repository: git clone -b v1.0 https://github.com/NVlabs/LongLive
      output: the .npz to write.
      overwrite: replace an output that exists.
    """

    repo: Path
    output: Path
    overwrite: bool = False
    wan: Annotated[Path | None, tyro.conf.arg(aliases=("--checkpoint",))] = None


def record(repo: Path, output: Path, run: Run, overwrite: bool = False) -> dict[str, Any]:
    """Runs the official pipeline and writes the case.

    Returns:
      What `meta.recorded` of the case says; with `run.inputs` also `max_abs` and `rms`, the difference of the latents.

    Raises:
      UserError: bad settings, no such clone, a missing package, weights that do not fit; nothing has been written.
    """
    run.check()
    if output.suffix != ".npz":
        raise UserError(f"--output {output} must end in .npz")
    if output.exists() and not overwrite:
        raise UserError(f"{output} exists; give --overwrite to replace it")
    try:
        import torch

        from longlive_jax.conversion.official_repo import check_repo
    except ModuleNotFoundError as error:
        raise UserError('the official code needs PyTorch: pip install "longlive-jax[convert]"') from error
    check_repo(repo)
    device, dtype = _device(run)
    with tempfile.TemporaryDirectory() as scratch:
        folder = run.wan
        if run.random_weights:
            folder = run.write_weights or Path(scratch) / "wan"
            write_random_wan(folder, run.preset, run.seed, str(dtype).removeprefix("torch."))
        exact = dtype == torch.float32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not exact  # TF32 is off by 1e-3
        arrays, settings, recorded = _run(repo, folder, run, device, dtype)
    latents = arrays["latents"]
    if not np.isfinite(latents).all():
        raise UserError("the official code gave latents that are not finite; are these the right weights?")
    meta = {"kind": "rollout", **settings, "weights": _weights_name(run), "dtype": recorded["dtype"]}
    if run.prompts:
        meta["prompts"] = list(run.prompts)
    _write(output, {"meta": json.dumps(meta | {"recorded": recorded}), **arrays})
    if run.inputs is not None:
        error = latents.astype(np.float64) - Inputs.read(run.inputs).latents
        recorded = recorded | {"max_abs": float(np.abs(error).max()), "rms": float(np.sqrt(np.mean(error**2)))}
    return recorded


def _run(repo: Path, folder: Path, run: Run, device, dtype) -> tuple[dict[str, np.ndarray], dict[str, Any], dict]:
    """The case's arrays, its settings under the official names, and `meta.recorded`."""
    import torch

    from longlive_jax.conversion.convert import open_wan
    from longlive_jax.conversion.official_capture import Clock, given_noise
    from longlive_jax.conversion.official_pipeline import Parts, build, official_settings
    from longlive_jax.conversion.official_repo import opened

    source = open_wan(folder, run.generator, run.generator_key, (), None)
    raise_all(source.faults, f"cannot run {folder}: ")
    if run.prompts and (source.tokenizer is None or "text_encoder" not in source.configs):
        raise UserError(f"{'; '.join(source.warnings)}; or give --random-embeds")
    cfg = source.configs["transformer"]
    inputs = Inputs.read(run.inputs) if run.inputs is not None else Inputs.draw(run, cfg)
    _fit(inputs, cfg, run)
    noise, renoise = (torch.from_numpy(array).to(device, dtype) for array in (inputs.noise, inputs.renoise))
    embeds = None if inputs.embeds is None else torch.from_numpy(inputs.embeds).to(device, dtype)
    lora = (run.lora, run.lora_alpha) if run.lora else None
    batch, frames = noise.shape[:2]
    prompts = [str(i) for i in range(len(embeds))] if embeds is not None else list(run.prompts)
    interactive = len(prompts) > 1
    with (
        opened(repo, text=bool(run.prompts), sdpa=run.attention == "sdpa") as code,
        contextlib.redirect_stdout(sys.stderr),  # the official code tells its progress
        torch.no_grad(),
    ):
        clock = Clock(device)
        parts = Parts(folder, source, lora, embeds, run.decode, device, dtype, clock)
        pipeline = build(code, parts, inputs.sampler, frames, interactive)
        if interactive:
            call = {"text_prompts_list": [[p] * batch for p in prompts], "switch_frame_indices": inputs.switch_frames}
        else:
            call = {"text_prompts": prompts * batch}
        for _ in range(run.warmup + 1):
            clock.times.clear()
            pipeline.text_encoder.embeds.clear()
            with given_noise(renoise), clock.span("total_ms"):
                _, latents = pipeline.inference(noise=noise, return_latents=True, **call)
    arrays = {
        "noise": _array(noise),
        "renoise": _array(renoise),
        "prompt_embeds": np.stack(pipeline.text_encoder.embeds),
        "switch_frames": np.asarray(inputs.switch_frames, np.int32),
        "latents": _array(latents),
    }
    if pipeline.vae.pixels is not None:
        arrays["pixels"] = pipeline.vae.pixels
    if embeds is not None:
        del clock.times["text_encode_ms"]  # nothing was encoded
    official = official_settings(inputs.sampler)
    model = official.pop("model_kwargs")
    settings = {name: model[name] for name in ("local_attn_size", "sink_size", "timestep_shift")} | official
    recorded = {
        "pipeline": "InteractiveCausalInferencePipeline" if interactive else "CausalInferencePipeline",
        "commit": _commit(repo),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "attention": run.attention,
        "torch": torch.__version__,
        "warmup": run.warmup,
        "times": clock.times,
    }
    return arrays, settings | {"rope": inputs.sampler.rope}, recorded


def _device(run: Run):
    """The torch device and dtype. Raises UserError if they, or flash-attention, are not to be had."""
    import torch

    cuda = torch.cuda.is_available()
    try:
        device = torch.device(run.device or ("cuda" if cuda else "cpu"))
    except RuntimeError as error:
        raise UserError(f"--device {run.device} is no device of PyTorch's; give cuda, cuda:1 or cpu") from error
    if device.type not in ("cuda", "cpu") or (device.type == "cuda" and not cuda):
        raise UserError(f"--device {device}: this PyTorch ({torch.__version__}) sees no such device; give --device cpu")
    dtype = getattr(torch, run.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    if run.attention == "flash":
        if not any(importlib.util.find_spec(name) for name in ("flash_attn", "flash_attn_interface")):
            raise UserError("--attention flash needs flash-attention: pip install flash-attn, or leave it out")
        if device.type != "cuda" or dtype != torch.bfloat16:
            raise UserError("--attention flash computes in bfloat16 on a GPU only; leave it out")
    return device, dtype


def _fit(inputs: Inputs, cfg, run: Run) -> None:
    """Refuses inputs, perhaps recorded with another model, whose sizes are not the weights'."""
    faults, block = [], inputs.sampler.block_frames
    batch, frames, channels = inputs.noise.shape[:3]
    if channels != cfg.in_channels:
        faults.append(f"noise has {channels} channels, the model {cfg.in_channels}")
    if inputs.embeds is not None and inputs.embeds.shape[1:] != (batch, cfg.text_length, cfg.text_dim):
        expected = [batch, cfg.text_length, cfg.text_dim]
        faults.append(f"embeddings are {list(inputs.embeds.shape[1:])}, the model's {expected}")
    shape = (frames // block, len(inputs.sampler.steps) - 1, batch, block, *inputs.noise.shape[2:])
    if frames % block or inputs.renoise.shape != shape:
        faults.append(f"renoise is {list(inputs.renoise.shape)}, expected {list(shape)} for {frames} frames")
    raise_all(faults, f"{run.inputs or 'inputs'}: ")


def _array(tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()


def _weights_name(run: Run) -> str:
    names = [f"random {run.preset} {run.seed}" if run.random_weights else (run.generator or run.wan).name]
    return " + ".join(names + ([run.lora.name] if run.lora else []))


def _commit(repo: Path) -> str | None:
    """The clone's commit, for the record; None if git does not say."""
    if not (repo / ".git").exists():  # git would tell the commit of a repository around it
        return None
    try:
        told = subprocess.run(["git", "-C", str(repo), "rev-parse", "HEAD"], capture_output=True, text=True)
    except OSError:
        return None
    return told.stdout.strip() or None


def _write(output: Path, arrays: dict[str, Any]) -> None:
    with whole_file(output) as partial:
        np.savez(partial, **arrays)


def typical(times: dict[str, list[float]]) -> dict[str, float]:
    """A number a part, in ms: the median; of blocks that of those after the first, which warms up."""
    blocks = times.get("dit_ms_per_block", [])[1:]
    medians = {name: statistics.median(values) for name, values in times.items()}
    return medians | ({"dit_ms_per_block": statistics.median(blocks)} if blocks else {})


def times_line(times: dict[str, list[float]]) -> str:
    """The times in a line."""
    return ", ".join(f"{name.replace('_', ' ')} {value:.1f}" for name, value in typical(times).items())


def main(args: list[str] | None = None) -> int:
    """Exits 0, or 1 with one line on stderr."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # shapes are all it is asked for, and it would take the GPU's memory
    command = tyro.cli(Record, prog="record", args=args, config=(tyro.conf.FlagCreatePairsOff,))
    try:
        recorded = record(command.repo, command.output, command, command.overwrite)
    except UserError as error:
        print("record:", str(error).replace("\n", " "), file=sys.stderr)
        return 1
    print(f"{command.output}: {recorded['pipeline']}, {recorded['dtype']} on {recorded['device']}")
    print(times_line(recorded["times"]))
    if "max_abs" in recorded:
        print(f"against {command.inputs}: latents max {recorded['max_abs']:.2e} rms {recorded['rms']:.2e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
