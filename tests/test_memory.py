"""The memory estimate: against what is really allocated, and that too much is refused before anything starts."""

import dataclasses

import jax
import pytest

from longlive_jax import checkpoint, memory
from longlive_jax.config import ModelConfig, SamplerConfig, replace
from longlive_jax.errors import UserError
from longlive_jax.models.attention import LOGITS_LIMIT
from longlive_jax.pipeline import LongLivePipeline
from longlive_jax.sharding import AXES

PROMPT = "a small red star stays still"


def size(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("batch", [1, 3])
def test_parts_that_can_be_counted(tiny_pipeline, batch):
    stream = tiny_pipeline.stream([PROMPT] * batch, seconds=2)
    parts = memory.estimate(tiny_pipeline.config, stream.sampler, batch, 8, tiny_pipeline.dtype)
    assert parts["KV cache"] == stream._state.cache.k.nbytes + stream._state.cache.v.nbytes
    assert parts["prompt keys and values"] == size(stream._state.text_kv)


def test_weights(tiny_pipeline, tiny_config):
    found = {"transformer": tiny_pipeline.params["transformer"], "VAE": tiny_pipeline.params["vae"]}
    found["text encoder"] = tiny_pipeline._text_params
    assert memory.weights(tiny_config, "float32") == {name: size(params) for name, params in found.items()}
    without = dataclasses.replace(tiny_config, text_encoder=None)
    assert list(memory.weights(without, "float32")) == ["transformer", "VAE"]


def test_weights_of_wan_are_counted_without_making_them():
    weights = memory.weights(ModelConfig.t2v_1_3b(), "bfloat16")
    assert weights["transformer"] == 2 * 1_418_996_800
    assert 2 * 5.6e9 < weights["text encoder"] < 2 * 5.8e9


def test_known_sizes():
    """LongLive at 480p: 30 layers of keys and values, 12 frames of 1560 tokens, 1536 wide, 2 bytes each."""
    parts = memory.estimate(ModelConfig.t2v_1_3b(), SamplerConfig(), 1, 21, "bfloat16")
    assert parts["KV cache"] == 2 * 30 * 12 * 1560 * 1536 * 2


@pytest.mark.parametrize(
    ("change", "grown"),
    [
        ({"window": 24}, {"KV cache"}),  # logits are built in chunks of one size
        ({"block_frames": 6}, {"transformer activations", "VAE activations"}),
        ({"height": 960}, {"KV cache", "transformer activations", "VAE activations"}),
        ({"window": -1}, {"KV cache"}),
        ({"sink_frames": 1}, set()),
    ],
)
def test_what_grows_with_which_setting(change, grown):
    config, sampler = ModelConfig.t2v_1_3b(), SamplerConfig()
    usual = memory.estimate(config, sampler, 1, 60, "float32")
    more = memory.estimate(config, replace(sampler, **change), 1, 60, "float32")
    assert {name for name in usual if more[name] > usual[name]} == grown
    assert all(more[name] >= usual[name] for name in usual)


def test_what_grows_with_batch_length_dtype_and_switches():
    config, sampler = ModelConfig.t2v_1_3b(), SamplerConfig()
    one = memory.estimate(config, sampler, 1, 60, "float32")
    three, logits = memory.estimate(config, sampler, 3, 60, "float32"), 2 * LOGITS_LIMIT
    for name, part in one.items():
        alike = logits if name == "transformer activations" else 0
        assert three[name] - alike == 3 * (part - alike), name
    assert memory.estimate(config, sampler, 1, 6000, "float32") == one, "a longer video needs no more"
    half = memory.estimate(config, sampler, 1, 60, "bfloat16")
    assert all(half[name] < one[name] for name in one)
    switching = memory.estimate(config, sampler, 1, 60, "float32", switches=True)
    assert {name for name in one if switching[name] > one[name]} == {"transformer activations"}
    kept = memory.estimate(config, replace(sampler, switch="keep"), 1, 60, "float32", switches=True)
    assert kept == one, "only a recache computes the whole window"


@pytest.mark.parametrize(
    ("axes", "transformer", "vae"),
    [((1, 1, 1, 1), 1, 1), ((4, 1, 1, 1), 4, 4), ((1, 4, 1, 1), 1, 4), ((2, 1, 2, 1), 4, 4), ((1, 1, 1, 4), 1, 4)],
)
def test_weights_on_a_mesh_are_counted_with_their_copies(axes, transformer, vae):
    config = ModelConfig.t2v_1_3b()
    one = memory.weights(config, "bfloat16")
    all_copies = memory.weights(config, "bfloat16", None, jax.sharding.AbstractMesh(axes, AXES))
    assert all_copies["VAE"] == vae * one["VAE"] and all_copies["text encoder"] == one["text encoder"]
    # Norms, biases and modulations are whole everywhere; over `tensor` the embeddings too.
    assert transformer * one["transformer"] <= all_copies["transformer"] < (transformer + 0.15) * one["transformer"]


def test_videos_on_a_mesh(tiny_config, monkeypatch):
    sampler, mesh = tiny_config.sampler, jax.sharding.AbstractMesh((2, 2, 1, 2), AXES)
    needed = {}
    for batch in (3, 4):
        monkeypatch.setattr(memory, "available", lambda mesh: 0)
        with pytest.raises(UserError, match="with all copies on 8 devices") as caught:
            memory.check(tiny_config, sampler, batch, 8, "float32", mesh)
        needed[batch] = str(caught.value)
    parts = {batch: memory.estimate(tiny_config, sampler, batch, 8, "float32") for batch in needed}
    twice = lambda name: 2 if name == "VAE activations" else 1
    assert needed[4].startswith(memory.describe({k: v * twice(k) for k, v in parts[4].items()}))
    assert needed[3].startswith(memory.describe({k: 4 * v * twice(k) for k, v in parts[3].items()})), "whole on each"


def test_too_little_memory_for_a_video(tiny_pipeline, monkeypatch):
    sampler = replace(tiny_pipeline.config.sampler, rope="absolute")
    parts = memory.estimate(tiny_pipeline.config, sampler, 1, 8, "float32")
    need = sum(parts.values())
    monkeypatch.setattr(memory, "available", lambda mesh: need)
    tiny_pipeline.prepare(PROMPT, seconds=2)
    monkeypatch.setattr(memory, "available", lambda mesh: need - 1)
    with pytest.raises(UserError) as caught:
        tiny_pipeline(PROMPT, seconds=2)
    message = str(caught.value)
    assert message.startswith(memory.describe(parts) + " are needed, but only ")
    assert message.endswith(
        "make the picture (32 x 32), the window (6 latent frames) or the batch (1) smaller, or use bfloat16"
    )


def test_too_little_memory_for_the_weights(tiny_checkpoint, tiny_config, monkeypatch):
    read = []
    monkeypatch.setattr(checkpoint, "load", lambda *args: read.append(args))
    monkeypatch.setattr(memory, "available", lambda mesh: 2048)
    with pytest.raises(
        UserError, match="but only 2.0 KiB are free; use bfloat16 or quantize int8, or run where there is more$"
    ) as caught:
        LongLivePipeline.from_pretrained(tiny_checkpoint)
    assert str(caught.value).startswith(f"the weights need {memory.describe(memory.weights(tiny_config, 'float32'))}")
    with pytest.raises(UserError, match="are free; use quantize int8, or run where there is more$"):
        LongLivePipeline.from_pretrained(tiny_checkpoint, dtype="bfloat16")
    with pytest.raises(UserError, match="are free; run where there is more$"):
        LongLivePipeline.from_pretrained(tiny_checkpoint, dtype="bfloat16", quantize="int8")
    assert not read


def test_nobody_says_what_is_free(tiny_pipeline, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda mesh: None)
    tiny_pipeline.prepare(PROMPT, seconds=2)


def test_what_is_free_here():
    assert 2**20 < memory.available() < 2**50


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0.0 KiB"), (1536, "1.5 KiB"), (2**20, "1.0 MiB"), (34 * 2**20, "34.0 MiB"), (2**30, "1.0 GiB")],
)
def test_readable(number, text):
    assert memory.readable(number) == text


def test_describe_leaves_out_nothing_but_zeros():
    parts = {"KV cache": 3 * 2**30, "text": 2**29, "none": 0}
    assert memory.describe(parts) == "3.5 GiB (KV cache 3.0 GiB, text 512.0 MiB)"
