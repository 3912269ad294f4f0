"""Settings: what is accepted, what is refused and with which way out, and that nothing is lost through JSON."""

import dataclasses
import json
import re

import pytest

from longlive_jax.config import (
    ModelConfig,
    SamplerConfig,
    TextEncoderConfig,
    TransformerConfig,
    VAEConfig,
    from_dict,
    official_changes,
    replace,
    to_dict,
    unknown_name,
)
from longlive_jax.errors import UserError

PRESETS = (ModelConfig.sprites, ModelConfig.t2v_1_3b, ModelConfig.t2v_14b)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_survive_json(preset):
    config = preset()
    assert from_dict(ModelConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_a_model_without_text_encoder_survives_json():
    config = dataclasses.replace(ModelConfig.sprites(), text_encoder=None)
    assert from_dict(ModelConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_wan_sizes():
    small, large = TransformerConfig.t2v_1_3b(), TransformerConfig.t2v_14b()
    assert (small.dim, small.ffn_dim, small.num_layers, small.num_heads, small.head_dim) == (1536, 8960, 30, 12, 128)
    assert (large.dim, large.ffn_dim, large.num_layers, large.num_heads, large.head_dim) == (5120, 13824, 40, 40, 128)
    sampler = ModelConfig.t2v_1_3b().sampler
    assert (sampler.window, sampler.sink_frames, sampler.block_frames) == (12, 3, 3)
    assert (sampler.switch, sampler.sink, sampler.rope) == ("recache", "keep", "auto")


# Names and kinds of JSON values


def test_an_unknown_key_offers_the_nearest():
    values = to_dict(ModelConfig.sprites())
    values["sampler"]["windw"] = values["sampler"].pop("window")
    with pytest.raises(UserError, match="^config.json: sampler: unknown key 'windw'; did you mean 'window'[?]$"):
        from_dict(ModelConfig, values, "config.json")


def test_an_unknown_name_far_from_all_lists_them():
    assert unknown_name("switch value", "xyz", ("recache", "keep")) == (
        "unknown switch value 'xyz'; known: keep, recache"
    )


def test_replace_offers_the_nearest():
    with pytest.raises(UserError, match="^unknown setting 'block_frame'; did you mean 'block_frames'[?]$"):
        replace(SamplerConfig(), block_frame=3)


def test_missing_keys_are_named_together():
    with pytest.raises(UserError, match="^transformer: missing ffn_dim, num_heads$"):
        from_dict(TransformerConfig, {"dim": 32, "num_layers": 2}, "transformer")


def test_lists_become_tuples_and_whole_numbers_pass_for_others():
    changed = replace(SamplerConfig(), steps=[1000, 500], shift=3, context_noise=0)
    assert changed.steps == (1000.0, 500.0)
    assert [type(v) for v in (*changed.steps, changed.shift, changed.context_noise)] == [float] * 4
    assert hash(changed) == hash(replace(SamplerConfig(), steps=(1000.0, 500.0), shift=3.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": "12"}, "window must be int, got '12'"),
        ({"window": 12.0}, "window must be int, got 12.0"),
        ({"window": True}, "window must be int, got True"),
        ({"warp": 1}, "warp must be bool, got 1"),
        ({"shift": True}, "shift must be float, got True"),
        ({"shift": None}, "shift must be float, got None"),
        ({"steps": 1000}, "steps must be a list, got 1000"),
        ({"steps": "1000"}, "steps must be a list, got '1000'"),
        ({"steps": ["a"]}, "steps must be float, got 'a'"),
        ({"switch": None}, "switch must be str, got None"),
    ],
)
def test_values_of_the_wrong_kind(change, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        replace(SamplerConfig(), **change)


def test_a_table_of_the_wrong_kind_or_length():
    values = to_dict(ModelConfig.sprites())
    with pytest.raises(UserError, match=r"^vae: expected a table of settings, got \[1\]$"):
        from_dict(ModelConfig, {**values, "vae": [1]})
    values["transformer"]["patch"] = [1, 2]
    with pytest.raises(UserError, match="^transformer: patch needs 3 entries, got 2$"):
        from_dict(ModelConfig, values)


# Ranges


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"switch": "recash"}, "unknown switch value 'recash'; did you mean 'recache'?"),
        ({"sink": "refrsh"}, "unknown sink value 'refrsh'; did you mean 'refresh'?"),
        ({"rope": "relativ"}, "unknown rope value 'relativ'; did you mean 'relative'?"),
        ({"block_frames": 0}, "block_frames is 0; at least 1 latent frame is needed"),
        ({"sink_frames": -1}, "sink_frames is -1; 0 or more latent frames are allowed"),
        ({"steps": ()}, "steps [] must be one or more numbers from 0 to 1000"),
        ({"steps": (1001.0,)}, "steps [1001.0] must be one or more numbers from 0 to 1000"),
        ({"steps": (-1.0,)}, "steps [-1.0] must be one or more numbers from 0 to 1000"),
        ({"steps": (float("nan"),)}, "steps [nan] must be one or more numbers from 0 to 1000"),
        ({"steps": (500.0, 500.0)}, "steps [500.0, 500.0] must fall, as in 1000 750 500 250"),
        ({"steps": (250.0, 500.0)}, "steps [250.0, 500.0] must fall, as in 1000 750 500 250"),
        ({"steps": (937.5,)}, "steps [937.5] index a table of 1000 and must be whole; or set warp to false"),
        ({"shift": 0.0}, "shift is 0.0; it must be above 0"),
        ({"shift": float("nan")}, "shift is nan; it must be above 0"),
        ({"shift": float("inf")}, "shift is inf; it must be finite"),
        ({"context_noise": 1001.0}, "context_noise is 1001.0; timesteps from 0 to 1000 are allowed"),
        ({"height": 0}, "height is 0; at least 1 pixel is needed"),
        ({"width": -64}, "width is -64; at least 1 pixel is needed"),
    ],
)
def test_sampler_ranges(change, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        replace(SamplerConfig(), **change)


def test_fractions_of_steps_without_warp():
    assert replace(SamplerConfig(), steps=(937.5, 0.5), warp=False).steps == (937.5, 0.5)


@pytest.mark.parametrize(("sink", "block"), [(3, 3), (0, 1), (5, 3), (2, 4)])
def test_the_window_holds_the_sink_and_a_block(sink, block):
    least = sink + block
    assert SamplerConfig(window=least, sink_frames=sink, block_frames=block).window == least
    assert SamplerConfig(window=-1, sink_frames=sink, block_frames=block).window == -1
    for window in {least - 1, 0, -2}:
        with pytest.raises(UserError, match=f"^window is {window} .* at least {least} [(]or -1 for all of the past[)]"):
            SamplerConfig(window=window, sink_frames=sink, block_frames=block)


@pytest.mark.parametrize(
    ("height", "width", "message"),
    [
        (480, 832, None),
        (16, 16, None),
        (470, 832, "height 470 is not a multiple of 16 pixels; the nearest that is: 464 or 480"),
        (480, 833, "width 833 is not a multiple of 16 pixels; the nearest that is: 832 or 848"),
        (8, 16, "height 8 is not a multiple of 16 pixels; the nearest that is: 16"),
    ],
)
def test_picture_sizes(height, width, message):
    sampler = SamplerConfig(height=height, width=width)
    if message is None:
        sampler.check_size((1, 2, 2))
        return
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        sampler.check_size((1, 2, 2))


def test_picture_sizes_go_by_the_patch():
    SamplerConfig(height=8, width=24).check_size((1, 1, 1))
    with pytest.raises(UserError, match="^width 24 is not a multiple of 16 pixels; the nearest that is: 16 or 32$"):
        SamplerConfig(height=8, width=24).check_size((1, 1, 2))


# Sizes of the networks


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TransformerConfig(30, 64, 2, 4), "dim 30 does not split into 4 heads of even width"),
        (lambda: TransformerConfig(12, 64, 2, 4), "dim 12 does not split into 4 heads of even width"),
        (lambda: TransformerConfig(32, 64, 2, 2, patch=(2, 2, 2)), "only 1 frame a token is supported"),
        (lambda: VAEConfig(temporal=(True, True)), "temporal needs 3 entries, got 2"),
        (lambda: VAEConfig(latent_std=(1.0,)), "latent_mean and latent_std need 16 entries each"),
        (lambda: VAEConfig(temporal=(True,) * 3), "compresses 8x in space and 8x in time; 8x and 4x are supported"),
        (lambda: TextEncoderConfig(attention_dim=10, num_heads=4), "width 10 does not split into 4 heads"),
        (
            lambda: replace(ModelConfig.sprites(), text_encoder=to_dict(TextEncoderConfig(dim=8))),
            "the text encoder gives 8 numbers a token, the transformer expects 96",
        ),
        (
            lambda: replace(ModelConfig.sprites(), transformer=to_dict(TransformerConfig(8, 8, 1, 1, 4, text_dim=96))),
            "the VAE has 16 latent channels, the transformer 4",
        ),
    ],
)
def test_sizes_that_do_not_fit(make, message):
    with pytest.raises(UserError, match=re.escape(message)):
        make()


def test_official_names():
    assert official_changes({"local_attn_size": -1, "sink_size": 2, "num_frame_per_block": 1, "model_name": "x"}) == {
        "window": -1, "sink_frames": 2, "block_frames": 1,
    }  # fmt: skip
    assert official_changes({"global_sink": False, "use_infinite_attention": True}) == {
        "sink": "refresh", "rope": "relative",
    }  # fmt: skip
    assert official_changes({"global_sink": True, "use_infinite_attention": False}) == {"sink": "keep"}
