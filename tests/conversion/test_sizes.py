"""Sizes come from the weights and config.json, at any size; what does not fit is named."""

import json

import pytest

from longlive_jax.checkpoint import tensor_shapes
from longlive_jax.config import TextEncoderConfig, TransformerConfig, VAEConfig
from longlive_jax.conversion import sizes, tables
from longlive_jax.errors import UserError


def shapes_of(part, cfg):
    return tables.WAN[part](cfg).torch_shapes(tensor_shapes(part, cfg))


@pytest.mark.parametrize("preset", ["t2v_1_3b", "t2v_14b", "sprites"])
def test_transformer(preset):
    cfg = getattr(TransformerConfig, preset)()
    settings = {"num_heads": cfg.num_heads, "text_len": cfg.text_length}
    assert sizes.transformer_sizes(shapes_of("transformer", cfg), settings, "x") == cfg


@pytest.mark.parametrize("cfg", [VAEConfig.wan(), VAEConfig(base_width=8, multipliers=(1, 3, 3, 2), res_blocks=1)])
def test_vae(cfg):
    assert sizes.vae_sizes(shapes_of("vae", cfg), "x") == cfg


def test_text_encoder():
    small = TextEncoderConfig(vocab_size=90, dim=24, attention_dim=48, ffn_dim=40, num_heads=6, num_layers=3)
    for cfg in (small, TextEncoderConfig.umt5_xxl()):
        assert sizes.text_encoder_sizes(shapes_of("text_encoder", cfg), "x") == cfg


def test_config_and_weights_must_agree(configs):
    shapes = shapes_of("transformer", configs["transformer"])
    with pytest.raises(UserError, match="ffn_dim is 48, config.json says 320"):
        sizes.transformer_sizes(shapes, {"num_heads": 2, "ffn_dim": 320}, "x")
    with pytest.raises(UserError, match="does not split into 3 heads"):
        sizes.transformer_sizes(shapes, {"num_heads": 3}, "x")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "not valid JSON"),
        ("[]", "holds no settings"),
        ("{}", "no num_heads"),
        ('{"num_heads": "2"}', "no num_heads"),
        ('{"num_heads": 0}', "no num_heads"),
        ("[" * 100000, "not valid JSON"),
        ('{"num_heads": 2, "model_type": "i2v"}', "only t2v"),
    ],
)
def test_settings(tmp_path, text, expected):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=expected):
        sizes.read_settings(tmp_path / "config.json")


def test_missing_settings(tmp_path):
    with pytest.raises(UserError, match="how many heads"):
        sizes.read_settings(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": 2}))
    assert sizes.read_settings(tmp_path / "config.json") == {"num_heads": 2}


def test_the_wrong_file_is_named(configs):
    vae, text = shapes_of("vae", configs["vae"]), shapes_of("text_encoder", configs["text_encoder"])
    with pytest.raises(UserError, match="x lacks patch_embedding.weight"):
        sizes.transformer_sizes(vae, {"num_heads": 2}, "x")
    with pytest.raises(UserError, match="x lacks encoder.conv1.weight"):
        sizes.vae_sizes(text, "x")
    with pytest.raises(UserError, match="x lacks token_embedding.weight"):
        sizes.text_encoder_sizes(vae, "x")
    with pytest.raises(UserError, match=r"is \[24\], expected 2 axes"):
        sizes.text_encoder_sizes(text | {"token_embedding.weight": (24,)}, "x")
    with pytest.raises(UserError, match="no regular levels"):
        sizes.vae_sizes(vae | {"encoder.downsamples.0.residual.2.weight": (5, 4, 3, 3, 3)}, "x")
    with pytest.raises(UserError, match="8 latent channels"):
        sizes.vae_sizes(vae | {"conv2.weight": (8, 8, 1, 1, 1)}, "x")
