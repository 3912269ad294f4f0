"""Runs a recorded sequence of the official training: rollout, losses and gradients of every chunk.

With `meta.stage` "init" every chunk is a video of its own, else all are one video that goes on. With `meta.lora`
("rank", "alpha") student and critic have adapters, which are in the case by peft's names, and only those learn.

The draws are given, so every number can be compared: latents and window absolutely, losses and gradients relatively.
Nothing is updated between chunks. Settings are those of the official code (`Quirks.reference`); gradients are compared
with the cache as the official code has it, and detached (keys that start with "detach:").
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from longlive_jax import checkpoint
from longlive_jax.checkpoint import abstract_params, compare_shapes, lazy_tensors, tensor_shapes
from longlive_jax.config import SPATIAL_FACTOR, SamplerConfig, TransformerConfig, official_changes, replace
from longlive_jax.conversion import sizes, tables
from longlive_jax.conversion.readers import open_weights
from longlive_jax.errors import UserError, collect, listed, raise_all
from longlive_jax.json_files import parse_json
from longlive_jax.models.layers import structure
from longlive_jax.models.transformer import WanTransformer
from longlive_jax.models.vae import VAE
from longlive_jax.training import lora
from longlive_jax.training.config import DistillationConfig, Quirks
from longlive_jax.training.dmd import Score
from longlive_jax.training.rollout import Rollout
from longlive_jax.training.state import ChunkDraws, Prompts, RolloutDraws
from longlive_jax.training.streaming import Distillation

if TYPE_CHECKING:
    from longlive_jax.conversion.parity import Case

LOSS_RTOL = 1e-4
GRADIENT_RTOL = 1e-3
VARIANTS = {"": "straight_through", "detach:": "detach"}
"""Prefix of the keys -> how the cache was treated."""

NEEDED = (
    "start", "exit_step", "renoise", "context_noise", "new_latents", "window", "dmd_tau", "dmd_noise", "dmd_gradient",
    "generator_loss", "critic_tau", "critic_noise", "critic_loss",
)  # fmt: skip
"""What a chunk has besides its noise; gradients may be left out."""

GRADIENT = re.compile(r"(detach:)?chunk\d+_generator_grad(?:_norms$|:)")
CHUNK = re.compile(r"(?:detach:)?chunk(\d+)_")

Outputs = dict[str, tuple]


def streaming_training(folder: str | Path, case: Case) -> Outputs:
    """Every quantity of every chunk: (ours, expected), and the relative error that is ok where it is that which counts.

    Args:
      folder: checkpoint of the generator and the VAE.
      case: the sequence; `case.networks` has the files of "critic" and "teacher".
    """
    sampler, variants = _sampler(case), _variants(case)
    _check_chunks(case, sampler.block_frames)
    config = checkpoint.load_config(folder)
    params = {"generator": checkpoint.load(folder, "transformer", np.float32)}
    params["vae"] = checkpoint.load(folder, "vae", np.float32)
    cfgs, faults = {"generator": config.transformer}, []
    for name in ("critic", "teacher"):
        with collect(faults):
            if name not in case.networks:
                raise UserError(f"a {case.kind} case needs --{name} FILE.safetensors")
            cfgs[name], params[name] = read_network(case.networks[name], config.transformer)
    raise_all(faults)
    graphs, names = {"teacher": _graph(cfgs["teacher"])}, {}
    for name in ("generator", "critic"):
        make = functools.partial(_network, cfgs[name], case.meta.get("lora"))
        graphs[name], names[name] = structure(make), tables.wan_transformer(cfgs[name])
        if "lora" in case.meta:
            names[name] = tables.wan_lora(cfgs[name])
            params[name] = lora.Adapted(_adapters(case, name, make, names[name]), params[name])
    params = jax.tree.map(jnp.asarray, params)
    score = {name: Score(graphs[name]) for name in ("teacher", "critic")}
    vae = structure(lambda: VAE(config.vae, rngs=nnx.Rngs(0)))
    runs = {
        prefix: Distillation(Rollout(graphs["generator"], sampler, _config(case, value)), **score, vae=vae)
        for prefix, value in variants.items()
    }
    return _compare(case, runs, params, names)


def _compare(case: Case, runs: dict[str, Distillation], params: dict[str, Any], names: dict[str, tables.Table]):
    """All chunks of the case, one after the other."""

    def jitted(method):
        run = jax.value_and_grad(method, has_aux=True)
        return jax.jit(run, static_argnames="first")

    generator = {prefix: jitted(run.generator_terms) for prefix, run in runs.items()}
    main = next(iter(runs.values()))
    critic = jitted(main.critic_terms)
    batch, _, rows, columns = case.frames("chunk0_noise").shape[:4]
    start, prompts, outputs = main.rollout.init(params["generator"], batch, rows, columns), _prompts(case), {}
    state, index = start, 0
    while f"chunk{index}_noise" in case.arrays:
        chunk = f"chunk{index}_"
        first = index == 0 or case.meta.get("stage") == "init"
        if int(case.get(f"{chunk}start", "")) != int(state.position):
            raise UserError(f"{case.path}: {chunk}start is not {int(state.position)}, where the chunk before it ended")
        results = {
            prefix: run(params["generator"], params, state, prompts, _draws(case, chunk, "dmd", main), first=first)
            for prefix, run in generator.items()
        }
        (loss, (after, terms)), _ = next(iter(results.values()))
        for name in ("new_latents", "window"):
            outputs[chunk + name] = (terms[name], case.frames(chunk + name))
        outputs[f"{chunk}dmd_gradient"] = (terms["dmd_gradient"], case.frames(f"{chunk}dmd_gradient"), GRADIENT_RTOL)
        outputs[f"{chunk}generator_loss"] = (loss, case.get(f"{chunk}generator_loss", ""), LOSS_RTOL)
        draws = _draws(case, chunk, "critic", main)
        (loss, _), gradient = critic(params["critic"], params, state, prompts, draws, first=first)
        outputs[f"{chunk}critic_loss"] = (loss, case.get(f"{chunk}critic_loss", ""), LOSS_RTOL)
        for prefix, (_, generator_gradient) in results.items():
            outputs |= _gradients(case, f"{prefix}{chunk}generator_grad", generator_gradient, names["generator"])
        outputs |= _gradients(case, f"{chunk}critic_grad", gradient, names["critic"])
        state, index = start if case.meta.get("stage") == "init" else after, index + 1
    return outputs


def _gradients(case: Case, key: str, gradient: Any, table: tables.Table) -> Outputs:
    """Norms by original parameter name, and whole tensors where they were recorded."""
    rows = {row.ours: row for row in table.rows}
    ours = {}
    for tensor in lazy_tensors(jax.tree.map(np.asarray, lora.parts(gradient)[0])):
        row = rows[tensor.name]
        ours[row.torch] = row.transform.to_torch(tensor.make(), **table.sizes)
    outputs = {}
    norms = _norms(case, f"{key}_norms")
    whole = {name.removeprefix(f"{key}:"): name for name in case.arrays if name.startswith(f"{key}:")}
    unknown = [name for name in [*norms, *whole] if name not in ours]
    if unknown:
        raise UserError(f"{case.path}: {key} has {', '.join(unknown)}, which the network does not have")
    for name, norm in norms.items():
        outputs[f"{key}_norms:{name}"] = (np.linalg.norm(ours[name].astype(np.float64)), norm, GRADIENT_RTOL)
    for name, stored in whole.items():
        outputs[stored] = (ours[name], case.arrays[stored], GRADIENT_RTOL)
    return outputs


def _norms(case: Case, key: str) -> dict[str, np.ndarray]:
    """The norms recorded under a key, by original parameter name; none if it is not there."""
    if key not in case.arrays:
        return {}
    norms = parse_json(str(case.arrays[key]), f"{case.path}: '{key}'", "record it again")
    odd = [name for name, norm in norms.items() if isinstance(norm, bool) or not isinstance(norm, (int, float))]
    if odd:
        raise UserError(f"{case.path}: '{key}' has no number for {listed(odd)}; record it again")
    return {name: np.asarray(norm, np.float64) for name, norm in norms.items()}


# MARK: inputs


def _variants(case: Case) -> dict[str, str]:
    """Those of `VARIANTS` that any chunk has gradients of; the official code's own if there are no gradients."""
    keys = [(name, GRADIENT.match(name)) for name in case.arrays]
    odd = [name for name, match in keys if match is None and name.startswith("detach:")]
    if odd:
        raise UserError(
            f"{case.path} has {listed(odd)}; of a detached cache only chunk<n>_generator_grad is compared; record it "
            "again"
        )
    found = {match[1] or "" for _, match in keys if match is not None}
    return {prefix: value for prefix, value in VARIANTS.items() if prefix in found} or {"": VARIANTS[""]}


def _check_chunks(case: Case, block: int) -> None:
    """Refuses a case that lacks something, or has a switch that the official code and ours treat differently."""
    start, count, switch = 0, 0, case.meta.get("switch_frame")
    for name in case.arrays:
        if name.endswith("_grad_norms"):
            _norms(case, name)
    if switch is not None and case.get("prompt_embeds", "p b l e").shape[0] < 2:
        raise UserError(
            f"{case.path}: 'prompt_embeds' has 1 prompt, a case with a switch_frame needs 2; record it again"
        )
    while f"chunk{count}_noise" in case.arrays:
        missing = [f"chunk{count}_{name}" for name in NEEDED if f"chunk{count}_{name}" not in case.arrays]
        if missing:
            raise UserError(f"{case.path} has no {', '.join(missing)}, which a {case.kind} case needs; record it again")
        end = start + case.get(f"chunk{count}_noise", "b f c h w").shape[1]
        if switch is not None and end - block < switch < end:
            raise UserError(
                f"{case.path}: switch_frame {switch} is inside the last block of chunk {count} (frames {start} to "
                f"{end - 1}), which is not supported: the official code never recaches then and has no gradient in the "
                f"chunk, ours switches at {end}; record it with the switch at {end - block} or {end}"
            )
        start, count = end, count + 1
    beyond = [name for name in case.arrays if (match := CHUNK.match(name)) and int(match[1]) >= count]
    if beyond:
        raise UserError(f"{case.path} has {beyond[0]}, but no chunk{count}_noise; record it again")


def _sampler(case: Case) -> SamplerConfig:
    rows, columns = case.frames("chunk0_noise").shape[2:4]
    size = {"height": rows * SPATIAL_FACTOR, "width": columns * SPATIAL_FACTOR}
    return replace(SamplerConfig(), **official_changes(case.meta), rope="absolute", **size)


def _config(case: Case, cache_gradient: str) -> DistillationConfig:
    meta, default = case.meta, DistillationConfig()
    quirks = dataclasses.replace(
        Quirks.reference(),
        cache_gradient=cache_gradient,
        sink=meta.get("recache_sink", Quirks.reference().sink),
        score_shift=meta.get("score_shift", Quirks.reference().score_shift),
    )
    return dataclasses.replace(
        default,
        chunk_frames=meta.get("chunk_frames", default.chunk_frames),
        new_frames=meta.get("new_frames", default.new_frames),
        max_frames=meta.get("max_length", default.max_frames),
        guidance=float(meta.get("guidance_scale", default.guidance - 1) + 1),
        quirks=quirks,
    )


def _prompts(case: Case) -> Prompts:
    embeds = jnp.asarray(case.get("prompt_embeds", "p b l e"), jnp.float32)
    switch = case.meta.get("switch_frame")
    return Prompts(
        embeds=embeds[:1] if switch is None else embeds[:2],
        negative=jnp.asarray(case.get("negative_embeds", "b l e"), jnp.float32),
        switch_frame=jnp.asarray(0 if switch is None else switch, jnp.int32),
    )


def _draws(case: Case, chunk: str, loss: str, run: Distillation) -> ChunkDraws:
    """The recorded random numbers of a chunk, in our order; steps after the exit step get zeros."""
    f, steps = run.rollout.sampler.block_frames, len(run.rollout.sampler.steps)
    exit_step = int(case.get(f"{chunk}exit_step", ""))
    noise = case.frames(f"{chunk}noise")
    batch = noise.shape[0]
    pattern = "n s (b f) c h w -> n s b f h w c"
    start = rearrange(noise, "b (n f) h w c -> n 1 b f h w c", f=f)
    renoise = rearrange(case.get(f"{chunk}renoise", "n s f c h w"), pattern, b=batch)
    context = rearrange(case.get(f"{chunk}context_noise", "n f c h w")[:, None], pattern, b=batch)
    if not 0 <= exit_step < steps or renoise.shape[1] != exit_step:
        raise UserError(f"{case.path}: {chunk}renoise has {renoise.shape[1]} steps, {chunk}exit_step is {exit_step}")
    rest = np.zeros((start.shape[0], steps - 1 - exit_step, *start.shape[2:]))
    return ChunkDraws(
        rollout=RolloutDraws(
            exit_step=jnp.asarray(exit_step, jnp.int32),
            noise=jnp.asarray(np.concatenate([start, renoise, rest, context], axis=1), jnp.float32),
        ),
        tau=jnp.asarray(case.arrays[f"{chunk}{loss}_tau"].reshape(-1), jnp.int32),
        noise=case.frames(f"{chunk}{loss}_noise"),
    )


# MARK: networks


def _graph(cfg: TransformerConfig) -> nnx.GraphDef:
    return structure(lambda: _network(cfg, None))


def _network(cfg: TransformerConfig, adapter: dict[str, float] | None) -> WanTransformer:
    model = WanTransformer(cfg, rngs=nnx.Rngs(0))
    return lora.adapt(model, **adapter, rngs=nnx.Rngs(0)) if adapter else model


def _adapters(case: Case, name: str, make: Callable[[], WanTransformer], table: tables.Table) -> checkpoint.Params:
    """The adapters of a network, which the case has under peft's names after "<network>_lora:"."""
    values = {row.ours: row.transform.to_ours(case.get(f"{name}_lora:{row.torch}", "o i")) for row in table.rows}
    return _filled(lora.split(nnx.to_pure_dict(nnx.state(nnx.eval_shape(make)))).trained, values)


def read_network(path: str | Path, like: TransformerConfig) -> tuple[TransformerConfig, checkpoint.Params]:
    """Sizes and parameters (float32, layers stacked) of a DiT in its original format.

    Args:
      path: the weights; head count and prompt length are in `<stem>.json` beside it, or else those of `like`.
      like: of the generator.

    Raises:
      UserError: the file cannot be read or is no Wan transformer.
    """
    reader, beside = open_weights(path), Path(path).with_suffix(".json")
    settings = {"num_heads": like.num_heads, "text_len": like.text_length}
    if beside.is_file():
        settings |= sizes.read_settings(beside)
    cfg = sizes.transformer_sizes(reader.shapes, settings, reader.where)
    table, ours = tables.WAN["transformer"](cfg), tensor_shapes("transformer", cfg)
    raise_all(compare_shapes(reader.where, table.torch_shapes(ours), reader.shapes))
    values = {row.ours: row.transform.to_ours(reader.read(row.torch), **table.sizes) for row in table.rows}
    return cfg, _filled(abstract_params("transformer", cfg), values)


def _filled(params: checkpoint.Params, values: dict[str, np.ndarray]) -> checkpoint.Params:
    """Abstract parameters with their values, given a tensor a layer; float32."""

    def fill(keys, leaf):
        names = [str(key.key) for key in keys]
        if names[0] != checkpoint.STACKED:
            return values[".".join(names)].astype(np.float32)
        layers = [values[".".join([names[0], str(i), *names[1:]])] for i in range(leaf.shape[0])]
        return np.stack(layers).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, params)
