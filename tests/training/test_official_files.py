"""LongLive v1.0's training YAML files: their keys become our settings, are named as without a say, or are refused."""

import pytest
import yaml

from longlive_jax.cli import main
from longlive_jax.config import TextEncoderConfig, TransformerConfig
from longlive_jax.errors import UserError
from longlive_jax.training.config import DistillationConfig, Quirks
from longlive_jax.training.config_files import read_config
from longlive_jax.training.official_files import ELSEWHERE, KNOWN
from longlive_jax.training.stage_config import STAGES, InitTrainConfig, LongTrainConfig

INIT = {
    "generator_ckpt": "ode.pt", "generator_fsdp_wrap_strategy": "size", "real_name": "Wan2.1-T2V-1.3B",
    "fake_name": "Wan2.1-T2V-1.3B", "denoising_step_list": [1000, 600], "warp_denoising_step": True,
    "ts_schedule": False, "num_train_timestep": 1000, "timestep_shift": 4.0, "guidance_scale": 2.5,
    "denoising_loss_type": "flow", "mixed_precision": False, "seed": 3, "wandb_key": "SECRET",
    "wandb_project": "YOUR_WANDB_PROJECT", "sharding_strategy": "hybrid_full", "lr": "3e-6", "lr_critic": 5e-7,
    "beta1": 0.1, "beta2": 0.9, "beta1_critic": 0.1, "beta2_critic": 0.9, "weight_decay": 0.02,
    "data_path": "prompts.txt", "batch_size": 2, "gradient_accumulation_steps": 4, "ema_weight": 0.9,
    "ema_start_step": 11, "total_batch_size": 32, "log_iters": 7, "max_checkpoints": 6, "max_iters": 90,
    "negative_prompt": "blurry", "dfake_gen_update_ratio": 2, "image_or_video_shape": [1, 21, 16, 30, 52],
    "distribution_loss": "dmd", "trainer": "score_distillation", "gradient_checkpointing": False,
    "num_frame_per_block": 3, "load_raw_video": False, "vis_interval": -1, "val_batch_size": 1,
    "model_kwargs": {"timestep_shift": 4.0, "local_attn_size": 9, "sink_size": 2},
    "min_num_training_frames": 12, "num_training_frames": 12, "slice_last_frames": 12,
}  # fmt: skip
"""The keys of v1.0's file for stage 1, with values unlike our defaults."""

LONG = INIT | {
    "distribution_loss": "dmd_switch", "global_sink": False, "switch_prompt_path": "switch.txt",
    "streaming_training": True, "streaming_chunk_size": 18, "streaming_max_length": 75, "streaming_min_new_frame": 15,
    "switch_mode": "random_choice", "switch_choices": [18, 33], "train_first_chunk": True, "last_step_only": False,
    "adapter": {
        "type": "lora", "rank": 8, "alpha": 4, "dropout": 0.0, "dtype": "bfloat16", "apply_to_critic": True,
        "verbose": True,
    },
}  # fmt: skip
"""Those for stage 2."""


@pytest.fixture
def read(tmp_path):
    """Reads settings as a file of a stage; gives its settings and what was said."""

    def write_and_read(settings: dict, stage: str):
        path, said = tmp_path / "official.yaml", []
        path.write_text(yaml.safe_dump(settings))
        return read_config(path, STAGES[stage], said.append), [line.removeprefix(f"{path}: ") for line in said]

    return write_and_read


def test_stage_1(read):
    config, said = read(INIT, "init")
    sampler, optimizer, run, phase = config.sampler, config.optimizer, config.run, config.phases[0]
    assert (config.transformer, config.text_encoder) == (TransformerConfig.t2v_1_3b(), TextEncoderConfig.umt5_xxl())
    assert (sampler.height, sampler.width, sampler.steps, sampler.shift) == (240, 416, (1000, 600), 4.0)
    assert (sampler.window, sampler.sink_frames, sampler.block_frames, sampler.rope) == (9, 2, 3, "absolute")
    assert (optimizer.b1, optimizer.b2, optimizer.weight_decay, optimizer.ema) == (0.1, 0.9, 0.02, 0.9)
    assert optimizer.ema_start == 6, "step 11 is past the student's sixth update"
    assert (run.seed, run.streams, run.dtype, run.save_every, run.keep) == (3, 16, "float32", 7, 6)
    assert (run.validate_every, run.wandb) == (0, None)
    assert (phase.steps, phase.batch_size, phase.rate, phase.critic_rate) == (90, 32, 3e-6, 5e-7)
    assert (config.student_every, config.negative_prompt, config.prompts) == (2, "blurry", ("prompts.txt",))
    assert (config.teacher_size, config.lora_rank) == ("t2v_1_3b", 0)
    assert config.distillation == DistillationConfig(
        chunk_frames=12, new_frames=12, max_frames=12, guidance=3.5, remat="none", quirks=Quirks.reference()
    )
    assert "generator_ckpt has no say here: --init FOLDER, from longlive convert --generator FILE" in said
    quiet = {"generator_ckpt", "generator_fsdp_wrap_strategy", "fake_name", "wandb_key", "wandb_project",
             "sharding_strategy", "gradient_accumulation_steps", "load_raw_video", "val_batch_size"}  # fmt: skip
    assert {line.split()[0] for line in said[:-1]} == quiet and "SECRET" not in "".join(said)
    assert said[-1].startswith("the official code's quirks are on (cache_gradient straight_through, sink zero, ")


def test_stage_2(read):
    config, said = read(LONG, "long")
    assert config.distillation == DistillationConfig(
        chunk_frames=18, new_frames=15, max_frames=75, guidance=3.5, remat="none", quirks=Quirks.reference()
    )
    assert (config.lora_rank, config.lora_alpha, config.optimizer.ema) == (8, 4.0, 0.0)
    assert config.prompts == ("prompts.txt", "switch.txt")
    assert (
        "switch_choices has no say here: a switch comes at the start of any chunk but the first and the last, 18 to 33"
        not in said
    )
    assert {"adapter.dtype", "adapter.verbose", "global_sink", "ema_weight", "slice_last_frames"} <= {
        line.split()[0] for line in said
    }


def test_fewer_switches_than_ours_are_said(read):
    _, said = read(LONG | {"switch_choices": [18]}, "long")
    assert (
        "switch_choices has no say here: a switch comes at the start of any chunk but the first and the last, 18 to 33"
        in said
    )


def test_what_a_file_leaves_out_is_the_stages_own(read):
    config, said = read({"distribution_loss": "dmd"}, "init")
    own = InitTrainConfig()
    assert (config.optimizer, config.phases, config.student_every) == (own.optimizer, own.phases, own.student_every)
    assert len(said) == 1
    config, _ = read({"distribution_loss": "dmd_switch", "streaming_training": True}, "long")
    assert (config.lora_rank, config.distillation.starts) == (0, LongTrainConfig().distillation.starts)


def test_some_values_are_spelt_otherwise(read):
    config, _ = read(INIT | {"max_checkpoints": 0, "wandb_project": "mine", "denoising_step_list": [900, 0]}, "init")
    assert (config.run.keep, config.run.wandb, config.sampler.steps) == (90, "mine", (900,))


def test_an_inference_file_is_told_apart(read):
    with pytest.raises(UserError, match="official.yaml: this is an inference file .*; longlive generate --config"):
        read({"denoising_step_list": [1000], "num_output_frames": 21, "output_folder": "videos"}, "init")


def test_an_unknown_key_does_not_list_all(read):
    with pytest.raises(UserError, match="unknown key of LongLive's training 'zzzz'$"):
        read(INIT | {"zzzz": 1}, "init")


def test_tables_do_not_overlap():
    assert len(set(KNOWN)) == len(KNOWN) and all(place and "\n" not in place for place in ELSEWHERE.values())


@pytest.mark.parametrize(
    ("stage", "change", "message"),
    [
        ("init", {"lr_critik": 1}, "unknown key of LongLive's training 'lr_critik'; did you mean 'lr_critic'?"),
        ("init", {"model_kwargs": {"local_atn_size": 9}}, "did you mean 'model_kwargs.local_attn_size'?"),
        ("init", {"model_kwargs": 3}, "model_kwargs must be a table of settings, got 3"),
        ("init", {"phases": []}, "unknown key of LongLive's training 'phases'"),
        ("init", {"beta1_critic": 0.5}, "beta1_critic is 0.5 and beta1 0.1; there is one setting for both"),
        ("init", {"slice_last_frames": 21}, "slice_last_frames is 21 and num_training_frames 12"),
        ("init", {"last_step_only": True}, "last_step_only is True; only False is available"),
        ("init", {"distribution_loss": "sid"}, "distribution_loss 'sid' with streaming_training false is not"),
        ("init", {"total_batch_size": 33}, "total_batch_size 33 does not split into streams of 2"),
        ("init", {"real_name": "Wan2.1-T2V-14"}, "real_name: unknown model 'Wan2.1-T2V-14'; did you mean"),
        ("init", {"image_or_video_shape": [1, 21, 48, 30, 52]}, "image_or_video_shape must be five numbers"),
        ("init", {"guidance_scale": "much"}, "guidance_scale must be a number, got 'much'"),
        ("init", {"lr": "much"}, "rate must be float, got 'much'"),
        ("long", {}, "this file of LongLive's is for stage init, not long; run longlive train init"),
        ("vae", {}, "this file of LongLive's is for stage init, not vae"),
    ],
)  # fmt: skip
def test_what_is_refused(read, stage, change, message):
    with pytest.raises(UserError) as caught:
        read(INIT | change, stage)
    assert message in str(caught.value) and "official.yaml: " in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"switch_choices": [18, 30]}, "switch_choices has [30]; a switch comes at a chunk's start: 18, 33"),
        ({"streaming_min_new_frame": 12}, "streaming_min_new_frame 12 lets LongLive draw"),
        ({"train_first_chunk": False}, "train_first_chunk is False; only True is available"),
        ({"adapter": LONG["adapter"] | {"dropout": 0.1}}, "adapter.dropout is 0.1; only 0 is available"),
        ({"switch_mode": "fixed", "adapter": 3}, "adapter must be a table"),
    ],
)
def test_what_is_refused_in_stage_2(read, change, message):
    with pytest.raises(UserError) as caught:
        read(LONG | change, "long")
    assert message in str(caught.value)


def test_the_command_says_what_has_no_say(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    (tmp_path / "prompts.txt").write_text("a red star\n")
    (tmp_path / "official.yaml").write_text(yaml.safe_dump(INIT))
    with pytest.raises(SystemExit) as ended:
        main(["train", "init", "--config", "official.yaml", "--check", "--output", "run"])
    shown = capsys.readouterr()
    assert ended.value.code == 0 and "GiB" in shown.out, "what it needs of memory"
    assert "official.yaml: fake_name has no say here: --critic FOLDER" in shown.err
    assert "official.yaml: the official code's quirks are on" in shown.err
