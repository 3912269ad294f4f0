"""The official training modules on small networks, a chunk at a time: rollout, both losses and their gradients.

Student, critic and teacher are of any size, prompts are embeddings, and everything runs in float32 on a CPU, in one
process. The modules are the official ones as released, gradient checkpointing on; what is put in their place is sizes
(`official_pipeline`), what draws (`official_capture`), and calls that need a GPU or other processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.utils.checkpoint  # the official models call it by its full name without importing it

from longlive_jax.config import SamplerConfig, TransformerConfig
from longlive_jax.conversion.official_capture import Clock, Draw, given_draws
from longlive_jax.conversion.official_pipeline import Settings, fitted, in_wan_models, network, official_settings
from longlive_jax.conversion.official_repo import opened
from longlive_jax.errors import UserError

CHUNK = 21
"""Latent frames that are judged at once: a number in the official code."""

NEW = 18
"""Latent frames of every chunk after the first: the only number that the official code can draw."""

LORA_PARTS = {"generator": "generator", "critic": "fake_score"}
"""Network -> what the official function for adapters calls it."""

CLASSES = {
    "utils.wan_wrapper": ("WanVAEWrapper", "WanModel", "CausalWanModel"),
    "pipeline.self_forcing_training": ("SelfForcingTrainingPipeline",),
    "pipeline.streaming_switch_training": ("StreamingSwitchTrainingPipeline",),
    "model.dmd": ("DMD",),
    "model.dmd_switch": ("DMDSwitch",),
    "model.streaming_training": ("StreamingTrainingModel",),
}
"""What training takes from the clone; `model.base` looks for the first pipeline in its package."""

LORA_CLASSES = {"utils.lora_utils": ("configure_lora_for_model",)}

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass
class Chunk:
    """What is random in a chunk, in the order it is drawn; n frames.

    Attributes:
      exits: step that each block would end with; the official code follows the first.
      noise: [B, n, C, h, w].
      renoise: of each block, before each step but the first up to the exit step, [blocks, exit, B f, C, h, w].
      context_noise: of each block's clean pass, [blocks, B f, C, h, w].
      dmd_tau, critic_tau: [B], int64.
      dmd_noise, critic_noise: [B, 21, C, h, w].
    """

    exits: torch.Tensor
    noise: torch.Tensor
    renoise: torch.Tensor
    context_noise: torch.Tensor
    dmd_tau: torch.Tensor
    dmd_noise: torch.Tensor
    critic_tau: torch.Tensor
    critic_noise: torch.Tensor

    def rollout(self) -> list[Draw]:
        draws = [("randn", self.noise), ("randint", self.exits)]
        for renoise, context in zip(self.renoise, self.context_noise):
            draws += [("randn_like", noise) for noise in (*renoise, context)]
        return draws

    def score(self, loss: str) -> list[Draw]:
        return [("randint", getattr(self, f"{loss}_tau")[:, None]), ("randn_like", getattr(self, f"{loss}_noise"))]


@dataclasses.dataclass
class Training:
    """What is trained.

    Attributes:
      wan: folder with the VAE, in Wan's files.
      networks: "generator", "critic" and "teacher": sizes, and weights under the original names.
      vae_width: of the VAE.
      sampler: settings of the rollout.
      guidance: the official `guidance_scale`.
      streaming: one video of all chunks, else each chunk is a video of the first stage.
      lora: rank, alpha, and the adapters of "generator" and "critic" by peft's names; None for all weights.
      prompts: [prompts, B, L, width].
      negative: [B, L, width].
      switch_frame: when the second prompt comes, in streaming.
      chunks: what is random.
    """

    wan: Path
    networks: dict[str, tuple[TransformerConfig, dict[str, torch.Tensor]]]
    vae_width: int
    sampler: SamplerConfig
    guidance: float
    streaming: bool
    lora: tuple[int, float, dict[str, dict[str, torch.Tensor]]] | None
    prompts: torch.Tensor
    negative: torch.Tensor
    switch_frame: int | None
    chunks: list[Chunk]

    @property
    def frames(self) -> int:
        """Of the whole video."""
        return CHUNK + NEW * (len(self.chunks) - 1) if self.streaming else CHUNK

    @property
    def tokens(self) -> int:
        """A latent frame's."""
        patch, (rows, columns) = self.networks["generator"][0].patch, self.chunks[0].noise.shape[-2:]
        return (rows // patch[1]) * (columns // patch[2])


def run_training(repo: Path, training: Training, *, detach: bool) -> Arrays:
    """Runs the official modules on every chunk.

    Args:
      repo: the clone.
      training: what is trained.
      detach: whether the cache is detached after each write, as the official code does not.

    Returns:
      `chunk{i}_...`: new_latents, window, dmd_gradient, generator_loss, critic_loss, and
      generator_grad:NAME, critic_grad:NAME for each parameter that learns.

    Raises:
      UserError: no such clone, a missing package, or the modules drew otherwise than expected.
    """
    classes = CLASSES | (LORA_CLASSES if training.lora else {})
    if training.lora:
        try:
            import peft  # noqa: F401 - before the stand-ins: it looks for packages that are replaced while they are there
        except ModuleNotFoundError as error:
            raise UserError("the official code lays a LoRA over the model by peft: pip install peft") from error
    with (
        opened(repo, text=False, sdpa=True, classes=classes) as code,
        contextlib.redirect_stdout(sys.stderr),  # the official code tells its progress
        _one_cpu_process(),
    ):
        model = _model(code, training)
        if detach:
            model.generator.register_forward_hook(_detach_cache, with_kwargs=True)
        run = _streaming(code, model, training) if training.streaming else partial(_first_stage, model, training)
        arrays = {}
        for i, chunk in enumerate(training.chunks):
            arrays |= {f"chunk{i}_{name}": value for name, value in run(chunk).items()}
        return arrays


# MARK: chunks


def _streaming(code: types.SimpleNamespace, model: Any, training: Training) -> Callable[[Chunk], Arrays]:
    """What runs the next chunk of a video that begins now."""
    stream = code.StreamingTrainingModel(model, model.args)
    switch = {"prompt_embeds": training.prompts[-1]} if training.switch_frame is not None else None
    stream.setup_sequence(
        conditional_dict={"prompt_embeds": training.prompts[0]},
        unconditional_dict={"prompt_embeds": training.negative},
        switch_conditional_dict=switch,
        switch_frame_index=training.switch_frame,
        temp_max_length=training.frames,
    )

    def run(chunk: Chunk) -> Arrays:
        with given_draws(chunk.rollout()):
            window, info = stream.generate_next_chunk(requires_grad=True)
        with given_draws(chunk.score("dmd")):
            loss, _ = stream.compute_generator_loss(window, info)
        found = {"window": window, "new_latents": window[:, -chunk.noise.shape[1] :]}
        found |= _learned(model, "generator", loss)
        with given_draws(chunk.score("critic")):
            loss, _ = stream.compute_critic_loss(window, info)
        return _arrays(found | _learned(model, "critic", loss))

    return run


def _first_stage(model: Any, training: Training, chunk: Chunk) -> Arrays:
    """A video of the first stage; the critic's own rollout is given the same draws."""
    batch, _, *latent = chunk.noise.shape
    prompt, negative = ({"prompt_embeds": embeds} for embeds in (training.prompts[0], training.negative))
    frames = [("randint", torch.tensor([CHUNK // model.num_frame_per_block]))]
    call = dict(
        image_or_video_shape=[batch, CHUNK, *latent], conditional_dict=prompt, unconditional_dict=negative,
        clean_latent=None,
    )  # fmt: skip
    with given_draws(frames + chunk.rollout() + chunk.score("dmd")):
        loss, _ = model.generator_loss(**call)
    found = {"window": model.scored, "new_latents": model.scored, **_learned(model, "generator", loss)}
    with given_draws(frames + chunk.rollout() + chunk.score("critic")):
        loss, _ = model.critic_loss(**call)
    return _arrays(found | _learned(model, "critic", loss))


def _learned(model: Any, name: str, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """A loss, what is known of it, and its gradients by the original or peft's names."""
    net = {"generator": model.generator, "critic": model.fake_score}[name].model
    if not loss.requires_grad:
        raise UserError("a chunk has no gradient: the official code has none where a switch falls into its last block")
    loss.backward()
    found = {f"{name}_loss": loss.double()} | ({"dmd_gradient": model.kl_gradient} if name == "generator" else {})
    for parameter, value in net.named_parameters():
        if value.requires_grad:
            gradient = torch.zeros_like(value) if value.grad is None else value.grad
            found[f"{name}_grad:{parameter.replace('.default.', '.')}"] = gradient
    net.zero_grad(set_to_none=True)
    return found


def _arrays(tensors: dict[str, torch.Tensor]) -> Arrays:
    return {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}


def _detach_cache(generator, args, kwargs, output) -> None:
    for entry in kwargs.get("kv_cache") or ():
        entry["k"], entry["v"] = entry["k"].detach(), entry["v"].detach()


# MARK: modules


def _model(code: types.SimpleNamespace, training: Training) -> Any:
    """The official DMD model; `kl_gradient` and `scored` are the last score difference and what it was of."""
    cfg, clock = training.networks["generator"][0], Clock(torch.device("cpu"))
    wrapper = code.modules["utils.wan_wrapper"]

    def from_pretrained(cls, path, **options):
        sizes, weights = training.networks["generator" if cls is code.CausalWanModel else Path(path).name]
        return network(cls, sizes, weights, **options)

    for name in ("CausalWanModel", "WanModel"):
        getattr(wrapper, name).from_pretrained = classmethod(from_pretrained)
    wrapper._video_vae = partial(wrapper._video_vae, dim=training.vae_width)
    base, switch = sys.modules["model.base"], code.modules["model.dmd_switch"]
    base.WanTextEncoder = torch.nn.Identity  # prompts are embeddings
    for module, name in ((base, "SelfForcingTrainingPipeline"), (switch, "StreamingSwitchTrainingPipeline")):
        setattr(module, name, _sized(fitted(getattr(code, name), cfg, clock), cfg, training.tokens))

    class Model(code.DMDSwitch if training.streaming else code.DMD):
        def _compute_kl_grad(self, *args, **kwargs):
            found = super()._compute_kl_grad(*args, **kwargs)
            self.kl_gradient, self.scored = found[0], kwargs["estimated_clean_image_or_video"]
            return found

    with in_wan_models(training.wan):
        model = Model(_settings(training), torch.device("cpu"))
    for part in (model.generator, model.fake_score, model.real_score):
        part.seq_len = CHUNK * training.tokens
    if training.lora:
        _adapt(code, model, *training.lora)
    return model


def _settings(training: Training) -> Settings:
    """The official configuration: both stages' YAML files, in float32 and at these sizes."""
    batch, _, *latent = training.chunks[0].noise.shape
    return Settings(
        official_settings(training.sampler),
        image_or_video_shape=[batch, CHUNK, *latent],
        real_name="teacher", fake_name="critic", mixed_precision=False, gradient_checkpointing=True,
        num_train_timestep=1000, timestep_shift=training.sampler.shift, guidance_scale=training.guidance,
        ts_schedule=False, denoising_loss_type="flow", i2v=False, independent_first_frame=False,
        same_step_across_blocks=True, last_step_only=False, global_sink=False,
        num_training_frames=CHUNK, min_num_training_frames=CHUNK, slice_last_frames=CHUNK,
        streaming_chunk_size=CHUNK, streaming_min_new_frame=NEW, streaming_max_length=training.frames,
    )  # fmt: skip


def _adapt(
    code: types.SimpleNamespace, model: Any, rank: int, alpha: float, adapters: dict[str, dict[str, torch.Tensor]]
) -> None:
    """Adapters on student and critic, configured by the official function and filled as from its checkpoint."""
    import peft

    parts = {"generator": model.generator, "critic": model.fake_score}
    settings = {"type": "lora", "rank": rank, "alpha": alpha, "dropout": 0.0}
    for name, part in parts.items():
        part.model = code.configure_lora_for_model(part.model, LORA_PARTS[name], settings, is_main_process=False)
        peft.set_peft_model_state_dict(part.model, adapters[name])


def _sized(base: type, cfg: TransformerConfig, tokens: int) -> type:
    """A training pipeline class for a number of layers and of tokens a frame."""

    class Sized(base):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.kv_cache_size = self.kv_cache_size // self.frame_seq_length * tokens
            self.num_transformer_blocks, self.frame_seq_length = cfg.num_layers, tokens

    return Sized


@contextlib.contextmanager
def _one_cpu_process() -> Iterator[None]:
    """Nothing goes to a GPU or to other processes, which the training modules take for granted."""
    places = [
        (torch.Tensor, "cuda", lambda tensor, *_, **__: tensor),
        (torch.distributed, "get_rank", lambda *_: 0),
        (torch.distributed, "broadcast", lambda *_, **__: None),
    ]
    before = [getattr(place, name) for place, name, _ in places]
    for place, name, value in places:
        setattr(place, name, value)
    try:
        yield
    finally:
        for (place, name, _), value in zip(places, before):
            setattr(place, name, value)
