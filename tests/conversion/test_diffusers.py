"""Folders of diffusers: as its own classes save them, in; and as they load them, out."""

import json
from fnmatch import fnmatch

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from longlive_jax import checkpoint
from longlive_jax.config import TextEncoderConfig, TransformerConfig, VAEConfig
from longlive_jax.conversion import diffusers
from longlive_jax.conversion.convert import convert_wan
from longlive_jax.conversion.export import export
from longlive_jax.conversion.parity import load_part
from longlive_jax.conversion.tables import WAN
from longlive_jax.conversion.tables_diffusers import DIFFUSERS
from longlive_jax.errors import UserError
from longlive_jax.tokenizer import PromptTokenizer, train_unigram

LOADERS = {"transformer": WanTransformer3DModel, "vae": AutoencoderKLWan, "text_encoder": UMT5EncoderModel}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module")
def models():
    """Each part with random numbers everywhere, norms and biases included."""
    made = {
        "transformer": WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, text_dim=24, freq_dim=16, ffn_dim=48, num_layers=2
        ),
        "vae": AutoencoderKLWan(base_dim=4, latents_mean=[0.25] * 16),
        "text_encoder": UMT5EncoderModel(
            UMT5Config(
                vocab_size=90, d_model=24, d_kv=8, d_ff=40, num_heads=4, num_layers=2,
                relative_attention_max_distance=64,
            )
        ),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for model in made.values():
        for parameter in model.eval().parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 5
    return made


@pytest.fixture
def folder(models, tmp_path):
    """A pipeline folder, the transformer in shards."""
    path = tmp_path / "pipeline"
    for part, model in models.items():
        model.save_pretrained(path / part, **({"max_shard_size": "30KB"} if part == "transformer" else {}))
    assert len(list((path / "transformer").glob("*.safetensors"))) > 1
    train_unigram(["a red square moves left"], 80).save(path / "tokenizer")
    (path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", "transformer_2": [None, None]}))
    return path


def message(*args, **kwargs) -> str:
    with pytest.raises(UserError) as error:
        convert_wan(*args, **kwargs)
    return str(error.value)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_equal(loaded, original, dtype):
    """Bit-equal states; what diffusers keeps in float32 holds the same numbers there."""
    ours, theirs = loaded.state_dict(), original.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name].float(), value.to(dtype).float(), rtol=0, atol=0, msg=name)


# MARK: in


def test_sizes_come_from_the_folder(folder, tmp_path):
    report = convert_wan(folder, tmp_path / "out", dtype="float32", verify=True)
    assert report["warnings"] == []
    config = checkpoint.check(tmp_path / "out")
    assert config.transformer == TransformerConfig(
        dim=32, ffn_dim=48, num_layers=2, num_heads=2, text_dim=24, time_dim=16
    )
    assert config.vae == VAEConfig(base_width=4, latent_mean=(0.25,) * 16)
    assert config.text_encoder == TextEncoderConfig(
        vocab_size=90, dim=24, attention_dim=32, ffn_dim=40, num_heads=4, num_layers=2, max_distance=64
    )
    PromptTokenizer.from_folder(tmp_path / "out", 16)


def test_the_transformer_computes_the_same(folder, models, tmp_path):
    convert_wan(folder, tmp_path / "out", dtype="float32")
    generator = torch.Generator().manual_seed(1)
    x, prompt = torch.randn(2, 16, 3, 4, 6, generator=generator), torch.randn(2, 7, 24, generator=generator)
    timestep = torch.tensor([700.0, 20.0])
    padded = torch.nn.functional.pad(prompt, (0, 0, 0, 512 - 7))  # as the pipeline pads; ours does it itself
    with torch.no_grad():
        expected = models["transformer"](x, timestep, padded).sample.permute(0, 2, 3, 4, 1).numpy()
    call = load_part(tmp_path / "out", "transformer")
    flow = call(
        lambda net, x, t, prompt: net.bidirectional(x, t, net.text_kv(prompt)),
        jnp.asarray(x.permute(0, 2, 3, 4, 1).numpy()), jnp.broadcast_to(timestep.numpy()[:, None], (2, 3)),
        jnp.asarray(prompt.numpy()),
    )  # fmt: skip
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(flow, expected, atol=1e-4)


@pytest.mark.parametrize("form", ["one file", "shards", ".pt"])
def test_a_generator_with_diffusers_names(wan, states, configs, tmp_path, form):
    """As diffusers saves one; over a Wan folder it gives what the same DiT with the original names gives."""
    rows = {row.torch: row.ours for row in DIFFUSERS["transformer"](configs["transformer"]).rows}
    original = {row.ours: row.torch for row in WAN["transformer"](configs["transformer"]).rows}
    tensors = {theirs: states["transformer"][original[ours]] + 1 for theirs, ours in rows.items()}
    path = tmp_path / ("dit.pt" if form == ".pt" else "dit.safetensors")
    if form == ".pt":
        torch.save({"model": {f"module.{name}": tensor for name, tensor in tensors.items()}}, path)
    elif form == "one file":
        save_file(tensors, path)
    else:
        shards = {name: f"dit-{i % 2}.safetensors" for i, name in enumerate(tensors)}
        for shard in set(shards.values()):
            save_file({name: tensors[name] for name in tensors if shards[name] == shard}, tmp_path / shard)
        path.with_name("dit.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    save_file({name: tensor + 1 for name, tensor in states["transformer"].items()}, tmp_path / "same.safetensors")
    report = convert_wan(wan, tmp_path / "out", generator=path, verify=True)
    assert report["hash"] == convert_wan(wan, tmp_path / "same", generator=tmp_path / "same.safetensors")["hash"]


def test_a_generator_with_names_of_both(wan, states, tmp_path):
    mixed = {**states["transformer"], "proj_out.bias": torch.ones(64), "blocks.1.attn1.to_q.bias": torch.ones(32)}
    save_file(mixed, tmp_path / "mixed.safetensors")
    text = message(wan, tmp_path / "out", generator=tmp_path / "mixed.safetensors")
    assert "has diffusers' names (blocks.1.attn1.to_q.bias, proj_out.bias) beside original ones (" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("part", "cfg"),
    [
        ("transformer", TransformerConfig.t2v_1_3b()),
        ("transformer", TransformerConfig.t2v_14b()),
        ("text_encoder", TextEncoderConfig.umt5_xxl()),
        ("vae", VAEConfig.wan()),
        ("vae", VAEConfig(base_width=8, multipliers=(1, 1, 3, 2), res_blocks=1, temporal=(True, False, True))),
    ],
)
def test_same_parameters_as_the_original_tables(part, cfg):
    """Each of ours once, by a name of its own, and in the same layout: the two sides differ in names alone."""
    rows, originals = DIFFUSERS[part](cfg).rows, {row.ours: row for row in WAN[part](cfg).rows}
    assert len({row.torch for row in rows}) == len(rows) == len(originals)
    assert {row.ours: row.transform for row in rows} == {name: row.transform for name, row in originals.items()}


def test_tied_embedding(folder, tmp_path):
    path = folder / "text_encoder/model.safetensors"
    tensors = load_file(path)
    assert "encoder.embed_tokens.weight" not in tensors
    both = tensors | {"encoder.embed_tokens.weight": tensors["shared.weight"].clone()}
    second = {name: tensor for name, tensor in both.items() if name != "shared.weight"}
    hashes = set()
    for i, case in enumerate((tensors, both, second)):
        save_file(case, path, {"format": "pt"})
        hashes.add(convert_wan(folder, tmp_path / f"out{i}")["hash"])
    assert len(hashes) == 1
    both["encoder.embed_tokens.weight"][3, 1] += 1
    save_file(both, path, {"format": "pt"})
    assert "are one tensor in umT5 but differ" in message(folder, tmp_path / "out")


def test_a_folder_without_text_encoder_and_tokenizer(folder, tmp_path):
    for name in ("text_encoder", "tokenizer"):
        (folder / name).rename(tmp_path / name)
    report = convert_wan(folder, tmp_path / "out")
    assert [warning.split(":")[0] for warning in report["warnings"]] == ["no text encoder", "no tokeniser"]


def test_a_generator_and_a_lora_of_longlive(folder, wan, lora, states, tmp_path):
    """Original names go on top of a diffusers folder as they do on an original one."""
    torch.save({"generator": {f"model.{n}": t for n, t in states["transformer"].items()}}, tmp_path / "base.pt")
    torch.save({"generator_lora": lora}, tmp_path / "lora.pt")
    kwargs = dict(loras=[(tmp_path / "lora.pt", 0.5)], dtype="float32")
    convert_wan(wan, tmp_path / "one", generator=tmp_path / "base.pt", **kwargs)
    convert_wan(folder, tmp_path / "two", generator=tmp_path / "base.pt", **kwargs)
    one, two = ((tmp_path / name / "transformer.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    convert_wan(folder, tmp_path / "plain", dtype="float32")
    convert_wan(folder, tmp_path / "merged", **kwargs)
    name = "base_model.model.blocks.1.ffn.2.lora"
    delta = 0.5 * (lora[f"{name}_B.weight"] @ lora[f"{name}_A.weight"]).T
    plain, merged = (checkpoint.load(tmp_path / n, "transformer")["blocks"]["ffn"]["down"] for n in ("plain", "merged"))
    np.testing.assert_allclose(merged["kernel"][1], plain["kernel"][1] + delta.numpy(), atol=1e-6)


def test_all_faults_at_once_and_nothing_written(folder, tmp_path):
    vae, text = folder / "vae/diffusion_pytorch_model.safetensors", folder / "text_encoder/model.safetensors"
    tensors = load_file(vae)
    tensors["decoder.up_blocks.1.resnets.9.conv1.bias"] = tensors.pop("decoder.up_blocks.1.resnets.0.conv1.bias")
    tensors["quant_conv.bias"] = torch.ones(3)
    save_file(tensors, vae)
    edit(folder / "text_encoder/config.json", d_ff=41)
    tensors = load_file(text)
    del tensors["encoder.final_layer_norm.weight"]
    save_file(tensors, text)
    next((folder / "transformer").glob("*-00001-of-*.safetensors")).unlink()
    edit(folder / "model_index.json", transformer_2=["diffusers", "WanTransformer3DModel"])
    before = sorted(tmp_path.iterdir())
    said = message(folder, tmp_path / "out")
    for part in (
        "nothing was written",
        "lacks decoder.up_blocks.1.resnets.0.conv1.bias",
        "unexpected decoder.up_blocks.1.resnets.9.conv1.bias",
        "quant_conv.bias is [3], expected [32]",
        "wi_0.weight is [40, 24], by config.json [41, 24]; these are two models",
        "-00001-of-",
        "is Wan 2.2's",
    ):
        assert part in said
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("part", "changes", "expected"),
    [
        ("transformer", {"image_dim": 1280}, "image_dim is 1280, but Wan 2.1's text to video models have None"),
        ("transformer", {"attention_head_dim": "16"}, "must be whole numbers"),
        ("transformer", {"num_layers": 1000}, "has 2 layers, config.json says 1000"),
        ("transformer", {"num_layers": 10**9}, "num_layers is 1000000000; 1 to 1000 is possible"),
        ("transformer", {"patch_size": [2, 2, 2]}, "spans frames"),
        ("vae", {"is_residual": True}, "is_residual is True"),
        ("vae", {"decoder_base_dim": 8}, "decoder_base_dim is 8"),
        ("vae", {"z_dim": 8}, "need 8 entries each"),
        ("text_encoder", {"model_type": "t5"}, "model_type is 't5'"),
        ("text_encoder", {"num_layers": True}, "must be int"),
    ],
)
def test_configs_of_other_models(folder, tmp_path, part, changes, expected):
    edit(folder / part / "config.json", **changes)
    assert expected in message(folder, tmp_path / "out")


def test_broken_configs(folder, tmp_path):
    path = folder / "vae/config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in values.items() if name not in ("base_dim", "z_dim")}))
    (folder / "transformer/config.json").write_text("{")
    (folder / "text_encoder/config.json").unlink()
    said = message(folder, tmp_path / "out")
    for part in ("lacks base_dim, z_dim", "is not valid JSON", "cannot read"):
        assert part in said
    edit(folder / "model_index.json", _class_name="WanImageToVideoPipeline")
    assert "of a WanImageToVideoPipeline" in message(folder, tmp_path / "out")
    (folder / "model_index.json").write_text("[]")
    assert "holds no settings" in message(folder, tmp_path / "out")


# MARK: out


@pytest.mark.parametrize("dtype", DTYPES)
def test_there_and_back(folder, models, tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 40_000)
    convert_wan(folder, tmp_path / "ours", dtype=dtype)
    report = export(tmp_path / "ours", tmp_path / "back", "diffusers")
    assert report["warnings"] == []
    assert (tmp_path / "back/transformer/diffusion_pytorch_model.safetensors.index.json").is_file()
    for part, original in models.items():
        loaded = LOADERS[part].from_pretrained(tmp_path / "back", subfolder=part, torch_dtype=DTYPES[dtype])
        assert_equal(loaded, original, DTYPES[dtype])
        for name in [*diffusers.SIZES[part].values(), *diffusers.HEADS.get(part, ())[1:], *diffusers.FIXED[part]]:
            ours, theirs = getattr(loaded.config, name), getattr(original.config, name)
            assert (list(ours) if isinstance(ours, tuple) else ours) == (
                list(theirs) if isinstance(theirs, tuple) else theirs
            ), name
    again = convert_wan(tmp_path / "back", tmp_path / "again", dtype=dtype)
    assert again["hash"] == checkpoint.checkpoint_hash(tmp_path / "ours")


def test_the_whole_pipeline_loads(folder, tmp_path):
    convert_wan(folder, tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back", "diffusers")
    pipe = WanPipeline.from_pretrained(tmp_path / "back")
    assert pipe.scheduler.config.shift == 5.0
    tokens = PromptTokenizer.from_folder(tmp_path / "ours", 16)(["a red square", "left"])
    kwargs = dict(padding="max_length", truncation=True, max_length=16, return_tensors="np")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "back/tokenizer")(["a red square", "left"], **kwargs)
    np.testing.assert_array_equal(theirs.input_ids, tokens.ids)
    np.testing.assert_array_equal(theirs.attention_mask, tokens.mask)


def test_without_text_encoder(folder, tmp_path):
    (folder / "text_encoder").rename(tmp_path / "text_encoder")
    (folder / "tokenizer").rename(tmp_path / "tokenizer")
    convert_wan(folder, tmp_path / "ours")
    report = export(tmp_path / "ours", tmp_path / "back", "diffusers")
    assert [warning.split(":")[0] for warning in report["warnings"]] == ["no text encoder", "no tokeniser"]
    pipe = WanPipeline.from_pretrained(tmp_path / "back", text_encoder=None, tokenizer=None)
    assert pipe.text_encoder is None
    assert pipe.transformer.config.num_layers == 2


def test_what_is_taken_from_the_hub(folder):
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    taken = {name for name in files if any(fnmatch(name, pattern) for pattern in diffusers.patterns(True))}
    assert taken == files
    rest = {name for name in files if any(fnmatch(name, pattern) for pattern in diffusers.patterns(False))}
    assert {name for name in taken - rest} == {n for n in files if n.startswith("transformer/diffusion")}
    assert diffusers.is_complete(folder, True)
    next((folder / "transformer").glob("*-00001-of-*.safetensors")).unlink()
    assert not diffusers.is_complete(folder, True)
    assert diffusers.is_complete(folder, False)
    (folder / "vae/config.json").unlink()
    assert not diffusers.is_complete(folder, False)
