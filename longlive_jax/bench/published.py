"""The same work in diffusers: Wan's transformer with cached keys and values, and Wan's VAE decoding a block.

diffusers has no causal rollout. Its transformer runs here over the tokens of one block, and its attention, by a
processor of our own, attends the block's keys written behind those of the frames before, and the kept keys of the
prompt: the shapes of our pass. One timestep serves all frames, which is less work than ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from longlive_jax.bench.machine import cores
from longlive_jax.config import SPATIAL_FACTOR, SamplerConfig, TransformerConfig, VAEConfig

Call = Callable[[], torch.Tensor]


def set_up() -> torch.device:
    """The device to run on; as many threads as this process has processors, as JAX takes."""
    torch.set_num_threads(cores())
    torch.set_grad_enabled(False)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait(_: Any) -> None:
    """Until all that was started is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def set_layout(network: torch.nn.Module, channels_last: bool) -> None:
    """Lays the weights of all convolutions out with the channels last, or first."""
    last = {torch.nn.Conv2d: torch.channels_last, torch.nn.Conv3d: torch.channels_last_3d}
    for layer in network.modules():
        for kind, form in last.items():
            if isinstance(layer, kind):
                form = form if channels_last else torch.contiguous_format
                layer.weight.data = layer.weight.data.contiguous(memory_format=form)


class CachedKeys:
    """An attention processor for diffusers' `WanAttention`: keys and values of what came before are there already.

    Args:
      attn: the attention it is for.
      past: keys that are there.
      own: tokens of a call, whose keys and values are computed and put behind those; 0 for attention to the prompt.
      like: of the device and dtype.
    """

    def __init__(self, attn: torch.nn.Module, past: int, own: int, like: torch.Tensor):
        shape = (1, attn.heads, past + own, attn.inner_dim // attn.heads)
        self.own = own
        self.k, self.v = (torch.randn(shape).to(like) for _ in range(2))

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        heads = lambda x: x.unflatten(2, (attn.heads, -1))
        q = heads(attn.norm_q(attn.to_q(hidden_states)))
        if self.own:
            k = heads(attn.norm_k(attn.to_k(hidden_states)))
            q, k = _rotated(q, *rotary_emb), _rotated(k, *rotary_emb)
            self.k[:, :, -self.own :] = k.transpose(1, 2)
            self.v[:, :, -self.own :] = heads(attn.to_v(hidden_states)).transpose(1, 2)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), self.k, self.v)
        return attn.to_out[0](y.transpose(1, 2).flatten(2))


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)


def transformer_pass(cfg: TransformerConfig, sampler: SamplerConfig, dtype: str, *, compiled: bool = False) -> Call:
    """A forward pass of a block with the window full, random weights; `compiled` by `torch.compile`."""
    from diffusers import WanTransformer3DModel

    device, kind = set_up(), getattr(torch, dtype)
    with device:
        model = WanTransformer3DModel(
            patch_size=cfg.patch, num_attention_heads=cfg.num_heads, attention_head_dim=cfg.head_dim,
            in_channels=cfg.in_channels, out_channels=cfg.out_channels, text_dim=cfg.text_dim, freq_dim=cfg.time_dim,
            ffn_dim=cfg.ffn_dim, num_layers=cfg.num_layers, eps=cfg.eps,
        )  # fmt: skip
        model = model if kind == torch.float32 else model.to(kind)  # diffusers warns of every cast
        size = sampler.height // SPATIAL_FACTOR, sampler.width // SPATIAL_FACTOR
        latents = torch.randn(1, cfg.in_channels, sampler.block_frames, *size, dtype=kind)
        text = torch.randn(1, cfg.text_length, cfg.text_dim, dtype=kind)
        timestep = torch.full((1,), 500.0)
    frame = size[0] // cfg.patch[1] * (size[1] // cfg.patch[2])
    own, past = sampler.block_frames * frame, (sampler.window - sampler.block_frames) * frame
    for block in model.blocks:
        block.attn1.processor = CachedKeys(block.attn1, past, own, latents)
        block.attn2.processor = CachedKeys(block.attn2, cfg.text_length, 0, latents)
        if compiled:
            block.compile()
    return lambda: model(latents, timestep, text, return_dict=False)[0]


def vae_decodes(cfg: VAEConfig, sampler: SamplerConfig, dtype: str) -> dict[str, Callable[[], Call]]:
    """What makes a call that decodes a block in the middle of a video, by variant; random weights.

    "published" decodes a latent frame a call, as diffusers does; "block" gives all of a block to one call of the
    decoder, which its caches allow after the first frames.
    """
    from diffusers import AutoencoderKLWan

    device, kind = set_up(), getattr(torch, dtype)

    def prepare(channels_last: bool, whole: bool, compiled: bool = False) -> Call:
        with device:
            vae = AutoencoderKLWan(
                base_dim=cfg.base_width, z_dim=cfg.z_channels, dim_mult=list(cfg.multipliers),
                num_res_blocks=cfg.res_blocks, temperal_downsample=list(cfg.temporal),
            )  # fmt: skip
            vae = vae if kind == torch.float32 else vae.to(kind)
            size = sampler.height // SPATIAL_FACTOR, sampler.width // SPATIAL_FACTOR
            latents = torch.randn(1, cfg.z_channels, sampler.block_frames, *size, dtype=kind)
        set_layout(vae, channels_last)
        if channels_last:
            latents = latents.to(memory_format=torch.channels_last_3d)
        frames = latents.shape[2]

        def decode(x: torch.Tensor, **first: bool) -> torch.Tensor:
            vae._conv_idx = [0]
            return vae.decoder(x, feat_cache=vae._feat_map, feat_idx=vae._conv_idx, **first)

        def call(chunk: int = frames if whole else 1) -> torch.Tensor:
            x = vae.post_quant_conv(latents)
            pixels = [decode(x[:, :, i : i + chunk]) for i in range(0, frames, chunk)]
            return torch.clamp(torch.cat(pixels, 2), -1, 1)

        if compiled:
            vae.decoder.compile()
        vae.clear_cache()
        x = vae.post_quant_conv(latents[:, :, :1])
        decode(x, first_chunk=True)
        call(1)
        return call

    variants = {
        "published": lambda: prepare(False, False),
        "channels-last": lambda: prepare(True, False),
        "block": lambda: prepare(False, True),
        "block, channels-last": lambda: prepare(True, True),
    }
    if device.type == "cuda":  # on a CPU it compiles for longer than anybody waits
        variants["block, channels-last, compiled"] = lambda: prepare(True, True, True)
    return variants
