"""What is captured and timed while an official pipeline runs: noise and prompts going in, pixels coming out."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

from longlive_jax.errors import UserError


class Clock:
    """Milliseconds by name, in the order they were spent; the GPU is waited for at both ends of a span."""

    def __init__(self, device: torch.device):
        self.device, self.times = device, {}
        self._started: dict[str, float] = {}

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def start(self, name: str) -> None:
        self._started[name] = self._now()

    def stop(self, name: str) -> None:
        self.times.setdefault(name, []).append(1000 * (self._now() - self._started.pop(name)))

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        self.start(name)
        yield
        self.stop(name)

    def watch_blocks(self, generator: torch.nn.Module, passes: int) -> None:
        """Times the generator from the first to the last of a block's passes, those of a recache aside."""
        calls = 0

        def before(*_):
            if "recache_ms" not in self._started and calls % passes == 0:
                self.start("dit_ms_per_block")

        def after(*_):
            nonlocal calls
            if "recache_ms" not in self._started:
                calls += 1
                if calls % passes == 0:
                    self.stop("dit_ms_per_block")

        generator.register_forward_pre_hook(before)
        generator.register_forward_hook(after)


class Text(torch.nn.Module):
    """Stands between a pipeline and its text encoder, or is one that knows the embeddings; keeps them in turn.

    Attributes:
      keep: whether they are copied to the host, which takes time.
      embeds: of each prompt that was asked for, [B, L, width].
    """

    def __init__(self, encode: Callable[..., dict[str, torch.Tensor]], clock: Clock, keep: bool = True):
        super().__init__()
        self.encode, self.clock = encode, clock  # a network registers itself here and moves with the pipeline
        self.keep = keep
        self.embeds: list[np.ndarray] = []

    def forward(self, text_prompts: list[str]) -> dict[str, torch.Tensor]:
        with self.clock.span("text_encode_ms"):
            given = self.encode(text_prompts=text_prompts)
        if self.keep:
            self.embeds.append(given["prompt_embeds"].float().cpu().numpy())
        return given


class VAE(torch.nn.Module):
    """Stands between a pipeline and its VAE.

    Attributes:
      keep: whether pixels are copied to the host, which takes time.
      pixels: the last that was decoded, [B, T, 3, H, W] in [-1, 1]; None if there is no VAE to decode with.
    """

    def __init__(self, vae: torch.nn.Module | None, clock: Clock, keep: bool = True):
        super().__init__()
        self.vae, self.clock, self.keep = vae, clock, keep
        self.pixels: np.ndarray | None = None

    def decode_to_pixel(self, latents: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        return self._decode("decode_to_pixel", latents, use_cache)

    def decode_to_pixel_chunk(self, latents: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        return self._decode("decode_to_pixel_chunk", latents, use_cache)

    def _decode(self, name: str, latents: torch.Tensor, use_cache: bool) -> torch.Tensor:
        if self.vae is None:
            return latents.new_zeros(1)
        with self.clock.span("vae_decode_ms"):
            pixels = getattr(self.vae, name)(latents, use_cache=use_cache)
        if self.keep:
            self.pixels = pixels.float().cpu().numpy()
        return pixels


Draw = tuple[str, torch.Tensor]
"""A function of torch's that draws, and what it is to give."""


@contextlib.contextmanager
def given_draws(draws: list[Draw], functions: tuple[str, ...] = ("randn", "randn_like", "randint")) -> Iterator[None]:
    """The functions hand out these draws in turn.

    Raises:
      UserError: at the end, if the pipeline has not drawn it all; at once, if it draws more or otherwise.
    """
    queue = list(draws)
    real = {name: getattr(torch, name) for name in functions}

    def draw(name: str, shape) -> torch.Tensor:
        if not queue or queue[0][0] != name or queue[0][1].shape != torch.Size(shape):
            raise UserError(f"the official pipeline drew noise {list(shape)} out of turn; is the clone unchanged?")
        return queue.pop(0)[1]

    patched = {
        "randn": lambda shape, **_: draw("randn", shape),
        "randn_like": lambda like, **_: draw("randn_like", like.shape).to(like),
        "randint": lambda low, high, size, **_: draw("randint", size),
    }
    for name in functions:
        setattr(torch, name, patched[name])
    try:
        yield
    finally:
        for name in functions:
            setattr(torch, name, real[name])
    if queue:
        raise UserError(f"the official pipeline left {len(queue)} draws of noise; is the clone unchanged?")


def given_noise(renoise: torch.Tensor) -> contextlib.AbstractContextManager[None]:
    """`torch.randn_like` hands out `renoise` [blocks, steps - 1, B, f, C, h, w] in turn; see `given_draws`."""
    draws = [("randn_like", noise) for noise in renoise.flatten(0, 1).flatten(1, 2)]
    return given_draws(draws, functions=("randn_like",))
