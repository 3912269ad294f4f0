"""The checkpoint folder: what is saved is loaded, faults are told all at once, a checkpoint is whole or not there."""

import dataclasses
import json
import os
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from longlive_jax import checkpoint
from longlive_jax.config import ModelConfig, SamplerConfig, TextEncoderConfig, TransformerConfig, VAEConfig
from longlive_jax.errors import UserError
from longlive_jax.models.text_encoder import TextEncoder
from longlive_jax.models.transformer import WanTransformer
from longlive_jax.tensor_files import LazyTensor, write_safetensors
from longlive_jax.tokenizer import train_unigram

CONFIG = ModelConfig(
    TransformerConfig(dim=32, ffn_dim=48, num_layers=3, num_heads=2, text_dim=24, text_length=8, time_dim=16),
    VAEConfig(base_width=4),
    TextEncoderConfig(vocab_size=40, dim=24, attention_dim=32, ffn_dim=40, num_heads=4, num_layers=2),
    SamplerConfig.sprites(),
)


def random_params(part: str) -> dict:
    """Random numbers in the shape of a part: quicker than initialising it."""
    rng = np.random.default_rng(0)
    draw = lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32)
    return jax.tree.map(draw, checkpoint.abstract_params(part, getattr(CONFIG, part)))


@pytest.fixture(scope="module")
def params():
    return {part: random_params(part) for part in checkpoint.MODULES}


@pytest.fixture(scope="module")
def saved(params, tmp_path_factory):
    """A checkpoint that no test changes."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    checkpoint.save(folder, CONFIG, params, train_unigram(["a red square"], 80), {"made by": "a test"})
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    """A copy to damage."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def assert_equal(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    jax.tree.map(np.testing.assert_array_equal, one, two)


def message(call, *args, **kwargs) -> str:
    """The text of the UserError, which must be one line."""
    with pytest.raises(UserError) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# MARK: round trips


def test_round_trip(saved, params):
    assert sorted(path.name for path in saved.iterdir()) == [
        "config.json", "text_encoder.safetensors", "tokenizer.json", "transformer.safetensors", "vae.safetensors",
    ]  # fmt: skip
    assert checkpoint.load_config(saved) == checkpoint.check(saved) == CONFIG
    assert checkpoint.load_provenance(saved) == {"made by": "a test"}
    for part in params:
        assert_equal(checkpoint.load(saved, part), params[part])


def test_loaded_parameters_merge(saved):
    graph, state = nnx.split(nnx.eval_shape(lambda: TextEncoder(CONFIG.text_encoder, rngs=nnx.Rngs(0))))
    loaded = checkpoint.load(saved, "text_encoder", jnp.bfloat16)
    assert jax.tree.map(jnp.shape, loaded) == jax.tree.map(jnp.shape, nnx.to_pure_dict(state))
    out = nnx.merge(graph, loaded)(jnp.ones((1, 4), jnp.int32), jnp.ones((1, 4), jnp.int32))
    assert np.isfinite(np.asarray(out)).all()


def test_layers_apart(saved, params):
    apart = checkpoint.load(saved, "transformer", stacked=False)
    module = nnx.eval_shape(lambda: WanTransformer(CONFIG.transformer, stacked=False, rngs=nnx.Rngs(0)))
    state = nnx.state(module)
    assert jax.tree.map(jnp.shape, apart) == jax.tree.map(jnp.shape, nnx.to_pure_dict(state))
    kernel = params["transformer"]["blocks"]["ffn"]["up"]["kernel"]
    np.testing.assert_array_equal(apart["blocks"][2]["ffn"]["up"]["kernel"], kernel[2])


def test_parameters_of_a_list_are_saved_alike(saved, params, tmp_path):
    apart = {"transformer": checkpoint.unstack(params["transformer"]), "vae": params["vae"]}
    checkpoint.save(tmp_path / "apart", CONFIG, apart)
    assert_equal(checkpoint.load(tmp_path / "apart", "transformer"), params["transformer"])


def test_one_tensor_a_layer(saved):
    names = set(load_file(saved / "transformer.safetensors"))
    assert {f"blocks.{i}.self_attn.q.kernel" for i in range(3)} <= names
    assert names == set(checkpoint.tensor_shapes("transformer", CONFIG.transformer))
    assert "decoder.layers.3.conv1.kernel" in load_file(saved / "vae.safetensors")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_dtypes(params, tmp_path, dtype):
    on_device = {part: jax.tree.map(jnp.asarray, value) for part, value in params.items()}
    checkpoint.save(tmp_path / "model", CONFIG, on_device, dtype=dtype)
    loaded = checkpoint.load(tmp_path / "model", "vae")
    assert_equal(loaded, jax.tree.map(lambda leaf: leaf.astype(dtype), params["vae"]))
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype(dtype)}
    wide = checkpoint.load(tmp_path / "model", "transformer", np.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(wide)} == {np.dtype(np.float32)}


def test_without_text_encoder(params, tmp_path):
    two = {part: params[part] for part in ("transformer", "vae")}
    checkpoint.save(tmp_path / "model", CONFIG, two)
    assert json.loads((tmp_path / "model/config.json").read_text())["text_encoder"] is None
    assert checkpoint.check(tmp_path / "model") == dataclasses.replace(CONFIG, text_encoder=None)
    assert "has no text encoder" in message(checkpoint.load, tmp_path / "model", "text_encoder")


def test_shards(saved, params, tmp_path):
    checkpoint.save(tmp_path / "model", CONFIG, params, train_unigram(["a red square"], 80), shard_bytes=30_000)
    names = sorted(path.name for path in (tmp_path / "model").glob("transformer*"))
    assert names[0] == f"transformer-00001-of-{len(names) - 1:05}.safetensors"
    assert names[-1] == "transformer.safetensors.index.json"
    assert all(path.stat().st_size < 60_000 for path in (tmp_path / "model").glob("transformer-*"))
    index = json.loads((tmp_path / "model/transformer.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(params["transformer"]))
    for part in params:
        assert_equal(checkpoint.load(tmp_path / "model", part), params[part])
    assert checkpoint.checkpoint_hash(tmp_path / "model") == checkpoint.checkpoint_hash(saved)


# MARK: hashes


def test_hash_is_of_the_contents(saved, copy, params, tmp_path):
    expected = checkpoint.checkpoint_hash(saved)
    assert len(expected) == 64
    assert checkpoint.checkpoint_hash(copy) == expected, "the place does not matter"
    values = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(values | {"provenance": {"other": 1}}))
    assert checkpoint.checkpoint_hash(copy) == expected, "nor does where it comes from"
    changed = jax.tree.map(np.copy, params)
    changed["vae"]["quant"]["bias"][0] += 1
    checkpoint.save(tmp_path / "changed", CONFIG, changed, train_unigram(["a red square"], 80))
    assert checkpoint.checkpoint_hash(tmp_path / "changed") != expected
    (copy / "tokenizer.json").write_text("{}")
    assert checkpoint.checkpoint_hash(copy) != expected


def test_hash_of_files_that_have_none(saved, copy):
    for path in copy.glob("*.safetensors"):
        save_file(load_file(path), path)  # other programs do not keep our hashes
    assert checkpoint.checkpoint_hash(copy) == checkpoint.checkpoint_hash(saved)


def test_headers_hold_each_tensors_hash(saved, params, tmp_path):
    hashes = checkpoint.save(tmp_path / "model", CONFIG, params)
    with safe_open(saved / "vae.safetensors", "np") as file:
        assert file.metadata() == hashes["vae"]


def test_verify_finds_a_flipped_bit(params, tmp_path):
    hashes = checkpoint.save(tmp_path / "model", CONFIG, params, finish=checkpoint.verify)
    path = tmp_path / "model/vae.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    text = message(checkpoint.verify, tmp_path / "model", hashes)
    assert text.endswith(f"vae: {list(hashes['vae'])[-1]} not as written")


# MARK: faults on reading


def test_no_checkpoint(tmp_path):
    assert "there is no checkpoint folder" in message(checkpoint.load_config, tmp_path / "none")
    assert "longlive convert" in message(checkpoint.load_config, tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "not valid JSON" in message(checkpoint.load_config, tmp_path)
    (tmp_path / "config.json").write_text('{"dim": 128}')
    assert "longlive convert --wan" in message(checkpoint.load_config, tmp_path)
    (tmp_path / "config.json").write_text('{"format": 99}')
    assert "update longlive-jax" in message(checkpoint.load_config, tmp_path)


def test_config_key_that_nobody_knows(copy):
    values = json.loads((copy / "config.json").read_text())
    values["sampler"]["windo"] = values["sampler"].pop("window")
    (copy / "config.json").write_text(json.dumps(values))
    assert "did you mean 'window'" in message(checkpoint.load_config, copy)


@pytest.mark.parametrize("keep", [0, 4, 500, -1])
def test_truncated(copy, keep):
    path = copy / "vae.safetensors"
    os.truncate(path, keep if keep >= 0 else path.stat().st_size + keep)
    text = message(checkpoint.load, copy, "vae")
    assert str(path) in text
    assert "cut off or damaged" in text


def test_garbage(copy):
    (copy / "vae.safetensors").write_bytes(os.urandom(1000))
    assert "cut off or damaged" in message(checkpoint.load, copy, "vae")


def test_all_faults_at_once(copy):
    (copy / "transformer.safetensors").unlink()
    os.truncate(copy / "vae.safetensors", 100)
    tensors = load_file(copy / "text_encoder.safetensors")
    tensors["extra.one"] = tensors.pop("blocks.1.ffn.up.kernel")
    tensors["extra.two"] = tensors.pop("norm.weight")
    tensors["token_embedding"] = tensors["token_embedding"][:-1]
    save_file(tensors, copy / "text_encoder.safetensors")
    text = message(checkpoint.check, copy)
    for part in (
        "transformer.safetensors is missing",
        "vae.safetensors is cut off",
        "lacks blocks.1.ffn.up.kernel, norm.weight",
        "unexpected extra.one, extra.two",
        "token_embedding is [39, 24], expected [40, 24]",
    ):
        assert part in text


def test_a_shard_is_missing(params, tmp_path):
    checkpoint.save(tmp_path / "model", CONFIG, params, shard_bytes=30_000)
    shards = sorted((tmp_path / "model").glob("transformer-*"))
    shards[0].unlink()
    shards[2].unlink()
    text = message(checkpoint.load, tmp_path / "model", "transformer")
    assert shards[0].name in text
    assert shards[2].name in text
    (tmp_path / "model/transformer.safetensors.index.json").write_text("[]")
    assert "no index of shards" in message(checkpoint.load, tmp_path / "model", "transformer")


def test_provenance_that_is_none(saved, copy):
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"provenance": 7}))
    assert f"{path}: its provenance is no table" in message(checkpoint.load_provenance, copy)


def test_index_names_a_tensor_that_is_nowhere(params, tmp_path):
    checkpoint.save(tmp_path / "model", CONFIG, params, shard_bytes=30_000)
    path = tmp_path / "model/transformer.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["ghost"] = index["weight_map"]["head.modulation"]
    path.write_text(json.dumps(index))
    text = message(checkpoint.load, tmp_path / "model", "transformer")
    assert f"{index['weight_map']['ghost']} lacks ghost, which {path.name} names there" in text


# MARK: writing


def test_an_existing_output_is_kept(saved, params):
    before = checkpoint.checkpoint_hash(saved)
    assert "exists and is kept" in message(checkpoint.save, saved, CONFIG, params)
    assert checkpoint.checkpoint_hash(saved) == before


def test_overwrite(copy, params):
    two = {part: params[part] for part in ("transformer", "vae")}
    checkpoint.save(copy, CONFIG, two, overwrite=True)
    assert not (copy / "tokenizer.json").exists(), "nothing of the old one stays"
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_overwrite_only_replaces_checkpoints(params, tmp_path):
    (tmp_path / "letters.txt").write_text("dear")
    assert "not a checkpoint folder" in message(checkpoint.save, tmp_path, CONFIG, params, overwrite=True)
    assert (tmp_path / "letters.txt").exists()


def test_parameters_must_fit(params, tmp_path):
    wrong = jax.tree.map(np.copy, params)
    del wrong["vae"]["quant"]["bias"]
    wrong["transformer"]["head"]["other"] = np.zeros(3)
    wrong["text_encoder"]["norm"]["weight"] = np.zeros(7)
    text = message(checkpoint.save, tmp_path / "model", CONFIG, wrong)
    assert all(part in text for part in ("lacks quant.bias", "unexpected head.other", "norm.weight is [7]"))
    none = dataclasses.replace(CONFIG, text_encoder=None)
    assert "has no text_encoder" in message(checkpoint.save, tmp_path / "model", none, params)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [UserError("no"), RuntimeError("no"), KeyboardInterrupt()])
def test_nothing_stays_of_a_failed_write(copy, params, error):
    def fail():
        raise error

    tensors = checkpoint.lazy_tensors(params["vae"])
    tensors[-1] = dataclasses.replace(tensors[-1], make=fail)
    before = checkpoint.checkpoint_hash(copy)
    for folder in (copy, copy.parent / "new"):
        with pytest.raises(type(error)):
            parts = {"transformer": params["transformer"], "vae": tensors}
            checkpoint.save(folder, CONFIG, parts, overwrite=True)
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]
    assert checkpoint.checkpoint_hash(copy) == before


def test_the_old_one_comes_back_if_the_new_one_cannot_take_its_place(copy, params, monkeypatch):
    rename, before = os.replace, checkpoint.checkpoint_hash(copy)

    def once_refused(source, target):
        if str(source).endswith(".tmp") and target == copy:
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr("longlive_jax.checkpoint.os.replace", once_refused)
    assert "No space left on device; nothing was written" in message(
        checkpoint.save, copy, CONFIG, params, overwrite=True
    )
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]
    assert checkpoint.checkpoint_hash(copy) == before


def test_a_place_that_cannot_be_written(params, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot write" in message(checkpoint.save, tmp_path / "file" / "model", CONFIG, params)


def test_tensors_are_made_one_at_a_time(params, tmp_path):
    """The writer lets go of a tensor before it makes the next one."""
    alive, most = weakref.WeakSet(), 0

    class Tracked(np.ndarray):
        __hash__ = object.__hash__
        __eq__ = object.__eq__

    def track(make):
        def made():
            nonlocal most
            array = np.array(make()).view(Tracked)
            alive.add(array)
            most = max(most, len(alive))
            return array

        return made

    tensors = [dataclasses.replace(t, make=track(t.make)) for t in checkpoint.lazy_tensors(params["transformer"])]
    checkpoint.save(tmp_path / "model", CONFIG, {"transformer": tensors, "vae": params["vae"]})
    assert 1 <= most <= 2


def test_scalars_and_empty_tensors_keep_their_bytes(tmp_path):
    values = {"a": np.float32(3.5), "b": np.zeros((0, 4), np.float32), "c": np.arange(6, dtype=np.int64)}
    tensors = [
        LazyTensor(name, np.shape(value), np.asarray(value).dtype, lambda value=value: value)
        for name, value in values.items()
    ]
    write_safetensors(Path(tmp_path / "x.safetensors"), tensors)
    loaded = load_file(tmp_path / "x.safetensors")
    for name, value in values.items():
        np.testing.assert_array_equal(loaded[name], value)
