"""`longlive train init` and `long`: the student learns few steps from what it makes itself, teacher and critic judging.

A step has up to two turns, each of which makes a chunk: the student's (in every `student_every`-th step), then the
critic's. Stage init begins a new video every time. In stage long the videos of all streams go on from turn to turn, in
step with each other, until no further chunk fits; all change their prompt once, at the start of the same chunk. The
step that blocks end with is drawn once a turn for all streams, too: what decides is shared (`training/streams.py`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from longlive_jax import checkpoint, hub
from longlive_jax.cache import KVCache
from longlive_jax.config import SPATIAL_FACTOR, to_dict
from longlive_jax.data.prompts_source import PromptSource
from longlive_jax.data.sprite_prompts import canonical, paraphrase
from longlive_jax.data.sprite_source import CANONICAL_SHARE, changed
from longlive_jax.data.sprites import combinations_of
from longlive_jax.errors import raise_all
from longlive_jax.models.layers import initial, structure
from longlive_jax.models.transformer import WanTransformer
from longlive_jax.models.vae import VAE
from longlive_jax.prompts import Schedule
from longlive_jax.tokenizer import PromptTokenizer
from longlive_jax.training import lora
from longlive_jax.training.dmd import Score
from longlive_jax.training.phases import DistillPhase
from longlive_jax.training.rollout import Rollout
from longlive_jax.training.stage_config import SIZES
from longlive_jax.training.stages.base import side_by_side
from longlive_jax.training.stages.transformer import ModelStage, test_prompts
from longlive_jax.training.state import ChunkDraws, Prompts, RolloutDraws, StreamState, Tape
from longlive_jax.training.step import Part, Turn
from longlive_jax.training.streaming import Distillation, joined
from longlive_jax.training.streams import Parted, each

NEVER = 2**30
"""Latent frame of a switch that does not come."""

TURNS = 2

MADE_AXES = (
    StreamState(cache=KVCache(k=0, v=0, count=None), recent=0, position=None, switched=None),
    Prompts(embeds=0, negative=0, switch_frame=None),
    ChunkDraws(rollout=RolloutDraws(exit_step=None, noise=0), tau=0, noise=0, first_given=0),
    Tape(x=0, latents=0, clean=0, prompt=None),
)
"""Of what the part "rollout" gives, for `Part.axes`."""


@dataclasses.dataclass(frozen=True)
class SpritePrompts:
    """Video i's prompts: of combinations that may be trained on, each `changed` from the one before."""

    prompts_a_video: int
    seed: int

    def __getitem__(self, index: int) -> tuple[str, ...]:
        rng, pool = np.random.default_rng([self.seed, index]), combinations_of("train")
        chosen = [pool[int(rng.integers(len(pool)))]]
        while len(chosen) < self.prompts_a_video:
            chosen.append(changed(chosen[-1], rng))
        return tuple(canonical(c) if rng.random() < CANONICAL_SHARE else paraphrase(c, rng)[0] for c in chosen)


@dataclasses.dataclass(frozen=True)
class ShuffledPrompts:
    """Video i's prompts from files: every epoch all of them, in an order of its own."""

    source: PromptSource
    seed: int

    def __getitem__(self, index: int) -> tuple[str, ...]:
        epoch, place = divmod(index, len(self.source))
        return self.source[int(_order(self.seed, epoch, len(self.source))[place])]


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


@dataclasses.dataclass(frozen=True)
class ChunkSchedule:
    """Which chunk of which video a turn makes: a function of the step alone.

    Attributes:
      chunks: of a video.
      student_every: see `DistillTrainConfig`.
    """

    chunks: int
    student_every: int

    def turns(self, step: int) -> list[tuple[str, int, int]]:
        """(learner, video, chunk) of each turn."""
        student = step % self.student_every == 0
        before = step + -(-step // self.student_every)  # every step one, every student's step one more
        names = ["generator", "critic"] if student else ["critic"]
        if self.chunks == 1:  # both turns of a step make videos of their own, of the same prompts
            return [(name, step, 0) for name in names]
        return [(name, *divmod(before + i, self.chunks)) for i, name in enumerate(names)]


@dataclasses.dataclass(frozen=True, repr=False)
class DistillSource:
    """Record i is sample i % batch_size of step i // batch_size: tokens of each turn's prompts, and their switch."""

    prompts: Any
    tokenizer: Any
    schedule: ChunkSchedule
    switches: Sequence[int]
    batch_size: int
    seed: int
    length: int

    def __len__(self) -> int:
        return self.length

    def __repr__(self) -> str:
        return f"DistillSource(seed={self.seed}, batch_size={self.batch_size}, length={self.length})"

    def __getitem__(self, record_key) -> dict[str, np.ndarray]:
        step, slot = divmod(int(record_key), self.batch_size)
        videos = [video for _, video, _ in self.schedule.turns(step)]
        videos += videos[-1:] * (TURNS - len(videos))
        tokens = [self.tokenizer(list(self.prompts[video * self.batch_size + slot])) for video in videos]
        return {
            "ids": np.stack([t.ids for t in tokens]),
            "mask": np.stack([t.mask for t in tokens]),
            "switch_frame": np.array([self._switch(video) for video in videos], np.int32),
        }

    def _switch(self, video: int) -> int:
        """The same in all streams, as the official code broadcasts it: see `training/streams.py`."""
        if not self.switches:
            return NEVER
        rng = np.random.default_rng([self.seed, 1 << 20, video])
        return self.switches[int(rng.integers(len(self.switches)))]


class DistillStage(ModelStage):
    """The learners are "generator" and "critic", each with its "transformer" (or its adapters)."""

    streaming: bool

    def __init__(self, config, output, say):
        self._files = PromptSource(config.prompts, 1 + self.streaming) if config.prompts else None
        super().__init__(config, output, say)
        self._teacher = hub.find(config.teacher) if config.teacher else None
        self._critic = hub.find(config.critic) if config.critic else self._teacher
        self.teacher_config = self.model.transformer
        for role, folder in (("teacher", self._teacher), ("critic", self._critic)):
            if folder is not None:
                self.sources[role] = checkpoint.checkpoint_hash(folder)
        if self._init is None:
            say("no student given (init: FOLDER): an untrained one begins, which is good for trying out only")
        if self._teacher is None:
            say("no teacher given (teacher: FOLDER): an untrained one judges, which is good for trying out only")
            if config.teacher_size is not None:
                self.teacher_config = SIZES[config.teacher_size]()
        else:
            self.teacher_config = checkpoint.load_config(self._teacher).transformer
        self.critic_config = (
            self.model.transformer if self._critic is None else checkpoint.load_config(self._critic).transformer
        )
        self._compare_scores()
        self.schedule = ChunkSchedule(len(config.distillation.starts), config.student_every)
        self.switches = config.distillation.switches if self.streaming else ()

    def _compare_scores(self) -> None:
        """Refuses scores that do not judge such latents, or do not read such prompts: the student's text encoder, which
        does not learn here, is what they hear all prompts through."""
        faults = []
        scores = (("teacher", self.teacher_config, self._teacher), ("critic", self.critic_config, self._critic))
        for role, cfg, folder in scores:
            theirs, ours = to_dict(cfg), to_dict(self.model.transformer)
            wrong = [
                f"{role} has {n} {theirs[n]}, the student {ours[n]}"
                for n in ("in_channels", "out_channels", "text_dim", "text_length", "patch")
                if theirs[n] != ours[n]
            ]
            asked = self._init is not None and folder is not None and (role == "teacher" or folder != self._teacher)
            if not wrong and asked and (other := self._other_text(folder)):
                wrong.append(
                    f"the {other} of {role} {folder} is not the student's ({self._init}); train the teacher from the "
                    "student, as experiments/sprites/cpu/teacher.yaml: --init STUDENT --no-train-text-encoder"
                )
            faults += wrong
        raise_all(faults)

    def _other_text(self, folder: Path) -> str | None:
        """What a checkpoint reads prompts with otherwise than the student; what it does not have does not count."""
        if all(checkpoint.has_part(f, "text_encoder") for f in (self._init, folder)):
            if not checkpoint.same_part(self._init, folder, "text_encoder"):
                return "text encoder"
        length = self.config.transformer.text_length
        files = [folder / name for name in ("tokenizer.json", "spiece.model")]
        if any(file.is_file() for file in files):
            if not self._tokenizer.same_as(PromptTokenizer.from_folder(folder, length)):
                return "tokenizer"
        return None

    # MARK: networks

    @functools.cache  # noqa: B019 - a stage lives as long as its run
    def _structure(self, cfg, *, adapted: bool) -> nnx.GraphDef:
        make = lambda: WanTransformer(cfg, unroll=self.config.run.unroll, rngs=nnx.Rngs(0))
        return structure(lambda: self._adapt(make(), 0) if adapted else make())

    def _adapt(self, model: WanTransformer, seed: int) -> WanTransformer:
        if not self.config.lora_rank:
            return model
        return lora.adapt(model, rank=self.config.lora_rank, alpha=self.config.lora_alpha, rngs=nnx.Rngs(seed))

    def _adapters(self, cfg, seed: int) -> dict[str, Any]:
        """First parameters of a network's adapters; its weights are not drawn, for nobody asks for them."""

        def draw():
            model = self._adapt(WanTransformer(cfg, rngs=nnx.Rngs(0)), seed)
            return lora.split(nnx.to_pure_dict(nnx.state(model))).trained

        return jax.jit(draw)()

    def _split(self, params: dict[str, Any]) -> tuple[Any, Any]:
        """(trained, frozen) of an adapted network, or all of it and nothing."""
        adapted = lora.split(params) if self.config.lora_rank else params
        return lora.parts(adapted)

    def _join(self, params: Any, base: Any) -> Any:
        """What a loss takes: a plain dict, or adapters beside the weights they adapt."""
        return (
            lora.Adapted(params["transformer"], base["transformer"]) if self.config.lora_rank else params["transformer"]
        )

    def shapes(self):
        learners, frozen = {}, {}
        for name, cfg in (("generator", self.model.transformer), ("critic", self.critic_config)):
            make = lambda cfg=cfg: self._adapt(WanTransformer(cfg, rngs=nnx.Rngs(0)), 0)
            trained, base = self._split(nnx.to_pure_dict(nnx.state(nnx.eval_shape(make))))
            learners[name], frozen[f"{name}_base"] = {"transformer": trained}, {"transformer": base}
        frozen["teacher"] = checkpoint.abstract_params("transformer", self.teacher_config)
        frozen["text_encoder"] = checkpoint.abstract_params("text_encoder", self.text_shape)
        frozen["vae"] = checkpoint.abstract_params("vae", self.model.vae)
        return learners, frozen

    def parameters(self):
        first, seed = self.first_params(), self.config.run.seed
        load = lambda folder: checkpoint.load(folder, "transformer", np.float32)
        fresh = lambda cfg, n: initial(lambda: WanTransformer(cfg, rngs=nnx.Rngs(5 * seed + n)))
        teacher = fresh(self.teacher_config, 3) if self._teacher is None else load(self._teacher)
        critic = teacher if self._critic == self._teacher else load(self._critic)
        learners, frozen = {}, {"teacher": teacher, "text_encoder": first["text_encoder"], "vae": self._vae_params()}
        networks = (("generator", self.model.transformer, first["transformer"]), ("critic", self.critic_config, critic))
        for n, (name, cfg, params) in enumerate(networks):
            trained, base = params, {}
            if self.config.lora_rank:
                trained, base = self._adapters(cfg, 5 * seed + n + 1), params
            learners[name], frozen[f"{name}_base"] = {"transformer": trained}, {"transformer": base}
        return learners, frozen

    def rate(self, phase, learner):
        return phase.critic_rate if learner == "critic" else phase.rate

    def averages(self, learner):
        return learner == "generator"

    def activations(self, phase: DistillPhase) -> dict[str, int]:
        rows, columns, _ = self._latent
        cfg, size = self.critic_config, jnp.dtype(self.config.run.dtype).itemsize
        frames = self.config.distillation.chunk_frames
        tokens = frames * rows * columns // (cfg.patch[1] * cfg.patch[2])
        videos = phase.batch_size // self.config.run.streams
        layer = videos * tokens * (12 * cfg.dim + 2 * cfg.ffn_dim) * size
        kept = {"none": 12 * cfg.dim + 2 * cfg.ffn_dim, "layer": cfg.dim, "dots": 6 * cfg.dim + cfg.ffn_dim}
        logits = 8 * videos * cfg.num_heads * tokens**2 if self.builds_logits else 0
        others = max(1, self.config.run.streams // self.config.run.devices) - 1 if self.streaming else 0
        parked = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(self._carry_shapes(videos)))
        return {
            "critic activations": layer + logits
            + cfg.num_layers * videos * tokens * kept[self.config.distillation.remat] * size,
            # Of the stream in flight the window, and the clean keys and values of a chunk's blocks; of the others what
            # they carry, once: it is read and written where it lies (`step.gradient`).
            "KV caches": (3 + others) * parked,
        }  # fmt: skip

    # MARK: data

    @property
    def _latent(self) -> tuple[int, int, int]:
        sampler = self.model.sampler
        return (
            sampler.height // SPATIAL_FACTOR, sampler.width // SPATIAL_FACTOR, self.model.transformer.in_channels
        )  # fmt: skip

    def source(self, phase: DistillPhase, seed: int) -> DistillSource:
        prompts = SpritePrompts(1 + self.streaming, seed) if self._files is None else ShuffledPrompts(self._files, seed)
        return DistillSource(
            prompts, self._tokenizer, self.schedule, self.switches, phase.batch_size, seed,
            phase.steps * phase.batch_size,
        )  # fmt: skip

    @staticmethod
    def collate(records) -> dict[str, np.ndarray]:
        """{"ids", "mask" [turn, prompt, b, L], "switch_frame" [turn]}."""
        return {
            "ids": np.stack([r["ids"] for r in records], axis=2),
            "mask": np.stack([r["mask"] for r in records], axis=2),
            "switch_frame": records[0]["switch_frame"],
        }

    @staticmethod
    def parted(batch):
        tokens = {name: batch[name] for name in ("ids", "mask")}
        return Parted(own=tokens, shared={"switch_frame": batch["switch_frame"][0]})

    # MARK: losses

    @functools.cache  # noqa: B019
    def _distillation(self, plain: bool) -> Distillation:
        config, dtype = self.config.distillation, "float32" if plain else self.config.run.dtype
        if plain:
            config = dataclasses.replace(config, remat="none")
        return Distillation(
            rollout=Rollout(self._structure(self.model.transformer, adapted=True), self.model.sampler, config, dtype),
            teacher=Score(self._structure(self.teacher_config, adapted=False), dtype),
            critic=Score(self._structure(self.critic_config, adapted=True), dtype),
            vae=structure(lambda: VAE(self.model.vae, rngs=nnx.Rngs(0))),
        )

    @functools.cache  # noqa: B019
    def _turn(self, learner: str, index: int, first: bool, plain: bool) -> Turn:
        distillation = self._distillation(plain)
        rows, columns, _ = self._latent

        def loss(params, nets, carry, batch, keys):
            networks = self._networks(nets | {learner: params})
            prompts = self._prompts(nets, batch, index, distillation.rollout.dtype)
            if first:
                state = distillation.rollout.init(networks["generator"], prompts.embeds.shape[1], rows, columns)
            else:
                state = StreamState.joined(carry)
            function = distillation.generator_loss if learner == "generator" else distillation.critic_loss
            value, (state, metrics) = function(networks[learner], networks, state, prompts, keys, first=first)
            return value, (state.parted() if self.streaming else carry, metrics)

        prefix = "" if learner == "generator" else "critic_"
        return Turn(learner, loss, prefix, distillation.rollout.expected(first=first))

    def _networks(self, nets: dict[str, Any]) -> dict[str, Any]:
        """As the losses take them."""
        return {
            "generator": self._join(nets["generator"], nets["generator_base"]),
            "critic": self._join(nets["critic"], nets["critic_base"]),
            "teacher": nets["teacher"],
            "vae": nets["vae"],
        }

    def parts(self, phase, step):
        return self._parts(self.schedule.turns(step)[0][2] == 0)

    @functools.cache  # noqa: B019
    def _parts(self, first: bool) -> tuple[Part, ...]:
        """Those of a turn; how often an average step has them depends on how often the student learns."""
        distillation, (rows, columns, _) = self._distillation(False), self._latent

        def rollout(nets, carry, batch, keys, made):
            networks, prompts = self._networks(nets), self._prompts(nets, batch, 0, distillation.rollout.dtype)
            if first:
                state = distillation.rollout.init(networks["generator"], prompts.embeds.shape[1], rows, columns)
            else:
                state = StreamState.joined(carry)
            draws = distillation.draw(keys, state, first=first)
            _, tape = distillation.rollout.run(networks["generator"], state, prompts, draws.rollout)
            return state, prompts, draws, tape

        def vae(nets, carry, batch, keys, made):
            state, _, _, tape = made["rollout"]
            return distillation.judged(nets, state, joined(tape), tape, first)

        def teacher(nets, carry, batch, keys, made):
            (_, prompts, draws, tape), (window, _) = made["rollout"], made["vae"]
            return distillation.teacher_flows(nets, window, prompts, draws, tape)

        def generator_backward(nets, carry, batch, keys, made):
            state, prompts, draws, tape = made["rollout"]

            def latents(params):
                joint = self._join(params, nets["generator_base"])
                return jnp.sum(distillation.rollout.with_gradient(joint, state, prompts, draws.rollout, tape))

            return jax.grad(latents)(nets["generator"])

        def critic(nets, carry, batch, keys, made):
            (_, prompts, draws, tape), (window, frames) = made["rollout"], made["vae"]

            def loss(params):
                joint = self._join(params, nets["critic_base"])
                return distillation.critic_window_loss(joint, window, prompts, draws, tape, frames)

            return jax.grad(loss)(nets["critic"])

        share = 1 / self.config.student_every
        found = [Part("rollout", rollout, 1 + share, MADE_AXES), Part("vae", vae, 1 + share)]
        found += [Part("teacher", teacher, share), Part("generator_backward", generator_backward, share)]
        return (*found, Part("critic", critic, 1.0))

    def _prompts(self, nets, batch, index: int, dtype: str) -> Prompts:
        text = nnx.merge(self.graphs["text_encoder"], nets["text_encoder"])
        ids, mask = batch.own["ids"][index], batch.own["mask"][index]
        embeds = jnp.stack([text(i, m, jnp.dtype(dtype)) for i, m in zip(ids, mask)])
        empty = self._tokenizer([self.config.negative_prompt])
        negative = text(jnp.asarray(empty.ids), jnp.asarray(empty.mask), jnp.dtype(dtype))
        negative = jnp.broadcast_to(negative, (embeds.shape[1], *negative.shape[1:]))
        return Prompts(*jax.lax.stop_gradient((embeds, negative)), switch_frame=batch.shared["switch_frame"][index])

    def turns(self, phase, step, *, plain=False):
        return self._turns(
            tuple((name, chunk == 0) for name, _, chunk in self.schedule.turns(step)), plain
        )  # fmt: skip

    @functools.cache  # noqa: B019
    def _turns(self, made: tuple[tuple[str, bool], ...], plain: bool) -> tuple[Turn, ...]:
        return tuple(self._turn(name, index, first, plain) for index, (name, first) in enumerate(made))

    def _carry_shapes(self, videos: int) -> Any:
        distillation, (rows, columns, _) = self._distillation(False), self._latent
        learners, frozen = self.shapes()
        generator = self._join(learners["generator"], frozen["generator_base"])
        return jax.eval_shape(lambda params: distillation.rollout.init(params, videos, rows, columns), generator)

    # MARK: what is left behind

    def _merged(self, name: str, best, frozen) -> dict[str, Any]:
        """A network with its adapters in its weights."""
        params = self._join(best[name], frozen[f"{name}_base"])
        rank = self.config.lora_rank
        return lora.merge(params, self.config.lora_alpha / rank) if rank else params

    def validate(self, best, frozen):
        params = {"transformer": self._merged("generator", best, frozen), "vae": frozen["vae"]}
        params["text_encoder"] = frozen["text_encoder"]
        return {}, side_by_side(self.pipeline(params)(self.shown(), seconds=3).frames, 2)

    def shown(self, count: int = 4) -> list[Schedule]:
        """What validation videos show: the first of the run's own files, else prompts that nobody trains on; with a
        switch in the middle where the videos of training have one."""
        if self._files is not None:
            return [Schedule(self._files[i]) for i in range(min(count, len(self._files)))]
        prompts = test_prompts(count * (1 + self.streaming))
        return [Schedule(prompts[i::count]) for i in range(count)]

    def finish(self, best, frozen, folder: Path, provenance: dict[str, Any]) -> None:
        """The student's folder; and the critic's beside it, for a stage that goes on."""
        shared = {part: frozen[part] for part in ("vae", "text_encoder")}
        critic = dataclasses.replace(self.model, transformer=self.critic_config)
        for target, config, name in ((folder, self.model, "generator"), (folder.parent / "critic", critic, "critic")):
            params = {"transformer": self._merged(name, best, frozen), **shared}
            note = {**provenance, "network": name}
            trained, rank = best[name]["transformer"], self.config.lora_rank
            keep = functools.partial(lora.keep, trained, self.config.lora_alpha / rank) if rank else None
            checkpoint.save(
                target, config, params, self._tokenizer, note, dtype=np.float32, overwrite=True, finish=keep
            )


class InitStage(DistillStage):
    """Single chunks, one prompt each."""

    name = "init"
    streaming = False


class LongStage(DistillStage):
    """Videos of many chunks that go on from turn to turn."""

    name = "long"
    streaming = True

    def carry(self, phase):
        run = self.config.run
        shapes = self._carry_shapes(phase.batch_size // run.streams).parted()
        leading = run.streams // run.devices, run.devices
        leads = each(lambda a: jax.ShapeDtypeStruct((*leading, *a.shape), a.dtype), shapes)
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), leads)
