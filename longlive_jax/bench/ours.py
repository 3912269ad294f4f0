"""Our programs in the steady state: compiled ahead, with the time that took, and called with states they leave behind.

The state of a video has one size from start to end, so block 320 is measured by setting the counters of a state to it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache

from longlive_jax import checkpoint
from longlive_jax.bench.timing import Times, measure, now
from longlive_jax.cache import Window
from longlive_jax.compilation import compiler_options
from longlive_jax.config import ModelConfig, ProgramConfig, SamplerConfig
from longlive_jax.decoding.decoder import Decoder
from longlive_jax.decoding.state import BlockOutput, DecodeState
from longlive_jax.decoding.switch import how_to_recache
from longlive_jax.models.layers import structure
from longlive_jax.models.quantization import quantize_params, with_int8
from longlive_jax.models.transformer import WanTransformer
from longlive_jax.models.vae import VAE

CACHE_EVENTS = {"/jax/compilation_cache/cache_hits": "hit", "/jax/compilation_cache/cache_misses": "miss"}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to build ours; the default is what users get.

    Attributes:
      transformer, vae, decoder: arguments of `WanTransformer`, `VAE` and `Decoder`, in place of the backend's choice.
      early_frames: see `ProgramConfig`.
      quantize: a name of `longlive_jax.models.quantization.MATMULS`: the transformer's blocks in int8, multiplied so.
      env: environment, such as XLA_FLAGS; set by whoever starts the process, before JAX wakes up.
    """

    transformer: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    vae: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    decoder: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    early_frames: bool | None = None
    quantize: str | None = None
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Ours:
    """A model of ours, ready to be timed.

    Args:
      config: sizes.
      params: of "transformer" and "vae", layers stacked, in floats.
      dtype: of activations and cache.
      sampler: settings; the config's own by default. Positions are absolute.
      variant: see `Variant`.

    Attributes:
      params: as its programs take them, on the device.
      compiled: for each program compiled so far, its seconds, and whether the cache on disk had it.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: dict[str, Any],
        dtype: Any,
        sampler: SamplerConfig | None = None,
        variant: Variant | None = None,
    ):
        variant = variant or Variant()
        self.config = config
        self.sampler = dataclasses.replace(sampler or config.sampler, rope="absolute")
        self.window = Window.of(self.sampler, 0)
        chosen = ProgramConfig(early_frames=variant.early_frames).decided(jax.default_backend())
        self.early_frames = chosen.early_frames
        layers = {"stacked": not chosen.unroll_layers, "split_kv": chosen.split_kv} | variant.transformer
        convolutions = {"impl": chosen.vae_conv} | variant.vae
        network = lambda: WanTransformer(config.transformer, rngs=nnx.Rngs(0), **layers)
        transformer = structure((lambda: with_int8(network(), variant.quantize)) if variant.quantize else network)
        vae = structure(lambda: VAE(config.vae, rngs=nnx.Rngs(0), **convolutions))
        make = functools.partial(
            Decoder, transformer, sampler=self.sampler, window=self.window, dtype=jnp.dtype(dtype).name,
            **variant.decoder,
        )  # fmt: skip
        self.decoder, self.blind = make(vae=vae), make(vae=None)
        quantized = jax.jit(quantize_params)  # compiled, so that no float32 copy of a part is ever held
        weights = quantized(params["transformer"]) if variant.quantize else params["transformer"]
        weights = weights if layers["stacked"] else checkpoint.unstack(weights)
        self.params = jax.device_put({"transformer": weights, "vae": params["vae"]})
        cfg = config.transformer
        self.embeds = jax.random.normal(jax.random.key(0), (1, cfg.text_length, cfg.text_dim), jnp.float32)
        self.keys = jax.random.key(1)[None]
        self.compiled: dict[str, dict[str, Any]] = {}
        self._programs: dict[str, Any] = {}

    def weight_bytes(self) -> dict[str, int]:
        """Bytes of the arrays of each part."""
        return {name: sum(leaf.nbytes for leaf in jax.tree.leaves(part)) for name, part in self.params.items()}

    # MARK: programs

    def program(self, name: str, function: Callable, *args: Any, donate: tuple[int, ...] = ()):
        """`function` compiled for `args`, once a name."""
        if name not in self._programs:
            with _cache_events() as events:
                start = now()
                options = compiler_options(jax.default_backend())
                jitted = jax.jit(function, donate_argnums=donate, compiler_options=options)
                self._programs[name] = jitted.lower(*args).compile()
                self.compiled[name] = {"seconds": now() - start, "cache": events[-1] if events else "off"}
        return self._programs[name]

    def _decoder(self, pixels: bool) -> Decoder:
        return self.decoder if pixels else self.blind

    def init(self, pixels: bool) -> DecodeState:
        """The state before the first block."""
        run = functools.partial(Decoder.init, self._decoder(pixels))
        args = self.params, self.embeds, self.keys
        return self.program(f"init, pixels={pixels}", run, *args)(*args)

    def step(self, state: DecodeState, pixels: bool, first: bool = False) -> tuple[DecodeState, BlockOutput]:
        """The next block, as a stream makes it; `state` is given away. `first`: whether it is a video's first."""

        def call(part: str, *args, donate=(1,), **options):
            run = functools.partial(getattr(Decoder, part), self._decoder(pixels), **options)
            told = "".join(f", {name}={value}" for name, value in options.items())
            return self.program(f"{part}, pixels={pixels}{told}", run, self.params, *args, donate=donate)(
                self.params, *args
            )

        if not self.early_frames:
            return call("step", state)
        state, latents = call("denoise", state)
        frames = None
        if pixels:
            frames, vae = call("pixels", latents, state.vae, donate=(), first=first)
            state = state.replace(vae=vae)
        return call("finish", state), BlockOutput(latents, frames)

    def switch(self, state: DecodeState, pixels: bool = False) -> DecodeState:
        """A prompt switch; `state` is given away."""
        how = how_to_recache(self.sampler, self.window, int(state.position))
        run = functools.partial(Decoder.switch, self._decoder(pixels), how=how)
        args = self.params, state, self.embeds
        return self.program(f"switch {how}, pixels={pixels}", run, *args, donate=(1,))(*args)

    def steady(self, pixels: bool) -> DecodeState:
        """A state after the window has filled and one block more."""
        state = self.init(pixels)
        for i in range(self.window.slots // self.window.block + 1):
            state, _ = self.step(state, pixels, first=i == 0)
        return jax.block_until_ready(state)

    # MARK: measurements

    def blocks(self, state: DecodeState, blocks: int, *, seconds: float = float("inf"), pixels: bool = False):
        """Times of blocks, each waited for; and the state after them. Pixels stay on the device."""

        def call():
            nonlocal state
            state, out = self.step(state, pixels)
            return out, state

        return measure(call, warmup=1, calls=blocks, seconds=seconds), state

    def stream(
        self, state: DecodeState, blocks: int, *, seconds: float = float("inf"), switch: bool = False
    ) -> tuple[Times, DecodeState]:
        """Times from block to block as its uint8 pixels arrive on the host, the next block already on its way.

        `switch`: the prompt is switched before every second block; the times are of those blocks alone.
        """
        arrivals, waiting, end, after = [], None, now() + seconds, 2 if switch else 1
        while len(arrivals) < after * blocks + 1 and (len(arrivals) < 4 or now() < end):
            if switch and len(arrivals) % 2:  # so of the next block the time since the last arrival is kept
                state = self.switch(state, True)
            state, out = self.step(state, True)
            out.frames.copy_to_host_async()
            if waiting is not None:
                np.asarray(waiting)
                arrivals.append(now())
            waiting = out.frames
        np.asarray(waiting)
        times = [1000 * (b - a) for a, b in zip(arrivals, arrivals[1:])]
        return Times.of(times[after - 1 :: after]), state

    def video(self, blocks: int) -> float:
        """Milliseconds from prompt embedding to the uint8 pixels of so many blocks on the host."""
        start, state, waiting = now(), self.init(True), []
        for i in range(blocks):
            state, out = self.step(state, True, first=i == 0)
            out.frames.copy_to_host_async()
            waiting.append(out.frames)
        for frames in waiting:
            np.asarray(frames)
        taken = 1000 * (now() - start)
        jax.block_until_ready(state)  # the last clean pass is not the next one's
        return taken

    def first_frame(self, calls: int = 3) -> Times:
        """From prompt embedding to the first block's pixels on the host, everything compiled."""
        taken = []
        for _ in range(calls + 1):
            start = now()
            state, out = self.step(self.init(True), True, True)
            np.asarray(out.frames)
            taken.append(1000 * (now() - start))
            jax.block_until_ready(state)
        return Times.of(taken[1:])

    def recaches(self, state: DecodeState, calls: int, *, seconds: float = float("inf")):
        """Times of prompt switches, and the state after them."""

        def call():
            nonlocal state
            state = self.switch(state)
            return state

        return measure(call, warmup=1, calls=calls, seconds=seconds), state

    def at_block(self, state: DecodeState, block: int) -> DecodeState:
        """The state as if `block` blocks had been made: counters only, nothing else of it depends on the length."""
        frames = jnp.asarray(block * self.window.block, jnp.int32)
        # Two arrays of one value: a buffer cannot be given away twice.
        return state.replace(position=frames, cache=state.cache.replace(count=frames + 0))

    def passes(self, state: DecodeState, calls: int, *, seconds: float = float("inf")) -> dict[int, Times]:
        """Times of one forward pass, by how many latent frames it attends."""
        run, times = Pass(self, state), {}
        for attended in range(self.window.block, self.window.slots + 1, self.window.block):
            run.attend(attended)
            times[attended] = measure(run, warmup=1, calls=calls, seconds=seconds)
        return times

    def decode_call(self, floats: bool = False) -> Callable[[], Any]:
        """A call that decodes a block's latents in the middle of a video to uint8, by the program of a stream.

        `floats`: to [-1, 1] instead, for errors smaller than a step of uint8.
        """
        shape = (1, self.window.block, *self.decoder.latent_size, self.config.vae.z_channels)
        latents = jax.random.normal(jax.random.key(3), shape)
        cache = self.init(True).vae

        def to_floats(params, latents, cache):
            vae = nnx.merge(self.decoder.vae, params["vae"])
            return vae.decode(latents.astype(self.decoder.dtype), cache, first=False)

        to_uint8 = functools.partial(Decoder.pixels, self.decoder, first=False)
        name, run = ("decode", to_floats) if floats else ("pixels, pixels=True, first=False", to_uint8)
        # Not donated, as in `decoding.programs`: a convolution reads the old cache beside the new one.
        decode = self.program(name, run, self.params, latents, cache)

        def call():
            nonlocal cache
            pixels, cache = decode(self.params, latents, cache)
            return pixels

        return call


class Pass:
    """One forward pass at a time, over a block and what is in the cache: a denoising step, or the clean pass.

    Args:
      ours: the model.
      state: whose cache is used; given away.
    """

    def __init__(self, ours: Ours, state: DecodeState):
        decoder, block = ours.blind, ours.window.block
        shape = (1, block, *decoder.latent_size, ours.config.transformer.in_channels)
        self.x = jax.random.normal(jax.random.key(2), shape)

        def run(params, x, state):
            model = nnx.merge(decoder.transformer, params["transformer"])
            timesteps, x = jnp.zeros((1, block)), x.astype(decoder.dtype)
            flow, cache = model.causal(x, timesteps, state.text_kv, state.cache, decoder.window, state.position)
            return flow, state.replace(cache=cache)

        self.ours, self.state = ours, state
        self.run = ours.program("pass", run, ours.params, self.x, state, donate=(2,))

    def attend(self, frames: int) -> None:
        """Sets the counters so that so many latent frames are attended, the block's own among them."""
        self.state = self.ours.at_block(self.state, frames // self.ours.window.block - 1)

    def __call__(self) -> jax.Array:
        flow, self.state = self.run(self.ours.params, self.x, self.state)
        return flow


@contextlib.contextmanager
def _cache_events() -> Iterator[list[str]]:
    """What the compilation cache on disk says while the body compiles."""
    events: list[str] = []

    def listen(event: str, **_: Any) -> None:
        if event in CACHE_EVENTS:
            events.append(CACHE_EVENTS[event])

    jax.monitoring.register_event_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_listener(listen)


@contextlib.contextmanager
def programs_in(folder: str) -> Iterator[None]:
    """Keeps every compiled program in `folder` while the body runs, however quickly it was compiled."""
    settings = {
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        _configure(settings)
        yield
    finally:
        _configure(before)


def _configure(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # JAX decides once, at the first compilation, whether there is a cache
