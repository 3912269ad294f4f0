"""Records a training case: runs the official training modules from a clone on small random networks.

    python -m longlive_jax.conversion.record_training --torch-repo LongLive --output case --stage long --lora-rank 4
    longlive parity --checkpoint case/checkpoint --critic case/critic.safetensors --teacher case/teacher.safetensors \
        case/training.npz

The folder has the case (`training.npz`), the student and its VAE converted (`checkpoint/`) and as they were (`wan/`),
critic and teacher, and with --lora-rank the adapters in LongLive's own format (`lora.pt`).
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from longlive_jax.checkpoint import new_folder, tensor_shapes
from longlive_jax.config import SPATIAL_FACTOR, SamplerConfig, TransformerConfig, VAEConfig, replace
from longlive_jax.conversion import tables
from longlive_jax.conversion.convert import convert_wan
from longlive_jax.conversion.recording import random_weights, write_random_wan
from longlive_jax.errors import UserError, collect, raise_all

CASE = "training.npz"
GUIDANCE = 3.0
"""The official `guidance_scale`."""


@dataclasses.dataclass(kw_only=True)
class RecordTraining:
    """Run the official training modules (NVlabs/LongLive, branch v1.0) on random networks and write a training case.

    Attributes:
      torch_repo: clone of the official repository: git clone -b v1.0 https://github.com/NVlabs/LongLive
      output: the folder to make.
      stage: init is the first stage, where each chunk is a video of its own; long is streaming, all chunks one video.
      exit_steps: index of the step that each chunk ends with; as many chunks are run.
      switch_frame: latent frame of the second prompt, in stage long; -1 for none.
      lora_rank: adapters of this rank on student and critic, which alone learn; 0 for none.
      lora_alpha: their alpha; the rank by default.
      detach: record the student's gradients with the cache detached after each write too.
      seed: of the weights and of all that is drawn.
      batch: videos at once; the official first stage can do no more than one.
      dim, ffn_dim, heads, layers: of student and critic; the teacher has a head and a layer more.
      text_length, text_dim: of the prompt embeddings.
      vae_width: of the VAE.
      height, width: in pixels.
      window: latent frames attended, the sink among them.
      sink_frames: latent frames of the sink.
    """

    torch_repo: Path
    output: Path
    stage: Literal["init", "long"] = "long"
    exit_steps: tuple[int, ...] = (2, 0, 3, 1)
    switch_frame: int = 39
    lora_rank: int = 0
    lora_alpha: float | None = None
    detach: bool = False
    seed: int = 0
    batch: int = 1
    dim: int = 128
    ffn_dim: int = 320
    heads: int = 2
    layers: int = 3
    text_length: int = 16
    text_dim: int = 48
    vae_width: int = 8
    height: int = 64
    width: int = 96
    window: int = 12
    sink_frames: int = 3

    @property
    def alpha(self) -> float:
        return self.lora_alpha or float(self.lora_rank)

    @property
    def switches(self) -> bool:
        return self.stage == "long" and self.switch_frame >= 0

    def sampler(self) -> SamplerConfig:
        names = ("height", "width", "window", "sink_frames")
        return replace(SamplerConfig(), **{name: getattr(self, name) for name in names}, rope="absolute")

    def networks(self) -> dict[str, TransformerConfig]:
        """Sizes of the networks."""
        student = TransformerConfig(
            dim=self.dim, ffn_dim=self.ffn_dim, num_layers=self.layers, num_heads=self.heads, text_dim=self.text_dim,
            text_length=self.text_length,
        )  # fmt: skip
        heads = self.heads + 1
        teacher = dataclasses.replace(
            student, dim=student.head_dim * heads, num_heads=heads, num_layers=self.layers + 1
        )
        return {"generator": student, "critic": student, "teacher": teacher}

    def check(self) -> None:
        """Raises UserError with all that is wrong with the settings."""
        faults = []
        for name, least in (("batch", 1), ("seed", 0), ("lora_rank", 0), ("window", 1)):
            if getattr(self, name) < least:
                faults.append(f"--{name.replace('_', '-')} is {getattr(self, name)}; at least {least} is needed")
        if self.stage == "init" and self.batch > 1:
            faults.append("--batch: the official first stage fails with more than one video; leave it out")
        with collect(faults):
            self.sampler().check_size(self.networks()["generator"].patch)
        steps = len(SamplerConfig().steps)
        if not self.exit_steps or not all(0 <= step < steps for step in self.exit_steps):
            faults.append(f"--exit-steps needs one or more of 0 to {steps - 1}")
        if self.output.exists():
            faults.append(f"{self.output} exists; name a folder to make")
        raise_all(faults)


def record_training(command: RecordTraining) -> dict[str, Any]:
    """Records a case and all that is needed to run it.

    Returns:
      `meta` of the case.

    Raises:
      UserError: bad settings, no such clone, a missing package; nothing has been written.
    """
    command.check()
    try:
        import torch
        from safetensors.torch import save_file

        from longlive_jax.conversion.official_training import CHUNK, NEW, Training, run_training
    except ModuleNotFoundError as error:
        raise UserError('the official code needs PyTorch: pip install "longlive-jax[convert]"') from error
    generator = torch.Generator().manual_seed(command.seed)
    cfgs, vae = command.networks(), VAEConfig(base_width=command.vae_width)
    with new_folder(command.output) as new:
        write_random_wan(new / "wan", (cfgs["generator"], vae), command.seed)
        convert_wan(new / "wan", new / "checkpoint", dtype="float32")
        weights = {name: random_weights("transformer", cfgs[name], generator) for name in ("critic", "teacher")}
        for name, tensors in weights.items():
            save_file(tensors, new / f"{name}.safetensors")
            sizes = {"num_heads": cfgs[name].num_heads, "text_len": cfgs[name].text_length}
            (new / f"{name}.json").write_text(json.dumps(sizes))
        weights["generator"] = _student(new / "wan")
        lora = None
        if command.lora_rank:
            adapters = {name: _adapters(cfgs[name], command.lora_rank, generator) for name in ("generator", "critic")}
            lora = (command.lora_rank, command.alpha, adapters)
            torch.save({f"{name}_lora": adapters[name] for name in adapters} | {"step": 1}, new / "lora.pt")
        prompts, negative = _embeds(command, generator)
        training = Training(
            wan=new / "wan",
            networks={name: (cfgs[name], weights[name]) for name in cfgs},
            vae_width=command.vae_width,
            sampler=command.sampler(),
            guidance=GUIDANCE,
            streaming=command.stage == "long",
            lora=lora,
            prompts=prompts,
            negative=negative,
            switch_frame=command.switch_frame if command.switches else None,
            chunks=[_chunk(command, i, generator) for i in range(len(command.exit_steps))],
        )
        meta = _meta(command, training.frames, CHUNK, NEW)
        arrays = {"prompt_embeds": prompts.numpy(), "negative_embeds": negative.numpy()}
        for name, tensors in (lora[2] if lora else {}).items():
            arrays |= {f"{name}_lora:{key}": tensor.numpy() for key, tensor in tensors.items()}
        for i, chunk in enumerate(training.chunks):
            arrays |= _inputs(f"chunk{i}_", chunk, training, i)
        found = run_training(command.torch_repo, training, detach=False)
        arrays |= found | _norms(found)
        if command.detach:
            found = run_training(command.torch_repo, training, detach=True)
            found = {name: value for name, value in found.items() if "generator_grad:" in name}
            found |= _norms(found)
            arrays |= {f"detach:{name}": value for name, value in found.items()}
        odd = [name for name, value in arrays.items() if value.dtype.kind == "f" and not np.isfinite(value).all()]
        if odd:
            raise UserError(f"the official code gave {odd[0]} that is not finite; try another --seed")
        np.savez_compressed(new / CASE, meta=json.dumps(meta), **arrays)
    return meta


def _meta(command: RecordTraining, frames: int, chunk: int, new: int) -> dict[str, Any]:
    sampler = command.sampler()
    meta = {
        "kind": "streaming_training", "stage": command.stage, "local_attn_size": sampler.window,
        "sink_size": sampler.sink_frames, "num_frame_per_block": sampler.block_frames,
        "denoising_step_list": [int(step) for step in sampler.steps], "warp_denoising_step": sampler.warp,
        "timestep_shift": sampler.shift, "score_shift": 8.0, "guidance_scale": GUIDANCE, "chunk_frames": chunk,
        "new_frames": new, "max_length": frames, "context_noise": 0, "recache_sink": "zero",
    }  # fmt: skip
    if command.switches:
        meta["switch_frame"] = command.switch_frame
    if command.lora_rank:
        meta["lora"] = {"rank": command.lora_rank, "alpha": command.alpha}
    return meta


# MARK: what is drawn


def _student(wan: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    from longlive_jax.conversion.convert import DIT_NAME

    return load_file(wan / DIT_NAME)


def _adapters(cfg: TransformerConfig, rank: int, generator) -> dict[str, Any]:
    """Adapters by peft's names; B is not zero, or A would have no gradient."""
    import torch

    shapes = tensor_shapes("transformer", cfg)
    adapters = {}
    for row in tables.wan_lora(cfg).rows:
        layer, _, side = row.ours.rpartition(".")
        inputs, outputs = shapes[f"{layer}.kernel"]
        shape, scale = ((rank, inputs), inputs**-0.5) if side == "lora_a" else ((outputs, rank), 0.15)
        adapters[row.torch] = scale * torch.randn(shape, generator=generator)
    return adapters


def _embeds(command: RecordTraining, generator) -> tuple[Any, Any]:
    """Embeddings of the prompts and of the negative one; each ends in a row of zeros more, as padding does."""
    import torch

    shape = (2 + command.switches, command.batch, command.text_length, command.text_dim)
    embeds = torch.randn(shape, generator=generator)
    for i, prompt in enumerate(embeds):
        prompt[:, -(i + 1) :] = 0
    return embeds[1:], embeds[0]


def _chunk(command: RecordTraining, index: int, generator) -> Any:
    """What is random in a chunk. Later blocks get other exit steps, which the official code does not heed."""
    import torch

    from longlive_jax.conversion.official_training import CHUNK, NEW, Chunk

    sampler, exit_step = command.sampler(), command.exit_steps[index]
    frames = NEW if command.stage == "long" and index else CHUNK
    blocks, steps, f = frames // sampler.block_frames, len(sampler.steps), sampler.block_frames
    channels = command.networks()["generator"].in_channels
    latent = (channels, command.height // SPATIAL_FACTOR, command.width // SPATIAL_FACTOR)
    draw = lambda *shape: torch.randn(*shape, *latent, generator=generator)
    tau = lambda: torch.randint(0, 1000, (command.batch,), generator=generator)
    return Chunk(
        exits=(exit_step + torch.arange(blocks)) % steps,
        noise=draw(command.batch, frames),
        renoise=draw(blocks, exit_step, command.batch * f),
        context_noise=draw(blocks, command.batch * f),
        dmd_tau=tau(),
        dmd_noise=draw(command.batch, CHUNK),
        critic_tau=tau(),
        critic_noise=draw(command.batch, CHUNK),
    )


def _inputs(prefix: str, chunk: Any, training: Any, index: int) -> dict[str, np.ndarray]:
    """A chunk's draws as the case has them."""
    first = training.chunks[0].noise.shape[1]
    start = first + (index - 1) * chunk.noise.shape[1] if training.streaming and index else 0
    names = ("noise", "renoise", "context_noise", "dmd_tau", "dmd_noise", "critic_tau", "critic_noise")
    arrays = {f"{prefix}{name}": getattr(chunk, name).numpy() for name in names}
    numbers = {"start": start, "exit_step": int(chunk.exits[0])}
    return arrays | {f"{prefix}{name}": np.array(value, np.int32) for name, value in numbers.items()}


def _norms(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Norms of the gradients of each network in each chunk, JSON by name."""
    norms: dict[str, dict[str, float]] = {}
    for name, value in found.items():
        key, _, parameter = name.partition("_grad:")
        if parameter:
            norms.setdefault(f"{key}_grad_norms", {})[parameter] = float(np.linalg.norm(value.astype(np.float64)))
    return {name: np.array(json.dumps(values)) for name, values in norms.items()}


def main(args: list[str] | None = None) -> int:
    """Exits 0, or 1 with one line on stderr."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # shapes are all it is asked for
    command = tyro.cli(RecordTraining, prog="record_training", args=args, config=(tyro.conf.FlagCreatePairsOff,))
    try:
        record_training(command)
    except UserError as error:
        print("record_training:", str(error).replace("\n", " "), file=sys.stderr)
        return 1
    folder = command.output
    networks = " ".join(f"--{name} {folder / name}.safetensors" for name in ("critic", "teacher"))
    print(f"longlive parity --checkpoint {folder / 'checkpoint'} {networks} {folder / CASE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
