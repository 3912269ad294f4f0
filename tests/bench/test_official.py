"""How the official pipelines are timed, on a stand-in for the clone (tests/conversion/stand_in)."""

import functools
import time
from pathlib import Path

import pytest
import torch

from longlive_jax.bench import official as official_module
from longlive_jax.bench.official import Official
from longlive_jax.config import ModelConfig, SamplerConfig, TransformerConfig, VAEConfig

STAND_IN = Path(__file__).parents[1] / "conversion" / "stand_in"
CONFIG = ModelConfig(
    TransformerConfig(dim=24, ffn_dim=32, num_layers=2, num_heads=2, text_dim=8, text_length=6, time_dim=16),
    VAEConfig(base_width=8, multipliers=(1, 1, 1, 1), res_blocks=0),
    None,
    SamplerConfig(height=32, width=32, window=9, steps=(1000.0, 500.0)),
)


def test_steady_blocks_and_passes_by_what_they_attend():
    with Official.opened(STAND_IN, CONFIG, "float32") as official:
        assert len(official.blocks(5).ms) == 5
        assert len(official.clock.times["dit_ms_per_block"]) == 5 + 4, "three blocks fill the window, one is left out"
        passes = official.passes()
        assert {frames: len(times.ms) for frames, times in passes.items()} == {3: 3, 6: 3, 9: 3}
        official.pipeline.generator.model.register_forward_pre_hook(lambda *_: time.sleep(0.02))
        # Not against the times before: on a loaded machine those may be longer than this.
        assert min(official.passes()[9].ms) >= 20, "what a pass does is in its time"


def test_a_video_and_a_prompt_switch():
    with Official.opened(STAND_IN, CONFIG, "float32", decode=True) as official:
        assert official.run(2, to_host=True) > 0
        assert len(official.clock.times["vae_decode_ms"]) == 1, "the clip is decoded at its end"
    with Official.opened(STAND_IN, CONFIG, "float32", interactive=True) as official:
        official.pipeline._recache_after_switch  # noqa: B018 - what is timed is there
        assert official.recache(4) > 0


def test_the_same_weights_and_noise_every_time():
    with Official.opened(STAND_IN, CONFIG, "float32") as official:
        one = official._noise(2), official.pipeline.generator.model.patch_embedding.weight.clone()
    with Official.opened(STAND_IN, CONFIG, "float32") as official:
        assert one[0].equal(official._noise(2)) and one[1].equal(
            official.pipeline.generator.model.patch_embedding.weight
        )
        weight = one[1].flatten(1)
        assert float(weight.var() * weight.shape[1]) == pytest.approx(1, abs=0.2)


def test_one_kernel_for_the_transformer_and_any_for_the_vae(monkeypatch):
    """The VAE's one head of 384 is more than the kernels that the transformer is held to can do."""
    from torch.nn.attention import SDPBackend

    monkeypatch.setattr(official_module, "_kernel", lambda *_: (SDPBackend.MATH, "the slow one"))
    allowed = {}
    with Official.opened(STAND_IN, CONFIG, "float32", decode=True) as official:

        def note(name, *_, **__):
            allowed[name] = torch.backends.cuda.flash_sdp_enabled()
            return torch.zeros(1) if name == "vae" else None

        official.pipeline.generator.model.register_forward_pre_hook(functools.partial(note, "transformer"))
        monkeypatch.setattr(official.pipeline.vae.vae, "decode_to_pixel", functools.partial(note, "vae"))
        official.run(1)
        assert official.attention == "the slow one"
    assert allowed == {"transformer": False, "vae": True} and torch.backends.cuda.flash_sdp_enabled()


def test_the_float32_reference_has_the_rounded_weights():
    with Official.opened(STAND_IN, CONFIG, "bfloat16") as official:
        narrow = official.pipeline.generator.model.patch_embedding.weight.clone()
    with Official.opened(STAND_IN, CONFIG, "float32", drawn="bfloat16") as official:
        wide = official.pipeline.generator.model.patch_embedding.weight.clone()
    with Official.opened(STAND_IN, CONFIG, "float32") as official:
        unrounded = official.pipeline.generator.model.patch_embedding.weight.clone()
    assert wide.dtype == torch.float32 and wide.equal(narrow.float()) and not wide.equal(unrounded)


def test_nothing_is_recorded_while_a_video_is_timed():
    with Official.opened(STAND_IN, CONFIG, "float32", decode=True) as official:
        official.run(2, to_host=True)
        assert official.pipeline.vae.pixels is None and official.pipeline.text_encoder.embeds == []
        assert official.block_sums() is None, "the stand-in's VAE has no decoder whose calls could be timed"


def test_a_block_of_a_video_is_its_passes_and_its_decoding():
    with Official.opened(STAND_IN, CONFIG, "float32") as official:
        skip = official.ramp_blocks()
        official.clock.times.update(dit_ms_per_block=[9.0] * skip + [10.0, 20.0])
        official.clock.times.update(decode_ms_per_latent=[0.0] * 3 * skip + [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
        assert official.block_sums().ms == (16.0, 35.0)


def test_a_gpu_notes_when_it_comes_by_and_is_asked_later(monkeypatch):
    class Event:
        moments = iter((5.0, 12.0, 20.0, 21.0))

        def record(self):
            self.ms = next(self.moments)

        def elapsed_time(self, end):
            return end.ms - self.ms

    monkeypatch.setattr(torch.cuda, "Event", lambda **_: Event())
    clock = official_module.BenchClock(torch.device("cuda"))
    clock.waits = False
    for _ in range(2):
        with clock.span("block"):
            assert clock.times == {}, "nothing is waited for"
    clock.settle()
    clock.settle()
    assert clock.times == {"block": [7.0, 1.0]}
