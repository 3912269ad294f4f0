"""All figures of one model on this machine: the JSON of `longlive bench`, and its table.

What cannot be measured here is null in the JSON, and the reason stands under "missing".
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

from longlive_jax.bench import counts, machine
from longlive_jax.bench.ours import Ours, Pass, programs_in
from longlive_jax.bench.timing import in_turn, measure, once
from longlive_jax.cache import Window
from longlive_jax.config import TEMPORAL_FACTOR, ModelConfig, SamplerConfig
from longlive_jax.errors import UserError

KEYS = (
    "dit_ms_per_block", "end_to_end_ms_per_block", "end_to_end_fps", "recache_ms", "first_frame_ms", "dit_vs_torch",
    "vae_vs_torch", "end_to_end_vs_stock", "end_to_end_vs_torch", "hardware", "versions",
)  # fmt: skip
"""Of the JSON; there is more beside them."""

MOST_SECONDS = 60.0
"""A block that is expected to take longer is not begun."""

DEFINITIONS = {
    "block": "{frames} latent frames, {pixels} pixel frames of {width} x {height}; {steps} denoising steps and a clean "
    "pass, window of {window} latent frames, full; {dtype}; batch of 1; each block is waited for; p50",
    "dit_ms_per_block": "the transformer's passes of a block and its noise; no VAE",
    "end_to_end_ms_per_block": "from block to block as its uint8 pixels arrive on the host: transformer and full VAE, "
    "the next block already on its way",
    "end_to_end_fps": "pixel frames a second at end_to_end_ms_per_block; no prompt encoding, no video file",
    "recache_ms": "a prompt switch with the window full: new text keys and values, and the window recached in one "
    "pass, sink kept",
    "first_frame_ms": "from prompt embedding to the first block's pixels on the host, everything compiled",
    "dit_vs_torch": "PyTorch's time over ours, timed in turn in one process on the same cores: {dit_vs_torch}",
    "vae_vs_torch": "PyTorch's time over ours for decoding a block in the middle of a video, timed in turn: "
    "{vae_vs_torch}",
    "end_to_end_vs_stock": "time of the official pipeline as shipped (LoRA by peft, clip decoded at its end) over ours "
    "for the same video, noise to uint8 pixels on the host, timed in turn",
    "end_to_end_vs_torch": "fastest PyTorch transformer and VAE of these, together, over end_to_end_ms_per_block",
    "flops": "two a multiplication and addition, of products and convolutions; of the model, not of the program",
    "compile": "seconds to trace and compile what a video needs (state, block): cold, and warm from a cache on disk",
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
      config, sampler: the model and its settings.
      dtype: of weights and activations.
      weights: where they come from, in words.
      load: makes the parameters of "transformer" and "vae".
      blocks: timed in the steady state.
      seconds: no measurement goes on much longer than this.
      torch: whether to compare with PyTorch, if it is installed.
      torch_compile: whether `torch.compile` is among the variants.
      torch_repo: clone of the official repository, or None.
      clock: what times are of, in words.
    """

    config: ModelConfig
    sampler: SamplerConfig
    dtype: str
    weights: str
    load: Callable[[], dict[str, Any]]
    blocks: int = 20
    seconds: float = 20.0
    torch: bool = True
    torch_compile: bool = True
    torch_repo: Path | None = None
    clock: str = "wall"


def run(plan: Plan, say: Callable[[str], None]) -> dict[str, Any]:
    """Measures all of it; `say` gets a line a part.

    Raises:
      UserError: the model is too much for this machine.
    """
    say("machine")
    found = {"hardware": machine.hardware(), "versions": machine.versions(), "ceilings": machine.ceilings(plan.dtype)}
    flops = work(plan)
    refuse_hours(plan, flops, found["ceilings"]["matmul"]["flops_per_second"])
    missing: dict[str, str] = {}
    results: dict[str, Any] = (
        dict.fromkeys(KEYS) | found | {"missing": missing, "weights": plan.weights, "clock": plan.clock}
    )
    with tempfile.TemporaryDirectory() as programs, programs_in(programs):
        params = plan.load()
        ours = Ours(plan.config, params, plan.dtype, plan.sampler)
        results |= _ours(plan, ours, params, flops, say)
        if not plan.torch:
            missing |= dict.fromkeys(("dit_vs_torch", "vae_vs_torch"), "left out by --no-torch")
        else:
            with _reason(missing, "dit_vs_torch", "vae_vs_torch"):
                results |= _against_diffusers(plan, ours, missing, say)
        with _reason(missing, "end_to_end_vs_stock"):
            results |= _against_stock(plan, ours, say)
        with _reason(missing, "end_to_end_vs_torch"):
            results |= _against_parts(plan, results, say)
    words = {key: results.get(f"{key}_what", "not measured") for key in ("dit_vs_torch", "vae_vs_torch")}
    results["definitions"] = {name: text.format(**_settings(plan), **words) for name, text in DEFINITIONS.items()}
    return results


def work(plan: Plan) -> dict[str, float]:
    """FLOPs of a block's passes, of its decoding, and of a recache."""
    cfg, window = plan.config, Window.of(plan.sampler, 0)
    return {
        "dit": counts.block(cfg.transformer, plan.sampler, window),
        "vae": counts.decode(cfg.vae, plan.sampler, window.block),
        "recache": counts.recache(cfg.transformer, plan.sampler, window),
    }


def refuse_hours(plan: Plan, flops: dict[str, float], speed: float) -> None:
    """Raises UserError if a block would take minutes even at the speed of a large matrix product."""
    needed = flops["dit"] + flops["vae"]
    if needed / speed > MOST_SECONDS:
        size = f"{plan.sampler.height} x {plan.sampler.width}"
        raise UserError(
            f"a block at {size} is {needed / 1e12:.1f} TFLOP, at least {needed / speed / 60:.0f} minutes at the "
            f"{speed / 1e9:.0f} GFLOP/s of this machine; make the picture smaller (--height 64 --width 64), "
            "take --preset sprites, or run it on an accelerator"
        )


def _settings(plan: Plan) -> dict[str, Any]:
    s = plan.sampler
    pixels = TEMPORAL_FACTOR * s.block_frames
    return {"frames": s.block_frames, "pixels": pixels, "width": s.width, "height": s.height, "steps": len(s.steps),
            "window": s.window, "dtype": plan.dtype}  # fmt: skip


def _ours(plan: Plan, ours: Ours, params, flops: dict[str, float], say: Callable[[str], None]) -> dict[str, Any]:
    pixels = TEMPORAL_FACTOR * plan.sampler.block_frames
    say("transformer: compiling, then blocks")
    state = ours.steady(False)
    dit, state = ours.blocks(state, plan.blocks, seconds=plan.seconds)
    say("prompt switch")
    recache, state = ours.recaches(state, 5, seconds=plan.seconds)
    del state
    say("end to end: compiling, then blocks")
    state = ours.steady(True)
    video, state = ours.stream(state, plan.blocks, seconds=plan.seconds)
    del state
    say("first frame")
    first = ours.first_frame()
    vae = measure(ours.decode_call(), calls=plan.blocks, seconds=plan.seconds)
    again = Ours(plan.config, params, plan.dtype, plan.sampler)
    jax.clear_caches()
    again.step(again.step(again.init(True), True, first=True)[0], True)
    cold = sum(ours.compiled[name]["seconds"] for name in again.compiled)
    times = {"dit": dit, "end_to_end": video, "vae": vae, "recache": recache, "first_frame": first}
    work = flops | {"end_to_end": flops["dit"] + flops["vae"]}
    return {
        "dit_ms_per_block": dit.p50,
        "end_to_end_ms_per_block": video.p50,
        "end_to_end_fps": 1000 * pixels / video.p50,
        "recache_ms": recache.p50,
        "first_frame_ms": first.p50,
        "times": {name: t.summary() for name, t in times.items()},
        "flops": work,
        "flops_per_second": {name: 1000 * work[name] / times[name].p50 for name in work},
        "compile": {
            "cold_seconds": cold,
            "warm_seconds": sum(program["seconds"] for program in again.compiled.values()),
            "programs": ours.compiled,
            "programs_warm": again.compiled,
        },
        "peak_memory": machine.peak_memory(),
    }


# MARK: PyTorch


def _against_diffusers(plan: Plan, ours: Ours, missing, say) -> dict[str, Any]:
    """The transformer's pass and the VAE's decode against every variant of diffusers'."""
    from longlive_jax.bench import published

    found: dict[str, Any] = {}
    mine = Pass(ours, ours.steady(False))
    passes = {"diffusers, eager": False} | ({"diffusers, compiled": True} if plan.torch_compile else {})
    makes = {
        name: lambda compiled=compiled: published.transformer_pass(
            plan.config.transformer, plan.sampler, plan.dtype, compiled=compiled
        )
        for name, compiled in passes.items()
    }
    what = "a forward pass of diffusers' WanTransformer3DModel with cached keys and values ({})"
    found |= _pairs("dit_vs_torch", what, makes, mine, plan, missing, say)
    makes = {
        f"diffusers, {name}": make
        for name, make in published.vae_decodes(plan.config.vae, plan.sampler, plan.dtype).items()
        if plan.torch_compile or "compiled" not in name
    }
    what = "diffusers' AutoencoderKLWan ({})"
    return found | _pairs("vae_vs_torch", what, makes, ours.decode_call(), plan, missing, say)


def _pairs(key: str, what: str, makes, mine, plan: Plan, missing, say) -> dict[str, Any]:
    """Ours against each variant in turn; the least ratio counts, since it is the fastest of theirs."""
    from longlive_jax.bench import published

    pairs = {}
    for name, make in makes.items():
        say(f"{key.partition('_')[0]} in turn with {name}")
        with _reason(missing, f"{key}: {name}"):
            theirs = make()
            pair = in_turn(
                lambda: once(mine),
                lambda: once(theirs, published.wait),  # noqa: B023 - called at once
                warmup=2, pairs=plan.blocks, seconds=plan.seconds,
            )  # fmt: skip
            pairs[name] = pair
    if not pairs:
        missing[key] = "no PyTorch variant ran"
        return {}
    best = min(pairs, key=lambda name: pairs[name].ratio)
    summary = {name: pair.summary() for name, pair in pairs.items()}
    return {key: pairs[best].ratio, f"{key}_what": what.format(best), f"{key}_variants": summary}


def _official(plan: Plan, **options: Any):
    """An official pipeline on random weights; a context."""
    if plan.torch_repo is None:
        raise UserError("give a clone of the official code by --torch-repo")
    from longlive_jax.bench.official import Official

    return Official.opened(plan.torch_repo, plan.config, plan.dtype, sampler=plan.sampler, **options)


def _against_stock(plan: Plan, ours: Ours, say) -> dict[str, Any]:
    """Whole videos against the official pipeline as shipped."""
    blocks = Window.of(plan.sampler, 0).slots // plan.sampler.block_frames + 2
    say("end to end in turn with the official pipeline as shipped")
    with _official(plan, lora=True, decode=True) as stock:
        pair = in_turn(lambda: ours.video(blocks), lambda: stock.run(blocks, to_host=True), pairs=3)
    return {"end_to_end_vs_stock": pair.ratio, "stock": pair.summary() | {"blocks": blocks}}


def _against_parts(plan: Plan, results: dict[str, Any], say) -> dict[str, Any]:
    """Our video against PyTorch's fastest transformer and fastest VAE, one after the other."""
    say("transformer of the official pipeline, LoRA merged")
    with _official(plan) as merged:
        dit = merged.blocks(min(plan.blocks, 10))
    fastest = {part: [v["b"]["p50_ms"] for v in results.get(f"{part}_vs_torch_variants", {}).values()]
               for part in ("dit", "vae")}  # fmt: skip
    found: dict[str, Any] = {"official_dit": dit.summary()}
    if not fastest["vae"]:  # without diffusers
        found["official_vae"] = vaes = _official_vaes(plan, say)
        fastest["vae"] = [times["p50_ms"] for times in vaes.values()]
    block = min([dit.p50, *((len(plan.sampler.steps) + 1) * ms for ms in fastest["dit"])])
    ratio = (block + min(fastest["vae"])) / results["end_to_end_ms_per_block"]
    return found | {"end_to_end_vs_torch": ratio}


def _official_vaes(plan: Plan, say) -> dict[str, Any]:
    """Times of decoding a block by each variant of the official VAE; compiled by `torch.compile` only on a GPU."""
    from longlive_jax.bench import official

    say("VAE of the official pipeline")
    makes = official.vae_decodes(plan.torch_repo, plan.config, plan.sampler, plan.dtype)
    compiles = plan.torch_compile and jax.default_backend() == "gpu"
    return {
        name: official.time_variant(make, plan.blocks, plan.seconds)[0].summary()
        for name, make in makes.items()
        if compiles or "compiled" not in name
    }


@contextlib.contextmanager
def _reason(missing: dict[str, str], *keys: str) -> Iterator[None]:
    """Notes why the body could not measure something, and goes on: a comparison is no reason to lose our figures."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing |= dict.fromkeys(keys, f"{error.name} is not installed")
    except UserError as error:
        missing |= dict.fromkeys(keys, str(error))
    except Exception as error:  # PyTorch's compiler can fail in any way
        first_line = (str(error).strip() or "no message").splitlines()[0]
        missing |= dict.fromkeys(keys, f"{type(error).__name__}: {first_line[:200]}")


# MARK: the table


def table(results: dict[str, Any]) -> Table:
    """What to print at the end."""
    device = results["hardware"]
    title = f"{device['device']}, {device['processor']}, {device['cores']} cores; weights: {results['weights']}"
    if results["clock"] != "wall":
        title += f"; clock: {results['clock']}"
    shown = Table("", "p50", "p95", "FLOP/s", "of ceiling", title=title, caption=results["definitions"]["block"])
    ceiling = results["ceilings"]["matmul"]["flops_per_second"]
    names = {
        "dit": "transformer, a block", "vae": "VAE, a block", "end_to_end": "end to end, a block",
        "recache": "prompt switch", "first_frame": "first frame",
    }  # fmt: skip
    for key, name in names.items():
        times, speed = results["times"][key], results["flops_per_second"].get(key)
        share = "" if speed is None else f"{speed / ceiling:.0%}"
        shown.add_row(name, ms(times["p50_ms"]), ms(times["p95_ms"]), flops(speed), share)
    compiling = results["compile"]
    shown.add_row("compilation", f"{compiling['cold_seconds']:.1f} s cold", f"{compiling['warm_seconds']:.1f} s warm")
    shown.add_row("peak memory", f"{results['peak_memory']['bytes'] / 2**30:.2f} GiB", results["peak_memory"]["of"])
    shown.add_row(
        "ceiling", "", "", flops(ceiling), f"{results['ceilings']['copy']['bytes_per_second'] / 1e9:.1f} GB/s"
    )
    shown.add_section()
    shown.add_row("end to end", f"{results['end_to_end_fps']:.1f} FPS")
    for key in ("dit_vs_torch", "vae_vs_torch", "end_to_end_vs_stock", "end_to_end_vs_torch"):
        shown.add_row(key, "-" if results[key] is None else f"{results[key]:.2f} x")
    return shown


def ms(value: float) -> str:
    return f"{value:.1f} ms" if value < 1e4 else f"{value / 1e3:.1f} s"


def flops(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return ""
    return f"{value / 1e12:.1f} T" if value >= 1e12 else f"{value / 1e9:.1f} G"
