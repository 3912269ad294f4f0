"""The official pipelines on weights of any size.

The official code is written for the 1.3B model at 480 x 832 on a GPU: 30 blocks of 12 heads of 128, 1560 tokens a
frame, 512 tokens of text, `wan_models/` in the working directory. `build` puts the sizes that the weights have in their
place, by arguments where there are any, else on the objects once they are made.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch

from longlive_jax.config import SPATIAL_FACTOR, SamplerConfig, TransformerConfig
from longlive_jax.conversion.convert import Source
from longlive_jax.conversion.official_capture import VAE, Clock, Text
from longlive_jax.conversion.readers import choose, load_pickle
from longlive_jax.errors import UserError

WAN_FOLDER = "wan_models/Wan2.1-T2V-1.3B"
"""Where the official code looks for Wan's files, whatever their size."""


class Settings(dict):
    """A dict whose keys are attributes too, which is all that the pipelines ask of their configuration."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def official_settings(sampler: SamplerConfig) -> Settings:
    """The settings of a rollout as in the official YAML files."""
    model = Settings(local_attn_size=sampler.window, sink_size=sampler.sink_frames, timestep_shift=sampler.shift)
    if sampler.rope == "relative":
        model["use_infinite_attention"] = True
    return Settings(
        model_kwargs=model,
        num_frame_per_block=sampler.block_frames,
        denoising_step_list=[int(step) for step in sampler.steps],
        warp_denoising_step=sampler.warp,
        context_noise=sampler.context_noise,
        global_sink=sampler.sink == "keep",
    )


@dataclasses.dataclass
class Parts:
    """What a pipeline is built of, beside its settings.

    Attributes:
      folder: Wan's.
      source: its weights, opened, and their sizes.
      lora: of the generator: a file, and peft's alpha.
      embeds: of the prompts, which are called "0", "1", ... then; None for the official text encoder.
      decode: whether latents are decoded.
      device, dtype: of weights and activations.
      clock: times the parts.
      capture: whether embeddings and pixels are kept on the host; not where the whole is timed.
    """

    folder: Path
    source: Source
    lora: tuple[Path, float | None] | None
    embeds: torch.Tensor | None
    decode: bool
    device: torch.device
    dtype: torch.dtype
    clock: Clock
    capture: bool = True


def build(code: types.SimpleNamespace, parts: Parts, sampler: SamplerConfig, frames: int, interactive: bool):
    """An official pipeline on these weights; its `text_encoder` and `vae` are `Text` and `VAE`.

    Args:
      code: of `official_repo.opened`.
      parts, sampler: what to build.
      frames: latent frames of the video.
      interactive: whether prompts will be switched.
    """
    cfg, wrapper = parts.source.configs["transformer"], code.wan_wrapper
    reader = parts.source.readers["transformer"]
    weights = {name: _tensor(reader.read(name)) for name in reader.shapes}

    def from_pretrained(cls, path, **options):
        with torch.device(parts.device):
            return network(cls, cfg, weights, **({"local_attn_size": -1, "sink_size": 0} | options))

    for name in ("CausalWanModel", "CausalWanModelInfinity"):
        getattr(wrapper, name).from_pretrained = classmethod(from_pretrained)
    wrapper._video_vae = partial(wrapper._video_vae, dim=parts.source.configs["vae"].base_width)
    base = code.InteractiveCausalInferencePipeline if interactive else code.CausalInferencePipeline
    with in_wan_models(parts.folder):
        encode = _given(parts.embeds) if parts.embeds is not None else _text_encoder(code, parts)
        vae = code.WanVAEWrapper() if parts.decode else None
        pipeline = fitted(base, cfg, parts.clock)(
            official_settings(sampler),
            parts.device,
            text_encoder=Text(encode, parts.clock, parts.capture),
            vae=VAE(vae, parts.clock, parts.capture),
        )
    if parts.lora:
        pipeline.generator.model = _with_lora(pipeline.generator.model, *parts.lora)
    pipeline.to(device=parts.device, dtype=parts.dtype)
    tokens = (sampler.height // SPATIAL_FACTOR // cfg.patch[1]) * (sampler.width // SPATIAL_FACTOR // cfg.patch[2])
    pipeline.num_transformer_blocks = cfg.num_layers
    pipeline.frame_seq_length = tokens
    pipeline.generator.seq_len = max(pipeline.generator.seq_len, frames * tokens)
    parts.clock.watch_blocks(pipeline.generator, passes=len(sampler.steps) + 1)
    return pipeline


def network(cls: type, cfg: TransformerConfig, weights: dict[str, torch.Tensor], **options: Any) -> torch.nn.Module:
    """An official transformer of these sizes and weights."""
    model = cls(
        model_type="t2v", patch_size=cfg.patch, text_len=cfg.text_length, in_dim=cfg.in_channels, dim=cfg.dim,
        ffn_dim=cfg.ffn_dim, freq_dim=cfg.time_dim, text_dim=cfg.text_dim, out_dim=cfg.out_channels,
        num_heads=cfg.num_heads, num_layers=cfg.num_layers, eps=cfg.eps, **options,
    )  # fmt: skip
    model.load_state_dict(weights)
    return model


def _tensor(array: np.ndarray) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:  # a type that numpy and torch do not share: the bits go over as integers
        return torch.from_numpy(np.array(array.view(np.int16))).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))


@contextlib.contextmanager
def in_wan_models(folder: Path) -> Iterator[None]:
    """A working directory in which the official code finds `folder` where it looks for Wan's files."""
    folder = folder.resolve()
    with tempfile.TemporaryDirectory() as place:
        link = Path(place) / WAN_FOLDER
        link.parent.mkdir()
        link.symlink_to(folder, target_is_directory=True)
        with contextlib.chdir(place):
            yield


def _given(embeds: torch.Tensor) -> Callable[..., dict[str, torch.Tensor]]:
    return lambda text_prompts: {"prompt_embeds": embeds[int(text_prompts[0])]}


def _text_encoder(code: types.SimpleNamespace, parts: Parts) -> torch.nn.Module:
    """The official text encoder and tokeniser at the size of the weights."""
    cfg = parts.source.configs["text_encoder"]
    code.wan_wrapper.umt5_xxl = partial(
        code.wan_wrapper.umt5_xxl, vocab_size=cfg.vocab_size, dim=cfg.dim, dim_attn=cfg.attention_dim,
        dim_ffn=cfg.ffn_dim, num_heads=cfg.num_heads, encoder_layers=cfg.num_layers, num_buckets=cfg.num_buckets,
    )  # fmt: skip
    code.WanTextEncoder.device = property(lambda encoder: parts.device)
    encoder = code.WanTextEncoder()
    encoder.tokenizer.seq_len = parts.source.configs["transformer"].text_length
    return encoder


def _with_lora(model: torch.nn.Module, path: Path, alpha: float | None) -> torch.nn.Module:
    """The model with a LoRA laid over the linear layers that the file names, by peft as officially, not merged."""
    try:
        import peft
    except ModuleNotFoundError as error:
        raise UserError("the official code lays a LoRA over the model by peft: pip install peft") from error
    _, state = choose(load_pickle(path), None, ("generator_lora",), str(path))
    down = {name: tensor for name, tensor in state.items() if name.endswith(".lora_A.weight")}
    if not down:
        raise UserError(f"{path} has no lora_A tensors; give LongLive's lora.pt")
    rank = next(iter(down.values())).shape[0]
    layers = [name.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for name in down]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=layers))
    peft.set_peft_model_state_dict(wrapped, state)
    return wrapped


def fitted(base: type, cfg: TransformerConfig, clock: Clock) -> type:
    """A pipeline class whose caches have the model's sizes, and whose recache is timed."""

    def resize(cache: list[dict[str, Any]], length: int | None = None) -> None:
        for entry in cache:
            for name in ("k", "v"):
                batch, slots = entry[name].shape[:2]
                entry[name] = entry[name].new_zeros(batch, length or slots, cfg.num_heads, cfg.head_dim)

    class Fitted(base):
        def _initialize_kv_cache(self, *args, **kwargs):
            super()._initialize_kv_cache(*args, **kwargs)
            resize(self.kv_cache1)

        def _initialize_crossattn_cache(self, *args, **kwargs):
            super()._initialize_crossattn_cache(*args, **kwargs)
            resize(self.crossattn_cache, cfg.text_length)

        def _recache_after_switch(self, *args, **kwargs):
            with clock.span("recache_ms"):
                return super()._recache_after_switch(*args, **kwargs)

    return Fitted
