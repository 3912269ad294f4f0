"""Which chunk of which video a turn makes, and whose prompts it gets."""

import dataclasses
import shutil

import numpy as np
import pytest

from longlive_jax.data.sprite_prompts import all_prompts
from longlive_jax.errors import UserError
from longlive_jax.tokenizer import Tokens, train_unigram
from longlive_jax.training.config import DistillationConfig
from longlive_jax.training.phases import DistillPhase
from longlive_jax.training.stage_config import InitTrainConfig, LongTrainConfig
from longlive_jax.training.stages.distillation import (
    NEVER,
    ChunkSchedule,
    DistillSource,
    InitStage,
    LongStage,
    ShuffledPrompts,
    SpritePrompts,
)


def simulated(steps: int, chunks: int, every: int):
    """The official order, by walking it: a student's step takes two chunks in a row, another one."""
    video = chunk = 0
    for step in range(steps):
        turns = []
        for name in ["generator"] * (step % every == 0) + ["critic"]:
            turns.append((name, video, chunk))
            video, chunk = (video, chunk + 1) if chunk + 1 < chunks else (video + 1, 0)
        yield turns


@pytest.mark.parametrize(("chunks", "every"), [(13, 5), (3, 2), (4, 1)])
def test_schedule_is_the_walk(chunks, every):
    schedule = ChunkSchedule(chunks, every)
    for step, turns in enumerate(simulated(100, chunks, every)):
        assert schedule.turns(step) == turns


def test_single_chunks_of_a_step_share_their_prompts():
    schedule = ChunkSchedule(1, 5)
    assert schedule.turns(10) == [("generator", 10, 0), ("critic", 10, 0)]
    assert schedule.turns(11) == [("critic", 11, 0)]


def test_every_chunk_of_a_video_teaches_the_student():
    schedule = ChunkSchedule(len(DistillationConfig().starts), 5)
    assert schedule.chunks == 13
    assert {
        chunk for step in range(0, 400, 5) for name, _, chunk in schedule.turns(step) if name == "generator"
    } == set(range(13))


class Lengths:
    """A tokeniser whose ids are the prompt's length."""

    def __call__(self, prompts):
        ids = np.array([[len(p)] * 2 for p in prompts], np.int32)
        return Tokens(ids, np.ones_like(ids), np.zeros(len(prompts), bool))


def source(**changes):
    settings = dict(
        prompts=[("a" * i, "b" * (100 + i)) for i in range(100)], tokenizer=Lengths(), schedule=ChunkSchedule(3, 2),
        switches=(9, 15), batch_size=4, seed=0, length=100,
    )  # fmt: skip
    return DistillSource(**(settings | changes))


def test_a_video_keeps_its_prompts_and_its_switch():
    records, seen = source(), {}
    for step in range(20):
        for slot in range(4):
            record = records[4 * step + slot]
            for turn, (_, video, _) in enumerate(records.schedule.turns(step)):
                told = (record["ids"][turn].tolist(), int(record["switch_frame"][turn]))
                assert seen.setdefault((video, slot), told) == told
                assert record["ids"][turn, 0, 0] == 4 * video + slot
    switches = {key: told[1] for key, told in seen.items()}
    assert all(switches[video, 0] == switch for (video, _), switch in switches.items()), "one for all streams"
    assert set(switches.values()) == {9, 15}


def test_no_switch_without_streaming():
    assert source(switches=())[0]["switch_frame"].tolist() == [NEVER, NEVER]


def test_prompts_of_the_sprites_world():
    one, two = SpritePrompts(2, 1), SpritePrompts(2, 1)
    assert one[5] == two[5] != one[6] and len(one[5]) == 2


def test_every_epoch_has_all_prompts_of_the_files():
    files = [("a",), ("b",), ("c",)]
    prompts = ShuffledPrompts(files, 0)
    epochs = [tuple(prompts[3 * e + i][0] for i in range(3)) for e in range(12)]
    assert all(sorted(epoch) == ["a", "b", "c"] for epoch in epochs) and len(set(epochs)) > 2


@pytest.mark.parametrize(("tokens", "message"), [(100, None), (160, "tokeniser has 160 tokens, its text encoder 128")])
def test_a_student_whose_tokeniser_has_fewer_tokens_than_its_text_encoder(
    tmp_path, tiny_config, tiny_checkpoint, tokens, message
):
    """As Wan's: 256300 and 256384."""
    tokenizer = train_unigram(list(all_prompts(1)), tokens, tiny_config.transformer.text_length)
    assert tokenizer.vocab_size == tokens
    config = dataclasses.replace(
        InitTrainConfig(), init=str(tmp_path / "student"), transformer=tiny_config.transformer,
        text_encoder=tiny_config.text_encoder, sampler=dataclasses.replace(tiny_config.sampler, rope="absolute"),
        distillation=DistillationConfig(chunk_frames=6, new_frames=6, max_frames=6),
    )  # fmt: skip
    shutil.copytree(tiny_checkpoint, tmp_path / "student")
    tokenizer.save(tmp_path / "student")
    if message is None:
        stage = InitStage(config, tmp_path / "run", lambda line: None)
        assert stage.model.text_encoder == stage.text_shape == tiny_config.text_encoder
    else:
        with pytest.raises(UserError, match=message):
            InitStage(config, tmp_path / "run", lambda line: None)


def test_settings_that_belong_to_the_other_stage():
    with pytest.raises(UserError, match="several chunks; that is stage long"):
        InitTrainConfig(distillation=DistillationConfig())
    with pytest.raises(UserError, match="one chunk only; that is stage init"):
        LongTrainConfig(distillation=DistillationConfig(max_frames=21))


def test_faults_are_collected():
    phases = (DistillPhase("a", 10, 3, 1e-5, 1e-6),)
    config = LongTrainConfig()
    run, sampler = dataclasses.replace(config.run, streams=2), dataclasses.replace(config.sampler, rope="auto")
    with pytest.raises(
        UserError, match="3 faults: .*does not split into 2 streams.*; sampler: rope.*; lora_rank is -1"
    ):
        LongTrainConfig(phases=phases, run=run, sampler=sampler, lora_rank=-1)


@pytest.mark.parametrize("stage", [InitStage, LongStage])
def test_validation_shows_the_runs_own_prompts_and_switches_where_training_does(tmp_path, stage):
    settings = {InitStage: InitTrainConfig, LongStage: LongTrainConfig}[stage]().shrunk()
    prompts = 1 + stage.streaming
    shown = stage(settings, tmp_path / "run", lambda line: None).shown()
    texts = [text for schedule in shown for text in schedule.prompts]
    assert len(shown) == 4 and len(set(texts)) == 4 * prompts, "all different"
    assert all(schedule.switch_seconds is None for schedule in shown), "in equal parts"
    for n in range(prompts):
        (tmp_path / f"{n}.txt").write_text(f"one of {n}\ntwo of {n}\n")
    own = dataclasses.replace(settings, prompts=tuple(str(tmp_path / f"{n}.txt") for n in range(prompts)))
    shown = stage(own, tmp_path / "run", lambda line: None).shown()
    assert [s.prompts for s in shown] == [tuple(f"{k} of {n}" for n in range(prompts)) for k in ("one", "two")]
