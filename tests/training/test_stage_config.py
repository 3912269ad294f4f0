"""Settings of the stages: every fault is told before anything starts, in one line."""

import dataclasses
from pathlib import Path

import pytest
from flax import nnx

from longlive_jax.errors import UserError
from longlive_jax.training.config_files import differences, read_config
from longlive_jax.training.phases import LatentPhase, VAEPhase
from longlive_jax.training.run_config import OptimizerConfig, RunConfig
from longlive_jax.training.stage_config import (
    STAGES,
    InitTrainConfig,
    StudentTrainConfig,
    TeacherTrainConfig,
    VAETrainConfig,
)
from longlive_jax.training.stages.distillation import InitStage
from longlive_jax.training.stages.student import StudentStage

FOLDERS = ("sprites/cpu", "sprites/gpu", "sprites/further", "wan")
EXPERIMENTS = sorted(p for f in FOLDERS for p in (Path(__file__).parents[2] / "experiments" / f).glob("*.yaml"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_configs_in_experiments(path):
    config = read_config(path, STAGES[stage_of(path)])
    assert path.read_text().startswith("# "), "what it is for"
    assert config.shrunk().steps == 2


def test_there_are_configs():
    assert {stage_of(path) for path in EXPERIMENTS} == STAGES.keys()


def stage_of(path: Path) -> str:
    """The decoder alone is for stage vae, a teacher for longer for stage teacher, a student of it for stage ar."""
    return {"decoder": "vae", "student": "ar"}.get(path.stem, path.stem)


def test_a_file_changes_what_it_names(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "kl_weight: 1e-5\noptimizer: {b2: 0.9}\nphases: [{name: a, steps: 300, batch_size: 4, rate: 2e-3}]\n"
    )
    config = read_config(path, VAETrainConfig)
    assert config == VAETrainConfig(
        kl_weight=1e-5, phases=(VAEPhase("a", 300, 4, 2e-3),),
        optimizer=dataclasses.replace(VAETrainConfig().optimizer, b2=0.9),
    )  # fmt: skip
    path.write_text("")
    assert read_config(path, VAETrainConfig) == VAETrainConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimizer: {weight_decy: 1}", "unknown key 'weight_decy'; did you mean 'weight_decay'?"),
        ("fases: []", "unknown key 'fases'; did you mean 'phases'?"),
        ("phases: [{name: a, steps: 3, batch_size: 1}]", "missing rate"),
        ("phases: []", "vae: there are no phases"),
        ("kl_weight: much", "kl_weight must be float, got 'much'"),
        ("run: {dtype: float16}", "unknown dtype 'float16'; did you mean"),
        ("[1, 2]", "expected a table of settings"),
        ("a: [", "not valid YAML"),
    ],
)
def test_faulty_files(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_config(path, VAETrainConfig)
    assert message in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_such_file(tmp_path):
    with pytest.raises(UserError, match="cannot read .*none.yaml: No such file"):
        read_config(tmp_path / "none.yaml", VAETrainConfig)


def test_a_mesh_that_does_not_divide():
    with pytest.raises(UserError, match="streams is 6, which a mesh of data 2 x fsdp 2 = 4 devices does not divide"):
        RunConfig(streams=6, data=2, fsdp=2)


def test_a_batch_that_does_not_split():
    phases = (VAEPhase("a", 300, 6, 1e-3), VAEPhase("b", 300, 9, 1e-3))
    with pytest.raises(
        UserError, match="2 faults: phase a: batch_size 6 does not split into 4 streams.* that does: 8; "
    ):
        VAETrainConfig(phases=phases, run=RunConfig(streams=4))


def test_a_warmup_longer_than_a_phase():
    with pytest.raises(UserError, match="phase a: 50 steps are not more than the warmup of 100"):
        VAETrainConfig(phases=(VAEPhase("a", 50, 1, 1e-3),))


def test_faults_of_phases():
    with pytest.raises(UserError, match="phase a: frames 4 must be 4 k"):
        VAEPhase("a", 1, 1, 1e-3, frames=4)
    with pytest.raises(UserError, match="phase a: 2 faults: steps is 0.*; rate is -1.0"):
        VAEPhase("a", 0, 1, -1.0)
    with pytest.raises(UserError, match="phase a: frames is 6; 1 to clip_frames 3"):
        LatentPhase("a", 1, 1, 1e-3, frames=6, clip_frames=3, clips=1)
    with pytest.raises(UserError, match="phase a: frames is 4; whole blocks of 3"):
        StudentTrainConfig(phases=(LatentPhase("a", 300, 1, 1e-3, frames=4, clip_frames=6, clips=1),))
    stills = (LatentPhase("a", 300, 1, 1e-3, frames=1, clip_frames=1, clips=1),)
    assert TeacherTrainConfig(phases=stills).first_given == 0
    with pytest.raises(UserError, match="phase a: frames is 1; after the first, which is given, there must be others"):
        TeacherTrainConfig(phases=stills, first_given=0.5)
    with pytest.raises(UserError, match="first_given is 1.5; 0 to 1"):
        TeacherTrainConfig(first_given=1.5)


@pytest.mark.parametrize("kind", STAGES.values(), ids=STAGES)
def test_shrunk_keeps_what_it_can(kind):
    config = dataclasses.replace(
        kind(), run=RunConfig(streams=2, data=2, dtype="bfloat16"), phases=kind().phases[:1],
        optimizer=OptimizerConfig(b1=0.0),
    )  # fmt: skip
    tiny = config.shrunk()
    assert (tiny.run.streams, tiny.run.dtype, tiny.optimizer.b1) == (2, "bfloat16", 0.0)
    assert tiny.steps == 2


def test_settings_of_the_official_training():
    """What LongLive 1.0's two configs say, in our names."""
    folder = Path(__file__).parents[2] / "experiments" / "wan"
    init, long = (read_config(folder / f"{name}.yaml", STAGES[name]) for name in ("init", "long"))
    for config in (init, long):
        sampler, optimizer = config.sampler, config.optimizer
        assert (sampler.height, sampler.width, sampler.shift) == (480, 832, 5.0)
        assert (sampler.window, sampler.sink_frames, sampler.block_frames) == (12, 3, 3)
        assert sampler.steps == (1000, 750, 500, 250) and sampler.warp
        assert (optimizer.b1, optimizer.b2, optimizer.eps, optimizer.weight_decay, optimizer.clip) == (
            0.0, 0.999, 1e-8, 0.01, 10.0
        )  # fmt: skip
        assert (config.student_every, config.phases[0].batch_size, config.distillation.guidance) == (5, 64, 4.0)
        assert len(config.negative_prompt) == 137 and config.negative_prompt[:5] == "色调艳丽，"
        assert " " not in config.negative_prompt
    assert (init.phases[0].rate, init.phases[0].critic_rate, init.phases[0].steps) == (2e-6, 4e-7, 700)
    assert (init.lora_rank, init.optimizer.ema, 5 * init.optimizer.ema_start) == (0, 0.99, 200)
    assert (long.phases[0].rate, long.phases[0].critic_rate, long.phases[0].steps) == (1e-5, 2e-6, 3000)
    assert (long.lora_rank, long.lora_alpha, long.optimizer.ema) == (256, 256, 0.0)
    assert long.distillation.starts == (0, *range(21, 220, 18))


def test_differences_leave_out_what_changes_no_number():
    old = {"run": {"seed": 0, "keep": 2}, "a": {"b": 1}}
    assert differences(old, {"run": {"seed": 1, "keep": 3}, "a": {"b": 1}}) == ["run.seed: 0, now 1"]


def test_unroll_is_that_of_student_critic_and_teacher(tmp_path):
    made = []
    for unroll in (False, True):
        stage = InitStage(dataclasses.replace(InitTrainConfig(), run=RunConfig(unroll=unroll)), tmp_path, print)
        (learners, frozen), parts = stage.shapes(), stage._distillation(plain=False)
        networks = (
            (parts.rollout, learners["generator"]["transformer"]),
            (parts.critic, learners["critic"]["transformer"]),
            (parts.teacher, frozen["teacher"]),
        )
        made.append([nnx.merge(part.transformer, params).unroll for part, params in networks])
    assert made == [[False] * 3, [True] * 3]


def test_unroll_is_the_transformers(tmp_path):
    made = [
        nnx.merge(stage.graphs["transformer"], stage.shapes()[0]["student"]["transformer"])
        for stage in (
            StudentStage(dataclasses.replace(StudentTrainConfig(), run=RunConfig(unroll=unroll)), tmp_path, print)
            for unroll in (False, True)
        )
    ]
    assert [transformer.unroll for transformer in made] == [False, True]
