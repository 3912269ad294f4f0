"""How the official pipelines are timed, on a stand-in for the clone (tests/conversion/stand_in)."""

import time
from pathlib import Path

import pytest

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
        times = passes[9].ms
        official.pipeline.generator.model.register_forward_pre_hook(lambda *_: time.sleep(0.02))
        assert min(official.passes()[9].ms) > max(10, min(times)), "what a pass does is in its time"


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
