"""The official PyTorch pipelines on random weights, timed: as shipped, with the LoRA merged, and compiled.

As shipped, a LoRA lies over every linear layer of the blocks by peft, and a clip is decoded when all its latents are
made. Merged means that there is no such layer. The transformer's attention is PyTorch's own (cuDNN's on a GPU), in
place of flash-attention; the VAE's is left to PyTorch's choice, as shipped. Nothing of the clone is changed on disk or
copied here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch

from longlive_jax.bench import weights
from longlive_jax.bench.counts import tokens_per_frame
from longlive_jax.bench.published import set_layout, set_up, wait
from longlive_jax.bench.timing import Times, measure, now
from longlive_jax.checkpoint import tensor_shapes
from longlive_jax.config import SPATIAL_FACTOR, ModelConfig, SamplerConfig, TransformerConfig
from longlive_jax.conversion import tables
from longlive_jax.conversion.convert import VAE_NAMES, Source
from longlive_jax.conversion.official_capture import Clock
from longlive_jax.conversion.official_pipeline import Parts, build
from longlive_jax.conversion.official_repo import opened
from longlive_jax.errors import UserError

LORA_SHARE = 6
"""The width over the rank of LongLive's own LoRA (1536 over 256), which is on every linear layer of the blocks."""


class BenchClock(Clock):
    """The recorder's clock, told by the one that everything here is timed by.

    Attributes:
      waits: whether both ends of a span are waited for. If not, a GPU is asked to note when it comes by, so that a
        video is made without stops as it is without a clock; `settle` reads those notes.
    """

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.waits = True
        self._noted: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def _now(self):
        if not self.waits and self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        wait(None)
        return now()

    def start(self, name: str) -> None:
        self._started[name] = self._now()

    def stop(self, name: str) -> None:
        start, end = self._started.pop(name), self._now()
        if isinstance(end, float):
            self.times.setdefault(name, []).append(1000 * (end - start))
        else:
            self._noted.append((name, start, end))

    def settle(self) -> None:
        """Turns what the GPU noted into times; it must have come by."""
        for name, start, end in self._noted:
            self.times.setdefault(name, []).append(start.elapsed_time(end))
        self._noted.clear()

    def watch(self, module: torch.nn.Module, name: str) -> None:
        """Times each call of a module."""
        module.register_forward_pre_hook(lambda *_: self.start(name))
        module.register_forward_hook(lambda *_: self.stop(name))


class RandomReader:
    """Stands for a file of weights; see `Reader`.

    Args:
      part: of the model.
      cfg: its sizes.
      dtype: of the tensors.
      drawn: what their numbers are rounded to first, by name; the dtype itself by default.
    """

    def __init__(self, part: str, cfg: Any, dtype: torch.dtype, drawn: str | None = None):
        self.shapes = tables.WAN[part](cfg).torch_shapes(tensor_shapes(part, cfg))
        self.kind = ml_dtypes.bfloat16 if dtype == torch.bfloat16 else np.float32
        self.drawn = self.kind if drawn is None else np.dtype(drawn)

    def read(self, name: str) -> np.ndarray:
        return weights.for_torch(name, self.shapes[name], self.drawn).astype(self.kind, copy=False)


@dataclasses.dataclass
class Official:
    """A pipeline, its clock, and how it is called.

    Attributes:
      pipeline: an official one.
      clock: its parts' times.
      sampler, size: settings, and [channels, rows, columns] of the latents.
      attention: what computes the transformer's.
    """

    pipeline: Any
    clock: Clock
    sampler: SamplerConfig
    size: tuple[int, int, int]
    device: torch.device
    dtype: torch.dtype
    attention: str

    @classmethod
    @contextlib.contextmanager
    def opened(
        cls,
        repo: Path,
        config: ModelConfig,
        dtype: str,
        *,
        sampler: SamplerConfig | None = None,
        lora: bool = False,
        compiled: bool = False,
        decode: bool = False,
        interactive: bool = False,
        blocks: int = 40,
        drawn: str | None = None,
    ) -> Iterator[Official]:
        """Builds one.

        Args:
          repo: a clone of branch v1.0.
          config, sampler: sizes and settings; positions are absolute.
          dtype: of weights and activations, by name.
          lora: whether a LoRA lies over the linear layers, as shipped.
          compiled: whether the layers are compiled by `torch.compile`.
          decode: whether there is a VAE.
          interactive: the pipeline that switches prompts.
          blocks: at most so many will be made at once.
          drawn: what the transformer's weights are rounded to before they get `dtype`, by name.
        """
        device, kind = set_up(), getattr(torch, dtype)
        sampler, cfg = dataclasses.replace(sampler or config.sampler, rope="absolute"), config.transformer
        source = Source(
            readers={"transformer": RandomReader("transformer", cfg, kind, drawn)},
            configs={"transformer": cfg, "vae": config.vae},
        )
        embeds = _seeded(2, 1, cfg.text_length, cfg.text_dim).to(device, kind)
        with (
            tempfile.TemporaryDirectory() as folder,
            opened(Path(repo), text=False, sdpa=True) as code,
            contextlib.redirect_stdout(sys.stderr),  # the official code tells its progress
        ):
            if decode:
                reader = RandomReader("vae", config.vae, torch.float32)
                state = {name: torch.from_numpy(reader.read(name).copy()) for name in reader.shapes}
                torch.save(state, Path(folder) / VAE_NAMES[0])
            clock = BenchClock(device)
            parts = Parts(Path(folder), source, None, embeds, decode, device, kind, clock, capture=False)
            pipeline = build(code, parts, sampler, blocks * sampler.block_frames, interactive)
            if (decoder := getattr(getattr(pipeline.vae.vae, "model", None), "decoder", None)) is not None:
                clock.watch(decoder, "decode_ms_per_latent")
            if lora:
                pipeline.generator.model = _with_lora(pipeline.generator.model, cfg.dim // LORA_SHARE).to(device, kind)
            if compiled:
                torch._dynamo.config.recompile_limit = 64  # indices into the cache are Python numbers until they repeat
                for layer in pipeline.generator.model.blocks:
                    layer.compile(backend=_backend(device))
            kernel, attention = _kernel(device, kind, cfg, sampler)
            if kernel is not None:
                _restrict(pipeline.generator, kernel)
            size = cfg.in_channels, sampler.height // SPATIAL_FACTOR, sampler.width // SPATIAL_FACTOR
            yield cls(pipeline, clock, sampler, size, device, kind, attention)

    def run(self, blocks: int, *, prompts: int = 1, to_host: bool = False) -> float:
        """Milliseconds of a video, from noise and embeddings on the device.

        Args:
          blocks: its length.
          prompts: with 2, the second starts in the middle.
          to_host: whether its pixels are fetched as uint8; those of a clip come at its end, as shipped.
        """
        noise = self._noise(blocks)
        call: dict[str, Any] = {"text_prompts": ["0"]}
        if prompts == 2:
            middle = blocks // 2 * self.sampler.block_frames
            call = {"text_prompts_list": [["0"], ["1"]], "switch_frame_indices": [middle]}
        self.clock.times.clear()
        self.clock.waits = not to_host
        wait(None)
        start = now()
        video = self.pipeline.inference(noise=noise, **call)
        if to_host:
            (video * 255).round().to(torch.uint8).cpu()
        wait(None)
        ms = 1000 * (now() - start)
        self.clock.settle()
        return ms

    def block_sums(self) -> Times | None:
        """Of the video just made with `to_host`: a block's passes and its decoding, added up, with the window full.

        The two lie apart, since a clip is decoded when all its latents are made, and the way to the host is in neither.
        None if the decoder's calls could not be told apart.
        """
        passes, decodes = (self.clock.times.get(n, []) for n in ("dit_ms_per_block", "decode_ms_per_latent"))
        frames, skip = self.sampler.block_frames, self.ramp_blocks()
        if len(decodes) != frames * len(passes) or len(passes) <= skip:
            return None
        return Times.of(passes[i] + sum(decodes[frames * i : frames * (i + 1)]) for i in range(skip, len(passes)))

    def ramp_blocks(self) -> int:
        """Blocks until the window is full, and one more."""
        return self.sampler.window // self.sampler.block_frames + 1

    def blocks(self, count: int) -> Times:
        """Times of `count` blocks in the steady state: denoising steps and clean pass, no decoding."""
        skip = self.ramp_blocks()
        self.run(skip + count)
        return Times.of(self.clock.times["dit_ms_per_block"][skip:])

    def passes(self) -> dict[int, Times]:
        """Times of one forward pass, by how many latent frames it attends; each is waited for."""
        block, passes, spent = self.sampler.block_frames, len(self.sampler.steps) + 1, []

        def clock() -> float:
            wait(None)
            return 1000 * now()

        def before(*_):
            spent.append(clock())

        def after(*_):
            spent[-1] = clock() - spent[-1]

        generator = self.pipeline.generator
        hooks = [generator.register_forward_pre_hook(before), generator.register_forward_hook(after)]
        try:
            self.run(self.sampler.window // block)
        finally:
            for hook in hooks:
                hook.remove()
        return {(i // passes + 1) * block: Times.of(spent[i : i + passes]) for i in range(0, len(spent), passes)}

    def one_pass(self) -> torch.Tensor:
        """The flow of a first block, always the same noise at the same timestep."""
        block, tokens = self.sampler.block_frames, self.pipeline.frame_seq_length
        caches = {"batch_size": 1, "dtype": self.dtype, "device": self.device}
        self.pipeline._initialize_kv_cache(**caches, kv_cache_size_override=self.sampler.window * tokens)
        self.pipeline._initialize_crossattn_cache(**caches)
        flow, _ = self.pipeline.generator(
            noisy_image_or_video=self._noise(1),
            conditional_dict=self.pipeline.text_encoder(text_prompts=["0"]),
            timestep=torch.full((1, block), 500, device=self.device),
            kv_cache=self.pipeline.kv_cache1,
            crossattn_cache=self.pipeline.crossattn_cache,
            current_start=0,
        )
        return flow

    def _noise(self, blocks: int) -> torch.Tensor:
        return _seeded(1, blocks * self.sampler.block_frames, *self.size).to(self.device, self.dtype)

    def recache(self, blocks: int) -> float:
        """Milliseconds of a prompt switch in the middle of so many blocks."""
        self.run(blocks, prompts=2)
        return self.clock.times["recache_ms"][0]


def _backend(device: torch.device) -> str:
    """Of `torch.compile`. On a CPU programs are only traced, to rehearse: the VAE's compile for half an hour."""
    return "inductor" if device.type == "cuda" else "aot_eager"


def _seeded(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _kernel(device: torch.device, dtype: torch.dtype, cfg: TransformerConfig, sampler: SamplerConfig):
    """PyTorch's attention kernel for the transformer and its name in words; None where PyTorch is left to choose.

    On a GPU the first that takes every shape of a video. It is tried, since what a kernel takes depends on versions,
    and a figure must not say cuDNN where another one ran.

    Raises:
      UserError: none does.
    """
    words = "PyTorch's scaled_dot_product_attention"
    if device.type != "cuda":
        return None, words
    from torch.nn.attention import SDPBackend, sdpa_kernel

    # float32 is for reference values only: neither of the first two has it.
    names = ("CUDNN_ATTENTION", "FLASH_ATTENTION") if dtype.itemsize == 2 else ("EFFICIENT_ATTENTION", "MATH")
    block = sampler.block_frames * tokens_per_frame(cfg, sampler)
    blocks = sampler.window // sampler.block_frames
    faults = []
    for name in names:
        try:
            for keys in (cfg.text_length, *(block * n for n in range(1, blocks + 1))):
                q, k = (
                    torch.zeros(1, length, cfg.num_heads, cfg.head_dim, device=device, dtype=dtype).transpose(1, 2)
                    for length in (block, keys)
                )
                with sdpa_kernel(getattr(SDPBackend, name)):
                    torch.nn.functional.scaled_dot_product_attention(q, k, k)
            wait(None)
            return getattr(SDPBackend, name), f"{name} by {words}, in place of flash-attention"
        except RuntimeError as error:
            faults.append(f"{name}: {str(error).splitlines()[0]}")
    raise UserError(f"PyTorch has no attention kernel for the transformer here: {'; '.join(faults)}")


def _restrict(generator: torch.nn.Module, kernel: Any) -> None:
    """Lets the generator's passes use one attention kernel only. Around a pass and not around all that runs: the VAE's
    one head of 384 is more than cuDNN and flash attention take."""
    from torch.nn.attention import sdpa_kernel

    forward = generator.forward

    def restricted(*args, **kwargs):
        with sdpa_kernel(kernel):
            return forward(*args, **kwargs)

    generator.forward = restricted


def _with_lora(model: torch.nn.Module, rank: int) -> torch.nn.Module:
    """A random LoRA over every linear layer of the blocks, by peft as officially, not merged."""
    import peft

    layers = [name for name, layer in model.blocks.named_modules(prefix="blocks") if isinstance(layer, torch.nn.Linear)]
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=layers, init_lora_weights="gaussian")
    return peft.get_peft_model(model, config)


def vae_decodes(repo: Path, config: ModelConfig, sampler: SamplerConfig, dtype: str) -> dict[str, Callable]:
    """What makes a call that decodes a block in the middle of a video, by variant: the official VAE, random weights.

    "stock" decodes a latent frame at a time, as shipped; "block" gives all of a block to one call of its decoder.
    """
    device, kind, cfg = set_up(), getattr(torch, dtype), config.vae
    with tempfile.TemporaryDirectory() as folder, opened(Path(repo), text=False, sdpa=True) as code:
        reader = RandomReader("vae", cfg, torch.float32)
        path = Path(folder) / VAE_NAMES[0]
        torch.save({name: torch.from_numpy(reader.read(name).copy()) for name in reader.shapes}, path)
        vae = code.wan_wrapper._video_vae(pretrained_path=str(path), z_dim=cfg.z_channels, dim=cfg.base_width)
    vae = vae.eval().requires_grad_(False).to(device, kind)
    size = cfg.z_channels, sampler.block_frames, sampler.height // SPATIAL_FACTOR, sampler.width // SPATIAL_FACTOR
    latents = torch.randn(1, *size).to(device, kind)
    scale = [torch.zeros(cfg.z_channels).to(latents), torch.ones(cfg.z_channels).to(latents)]

    def prepare(channels_last: bool, whole: bool) -> Callable[[], torch.Tensor]:
        form = torch.channels_last_3d if channels_last else torch.contiguous_format
        torch.backends.cudnn.benchmark = (
            channels_last or whole
        )  # what is not as shipped chooses its kernels, as XLA does
        set_layout(vae, channels_last)
        z = latents.contiguous(memory_format=form)
        vae.clear_cache()
        vae.cached_decode(z, scale)

        def block() -> torch.Tensor:
            vae._conv_idx = [0]
            x = vae.conv2(z / scale[1].view(1, -1, 1, 1, 1) + scale[0].view(1, -1, 1, 1, 1))
            return vae.decoder(x, feat_cache=vae._feat_map, feat_idx=vae._conv_idx).float().clamp_(-1, 1)

        return block if whole else lambda: vae.cached_decode(z, scale).float().clamp_(-1, 1)

    def compiled(channels_last: bool) -> Callable[[], torch.Tensor]:
        torch._dynamo.config.recompile_limit = 64
        call = prepare(channels_last, True)  # its start, frame by frame, is not to be compiled
        vae.decoder.compile(backend=_backend(device))
        return call

    return {
        "stock": lambda: prepare(False, False),
        "channels-last": lambda: prepare(True, False),
        "block": lambda: prepare(False, True),
        "block, channels-last": lambda: prepare(True, True),
        "block, channels-last, compiled": lambda: compiled(True),
    }


def time_variant(make: Callable[[], Callable], calls: int, seconds: float) -> tuple[Times, float]:
    """Times of a variant, and the seconds until its second result was there (compilation, mostly)."""
    start = now()
    call = make()
    for _ in range(2):
        wait(call())
    return measure(call, warmup=1, calls=calls, seconds=seconds, wait=wait), now() - start
