"""`LongLivePipeline`: prompts in, video out. Joins tokeniser, text encoder, decoder and VAE of one checkpoint.

pipe = LongLivePipeline.from_pretrained("sprites")
video = pipe([(0, "a small red star stays still over a night sky"), (5, "a small blue star ...")], seconds=10)
video.save("stars.mp4")

stream = pipe.stream("a small red star stays still over a night sky")
for frames in stream:                      # uint8 [1, t, H, W, 3], block by block, for ever
    stream.set_prompt("a large red star bounces around over a night sky")
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longlive_jax import checkpoint, hub, memory, sharding
from longlive_jax.cache import Window
from longlive_jax.config import (
    MAX_ABSOLUTE_FRAMES,
    ModelConfig,
    ProgramConfig,
    SamplerConfig,
    replace,
    unknown_name,
)
from longlive_jax.decoding.decoder import Decoder
from longlive_jax.errors import UserError
from longlive_jax.models.layers import structure
from longlive_jax.models.quantization import INT8, resolve_matmul, with_int8
from longlive_jax.models.text_encoder import TextEncoder
from longlive_jax.models.transformer import WanTransformer
from longlive_jax.models.vae import VAE
from longlive_jax.prompts import LATENTS_PER_SECOND, MAX_SEED, Plan, Schedule
from longlive_jax.sidecar import make_record, sidecar_path, write_sidecar
from longlive_jax.stream import VideoStream
from longlive_jax.tokenizer import PromptTokenizer
from longlive_jax.video import VideoWriter, require_free

Prompts = str | Schedule | Sequence[Any]
"""A text; a timeline `[(0, text), (5, text)]`; a `Schedule`; or a list of texts or schedules, one video each."""


REMEMBERED_PROMPTS = 64
"""Prompts whose embeddings stay on the device (4 MiB each for Wan, in bfloat16)."""


@dataclasses.dataclass(frozen=True)
class Video:
    """Finished videos of one call.

    Attributes:
      frames: uint8 [B, T, H, W, 3].
      latents: float32 [B, F, h, w, C], normalised.
      plans: prompts and switches of each video, as applied.
      seeds: of each video.
      record: settings, checkpoint and timings, for the sidecar.
    """

    frames: np.ndarray
    latents: np.ndarray
    plans: tuple[Plan, ...]
    seeds: tuple[int, ...]
    record: dict[str, Any]

    def save(self, path: str | Path, *, overwrite: bool = False) -> list[Path]:
        """Writes an mp4 and its sidecar JSON for each video; several get "-0", "-1" before the suffix.

        Raises:
          UserError: one of the files exists and `overwrite` is false (none is written then), or cannot be written.
        """
        path = Path(path)
        many = len(self.frames) > 1
        paths = [path.with_stem(f"{path.stem}-{i}") if many else path for i in range(len(self.frames))]
        for target in paths:  # all of them, before the first is written
            require_free(target, overwrite)
            require_free(sidecar_path(target), overwrite)
        for i, target in enumerate(paths):
            with VideoWriter(target, overwrite=overwrite) as writer:
                writer.write(self.frames[i])
            write_sidecar(target, record_of(self.plans[i], self.seeds[i], self.record), overwrite=overwrite)
        return paths


def record_of(plan: Plan, seed: int, run: dict[str, Any]) -> dict[str, Any]:
    """The sidecar of one video: its plan and seed, and the settings, checkpoint and timings of its run."""
    return make_record(
        prompts=plan.prompts,
        asked_seconds=plan.asked_seconds,
        applied_seconds=plan.applied_seconds,
        seconds=plan.num_frames / LATENTS_PER_SECOND,
        seed=seed,
        **run,
    )


class LongLivePipeline:
    """A loaded checkpoint. See the module's docstring; `from_pretrained` makes one.

    Attributes:
      config: sizes of the networks and the sampler's defaults.
      dtype: of activations and of the KV cache.
      mesh: devices to spread over, or None for one.
      program: how the programs are built, as decided for the backend.
      params: of the transformer (layers stacked, or apart if `program` unrolls them) and the VAE.
      quantization: how the parts that are quantised are, such as {"transformer": "int8"}.
      int8_matmul: how the transformer multiplies with int8 weights, see `longlive_jax.models.quantization`.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: dict[str, Any],
        tokenizer: PromptTokenizer | None,
        *,
        dtype: Any = jnp.float32,
        mesh: jax.sharding.Mesh | None = None,
        program: ProgramConfig | None = None,
        quantization: dict[str, str] | None = None,
        int8_matmul: str = "auto",
        checkpoint_info: dict[str, Any] | None = None,
        note: Callable[[str], None] | None = None,
    ):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.mesh = mesh
        self.checkpoint_info = checkpoint_info or {}
        self._note = note or (lambda line: print(line, file=sys.stderr))
        self._tokenizer = tokenizer
        self.program = program = (program or ProgramConfig()).decided(jax.default_backend())
        stacked = not program.unroll_layers
        parts = {name: params[name] for name in ("transformer", "vae")}
        if not stacked:
            parts["transformer"] = checkpoint.unstack(parts["transformer"])
        self.params = sharding.shard_params(parts, mesh)
        self._text_params = self._placed_text_encoder(params.get("text_encoder"))
        self.quantization = quantization or {}
        self.int8_matmul = _decide_matmul(int8_matmul, self.quantization)
        make = lambda: WanTransformer(config.transformer, stacked=stacked, split_kv=program.split_kv, rngs=nnx.Rngs(0))
        quantized = "transformer" in self.quantization
        self._transformer = structure((lambda: with_int8(make(), self.int8_matmul)) if quantized else make)
        self._vae = structure(lambda: VAE(config.vae, impl=program.vae_conv, rngs=nnx.Rngs(0)))
        self._embeds: dict[str, jax.Array] = {}

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path = "sprites",
        *,
        dtype: Any = None,
        mesh=None,
        program: ProgramConfig | None = None,
        quantize: str | None = None,
        quantize_text_encoder: bool = False,
        int8_matmul: str = "auto",
        note: Callable[[str], None] | None = None,
    ) -> LongLivePipeline:
        """Loads a checkpoint.

        Args:
          source: "sprites" (ships with the package), a checkpoint folder, or a Hugging Face id of one.
          dtype: of weights and activations; bfloat16 on an accelerator, float32 on a CPU by default.
          mesh: see `longlive_jax.sharding.make_mesh`.
          program: how programs are built; what suits the backend by default.
          quantize: "int8" for the weights of the transformer's blocks: half the memory, slightly other videos. A folder
            that is stored in int8 is loaded as such in any case.
          quantize_text_encoder: with `quantize`, the text encoder's blocks too.
          int8_matmul: "weight_only" (int8 weights, products in `dtype`), "w8a8" (activations in int8 too, for hardware
            with int8 units) or "auto" (w8a8 on such hardware).
          note: gets one-line messages; standard error by default.

        Raises:
          UserError: nothing there, or a faulty checkpoint.
        """
        folder = hub.find(source)
        config = checkpoint.load_config(folder)
        dtype = dtype or (jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
        if dtype not in ("float32", "bfloat16", jnp.float32, jnp.bfloat16):
            raise UserError(f"dtype is {dtype!r}; float32 and bfloat16 are known")
        dtype = jnp.dtype(dtype)
        quantization = checkpoint.load_quantization(folder) | _asked_quantization(quantize, quantize_text_encoder)
        _decide_matmul(int8_matmul, quantization)  # before anything is read
        memory.check_weights(config, dtype, mesh, quantization)
        parts = ["transformer", "vae"] + ["text_encoder"] * (config.text_encoder is not None)
        params = {part: checkpoint.load(folder, part, dtype, quantization=quantization.get(part)) for part in parts}
        has_tokenizer = (folder / "tokenizer.json").exists()
        tokenizer = PromptTokenizer.from_folder(folder, config.transformer.text_length) if has_tokenizer else None
        info = {"name": str(source), "hash": checkpoint.checkpoint_hash(folder)}
        return cls(
            config, params, tokenizer, dtype=dtype, mesh=mesh, program=program, quantization=quantization,
            int8_matmul=int8_matmul, checkpoint_info=info, note=note,
        )  # fmt: skip

    def __call__(
        self,
        prompts: Prompts,
        *,
        seconds: float | None = None,
        seed: int | Sequence[int] = 0,
        decode: str | None = None,
        **settings,
    ) -> Video:
        """Makes whole videos.

        Args:
          prompts: see `Prompts`. Videos of one call must switch prompts at the same times.
          seconds: length of those that do not say their own; 5 by default.
          seed: of the noise; one for all videos, or one each. A video depends on its own seed only.
          decode: "scan" (one compiled loop over all blocks) or "blocks" (the streaming path); equal results. By default
            blocks where a stream hands frames out early, else the scan.
          **settings: any field of `SamplerConfig`, such as `window=9`, `switch="keep"`, `height=480`.

        Raises:
          UserError: anything that cannot be done, with the way out.
        """
        decode = decode or ("blocks" if self.program.early_frames else "scan")
        if decode not in ("scan", "blocks"):
            raise UserError(f"decode is '{decode}'; 'scan' and 'blocks' are known")
        started = time.monotonic()
        stream = self.stream(prompts, seconds=5.0 if seconds is None else seconds, seed=seed, **settings)
        if decode == "scan":
            frames, latents = stream.scan()
        else:
            blocks = [(block, stream.latents) for block in stream.ahead()]
            frames, latents = (np.concatenate(parts, axis=1) for parts in zip(*blocks))
        timings = {"seconds": round(time.monotonic() - started, 3)}
        return Video(frames, latents, stream.plans, stream.seeds, stream.run_record(timings))

    def stream(
        self, prompts: Prompts, *, seconds: float | None = None, seed: int | Sequence[int] = 0, **settings
    ) -> VideoStream:
        """Starts videos that are made block by block: iterate for frames, `set_prompt` between blocks.

        Args:
          prompts, seed, **settings: as for a call.
          seconds: length; None goes on until the caller stops (with relative RoPE, which has no end).
        """
        sampler, plans, seeds, endless = self.prepare(prompts, seconds=seconds, seed=seed, **settings)
        long = not endless and plans[0].num_frames > MAX_ABSOLUTE_FRAMES
        if long and settings.get("rope", self.config.sampler.rope) == "auto":
            self._note(
                f"{plans[0].num_frames} latent frames are more than absolute RoPE's {MAX_ABSOLUTE_FRAMES}: "
                "using rope=relative"
            )
        return VideoStream(self, sampler, plans, seeds, endless)

    def prepare(
        self, prompts: Prompts, *, seconds: float | None = None, seed: int | Sequence[int] = 0, **settings
    ) -> tuple[SamplerConfig, tuple[Plan, ...], tuple[int, ...], bool]:
        """All that is decided before a video starts: settings, plan and seed of each, and whether it has no end.

        Starts nothing, so it tells at no cost whether `stream` would refuse the same arguments.

        Raises:
          UserError: anything that cannot be done, with the way out.
        """
        schedules = as_schedules(prompts)
        known = [f.name for f in dataclasses.fields(SamplerConfig)]
        for name in settings:
            if name not in known:
                raise UserError(unknown_name("setting", name, [*known, "seconds", "seed"]))
        sampler = replace(self.config.sampler, **settings)
        sampler.check_size(self.config.transformer.patch)
        endless = seconds is None and all(s.seconds is None for s in schedules)
        if endless and any(len(s.prompts) > 1 and s.switch_seconds is None for s in schedules):
            raise UserError("prompts in equal parts need a length; give seconds, or the times of the switches")
        if sampler.window == -1 and endless:
            raise UserError("a window of -1 remembers everything, so the video needs a length; give seconds")
        plans = tuple(self._plan(s, sampler, seconds, endless) for s in schedules)
        if len({(p.num_frames, p.switch_blocks) for p in plans}) > 1:
            raise UserError("the videos of one batch must have one length and switch prompts at the same times")
        seeds = as_seeds(seed, schedules)
        sampler = _decide_rope(sampler, None if endless else plans[0].num_frames)
        switches = endless or bool(plans[0].switch_blocks)
        memory.check(self.config, sampler, len(plans), plans[0].num_frames, self.dtype, self.mesh, switches=switches)
        return sampler, plans, seeds, endless

    def encode_prompts(self, texts: Sequence[str]) -> jax.Array:
        """Prompt embeddings [B, L, D]; the newest `REMEMBERED_PROMPTS` are not encoded again.

        Raises:
          UserError: the checkpoint has no text encoder or tokeniser.
        """
        if self._text_params is None or self._tokenizer is None:
            missing = "text encoder" if self._text_params is None else "tokeniser"
            raise UserError(
                f"this checkpoint has no {missing}, so it cannot read prompts; convert again from a folder that has "
                "models_t5_umt5-xxl-enc-bf16.pth and google/umt5-xxl/, or pass embeddings to the decoder yourself"
            )
        new = list(dict.fromkeys(t for t in texts if t not in self._embeds))
        if new:
            tokens = self._tokenizer(new)
            for text in (t for t, cut in zip(new, tokens.truncated) if cut):
                self._note(f"prompt longer than {self.config.transformer.text_length} tokens, cut: {text[:60]}...")
            make = lambda: TextEncoder(self.config.text_encoder, rngs=nnx.Rngs(0))
            # Its weights are read once a prompt: int8 saves memory there, and no time that w8a8 could gain counts.
            graph = structure((lambda: with_int8(make())) if "text_encoder" in self.quantization else make)
            embeds = _encode_text(graph, self._text_params, tokens.ids, tokens.mask, self.dtype)
            self._embeds.update(zip(new, embeds))
        found = jnp.stack([self._embeds[t] for t in texts])
        for oldest in list(self._embeds)[:-REMEMBERED_PROMPTS]:
            del self._embeds[oldest]
        return found

    def _placed_text_encoder(self, params: Any) -> Any:
        """The text encoder's weights, on the device if they are to stay there."""
        keep = self.program.keep_text_encoder
        if keep is None and params is not None and jax.default_backend() != "cpu":
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
            free = memory.available()
            keep = free is not None and 2 * size <= free
        return jax.tree.map(jnp.asarray, params) if keep else params

    def decoder(self, sampler: SamplerConfig, num_frames: int) -> Decoder:
        """The pure decoder behind this pipeline, for those who jit it themselves; use with `params`."""
        window = Window.of(sampler, num_frames)
        return Decoder(self._transformer, self._vae, sampler, window, dtype=self.dtype.name)

    def quantization_record(self) -> dict[str, Any]:
        """What `from_pretrained` needs to load the same weights from a float checkpoint; nothing for float ones."""
        if "transformer" not in self.quantization:
            return {}
        text = "text_encoder" in self.quantization
        return {"quantize": INT8, "quantize_text_encoder": text, "int8_matmul": self.int8_matmul}

    def _plan(self, schedule: Schedule, sampler: SamplerConfig, seconds: float | None, endless: bool) -> Plan:
        if endless:
            last = max(schedule.switch_seconds or (0.0,))
            seconds = last + 2 * sampler.block_frames * len(schedule.prompts) / LATENTS_PER_SECOND
        return schedule.plan(sampler.block_frames, seconds)


def _asked_quantization(quantize: str | None, text_encoder: bool) -> dict[str, str]:
    if quantize not in (None, INT8):
        raise UserError(f"quantize is '{quantize}'; {INT8} is known, or leave it out")
    if text_encoder and quantize is None:
        raise UserError(f"quantize_text_encoder goes with quantize {INT8}; add that too")
    return {part: INT8 for part in ["transformer"] * bool(quantize) + ["text_encoder"] * text_encoder}


def _decide_matmul(int8_matmul: str, quantization: dict[str, str]) -> str:
    matmul = resolve_matmul(int8_matmul)
    if int8_matmul != "auto" and "transformer" not in quantization:
        raise UserError(f"int8_matmul {int8_matmul} is for int8 weights; add quantize {INT8}, or leave it out")
    return matmul


def _decide_rope(sampler: SamplerConfig, num_frames: int | None) -> SamplerConfig:
    """The sampler with `rope` chosen where it was left open; `num_frames` is None for a video without end."""
    long = num_frames is None or num_frames > MAX_ABSOLUTE_FRAMES
    if sampler.rope == "auto":
        sampler = dataclasses.replace(sampler, rope="relative" if long else "absolute")
    if sampler.window > MAX_ABSOLUTE_FRAMES:
        raise UserError(f"window is {sampler.window}; {MAX_ABSOLUTE_FRAMES} latent frames have temporal positions")
    if long and (sampler.rope == "absolute" or sampler.window == -1):
        limit = MAX_ABSOLUTE_FRAMES / LATENTS_PER_SECOND
        what = "an open-ended video does" if num_frames is None else f"{num_frames} latent frames do"
        raise UserError(
            f"{what} not fit the {MAX_ABSOLUTE_FRAMES} temporal positions ({limit:g} s); "
            "use rope relative with a window of fixed size"
        )
    return sampler


def as_schedules(prompts: Prompts) -> list[Schedule]:
    """One schedule a video, from all that `Prompts` allows."""
    if isinstance(prompts, str):
        return [Schedule((prompts,))]
    if isinstance(prompts, Schedule):
        return [prompts]
    if not isinstance(prompts, (list, tuple)):
        raise UserError(f"a prompt is a text, a Schedule or a timeline, not {prompts!r}")
    if not prompts:
        raise UserError("there is no prompt; give a text, a list of texts, or [(0, text), (seconds, text), ...]")
    if all(_is_start_and_text(p) for p in prompts):
        return [Schedule.from_timeline(prompts)]
    return [schedule for prompt in prompts for schedule in as_schedules(prompt)]


def _is_start_and_text(entry: Any) -> bool:
    pair = isinstance(entry, (list, tuple)) and len(entry) == 2
    return pair and isinstance(entry[0], Real) and isinstance(entry[1], str)


def as_seeds(seed: int | Sequence[int], schedules: Sequence[Schedule]) -> tuple[int, ...]:
    """One seed a video; a schedule's own goes first."""
    seeds = list(seed) if isinstance(seed, (list, tuple, range, np.ndarray)) else [seed] * len(schedules)
    if len(seeds) != len(schedules):
        raise UserError(f"{len(seeds)} seeds for {len(schedules)} videos; give one, or one each")
    seeds = [own.seed if own.seed is not None else given for own, given in zip(schedules, seeds)]
    for one in seeds:
        if not isinstance(one, Integral) or isinstance(one, bool) or not 0 <= one <= MAX_SEED:
            raise UserError(f"seed is {one!r}; it must be a whole number from 0 to {MAX_SEED}")
    return tuple(int(s) for s in seeds)


def _encode_text_impl(graph, params, ids, mask, dtype):
    return nnx.merge(graph, params)(ids, mask, dtype=dtype)


_encode_text = jax.jit(_encode_text_impl, static_argnums=(0, 4))
