"""The causal video VAE of Wan 2.1: encoder and decoder, whole clip or chunk by chunk with explicit feature caches.

Everything is `[batch, time, height, width, channels]`. Each causal convolution needs the last two frames of its own
input; a call takes them in as a cache and hands the new ones back, so a video of any length is coded in constant
memory. A call without a cache starts a video. Reference section 7.

The first frame of a video is special: it stands for itself, every later latent frame for four pixel frames. It passes
the changes of frame rate unchanged and, on the way up, does not enter the history of their convolution.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Num

from longlive_jax.config import VAEConfig
from longlive_jax.models.attention import attention
from longlive_jax.models.layers import Linear

Cache = Any
"""A pytree of `[B, history, h, w, C]` arrays, mirroring the modules; None at the start of a video."""


class CausalConv(nnx.Module):
    """A 3-D convolution that sees no frame of the future; `kernel` is [time, height, width, in, out].

    `impl` "2d" computes it as a sum of 2-D convolutions, one a step in time: 3 to 5 times faster on a CPU than XLA's
    3-D convolution. "3d" is one such convolution, which a GPU is faster with (`ProgramConfig.vae_conv`).
    """

    def __init__(self, in_features: int, out_features: int, kernel: tuple[int, int, int], *, impl: str, rngs):
        init = nnx.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
        self.kernel = nnx.Param(init(rngs.params(), (*kernel, in_features, out_features), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(out_features))
        self.impl = impl

    def __call__(self, x: Num[Array, "b t h w i"], cache: Cache = None) -> tuple[Num[Array, "b t h w o"], Cache]:
        history = self.kernel.shape[0] - 1
        if cache is None and self.impl == "2d":
            return self._start(x), _pad_front(x, history)[:, x.shape[1] :]
        if cache is None:
            cache = jnp.zeros((x.shape[0], history, *x.shape[2:]), x.dtype)
        x = jnp.concatenate([cache.astype(x.dtype), x], axis=1)
        return self.valid(x), x[:, x.shape[1] - history :]

    def _start(self, x: Num[Array, "b t h w i"]) -> Num[Array, "b t h w o"]:
        """The start of a video, without convolving the zeros before it: a still image costs a third."""
        kernel, frames = self.kernel.astype(x.dtype), x.shape[1]
        lags = range(min(kernel.shape[0], frames))
        taps = [_pad_front(conv2d(x[:, : frames - lag], kernel[kernel.shape[0] - 1 - lag]), lag) for lag in lags]
        return sum(taps) + self.bias.astype(x.dtype)

    def valid(self, x: Num[Array, "b t h w i"], stride: int = 1) -> Num[Array, "b s h w o"]:
        """Convolves in time without padding (every `stride` frames), in space with zero padding."""
        kernel, bias = self.kernel.astype(x.dtype), self.bias.astype(x.dtype)
        steps = kernel.shape[0]
        frames = (x.shape[1] - steps) // stride + 1
        if self.impl == "3d":
            space = [(k // 2, k // 2) for k in kernel.shape[1:3]]
            y = jax.lax.conv_general_dilated(
                x, kernel, (stride, 1, 1), [(0, 0), *space], dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
            )
            return y + bias
        taps = [x[:, k : k + stride * (frames - 1) + 1 : stride] for k in range(steps)]
        return sum(conv2d(tap, kernel[k]) for k, tap in enumerate(taps)) + bias


def _pad_front(x: Num[Array, "b t h w c"], frames: int) -> Num[Array, "b s h w c"]:
    return jnp.pad(x, [(0, 0), (frames, 0), (0, 0), (0, 0), (0, 0)]) if frames else x


class Conv2d(nnx.Module):
    """A 2-D convolution of every frame; `kernel` is [height, width, in, out]."""

    def __init__(self, in_features: int, out_features: int, size: int, *, rngs):
        init = nnx.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
        self.kernel = nnx.Param(init(rngs.params(), (size, size, in_features, out_features), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(out_features))

    def __call__(self, x: Num[Array, "b t h w i"], stride: int = 1, padding=None) -> Num[Array, "b t H W o"]:
        return conv2d(x, self.kernel.astype(x.dtype), stride, padding) + self.bias.astype(x.dtype)


def conv2d(x: Num[Array, "b t h w i"], kernel: Num[Array, "kh kw i o"], stride: int = 1, padding=None):
    """Convolves each frame; `padding` defaults to "same" for odd kernels. A 1 x 1 kernel is a matrix product."""
    if kernel.shape[:2] == (1, 1) and stride == 1:
        return x @ kernel[0, 0]
    padding = padding or [(k // 2, k // 2) for k in kernel.shape[:2]]
    frames = x.reshape(-1, *x.shape[2:])
    y = jax.lax.conv_general_dilated(
        frames, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return y.reshape(*x.shape[:2], *y.shape[1:])


class ChannelNorm(nnx.Module):
    """x / |x| * sqrt(C) * gamma over the channels, in float32."""

    def __init__(self, dim: int):
        self.gamma = nnx.Param(jnp.ones(dim))

    def __call__(self, x: Num[Array, "... c"]) -> Num[Array, "... c"]:
        y = x.astype(jnp.float32)
        # The floor is the reference's (1e-12 on the norm), squared; inside the root it keeps the gradient finite at 0.
        y = y * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(y), axis=-1, keepdims=True), 1e-24))
        return (y * (math.sqrt(x.shape[-1]) * self.gamma.astype(jnp.float32))).astype(x.dtype)


class ResidualBlock(nnx.Module):
    """Norm, SiLU, convolution, twice, around a shortcut."""

    def __init__(self, in_features: int, out_features: int, *, impl: str, rngs):
        self.norm1 = ChannelNorm(in_features)
        self.conv1 = CausalConv(in_features, out_features, (3, 3, 3), impl=impl, rngs=rngs)
        self.norm2 = ChannelNorm(out_features)
        self.conv2 = CausalConv(out_features, out_features, (3, 3, 3), impl=impl, rngs=rngs)
        self.shortcut = Linear(in_features, out_features, rngs=rngs) if in_features != out_features else None

    def __call__(self, x, cache: Cache, first: bool):
        one, two = cache or (None, None)
        y, one = self.conv1(nnx.silu(self.norm1(x)), one)
        y, two = self.conv2(nnx.silu(self.norm2(y)), two)
        return (x if self.shortcut is None else self.shortcut(x)) + y, (one, two)


class AttentionBlock(nnx.Module):
    """Self-attention with one head within each frame."""

    def __init__(self, dim: int, *, rngs):
        self.norm = ChannelNorm(dim)
        self.qkv = Linear(dim, 3 * dim, rngs=rngs)
        self.proj = Linear(dim, dim, std=1e-3, rngs=rngs)

    def __call__(self, x, cache: Cache, first: bool):
        b, t, h, w, c = x.shape
        q, k, v = jnp.split(self.qkv(self.norm(x)).reshape(b * t, h * w, 1, 3 * c), 3, axis=-1)
        # One head as wide as the channels (384) is more than cuDNN takes; its logits are 0.5 GB a block at 480 x 832.
        return x + self.proj(attention(q, k, v, implementation="xla").reshape(x.shape)), ()


class Upsample(nnx.Module):
    """Doubles the picture and halves the channels; with `temporal`, doubles the frames before."""

    def __init__(self, dim: int, temporal: bool, *, impl: str, rngs):
        self.time_conv = CausalConv(dim, 2 * dim, (3, 1, 1), impl=impl, rngs=rngs) if temporal else None
        self.conv = Conv2d(dim, dim // 2, 3, rngs=rngs)

    def __call__(self, x, cache: Cache, first: bool):
        if self.time_conv is not None:
            x, cache = self._double_frames(x, cache, first)
        x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
        return self.conv(x), () if self.time_conv is None else cache

    def _double_frames(self, x, cache: Cache, first: bool):
        if first:
            start, x = x[:, :1], x[:, 1:]
            if x.shape[1] == 0:
                return start, jnp.zeros((x.shape[0], 2, *x.shape[2:]), x.dtype)
        y, cache = self.time_conv(x, None if first else cache)
        y = y.reshape(*y.shape[:4], 2, -1)  # channel halves are neighbouring frames
        y = jnp.moveaxis(y, 4, 2).reshape(y.shape[0], -1, *x.shape[2:])
        return jnp.concatenate([start, y], axis=1) if first else y, cache


class Downsample(nnx.Module):
    """Halves the picture; with `temporal`, halves the frames after."""

    def __init__(self, dim: int, temporal: bool, *, impl: str, rngs):
        self.conv = Conv2d(dim, dim, 3, rngs=rngs)
        self.time_conv = CausalConv(dim, dim, (3, 1, 1), impl=impl, rngs=rngs) if temporal else None

    def __call__(self, x, cache: Cache, first: bool):
        x = self.conv(x, stride=2, padding=[(0, 1), (0, 1)])
        if self.time_conv is None:
            return x, ()
        if not first:
            y = self.time_conv.valid(jnp.concatenate([cache.astype(x.dtype), x], axis=1), stride=2)
        elif x.shape[1] == 1:
            y = x
        else:
            y = jnp.concatenate([x[:, :1], self.time_conv.valid(x, stride=2)], axis=1)
        return y, x[:, -1:]


class Coder(nnx.Module):
    """What encoder and decoder share: a convolution in, layers, norm, SiLU, a convolution out."""

    def __init__(self, conv_in: CausalConv, layers: list[nnx.Module], norm: ChannelNorm, conv_out: CausalConv):
        self.conv_in = conv_in
        self.layers = nnx.List(layers)
        self.norm = norm
        self.conv_out = conv_out

    def __call__(self, x, cache: Cache, first: bool):
        old = cache or (None,) * (len(self.layers) + 2)
        new = []
        x, c = self.conv_in(x, old[0])
        new.append(c)
        for layer, c in zip(self.layers, old[1:-1]):
            x, c = layer(x, c, first)
            new.append(c)
        x, c = self.conv_out(nnx.silu(self.norm(x)), old[-1])
        return x, (*new, c)


def make_encoder(cfg: VAEConfig, impl: str, rngs) -> Coder:
    """Finest level first; ends with the middle: residual, attention, residual."""
    make = dict(impl=impl, rngs=rngs)
    widths = [cfg.base_width * m for m in cfg.multipliers]
    layers, dim = [], widths[0]
    for level, width in enumerate(widths):
        for _ in range(cfg.res_blocks):
            layers.append(ResidualBlock(dim, width, **make))
            dim = width
        if level < len(cfg.temporal):
            layers.append(Downsample(dim, cfg.temporal[level], **make))
    layers += [ResidualBlock(dim, dim, **make), AttentionBlock(dim, rngs=rngs), ResidualBlock(dim, dim, **make)]
    conv_in = CausalConv(3, widths[0], (3, 3, 3), **make)
    return Coder(conv_in, layers, ChannelNorm(dim), CausalConv(dim, 2 * cfg.z_channels, (3, 3, 3), **make))


def make_decoder(cfg: VAEConfig, impl: str, rngs) -> Coder:
    """Starts with the middle; coarsest level first, one residual block a level more than the encoder."""
    make = dict(impl=impl, rngs=rngs)
    widths = [cfg.base_width * m for m in reversed(cfg.multipliers)]
    temporal = tuple(reversed(cfg.temporal))
    dim = widths[0]
    layers = [ResidualBlock(dim, dim, **make), AttentionBlock(dim, rngs=rngs), ResidualBlock(dim, dim, **make)]
    for level, width in enumerate(widths):
        for _ in range(cfg.res_blocks + 1):
            layers.append(ResidualBlock(dim, width, **make))
            dim = width
        if level < len(temporal):
            layers.append(Upsample(dim, temporal[level], **make))
            dim //= 2
    conv_in = CausalConv(cfg.z_channels, widths[0], (3, 3, 3), **make)
    return Coder(conv_in, layers, ChannelNorm(dim), CausalConv(dim, 3, (3, 3, 3), **make))


class VAE(nnx.Module):
    """Pixels in [-1, 1] to normalised latents and back.

    Args:
      cfg: sizes and the latents' normalisation.
      impl: how causal convolutions are computed, "2d" or "3d" (equal up to rounding).
    """

    def __init__(self, cfg: VAEConfig, *, impl: str = "2d", rngs: nnx.Rngs):
        self.cfg = cfg
        self.encoder = make_encoder(cfg, impl, rngs)
        self.quant = Linear(2 * cfg.z_channels, 2 * cfg.z_channels, rngs=rngs)
        self.post_quant = Linear(cfg.z_channels, cfg.z_channels, rngs=rngs)
        self.decoder = make_decoder(cfg, impl, rngs)

    def moments(self, video: Num[Array, "b t h w 3"], cache: Cache = None, *, first: bool = True):
        """Mean and log variance of the latents before normalisation, each [B, F, h/8, w/8, C], and the new cache.

        A first chunk has 4k + 1 pixel frames, a later one 4k.
        """
        x, cache = self.encoder(video, cache, first)
        mean, log_variance = jnp.split(self.quant(x), 2, axis=-1)
        return mean, log_variance, cache

    def encode(self, video: Num[Array, "b t h w 3"], cache: Cache = None, *, first: bool = True):
        """Normalised latents [B, F, h/8, w/8, C] (the mean, no sampling) and the new cache."""
        mean, _, cache = self.moments(video, cache, first=first)
        latent_mean, latent_std = self._normalisation()
        return ((mean.astype(jnp.float32) - latent_mean) / latent_std).astype(video.dtype), cache

    def decode(self, latents: Num[Array, "b f h w c"], cache: Cache = None, *, first: bool = True):
        """Pixels [B, T, 8h, 8w, 3] in [-1, 1] and the new cache. T is 4F - 3 for a first chunk, 4F for a later one."""
        latent_mean, latent_std = self._normalisation()
        z = (latents.astype(jnp.float32) * latent_std + latent_mean).astype(latents.dtype)
        x, cache = self.decoder(self.post_quant(z), cache, first)
        return jnp.clip(x, -1, 1), cache

    def _normalisation(self) -> tuple[Float[Array, " c"], Float[Array, " c"]]:
        return jnp.asarray(self.cfg.latent_mean, jnp.float32), jnp.asarray(self.cfg.latent_std, jnp.float32)
