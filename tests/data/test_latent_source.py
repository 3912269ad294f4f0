"""Training sequences from cached latents: functions of their index, and prompts that fit what is to be learnt."""

import numpy as np
import pytest
from flax import nnx

from longlive_jax.config import VAEConfig
from longlive_jax.data.latent_source import LatentSource
from longlive_jax.data.sprite_prompts import matches, parse
from longlive_jax.errors import UserError
from longlive_jax.models.vae import VAE
from longlive_jax.tokenizer import Tokens
from longlive_jax.training import latents as latents_module
from longlive_jax.training.latents import cached_latents, scheduled_clip

CLIPS, FRAMES = 8, 15
PLANS = [scheduled_clip(7, i, FRAMES, 3, draw=False)[1:] for i in range(CLIPS)]
# A latent tells its clip and frame.
LATENTS = (100 * np.arange(CLIPS)[:, None] + np.arange(FRAMES)).astype(np.float16)[:, :, None, None, None]


class Words:
    """A tokeniser that remembers what it was given."""

    def __call__(self, prompts):
        self.prompt = prompts[0]
        return Tokens(np.zeros((1, 4), np.int32), np.ones((1, 4), np.int32), np.zeros(1, bool))


def source(**changes):
    settings = dict(block=3, frames=12, group=2, anywhere=True, prompt_dropout=0.0, seed=1, length=200)
    return LatentSource(LATENTS, PLANS, Words(), **(settings | changes))


def test_records_are_functions_of_their_index():
    one, two = source(), source()
    for i in (5, 0, 5):
        for name, value in one[i].items():
            np.testing.assert_array_equal(value, two[i][name])
    assert any((one[0]["latents"] != one[i]["latents"]).any() for i in range(1, 5))


def test_the_clips_of_a_stream_share_their_positions():
    records = source()
    for i in range(0, 40, 2):
        np.testing.assert_array_equal(records[i]["positions"], records[i + 1]["positions"])
    gaps = {int(records[i]["positions"][3]) for i in range(0, 40, 2)}
    assert 3 in gaps and len(gaps) > 5 and max(gaps) < 1024


def test_prompts_say_what_is_learnt():
    records, seen = source(), set()
    for i in range(100):
        record = records[i]
        clip, frames = divmod(record["latents"][:, 0, 0, 0].astype(int), 100)
        (first, second), change = PLANS[clip[0]]
        stated = parse(records.tokenizer.prompt)
        for frame, learn in zip(frames, record["learn"]):
            shown = second if frame >= change else first
            if learn:
                assert matches(shown, stated)
        assert record["learn"].any()
        seen.add(bool(record["learn"].all()))
    assert seen == {True, False}


def test_whole_clips_begin_at_their_start():
    record = source(anywhere=False, block=15, frames=15)[3]
    np.testing.assert_array_equal(record["positions"], np.arange(15))
    np.testing.assert_array_equal(record["latents"][:, 0, 0, 0] % 100, np.arange(15))


def test_prompt_dropout():
    records, empty = source(prompt_dropout=0.3, length=400), 0
    for i in range(400):
        records[i]
        empty += records.tokenizer.prompt == ""
    assert 80 < empty < 160


def latents_of(folder, clips, **changes):
    vae = nnx.eval_shape(lambda: VAE(VAEConfig.sprites(), rngs=nnx.Rngs(0)))
    settings = dict(latent_frames=3, block=3, seed=7, vae_hash="a", say=lambda line: None) | changes
    return cached_latents(vae, folder, clips=clips, **settings)


@pytest.fixture
def pictures_as_latents(monkeypatch):
    """The first frames themselves, at a fourth of their size."""
    monkeypatch.setattr(latents_module, "encoded", lambda vae, video: video[:, :3, ::4, ::4] / 255)


def test_more_clips_than_a_folder_has_are_those_of_a_new_folder(tmp_path, monkeypatch, pictures_as_latents):
    monkeypatch.setattr(latents_module, "SHARD", 4)
    latents_of(tmp_path / "grown", 2)
    for clips in (7, 3):
        (grown, plans), (new, same) = latents_of(tmp_path / "grown", clips), latents_of(tmp_path / str(clips), clips)
        assert plans == same and len(plans) == clips
        np.testing.assert_array_equal(grown, new)


def test_cached_latents_of_others_are_refused(tmp_path, pictures_as_latents):
    latents, plans = latents_of(tmp_path, 4)
    assert len(latents) == len(plans) == 4
    with pytest.raises(
        UserError, match="latents in .* are of others .vae a, now b.; delete the folder or give another"
    ):
        latents_of(tmp_path, 4, vae_hash="b")
