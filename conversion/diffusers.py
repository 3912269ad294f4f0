"""Folders of diffusers' `WanPipeline`: their config files, both ways, and opening their weights.

    model_index.json
    transformer/    config.json, diffusion_pytorch_model.safetensors (or shards and an index)     WanTransformer3DModel
    vae/            the same                                                                      AutoencoderKLWan
    text_encoder/   config.json, model.safetensors (or shards and an index)                       UMT5EncoderModel
    tokenizer/      tokenizer.json or spiece.model
    scheduler/

Every setting of the config files that sizes a model stands in a table here, by our name and by theirs.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np

from longlive_jax import checkpoint
from longlive_jax.config import ModelConfig, TextEncoderConfig, TransformerConfig, VAEConfig, from_dict
from longlive_jax.conversion import sizes
from longlive_jax.conversion.readers import Reader, Renamed, open_weights
from longlive_jax.conversion.tables_diffusers import DIFFUSERS, ORIGINAL_NAMES, TIED
from longlive_jax.errors import UserError, collect, listed, raise_all
from longlive_jax.json_files import read_json

INDEX = "model_index.json"

WEIGHTS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
"""Part (and folder) -> name of its weights, without `.safetensors`."""

CLASSES = {
    "transformer": ("diffusers", "WanTransformer3DModel"),
    "vae": ("diffusers", "AutoencoderKLWan"),
    "text_encoder": ("transformers", "UMT5EncoderModel"),
    "tokenizer": ("transformers", "PreTrainedTokenizerFast"),
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
}
"""Folder -> library and class that load it, as model_index.json has them."""

CONFIGS = {"transformer": TransformerConfig, "vae": VAEConfig, "text_encoder": TextEncoderConfig}

SIZES = {
    "transformer": {
        "ffn_dim": "ffn_dim", "num_layers": "num_layers", "num_heads": "num_attention_heads",
        "in_channels": "in_channels", "out_channels": "out_channels", "patch": "patch_size", "text_dim": "text_dim",
        "time_dim": "freq_dim", "eps": "eps",
    },
    "vae": {
        "base_width": "base_dim", "multipliers": "dim_mult", "res_blocks": "num_res_blocks",
        "temporal": "temperal_downsample", "z_channels": "z_dim", "latent_mean": "latents_mean",
        "latent_std": "latents_std",
    },
    "text_encoder": {
        "vocab_size": "vocab_size", "dim": "d_model", "ffn_dim": "d_ff", "num_heads": "num_heads",
        "num_layers": "num_layers", "num_buckets": "relative_attention_num_buckets",
        "max_distance": "relative_attention_max_distance", "eps": "layer_norm_epsilon",
    },
}  # fmt: skip
"""Part -> our setting -> its name in the part's config.json."""

HEADS = {
    "transformer": ("dim", "num_attention_heads", "attention_head_dim"),
    "text_encoder": ("attention_dim", "num_heads", "d_kv"),
}
"""Part -> our width over all heads, and the two numbers whose product it is."""

FIXED = {
    "transformer": {
        "qk_norm": "rms_norm_across_heads", "cross_attn_norm": True, "image_dim": None, "added_kv_proj_dim": None,
        "pos_embed_seq_len": None,
    },
    "vae": {
        "decoder_base_dim": None, "attn_scales": [], "is_residual": False, "in_channels": 3, "out_channels": 3,
        "patch_size": None,
    },
    "text_encoder": {"model_type": "umt5", "feed_forward_proj": "gated-gelu"},
}  # fmt: skip
"""Part -> settings with only one value that Wan 2.1's text to video models have."""

EVIDENCE = {
    "transformer": (
        "patch_embedding.weight", "condition_embedder.text_embedder.linear_1.weight",
        "condition_embedder.time_embedder.linear_1.weight", "blocks.0.ffn.net.0.proj.weight", "proj_out.weight",
    ),
    "vae": ("encoder.conv_in.weight", "decoder.conv_in.weight"),
    "text_encoder": (
        "shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "encoder.block.0.layer.1.DenseReluDense.wi_0.weight",
    ),
}  # fmt: skip
"""Part -> tensors that show each size once: if one is off, the config is another model's, and that is said once."""

LAYERS = {"transformer": "blocks", "text_encoder": "encoder.block"}


# MARK: reading


def is_folder(folder: Path) -> bool:
    """Whether a folder has the layout of a diffusers pipeline."""
    return (folder / INDEX).is_file() or (folder / "transformer" / "config.json").is_file()


def patterns(with_transformer: bool) -> list[str]:
    """The files of a hub repository that a conversion reads."""
    parts = [part for part in WEIGHTS if with_transformer or part != "transformer"]
    weights = [f"{part}/{WEIGHTS[part]}{end}" for part in parts for end in (".safetensors*", "-*-of-*.safetensors")]
    names = [INDEX, *(f"{part}/config.json" for part in WEIGHTS), "tokenizer/tokenizer.json", "tokenizer/spiece.model"]
    return names + weights


def is_complete(folder: Path, with_transformer: bool) -> bool:
    """Whether all parts of a pipeline are in a folder, text encoder and tokeniser included."""
    try:
        for part, name in WEIGHTS.items():
            read_json(folder / part / "config.json")
            if with_transformer or part != "transformer":
                open_weights(folder / part / f"{name}.safetensors")
    except UserError:
        return False
    return any((folder / "tokenizer" / name).is_file() for name in ("tokenizer.json", "spiece.model"))


def check_index(folder: Path) -> None:
    """Refuses the folders of other pipelines, such as Wan 2.2's with its two transformers."""
    if not (folder / INDEX).is_file():
        return
    index = read_json(folder / INDEX)
    if index.get("_class_name", "WanPipeline") != "WanPipeline":
        raise UserError(
            f"{folder / INDEX} is of a {index['_class_name']}; only WanPipeline (text to video) is supported"
        )
    second = index.get("transformer_2")
    if (isinstance(second, list) and any(second)) or index.get("expand_timesteps"):
        raise UserError(f"{folder / INDEX} is Wan 2.2's; only Wan 2.1 (one transformer, one timestep) is supported")


def read_sizes(folder: Path, part: str) -> Any:
    """The sizes that a part's config.json gives: a `TransformerConfig`, `VAEConfig` or `TextEncoderConfig`.

    Raises:
      UserError: it is missing or broken, lacks a size, or describes another model than Wan 2.1's (all faults at once).
    """
    path = folder / part / "config.json"
    values = read_json(path)
    if part == "vae" and values.get("decoder_base_dim") == values.get("base_dim"):
        values["decoder_base_dim"] = None
    if part == "transformer" and values.get("out_channels", 0) is None:
        values["out_channels"] = values.get("in_channels")
    names = [*SIZES[part].values(), *HEADS.get(part, ())[1:]]
    missing = [name for name in dict.fromkeys(names) if name not in values]
    faults = [f"{path} lacks {', '.join(missing)}"] if missing else []
    faults += [
        f"{path}: {name} is {values[name]!r}, but Wan 2.1's text to video models have {value!r}"
        for name, value in FIXED[part].items()
        if name in values and values[name] != value
    ]
    raise_all(faults)
    read = {ours: values[theirs] for ours, theirs in SIZES[part].items()}
    if part in HEADS:
        width, heads, each = HEADS[part]
        if any(type(values[name]) is not int or values[name] < 1 for name in (heads, each)):
            raise UserError(f"{path}: {heads} and {each} must be whole numbers above 0")
        read[width] = values[heads] * values[each]
    return from_dict(CONFIGS[part], read, str(path))


def open_part(folder: Path, part: str) -> tuple[Reader, Any]:
    """The weights and sizes of a part.

    Raises:
      UserError: one of them is missing or broken, or they do not belong together (all faults at once).
    """
    faults: list[str] = []
    reader, cfg = None, None
    with collect(faults):
        reader = open_weights(folder / part / f"{WEIGHTS[part]}.safetensors")
        reader = untied(reader) if part == "text_encoder" else reader
    with collect(faults):
        cfg = read_sizes(folder, part)
    if reader is not None and cfg is not None:
        faults += disagreement(reader, part, cfg)
    raise_all(faults)
    return reader, cfg


def disagreement(reader: Reader, part: str, cfg: Any) -> list[str]:
    """Sizes by which the weights differ from config.json."""
    layers = sizes.count(reader.shapes, LAYERS[part]) if part in LAYERS else None
    if layers is not None and layers != cfg.num_layers:
        return [f"{reader.where} has {layers} layers, config.json says {cfg.num_layers}; these are two models"]
    expected = DIFFUSERS[part](cfg).torch_shapes(checkpoint.tensor_shapes(part, cfg))
    return [
        f"{reader.where}: {name} is {list(reader.shapes[name])}, by config.json {list(expected[name])}; "
        "these are two models"
        for name in EVIDENCE[part]
        if name in reader.shapes and reader.shapes[name] != expected[name]
    ]


def untied(reader: Reader) -> Reader:
    """A file that may have a tied tensor under its second name, or under both: only the first remains.

    Raises:
      UserError: both are there and differ, so that it is not said which one the model uses.
    """
    names = {name: name for name in reader.shapes}
    for second, first in TIED.items():
        if second not in reader.shapes:
            continue
        if first in reader.shapes and not same(reader, first, second):
            raise UserError(f"{reader.where}: {first} and {second} are one tensor in umT5 but differ; remove one")
        names.setdefault(first, second)
        del names[second]
    return Renamed(reader, names)


def by_original_names(reader: Reader) -> Reader:
    """A DiT with diffusers' names by the original ones, which name the same tensors; any other file as it is.

    Raises:
      UserError: it has names that only diffusers has, and names that only the original has.
    """
    layers = {name: re.match(r"blocks\.(\d+)\.", name) for name in reader.shapes}
    patterns = {name: f"blocks.{{i}}.{name[layer.end() :]}" if layer else name for name, layer in layers.items()}
    originals = set(ORIGINAL_NAMES.values())
    theirs = [name for name, pattern in patterns.items() if pattern in ORIGINAL_NAMES.keys() - originals]
    ours = [name for name, pattern in patterns.items() if pattern in originals - ORIGINAL_NAMES.keys()]
    if theirs and ours:
        raise UserError(
            f"{reader.where} has diffusers' names ({listed(theirs)}) beside original ones ({listed(ours)}); "
            "give a file with one of them"
        )
    if not theirs:
        return reader
    new = lambda name: ORIGINAL_NAMES[patterns[name]].replace("{i}", layers[name][1] if layers[name] else "")
    return Renamed(reader, {new(name) if patterns[name] in ORIGINAL_NAMES else name: name for name in reader.shapes})


def same(reader: Reader, one: str, two: str) -> bool:
    """Whether two tensors of a file are bit for bit equal; one of them is in memory at a time."""
    one, two = (hashlib.sha256(np.ascontiguousarray(reader.read(name)).view(np.uint8)).digest() for name in (one, two))
    return one == two


# MARK: writing


def part_config(part: str, cfg: Any, dtype: np.dtype) -> dict[str, Any]:
    """config.json of a part, weights of type `dtype`."""
    values = {theirs: getattr(cfg, ours) for ours, theirs in SIZES[part].items()} | FIXED[part]
    if part in HEADS:
        width, heads, each = HEADS[part]
        values[each] = getattr(cfg, width) // values[heads]
    if part == "text_encoder":
        # Of the ids, T5's; the decoder's length is asked for and not used. `torch_dtype`: also read by transformers 5.
        ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
        values |= {"architectures": [CLASSES[part][1]], "torch_dtype": str(dtype), "num_decoder_layers": cfg.num_layers}
        return values | ids | {"is_encoder_decoder": True, "tie_word_embeddings": True}
    return {"_class_name": CLASSES[part][1], **values}


def index(config: ModelConfig, tokenizer: bool) -> dict[str, Any]:
    """model_index.json; parts that are not there are nulls, as diffusers has them."""
    missing = set() if config.text_encoder else {"text_encoder"}
    missing |= set() if tokenizer else {"tokenizer"}
    parts = {part: [None, None] if part in missing else list(names) for part, names in CLASSES.items()}
    return {"_class_name": "WanPipeline", **parts}


def scheduler(config: ModelConfig) -> dict[str, Any]:
    """scheduler_config.json: the flow-matching schedule that the model was trained with."""
    return {"_class_name": CLASSES["scheduler"][1], "num_train_timesteps": 1000, "shift": config.sampler.shift}
