"""LongLive v1.0's inference YAML files: their keys become our settings."""

import pytest

from longlive_jax.config import SamplerConfig, replace
from longlive_jax.errors import UserError
from longlive_jax.official import OfficialRun, read_official

INTERACTIVE = """
denoising_step_list:
- 1000
- 600
warp_denoising_step: true  # a comment
num_frame_per_block: 6
model_name: Wan2.1-T2V-1.3B
model_kwargs:
  local_attn_size: 15
  timestep_shift: 4.0
  sink_size: 2
data_path: prompts/interactive_example.jsonl
output_folder: videos/interactive
inference_iter: -1
num_output_frames: 144
use_ema: false
seed: 1
num_samples: 1
save_with_index: true
switch_frame_indices:  48, 96
global_sink: false
context_noise: 0
generator_ckpt: models/longlive_base.pt
lora_ckpt: models/lora.pt
adapter:
  type: "lora"
  rank: 256
"""
"""The keys of v1.0's interactive inference file, with values unlike our defaults."""


@pytest.fixture
def read(tmp_path):
    def write_and_read(text: str | bytes) -> OfficialRun:
        path = tmp_path / "run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_official(path)

    return write_and_read


def test_the_interactive_file(read):
    run = read(INTERACTIVE)
    sampler = replace(SamplerConfig(), **run.sampler)
    assert sampler == SamplerConfig(
        window=15, sink_frames=2, block_frames=6, steps=(1000.0, 600.0), shift=4.0, context_noise=0.0, sink="refresh"
    )
    assert (run.seconds, run.seed, run.switch_seconds) == (36.0, 1, (12.0, 24.0))
    assert run.elsewhere["lora_ckpt"] == "longlive convert --lora"
    assert {"adapter", "data_path", "generator_ckpt", "output_folder", "use_ema"} <= set(run.elsewhere)


def test_a_file_is_not_refused_for_what_it_leaves_open(read):
    """The checkpoint's own sink may be small enough for this window."""
    assert read("local_attn_size: 4\n").sampler == {"window": 4}


def test_infinite_attention_is_relative_rope(read):
    assert read("model_kwargs:\n  use_infinite_attention: true\n").sampler == {"rope": "relative"}


def test_what_is_not_said_is_left_to_others(read):
    assert read("global_sink: true\n") == OfficialRun({"sink": "keep"})


@pytest.mark.parametrize(("text", "times"), [("40", (10.0,)), ("[40, 81]", (10.0, 20.25)), ("'2, 4'", (0.5, 1.0))])
def test_spellings_of_switch_frames(read, text, times):
    assert read(f"switch_frame_indices: {text}\n").switch_seconds == times


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sink_sise: 3\n", "run.yaml: unknown key 'sink_sise'; did you mean 'sink_size'[?]$"),
        ("model_kwargs:\n  local_atn_size: 3\n", "run.yaml: .*did you mean 'local_attn_size'[?]$"),
        ("a: [1\nb: 2\n", "run.yaml:2: not valid YAML$"),
        (b"\xff\xfe\x00", "run.yaml: not valid YAML$"),
        ("distribution_loss: dmd\nlr: 1.0e-5\n", "run.yaml: this is a training file .*; longlive train init"),
        ("- 1\n- 2\n", "run.yaml: expected a table of settings"),
        ("", "run.yaml: expected a table of settings"),
        ("model_kwargs: 3\n", "run.yaml: model_kwargs must be a table of settings"),
        ("local_attn_size: 4\nsink_size: 3\nnum_frame_per_block: 3\n", "run.yaml: window is 4 .* at least 6"),
        ("local_attn_size: twelve\n", "run.yaml: window must be int, got 'twelve'"),
        ("num_output_frames: many\n", "run.yaml: num_output_frames must be a whole number"),
        ("switch_frame_indices: 1, x\n", "run.yaml: switch_frame_indices must be whole numbers"),
        ("switch_frame_indices: 1.5\n", "run.yaml: switch_frame_indices must be whole numbers"),
        ("seed: one\n", "run.yaml: seed must be a whole number"),
    ],
)
def test_what_is_refused(read, text, message):
    with pytest.raises(UserError, match=message) as caught:
        read(text)
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="cannot read .*none.yaml: No such file.*--config"):
        read_official(tmp_path / "none.yaml")
