"""What a recording is made of: the settings of the official run (`Run`), its inputs, and random weights to run on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from longlive_jax.config import SPATIAL_FACTOR, SamplerConfig, TransformerConfig, VAEConfig, official_changes, replace
from longlive_jax.errors import UserError, collect, raise_all
from longlive_jax.prompts import plan_switches

PRESETS = {
    "sprites": (TransformerConfig.sprites, VAEConfig.sprites),
    "t2v_1_3b": (TransformerConfig.t2v_1_3b, VAEConfig.wan),
    "t2v_14b": (TransformerConfig.t2v_14b, VAEConfig.wan),
}
"""Sizes for random weights."""


@dataclasses.dataclass(kw_only=True)
class Run:
    """What the official code runs on.

    Attributes:
      wan: folder of Wan's original files (config.json, DiT, VAE; text encoder and tokeniser for prompts as text).
      generator: LongLive's or Self-Forcing's .pt whose DiT replaces Wan's.
      generator_key: which entry of that file: generator, generator_ema or model; the first present by default.
      lora: LongLive's LoRA, laid over the generator by peft.
      lora_alpha: alpha of the LoRA; its rank by default.
      random_weights: random weights of the sizes of --preset in place of files.
      preset: sizes for --random-weights.
      write_weights: keep the random weights in this folder, in Wan's files, as longlive convert --wan reads them.
      prompts: one, or the prompts switched between.
      random_embeds: random embeddings in place of prompts, one more than there are switches.
      switch_frames: latent frames of the switches, one fewer than prompts.
      inputs: take noise, embeddings, switches and settings from this recorded case, and compare the latents with its.
      frames: length in latent frames.
      batch: videos at once.
      seed: of noise, random embeddings and random weights.
      height, width: in pixels.
      window: latent frames attended, the sink among them; -1 for all.
      sink_frames: latent frames of the sink.
      block_frames: latent frames a block.
      steps: the few-step list.
      shift: timestep shift.
      sink: whether a recache leaves the sink alone or makes a new one.
      rope: positions by frame, or within the window (the official use_infinite_attention).
      decode: whether pixels are decoded and recorded too.
      attention: sdpa is PyTorch's own; flash is the installed flash-attention, as the official code finds it.
      warmup: runs before the one that is timed.
      device: cuda where there is one, else cpu.
      dtype: bfloat16 on cuda, else float32.
    """

    wan: Path | None = None
    generator: Path | None = None
    generator_key: str | None = None
    lora: Path | None = None
    lora_alpha: float | None = None
    random_weights: bool = False
    preset: Literal["sprites", "t2v_1_3b", "t2v_14b"] = "t2v_1_3b"
    write_weights: Path | None = None
    prompts: tuple[str, ...] = ()
    random_embeds: bool = False
    switch_frames: tuple[int, ...] = ()
    inputs: Path | None = None
    frames: int = 21
    batch: int = 1
    seed: int = 0
    height: int = 480
    width: int = 832
    window: int = 12
    sink_frames: int = 3
    block_frames: int = 3
    steps: tuple[int, ...] = (1000, 750, 500, 250)
    shift: float = 5.0
    sink: Literal["keep", "refresh"] = "keep"
    rope: Literal["absolute", "relative"] = "absolute"
    decode: bool = True
    attention: Literal["sdpa", "flash"] = "sdpa"
    warmup: int = 0
    device: str | None = None
    dtype: Literal["float32", "bfloat16"] | None = None

    def check(self) -> None:
        """Raises UserError with all that can be told without a file."""
        faults = []
        if (self.wan is None) == (not self.random_weights):
            faults.append("give either --wan FOLDER or --random-weights")
        if self.random_weights and (self.generator or self.lora):
            faults.append("--generator and --lora are files of their own sizes; leave them out with --random-weights")
        if self.write_weights is not None and not self.random_weights:
            faults.append("--write-weights keeps random weights; give --random-weights")
        if self.write_weights is not None and self.write_weights.exists():
            faults.append(f"{self.write_weights} exists; name a folder to make")
        if bool(self.prompts) + self.random_embeds + (self.inputs is not None) != 1:
            faults.append("give one of --prompts, --random-embeds and --inputs")
        if self.prompts and len(self.prompts) != len(self.switch_frames) + 1:
            faults.append(f"{len(self.prompts)} prompts need {len(self.prompts) - 1} --switch-frames")
        for name, least in (("frames", 1), ("batch", 1), ("seed", 0), ("warmup", 0)):
            if getattr(self, name) < least:
                faults.append(f"--{name} is {getattr(self, name)}; at least {least} is needed")
        if self.rope == "relative" and self.batch > 1:
            faults.append("relative positions work for a batch of 1 in the official code; leave out --batch")
        with collect(faults):
            self.sampler()
            plan_switches(self.switch_frames, self.frames, self.block_frames)
        raise_all(faults)

    def sampler(self) -> SamplerConfig:
        """The settings of the rollout, checked."""
        names = ("height", "width", "window", "sink_frames", "block_frames", "steps", "shift", "sink", "rope")
        return replace(SamplerConfig(), **{name: getattr(self, name) for name in names})

    def arguments(self) -> list[str]:
        """The command line that gives this; defaults are left out."""
        words = []
        for field in dataclasses.fields(self):
            value, flag = getattr(self, field.name), field.name.replace("_", "-")
            if value == field.default:
                continue
            if isinstance(value, bool):
                words += [f"--{flag}" if value else f"--no-{flag}"]
            else:
                words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else (value,))]
        return words


@dataclasses.dataclass
class Inputs:
    """What goes into a rollout; float32, channels first.

    Attributes:
      sampler: settings.
      noise: [B, F, C, h, w].
      renoise: [blocks, steps - 1, B, f, C, h, w].
      switch_frames: as asked for.
      embeds: [prompts, B, L, width], or None where prompts will be encoded.
      latents: what came out when they were recorded before, if they were.
    """

    sampler: SamplerConfig
    noise: np.ndarray
    renoise: np.ndarray
    switch_frames: list[int]
    embeds: np.ndarray | None = None
    latents: np.ndarray | None = None

    @classmethod
    def draw(cls, run: Run, cfg: TransformerConfig) -> Inputs:
        """From the run's seed. A random embedding ends in a row of zeros more each prompt, as padding does."""
        sampler = run.sampler()
        sampler.check_size(cfg.patch)
        rng = np.random.default_rng(run.seed)
        blocks, drawn = run.frames // run.block_frames, len(sampler.steps) - 1
        latent = (cfg.in_channels, sampler.height // SPATIAL_FACTOR, sampler.width // SPATIAL_FACTOR)
        draw = lambda *shape: rng.standard_normal(shape, np.float32)
        noise, renoise = draw(run.batch, run.frames, *latent), draw(blocks, drawn, run.batch, run.block_frames, *latent)
        embeds = None
        if run.random_embeds:
            embeds = draw(len(run.switch_frames) + 1, run.batch, cfg.text_length, cfg.text_dim)
            for i, prompt in enumerate(embeds):
                prompt[:, -(i + 1) :] = 0
        return cls(sampler, noise, renoise, list(run.switch_frames), embeds)

    @classmethod
    def read(cls, path: Path) -> Inputs:
        """Those of a recorded case."""
        from longlive_jax.conversion.parity import read_case

        case = read_case(path)
        if case.kind != "rollout":
            raise UserError(f"{path} is a {case.kind} case; the pipelines run rollouts")
        noise = case.get("noise", "b f c h w")
        rows, columns = noise.shape[3:]
        changes = official_changes(case.meta) | {"rope": case.meta.get("rope", "absolute")}
        size = {"height": rows * SPATIAL_FACTOR, "width": columns * SPATIAL_FACTOR}
        return cls(
            replace(SamplerConfig(), **changes, **size),
            noise,
            case.get("renoise", "n s b f c h w"),
            [int(frame) for frame in case.get("switch_frames", "p")],
            case.get("prompt_embeds", "p b l e"),
            case.get("latents", "b f c h w"),
        )


def write_random_wan(
    folder: Path, sizes: str | tuple[TransformerConfig, VAEConfig], seed: int, dtype: str = "float32"
) -> None:
    """Random weights in the files of a Wan folder, without text encoder: what `longlive convert --wan` reads.

    Args:
      folder: is made.
      sizes: a name in `PRESETS`, or the sizes themselves.
      seed: of the weights.
      dtype: "float32" or "bfloat16".
    """
    import torch
    from safetensors.torch import save_file

    from longlive_jax.conversion.convert import DIT_NAME, VAE_NAMES

    cfg, vae = (make() for make in PRESETS[sizes]) if isinstance(sizes, str) else sizes
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True)
    settings = {"model_type": "t2v", "num_heads": cfg.num_heads, "text_len": cfg.text_length, "eps": cfg.eps}
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(random_weights("transformer", cfg, generator, dtype), folder / DIT_NAME)
    torch.save(random_weights("vae", vae, generator, dtype), folder / VAE_NAMES[0])


def random_weights(part: str, cfg: Any, generator: Any, dtype: str = "float32") -> dict[str, Any]:
    """Random torch tensors under the original names of a part, from a torch generator.

    Of a size that keeps activations near 1, and no tensor all zeros or ones.
    """
    import torch

    from longlive_jax.checkpoint import tensor_shapes
    from longlive_jax.conversion import tables

    def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        values = torch.randn(shape, generator=generator)
        if name.endswith(("bias", "modulation")):
            values *= 0.1
        elif name.endswith("gamma") or len(shape) == 1:
            values = 1 + 0.1 * values
        else:
            values /= float(np.prod(shape[1:])) ** 0.5
        return values.to(getattr(torch, dtype))

    shapes = tables.WAN[part](cfg).torch_shapes(tensor_shapes(part, cfg))
    return {name: draw(name, shape) for name, shape in shapes.items()}
