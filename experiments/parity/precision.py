"""What lower precision costs: the same model, prompts and noise in float32 and in others, compared.

    python experiments/parity/precision.py --output runs/precision

Three models: `micro`, random weights, 240 s of video; `sprites`, the shipped weights, 240 s; `t2v_1_3b`, random weights
at the full size, 12 blocks of --pixels, 32 x 32 by default (12 GB of memory; leave it out with --models micro sprites;
on a GPU give --pixels 480 832). For each:

- by layer: each transformer block on the input it has in float32 (`alone`), and the whole network up to it (`through`),
  as the root mean square of the difference over that of float32;
- by latent frame of a rollout of the scanned decoder with prompt switches: the same measure of the latents;
- by pixel frame: PSNR of the decoded frames.

Each model in each precision is a part of its own, kept in DIR/parts: a run that was interrupted goes on where it was.
Writes precision.json, precision.md (a table) and precision.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from longlive_jax import checkpoint, hub
from longlive_jax.cache import Window
from longlive_jax.config import ModelConfig, SamplerConfig, TransformerConfig, VAEConfig, to_dict
from longlive_jax.data.sprite_prompts import all_combinations, canonical
from longlive_jax.decoding.decoder import Decoder
from longlive_jax.decoding.state import FILLER, BlockInputs
from longlive_jax.errors import UserError
from longlive_jax.files import whole_file
from longlive_jax.models import rope
from longlive_jax.models.attention import attention
from longlive_jax.models.layers import run_layers, structure
from longlive_jax.models.quantization import quantize_params, with_int8
from longlive_jax.models.text_encoder import TextEncoder
from longlive_jax.models.transformer import WanTransformer
from longlive_jax.models.vae import VAE
from longlive_jax.prompts import LATENTS_PER_SECOND
from longlive_jax.schedule import few_step_list
from longlive_jax.sidecar import versions
from longlive_jax.tokenizer import PromptTokenizer

REFERENCE = "float32"


@dataclasses.dataclass(frozen=True)
class Precision:
    """How numbers are held.

    Attributes:
      weights, activations: their dtypes.
      network: makes of a transformer one that computes otherwise; as it is by default.
      convert: makes of the transformer's parameters those of that one.
    """

    weights: str
    activations: str
    network: Callable[[WanTransformer], WanTransformer] = lambda net: net
    convert: Callable[[checkpoint.Params], checkpoint.Params] = lambda params: params

    def transformer(self, cfg: TransformerConfig) -> nnx.GraphDef:
        return structure(lambda: self.network(WanTransformer(cfg, rngs=nnx.Rngs(0))))


PRECISIONS = {
    "float32": Precision("float32", "float32"),
    "bfloat16": Precision("bfloat16", "bfloat16"),
    "bfloat16 weights": Precision("bfloat16", "float32"),
    "int8": Precision("bfloat16", "bfloat16", with_int8, quantize_params),
}
"""The second is how the pipeline runs on an accelerator."""

SEED = 0
LARGEST_PSNR = 99.0  # of equal frames, whose PSNR is infinite


# MARK: the models


@dataclasses.dataclass(frozen=True)
class Model:
    """What is run.

    Attributes:
      config: sizes and sampler settings.
      blocks: length of the rollout; the prompt changes at equal parts of it.
      params: `params(part, dtype)` loads or draws the weights of a part.
      prompt_embeds: float32 [prompts, 1, L, width], the same in every precision.
    """

    config: ModelConfig
    blocks: int
    params: Callable[[str, str], checkpoint.Params]
    prompt_embeds: np.ndarray


def random_model(
    transformer: TransformerConfig, vae: VAEConfig, pixels: tuple[int, int], blocks: int, prompts: int
) -> Model:
    """Random weights and prompts, each prompt's embeddings zero over its last quarter as padding is."""
    config = ModelConfig(transformer, vae, None, SamplerConfig(height=pixels[0], width=pixels[1], rope="absolute"))
    embeds = np.random.default_rng(SEED).standard_normal((prompts, 1, transformer.text_length, transformer.text_dim))
    embeds[:, :, -(transformer.text_length // 4) :] = 0
    return Model(
        config, blocks, lambda part, dtype: random_params(part, getattr(config, part), dtype), embeds.astype(np.float32)
    )


def random_params(part: str, cfg: Any, dtype: str) -> checkpoint.Params:
    """Kernels with variance 1 / inputs, so that every layer keeps the scale of what it gets; norms 1 and biases 0,
    each +- 0.1. Drawn in float32, then rounded: every precision has the same weights."""
    rng = np.random.default_rng(SEED)

    def draw(path, leaf):
        name, values = path[-1].key, rng.standard_normal(leaf.shape, np.float32)
        if name == "kernel":
            inputs = leaf.shape[-2] if path[0].key == checkpoint.STACKED else np.prod(leaf.shape[:-1])
            values *= np.float32(inputs**-0.5)
        else:
            values = np.float32(0.1) * values + np.float32(name in ("weight", "gamma"))
        return jnp.asarray(values, dtype)

    return jax.tree_util.tree_map_with_path(draw, checkpoint.abstract_params(part, cfg))


def sprites(blocks: int) -> Model:
    """The shipped weights; four prompts of the sprites world, far apart in the list of all."""
    folder = hub.find("sprites")
    config = checkpoint.load_config(folder)
    combinations = all_combinations()
    texts = [canonical(combinations[i * len(combinations) // 4 + 7]) for i in range(4)]
    tokens = PromptTokenizer.from_folder(folder, config.transformer.text_length)(texts)
    graph = structure(lambda: TextEncoder(config.text_encoder, rngs=nnx.Rngs(0)))
    encoder = nnx.merge(graph, checkpoint.load(folder, "text_encoder", np.float32))
    embeds = np.asarray(encoder(jnp.asarray(tokens.ids), jnp.asarray(tokens.mask)))[:, None]
    config = dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, rope="absolute"))
    return Model(
        config,
        blocks,
        lambda part, dtype: jax.tree.map(jnp.asarray, checkpoint.load(folder, part, np.dtype(dtype))),
        embeds,
    )


MICRO = TransformerConfig(dim=128, ffn_dim=320, num_layers=6, num_heads=2, text_dim=48, text_length=16)
MODELS: dict[str, Callable[[bool, tuple[int, int]], Model]] = {
    "micro": lambda smoke, pixels: random_model(MICRO, VAEConfig(base_width=8), (32, 32), 8 if smoke else 320, 4),
    "sprites": lambda smoke, pixels: sprites(8 if smoke else 320),
    "t2v_1_3b": lambda smoke, pixels: (
        random_model(dataclasses.replace(MICRO, num_layers=9), VAEConfig(base_width=8), pixels, 4, 2)
        if smoke
        else random_model(TransformerConfig.t2v_1_3b(), VAEConfig.wan(), pixels, 12, 2)
    ),
}
"""Makes each model, the full size for frames of some height and width; a smoke test wants a short and small one."""


# MARK: one part: a model in a precision


def block_outputs(net: WanTransformer, x, timesteps, text, given=None):
    """Tokens before and after every block, `[layer, B, T, n, D]` each, frames attending all others.

    Args:
      net: the network.
      x: noisy latents, in the dtype of the activations.
      timesteps: one a frame.
      text: prompt embeddings.
      given: what each block gets, `[layer, ...]`; None for what the one before it made.
    """
    rows, columns = x.shape[2] // net.cfg.patch[1], x.shape[3] // net.cfg.patch[2]
    turn = rope.rotation(jnp.arange(x.shape[1]), rows, columns, net.cfg.head_dim, net.cfg.rope_theta)

    def attend(q, k, v):
        shape, (q, k) = q.shape, (rope.rotate(a, turn) for a in (q, k))
        q, k, v = (rearrange(a, "b t n h d -> b (t n) h d") for a in (q, k, v))
        return attention(q, k, v).reshape(shape), None

    def layer(block, tokens, xs):
        kv, own = xs
        tokens = tokens if own is None else own.astype(tokens.dtype)
        after = block(tokens, e6, kv, attend)[0]
        return after, (tokens, after)

    tokens, _, e6 = net._embed(x, timesteps)
    return run_layers(net.blocks, layer, tokens, (net.text_kv(text), given))[1]


def by_layer(model: Model, params: checkpoint.Params, precision: Precision, given=None) -> dict[str, np.ndarray]:
    """`before` and `through`: tokens before and after each block. With `given`, `alone`: after each on that input."""
    sampler, dtype = model.config.sampler, precision.activations
    graph = precision.transformer(model.config.transformer)
    frames, cells = sampler.window, (sampler.height // 8, sampler.width // 8, model.config.transformer.in_channels)
    x = np.random.default_rng(SEED + 1).standard_normal((1, frames, *cells), np.float32)
    timesteps = jnp.full((1, frames), float(few_step_list(sampler)[1]))
    call = jax.jit(lambda params, *args: block_outputs(nnx.merge(graph, params), *args))
    args = jnp.asarray(x, dtype), timesteps, jnp.asarray(model.prompt_embeds[0], dtype)
    before, through = call(params, *args)
    results = {"before": before, "through": through}
    if given is not None:
        results["alone"] = call(params, *args, jnp.asarray(given))[1]
    return {name: np.asarray(a, np.float32) for name, a in results.items()}


def rollout(model: Model, params: dict[str, checkpoint.Params], precision: Precision) -> dict[str, np.ndarray]:
    """`latents` [F, h, w, C] and `frames` uint8 [T, H, W, 3] of the scanned decoder."""
    sampler, cfg, parts = model.config.sampler, model.config, len(model.prompt_embeds)
    window = Window.of(sampler, model.blocks * sampler.block_frames)
    graphs = precision.transformer(cfg.transformer), structure(lambda: VAE(cfg.vae, rngs=nnx.Rngs(0)))
    decoder = Decoder(*graphs, sampler, window, dtype=precision.activations)
    inputs = BlockInputs.plan(model.blocks, [i * model.blocks // parts for i in range(1, parts)])
    prompts = jnp.asarray(model.prompt_embeds)
    state = jax.jit(Decoder.init, static_argnums=0)(decoder, params, prompts[0], jax.random.key(SEED)[None])
    _, out = jax.jit(Decoder.scan, static_argnums=0)(decoder, params, state, inputs, prompts)
    frames = rearrange(np.asarray(out.frames), "n 1 t h w c -> (n t) h w c")[FILLER:]
    return {"latents": rearrange(np.asarray(out.latents), "n 1 f h w c -> (n f) h w c"), "frames": frames}


def run_part(name: str, precision: str, smoke: bool, pixels: tuple[int, int], folder: Path) -> dict[str, np.ndarray]:
    """The results of one model in one precision: read if they are there, else computed and kept."""
    path = folder / f"{name}-{precision.replace(' ', '-')}.npz"
    model = MODELS[name](smoke, pixels)
    how = PRECISIONS[precision]
    kept = {"config": to_dict(model.config), "blocks": model.blocks, "precision": (how.weights, how.activations)}
    settings = json.dumps(kept)
    if path.exists():
        with np.load(path) as file:
            found = {key: file[key] for key in file.files}
        if str(found.pop("settings")) != settings:
            raise UserError(f"{path} was made with other settings; choose another --output or remove it")
        return found
    given = run_part(name, REFERENCE, smoke, pixels, folder)["before"] if precision != REFERENCE else None
    print(f"{name} in {precision} ...", flush=True)
    started = time.monotonic()
    params = {part: model.params(part, how.weights) for part in ("transformer", "vae")}
    params["transformer"] = how.convert(params["transformer"])
    with jax.default_matmul_precision("highest"):  # on a GPU, float32 would else be TF32
        results = by_layer(model, params["transformer"], how, given)
        results |= rollout(model, params, how)
    results["seconds"] = np.asarray(time.monotonic() - started)
    with whole_file(path) as partial:
        np.savez(partial, settings=settings, **results)
    return results


# MARK: the figures


def relative(got: np.ndarray, expected: np.ndarray) -> list[float]:
    """Root mean square of the difference over that of what is expected, an entry a row of the first axis."""
    over = tuple(range(1, expected.ndim))
    square = lambda a: np.mean(np.square(a.astype(np.float64)), axis=over)
    return np.sqrt(square(got.astype(np.float64) - expected) / square(expected)).tolist()


def psnr(got: np.ndarray, expected: np.ndarray) -> list[float]:
    """In decibel, a frame each, peak 255."""
    square = np.mean(np.square(got.astype(np.float64) - expected), axis=(1, 2, 3))
    return np.minimum(LARGEST_PSNR, 10 * np.log10(255**2 / np.maximum(square, 1e-12))).tolist()


def figures(got: dict[str, np.ndarray], reference: dict[str, np.ndarray]) -> dict[str, Any]:
    """Everything about one model in one precision; `early` and `late` are the first and the last quarter."""
    latents = relative(got["latents"], reference["latents"])
    decibel = psnr(got["frames"], reference["frames"])
    quarter = lambda values: (
        float(np.mean(values[: len(values) // 4])),
        float(np.mean(values[-(len(values) // 4) :])),
    )
    return {
        "layers_alone": relative(got["alone"], reference["through"]),
        "layers_through": relative(got["through"], reference["through"]),
        "latents": latents,
        "psnr": decibel,
        "latents_early_late": quarter(latents),
        "latents_worst": max(latents),
        "psnr_early_late": quarter(decibel),
        "psnr_worst": min(decibel),
        "seconds": float(got["seconds"]),
    }


def table(report: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The summary as markdown."""
    percent = lambda value: f"{100 * value:.2f} %"
    lines = [
        "| model | precision | a block alone, worst | through all blocks | latents, first quarter | last quarter "
        "| worst frame | PSNR, first quarter | last quarter | worst frame |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model, precisions in report.items():
        for precision, f in precisions.items():
            cells = [percent(max(f["layers_alone"])), percent(f["layers_through"][-1])]
            cells += [*map(percent, f["latents_early_late"]), percent(f["latents_worst"])]
            cells += [f"{value:.1f} dB" for value in (*f["psnr_early_late"], f["psnr_worst"])]
            lines.append(f"| {' | '.join([model, precision, *cells])} |")
    return "\n".join(lines) + "\n"


def plot(report: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    """A column a model; rows by layer, by time of the latents, by time of the pixels."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, len(report), figsize=(4.6 * len(report), 9), squeeze=False, layout="constrained")
    for column, (model, precisions) in zip(axes.T, report.items()):
        for precision, f in precisions.items():
            colour = f"C{list(PRECISIONS).index(precision) - 1}"
            layers = np.arange(1, len(f["layers_alone"]) + 1)
            column[0].semilogy(layers, f["layers_alone"], "o:", ms=3, color=colour, label=f"{precision}, block alone")
            column[0].semilogy(layers, f["layers_through"], "-", color=colour, label=f"{precision}, through")
            seconds = np.arange(len(f["latents"])) / LATENTS_PER_SECOND
            column[1].semilogy(seconds, f["latents"], lw=0.8, color=colour, label=precision)
            seconds = np.arange(len(f["psnr"])) / (4 * LATENTS_PER_SECOND)
            column[2].plot(seconds, f["psnr"], lw=0.8, color=colour, label=precision)
        for axis, label, title in (
            (column[0], "transformer block", f"{model}: error by layer"),
            (column[1], "seconds of video", "error of the latents by frame"),
            (column[2], "seconds of video", "PSNR of the frames [dB]"),
        ):
            axis.set(xlabel=label, title=title)
            axis.grid(alpha=0.3, which="both" if axis is not column[2] else "major")
            axis.legend(fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.21))
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--precisions", nargs="+", choices=list(PRECISIONS), default=list(PRECISIONS))
    parser.add_argument("--pixels", nargs=2, type=int, default=(32, 32), help="height and width of the full size")
    parser.add_argument("--smoke", action="store_true", help="a few blocks and no full size: a minute or two")
    args = parser.parse_args()
    report: dict[str, dict[str, dict[str, Any]]] = {}
    for name in args.models:
        run = functools.partial(
            run_part, name, smoke=args.smoke, pixels=tuple(args.pixels), folder=args.output / "parts"
        )
        reference = run(precision=REFERENCE)
        report[name] = {}
        for precision in args.precisions:
            if precision == REFERENCE:
                continue
            results = run(precision=precision)
            if np.array_equal(results["latents"], reference["latents"]):
                print(f"{name} in {precision} is {REFERENCE} bit for bit, as its weights are stored so: left out")
                continue
            report[name][precision] = figures(results, reference)
        # After each model, so that a later one that fails takes nothing with it.
        whole = {"models": report, "versions": versions(), "backend": jax.default_backend(), "smoke": args.smoke}
        (args.output / "precision.json").write_text(json.dumps(whole, indent=1) + "\n")
        (args.output / "precision.md").write_text(table(report))
        plot(report, args.output / "precision.png")
    print(table(report))


if __name__ == "__main__":
    main()
