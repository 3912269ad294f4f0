"""The rows of `h100.py`: each measures one thing in a process of its own and writes figures as they come.

Random weights of the real shapes on both sides, said so in every row's figures. A rehearsal takes small shapes.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
Emit = Callable[..., None]


def use_source_tree() -> None:
    """Lets `longlive_jax` and its `conversion` be imported from a checkout where the package is not installed."""
    sys.path.insert(0, str(ROOT))
    import longlive_jax

    name = "longlive_jax.conversion"
    if importlib.util.find_spec(name) is None:
        places = [str(ROOT / "conversion")]
        spec = importlib.util.spec_from_file_location(
            name, ROOT / "conversion" / "__init__.py", submodule_search_locations=places
        )
        sys.modules[name] = longlive_jax.conversion = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])


use_source_tree()

from longlive_jax.bench import counts, timing  # noqa: E402
from longlive_jax.config import ModelConfig, SamplerConfig, TransformerConfig, VAEConfig  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Size:
    """What is measured, and how long.

    Attributes:
      config: sizes; no text encoder, embeddings are random.
      official: sizes on the official side, whose VAE has a fixed number of layers; the same but in a rehearsal.
      dtype: of weights and activations.
      blocks: counted in the steady state.
      calls: of short things.
      inner: calls between two looks at the clock, of things shorter than a millisecond.
    """

    config: ModelConfig
    official: ModelConfig
    dtype: str
    blocks: int
    calls: int
    inner: int

    @classmethod
    def of(cls, rehearse: bool) -> Size:
        if not rehearse:
            config = ModelConfig(TransformerConfig.t2v_1_3b(), VAEConfig.wan(), None, SamplerConfig())
            return cls(config, config, "bfloat16", 25, 10, 20)
        transformer = TransformerConfig(
            dim=48, ffn_dim=96, num_layers=1, num_heads=2, text_dim=32, text_length=16, time_dim=32
        )
        # Five tokens a frame, so that the keys can be halved and cut in five, as those of the real picture.
        sampler = SamplerConfig(height=16, width=80, steps=(1000.0, 500.0))
        vae = VAEConfig(base_width=8, multipliers=(1, 1, 1, 1), res_blocks=0)
        config, official = (ModelConfig(transformer, v, None, sampler) for v in (vae, VAEConfig(base_width=8)))
        return cls(config, official, "float32", 2, 2, 2)

    @property
    def frame(self) -> int:
        """Tokens of a latent frame."""
        return counts.tokens_per_frame(self.config.transformer, self.config.sampler)


@dataclasses.dataclass(frozen=True)
class Context:
    """What a row is given: sizes, the clone, the variant of ours, where figures go, and what it was started with."""

    size: Size
    repo: Path | None
    variant: dict[str, Any] | None
    emit: Emit
    settings: dict[str, Any]

    def ours(self, params: dict[str, Any] | None = None):
        """Our model in this row's variant, on random weights if none are given."""
        from longlive_jax.bench import weights
        from longlive_jax.bench.ours import Ours, Variant

        start = time.perf_counter()
        if params is None:
            params = weights.ours(self.size.config, self.size.dtype)
            self.emit(weights=weights.DESCRIPTION)
        ours = Ours(self.size.config, params, self.size.dtype, variant=Variant(**(self.variant or {})))
        self.emit(weights_seconds=time.perf_counter() - start, weight_bytes=ours.weight_bytes())
        return ours

    def official(self, **options: Any):
        """An official pipeline on random weights; a context."""
        from longlive_jax.bench import weights
        from longlive_jax.bench.official import Official

        self.emit(weights=weights.DESCRIPTION)
        dtype = options.pop("dtype", self.size.dtype)
        return Official.opened(self.repo, self.size.official, dtype, **options)


def spent(times: timing.Times, flops: float | None = None) -> dict[str, float]:
    """A summary of times, and FLOP/s where they are known."""
    return times.summary() | ({} if flops is None else {"flops": flops, "flops_per_second": 1e3 * flops / times.p50})


def pass_flops(size: Size, attended: int) -> float:
    cfg, block = size.config.transformer, size.config.sampler.block_frames
    return sum(counts.transformer_pass(cfg, block * size.frame, attended * size.frame).values())


def block_flops(size: Size) -> float:
    from longlive_jax.cache import Window

    sampler = size.config.sampler
    return counts.block(size.config.transformer, sampler, Window.of(sampler, 0))


def vae_flops(size: Size) -> float:
    return counts.decode(size.config.vae, size.config.sampler, size.config.sampler.block_frames)


# MARK: the machine


def ceilings(context: Context) -> None:
    """A large matrix product and a copy, in JAX and in PyTorch."""
    import torch

    from longlive_jax.bench import machine
    from longlive_jax.bench.published import set_up, wait

    context.emit(hardware=machine.hardware(), versions=machine.versions())
    found = machine.ceilings(context.size.dtype)
    context.emit(matmul=found["matmul"], copy=found["copy"])
    device, rows = set_up(), int(found["matmul"]["rows"])
    a, b = (torch.randn(rows, rows, device=device, dtype=getattr(torch, context.size.dtype)) for _ in range(2))
    calls = int(found["matmul"]["calls"])
    times = timing.measure(lambda: [a @ b for _ in range(calls)], warmup=3, calls=10, seconds=2, wait=wait)
    times = timing.Times.of(ms / calls for ms in times.ms)
    context.emit(torch_matmul=spent(times, 2.0 * rows**3))


# MARK: ours


def ours_dit(context: Context, brief: bool = False) -> None:
    """A block of the transformer (steps and clean pass); if not `brief`, a pass by how much it attends, a recache,
    growth and memory too."""
    from longlive_jax.bench.machine import peak_memory

    size, ours = context.size, context.ours()
    state = ours.steady(False)
    context.emit(compiled=ours.compiled)
    times, state = ours.blocks(state, size.blocks, seconds=20)
    context.emit(block=spent(times, block_flops(size)), memory=peak_memory())
    if brief:
        return
    for block in (5, 320):
        times, state = ours.blocks(ours.at_block(state, block), max(3, size.blocks // 3))
        context.emit(**{f"block_{block}": spent(times), f"memory_{block}": peak_memory()})
    times, state = ours.recaches(state, 5, seconds=5)
    flops = counts.recache(size.config.transformer, ours.sampler, ours.window)
    context.emit(recache=spent(times, flops), compiled=ours.compiled)
    passes = ours.passes(state, size.calls)
    context.emit(passes={n: spent(t, pass_flops(size, n)) for n, t in passes.items()}, compiled=ours.compiled)


def ours_pass(context: Context) -> None:
    """A pass by how much it attends, alone: the one program that has to be compiled to compare variants of the
    transformer."""
    size, ours = context.size, context.ours()
    passes = ours.passes(ours.init(False), size.calls)
    context.emit(passes={n: spent(t, pass_flops(size, n)) for n, t in passes.items()}, compiled=ours.compiled)


def ours_video(context: Context) -> None:
    """Everything, pixels on the host: FPS over blocks, the block after a prompt switch, first frame, memory."""
    from longlive_jax.bench.machine import peak_memory

    size, ours = context.size, context.ours()
    state = ours.switch(ours.steady(True), True)
    context.emit(compiled=ours.compiled)
    flops = block_flops(size) + vae_flops(size)
    times, state = ours.stream(state, max(3, size.blocks + 5), seconds=30)
    context.emit(block=spent(times, flops), fps=12e3 / times.p50, memory=peak_memory())
    times, state = ours.stream(state, max(3, size.blocks // 3), seconds=15, switch=True)
    context.emit(switched=spent(times), compiled=ours.compiled)
    context.emit(first_frame=spent(ours.first_frame()), memory_end=peak_memory())


def ours_vae(context: Context) -> None:
    """Decoding a block's latents to pixels."""
    from longlive_jax.bench.machine import peak_memory

    ours = context.ours()
    call = ours.decode_call()
    context.emit(compiled=ours.compiled)
    times = timing.measure(call, warmup=2, calls=2 * context.size.calls, seconds=10)
    context.emit(decode=spent(times, vae_flops(context.size)), memory=peak_memory())


def ours_start(context: Context) -> None:
    """Two new processes from a checkpoint folder to first pixels: without compiled programs, and with the first one's.

    Raises:
      RuntimeError: a start failed, or the second one compiled something.
    """
    from longlive_jax import checkpoint
    from longlive_jax.bench import weights

    with tempfile.TemporaryDirectory() as place:
        folder, config = Path(place) / "checkpoint", context.size.config
        start = time.perf_counter()
        params = weights.host(config, context.size.dtype)
        checkpoint.save(folder, config, params, provenance={"weights": weights.DESCRIPTION})
        context.emit(weights=weights.DESCRIPTION, written_seconds=time.perf_counter() - start)
        settings = context.settings | {"body": "start_from_checkpoint", "arguments": {"folder": str(folder)}}
        cache = {
            "JAX_COMPILATION_CACHE_DIR": str(Path(place) / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        for name in ("cold", "warm"):
            into = Path(place) / f"{name}.jsonl"
            env = os.environ | cache | {"ROW_STARTED": str(time.time())}
            code = subprocess.run([sys.executable, __file__, json.dumps(settings), str(into)], env=env).returncode
            figures: dict[str, Any] = {}
            for line in into.read_text().splitlines() if into.exists() else ():
                figures |= json.loads(line)
            context.emit(**{name: figures})
            if code:
                raise RuntimeError(f"the {name} start ended with {code}")
    compiled = [program for program, told in figures["compiled"].items() if told["cache"] != "hit"]
    if compiled:
        raise RuntimeError(f"the warm start compiled {', '.join(compiled)}: not warm")


def start_from_checkpoint(context: Context, folder: str) -> None:
    """Loads a checkpoint and makes a first block, in seconds since its process was asked for."""
    started = float(os.environ["ROW_STARTED"])
    import jax
    import numpy as np

    from longlive_jax import checkpoint

    jax.devices()
    context.emit(device_ready_seconds=time.time() - started)
    params = {part: checkpoint.load(folder, part, context.size.dtype) for part in ("transformer", "vae")}
    checkpoint.checkpoint_hash(folder)  # `LongLivePipeline.from_pretrained` notes it, and it takes time
    context.emit(loaded_seconds=time.time() - started)
    ours = context.ours(params)
    jax.block_until_ready(ours.params)
    context.emit(on_device_seconds=time.time() - started)
    np.asarray(ours.step(ours.init(True), True, first=True)[1].frames)
    context.emit(first_frame_seconds=time.time() - started, compiled=ours.compiled)


ATTENTION: dict[str, dict[str, Any]] = {
    "cudnn": {"implementation": "cudnn"},
    "cudnn, with a length": {"implementation": "cudnn", "with_length": True},  # as the model, whose cache fills up
} | {f"cudnn, keys in {n} parts": {"implementation": "cudnn", "split_kv": n} for n in (2, 3, 5)}
"""Implementations of `longlive_jax.models.attention.attention`: arguments by name."""


def ours_attention(context: Context) -> None:
    """Self-attention of a block over one to four blocks of keys."""
    import jax
    import numpy as np

    from longlive_jax.models.attention import attention

    on_cpu = jax.default_backend() == "cpu"
    on_a_cpu = {name: {"implementation": "xla", "with_length": name != "xla"} for name in ("xla", "xla, with a length")}
    for name, options in (on_a_cpu if on_cpu else ATTENTION).items():
        with_length = options.get("with_length", False)
        options = {word: value for word, value in options.items() if word != "with_length"}
        run = jax.jit(lambda q, k, v, n, options=options: attention(q, k, v, key_length=n, **options))

        def many(args, run=run, with_length=with_length):
            length = np.int32(args[1].shape[1]) if with_length else None
            return [run(*args, length) for _ in range(context.size.inner)]

        draw = lambda shape, i: jax.random.normal(jax.random.key(i), shape, context.size.dtype)
        attention_figures(context, name, draw, many, timing.wait_for_jax)


def torch_attention(context: Context) -> None:
    """The same by PyTorch, for each of its kernels."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from longlive_jax.bench.published import set_up, wait

    device, kind = set_up(), getattr(torch, context.size.dtype)
    kernels = ("CUDNN_ATTENTION", "FLASH_ATTENTION") if device.type == "cuda" else ("FLASH_ATTENTION",)
    for kernel in kernels:

        def many(args, kernel=kernel):
            with sdpa_kernel(getattr(SDPBackend, kernel)):
                q, k, v = (a.transpose(1, 2) for a in args)
                return [torch.nn.functional.scaled_dot_product_attention(q, k, v) for _ in range(context.size.inner)]

        attention_figures(context, kernel, lambda shape, i: torch.randn(shape, device=device, dtype=kind), many, wait)


def attention_figures(context: Context, name: str, draw, many, wait) -> None:
    cfg, size = context.size.config.transformer, context.size
    block, kinds = size.config.sampler.block_frames, {}
    for blocks in range(1, size.config.sampler.window // block + 1):
        queries, keys = block * size.frame, blocks * block * size.frame
        args = [draw((1, length, cfg.num_heads, cfg.head_dim), i) for i, length in enumerate((queries, keys, keys))]
        times = timing.measure(lambda: many(args), warmup=2, calls=5, seconds=3, wait=wait)  # noqa: B023 - at once
        times = timing.Times.of(ms / size.inner for ms in times.ms)
        kinds[keys] = spent(times, 4.0 * queries * keys * cfg.dim)
    context.emit(**{name: kinds})


def gemm_shapes(size: Size) -> list[tuple[int, int, int]]:
    """Rows, inputs and outputs of the products of a block: output and prompt, fused q k v, up, down."""
    cfg, rows = size.config.transformer, size.config.sampler.block_frames * size.frame
    return [(rows, cfg.dim, n) for n in (cfg.dim, 3 * cfg.dim, cfg.ffn_dim)] + [(rows, cfg.ffn_dim, cfg.dim)]


def ours_gemms(context: Context) -> None:
    """Matrix products at our shapes, in bfloat16, int8 and float8; each over several pairs of matrices at once."""
    import jax
    import jax.numpy as jnp

    kinds = {context.size.dtype: None, "int8": "int32", "float8_e4m3fn": "bfloat16"}
    for kind, into in kinds.items():
        product = lambda a, b, into=into: jax.lax.dot(a, b, preferred_element_type=into)
        run = jax.jit(lambda xs, ws, product=product: [product(x, w) for x, w in zip(xs, ws)])

        def draw(shape, i, kind=kind):
            x = jax.random.normal(jax.random.key(i), shape)
            return (32 * x if kind == "int8" else x).astype(jnp.dtype(kind))

        gemm_figures(context, kind, draw, run, timing.wait_for_jax)


def torch_gemms(context: Context) -> None:
    """The same by PyTorch."""
    import torch

    from longlive_jax.bench.published import set_up, wait

    device, kind = set_up(), getattr(torch, context.size.dtype)
    draw = lambda shape, i: torch.randn(shape, device=device, dtype=kind)
    gemm_figures(context, context.size.dtype, draw, lambda xs, ws: [x @ w for x, w in zip(xs, ws)], wait)


def gemm_figures(context: Context, kind: str, draw, run, wait) -> None:
    found: dict[str, Any] = {}
    for rows, inputs, outputs in gemm_shapes(context.size):
        name = f"{rows}x{inputs}x{outputs}"
        try:  # not every type has a product everywhere: that is a finding, not a failure of the others
            xs = [draw((rows, inputs), 2 * i) for i in range(context.size.inner)]
            ws = [draw((inputs, outputs), 2 * i + 1) for i in range(context.size.inner)]
            times = timing.measure(lambda: run(xs, ws), warmup=2, calls=5, seconds=2, wait=wait)  # noqa: B023 - at once
            times = timing.Times.of(ms / context.size.inner for ms in times.ms)
            found[name] = spent(times, 2.0 * rows * inputs * outputs)
        except Exception as error:
            found[name] = {"error": str(error).splitlines()[0][:200]}
    context.emit(**{kind: found})


def ours_error(context: Context) -> None:
    """A first pass and a decode as this row's variant computes them against float32, on the same rounded weights."""
    import jax
    import jax.numpy as jnp

    from longlive_jax.bench import weights
    from longlive_jax.bench.ours import Ours, Pass

    config = context.size.config
    params = weights.ours(config, context.size.dtype)
    narrow = context.ours(params)
    context.emit(dtype=context.size.dtype)
    wide = Ours(config, jax.tree.map(lambda a: a.astype(jnp.float32), params), jnp.float32)
    flow = lambda model: jax.device_get(Pass(model, model.init(False))())
    pixels = lambda model: jax.device_get(model.decode_call(floats=True)())
    for part in (flow, pixels):
        mine = part(narrow)
        # Programs are traced when they are first called: set for longer, this would change ours too.
        with jax.default_matmul_precision("highest"):
            right = part(wide)
        context.emit(**(flow_error if part is flow else pixel_error)(mine, right))


def flow_error(a, b) -> dict[str, float]:
    """Relative L2 error of the first."""
    import numpy as np

    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return {"flow_relative_l2": float(np.linalg.norm(a - b) / np.linalg.norm(b))}


def pixel_error(a, b) -> dict[str, float | None]:
    """PSNR of pixels in [-1, 1]; None if they are the same."""
    import numpy as np

    mean = float(np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2))
    return {"pixels_psnr_db": 10 * float(np.log10(4 / mean)) if mean else None}


# MARK: the official code


def stock_dit(context: Context, lora: bool = False, compiled: bool = False) -> None:
    """A block and a pass of the official generator."""
    size, start = context.size, time.perf_counter()
    with context.official(lora=lora, compiled=compiled) as official:
        context.emit(attention=official.attention, built_seconds=time.perf_counter() - start)
        start = time.perf_counter()
        official.run(official.ramp_blocks() + 2)
        context.emit(first_run_seconds=time.perf_counter() - start)
        blocks = 3 if size.blocks < 10 else 20
        context.emit(block=spent(official.blocks(blocks), block_flops(size)), memory=torch_memory())
        context.emit(passes={n: spent(t, pass_flops(size, n)) for n, t in official.passes().items()})


def stock_video(context: Context, lora: bool = True) -> None:
    """The official pipeline to uint8 pixels on the host: a clip decoded at the end, and a single block."""
    size = context.size
    blocks = 7 if size.blocks < 10 else 20
    missing = (
        "blocks have no arrival times: the clip is decoded at its end. `block` adds up a block's passes and its "
        "decoding, which lie apart, with the window full; the way to the host is only in `ms_per_block`, a mean"
    )
    with context.official(lora=lora, decode=True) as official:
        official.run(2, to_host=True)
        ms = official.run(blocks, to_host=True)
        context.emit(attention=official.attention, blocks=blocks, ms_per_block=ms / blocks, fps=12e3 * blocks / ms)
        if (sums := official.block_sums()) is not None:
            context.emit(block=spent(sums, block_flops(size) + vae_flops(size)))
        context.emit(missing={"p50 and p95 of a block from pixels to pixels": missing})
        context.emit(
            first_frame=spent(timing.Times.of(official.run(1, to_host=True) for _ in range(3))), memory=torch_memory()
        )


def stock_recache(context: Context) -> None:
    """A prompt switch of the official interactive pipeline, once the window is full."""
    with context.official(interactive=True) as official:
        blocks = 2 * official.ramp_blocks()
        first = official.recache(blocks)
        times = timing.Times.of(official.recache(blocks) for _ in range(2))
        context.emit(attention=official.attention, first_ms=first, recache=spent(times), memory=torch_memory())


def stock_vae(context: Context, variants: Sequence[str] = ()) -> None:
    """Decoding a block's latents by the official VAE."""
    from longlive_jax.bench import official

    size = context.size
    made = official.vae_decodes(context.repo, size.official, size.config.sampler, size.dtype)
    flops = counts.decode(size.official.vae, size.config.sampler, size.config.sampler.block_frames)
    for name in variants:
        times, seconds = official.time_variant(made[name], size.calls, 6)
        context.emit(**{name: spent(times, flops) | {"first_two_seconds": seconds}})
    context.emit(memory=torch_memory())


def stock_error(context: Context) -> None:
    """A block of the official pipeline in this row's precision against float32, on the same rounded weights."""
    import torch

    flows = []
    for dtype in (context.size.dtype, "float32"):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        with context.official(dtype=dtype, drawn=context.size.dtype) as official, torch.no_grad():
            context.emit(**{f"attention_{dtype}": official.attention})
            official.run(1)
            flows.append(official.one_pass().float().cpu().numpy())
    context.emit(**flow_error(*flows), dtype=context.size.dtype)


def torch_memory() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        from longlive_jax.bench.machine import peak_memory

        return peak_memory()
    return {"bytes": torch.cuda.max_memory_allocated(), "of": "device"}


def main(settings: dict[str, Any], into: Path) -> None:
    def emit(**figures: Any) -> None:
        with open(into, "a") as file:
            file.write(json.dumps(figures) + "\n")

    repo = None if settings["repo"] is None else Path(settings["repo"])
    context = Context(Size.of(settings["rehearse"]), repo, settings["variant"], emit, settings)
    globals()[settings["body"]](context, **settings["arguments"])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
