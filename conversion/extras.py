"""`longlive.json`: what PyTorch's formats have no place for, beside the files that `export` writes.

The sampler's defaults, and sizes that the code of the other side has built in. Other programs ignore the file; a
conversion of the folder reads it, so that a checkpoint comes back as it was. It also marks a folder as one of ours,
which may be overwritten.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longlive_jax.config import WAN_LATENT_MEAN, WAN_LATENT_STD, ModelConfig, SamplerConfig, from_dict, replace, to_dict
from longlive_jax.errors import UserError
from longlive_jax.json_files import read_json

FILE = "longlive.json"

BUILT_IN: dict[str, dict[str, dict[str, Any]]] = {
    "torch": {
        "transformer": {"rope_theta": 10000.0},
        "vae": {"latent_mean": WAN_LATENT_MEAN, "latent_std": WAN_LATENT_STD},
        "text_encoder": {"max_distance": 128, "eps": 1e-6},
    },
    "diffusers": {"transformer": {"rope_theta": 10000.0, "text_length": 512}},
}
"""Format -> part -> setting -> what its code takes, since its files cannot say. (512: what `WanPipeline` pads to.)"""


def unsaid(config: ModelConfig, to: str) -> dict[str, dict[str, Any]]:
    """Part -> setting -> value, of those settings that are not what the code of the other side has built in."""
    return {
        part: {name: getattr(sizes, name) for name, value in settings.items() if getattr(sizes, name) != value}
        for part, settings in BUILT_IN[to].items()
        if (sizes := getattr(config, part)) is not None
    }


def warnings(config: ModelConfig, to: str) -> list[str]:
    """One line for each setting that only our own conversion will read back."""
    lines = []
    for part, settings in unsaid(config, to).items():
        for name, value in settings.items():
            figures = isinstance(value, tuple)  # a number a channel: too long for a line
            told = "differs from what" if figures else f"is {value}, but {BUILT_IN[to][part][name]} is what"
            lines.append(f"{part}: {name} {told} the code that reads {to} files has built in")
    return lines


def write(folder: Path, config: ModelConfig, to: str, provenance: dict[str, Any]) -> None:
    """Writes the file for a folder in format `to`."""
    values = {"format": to, "sampler": to_dict(config.sampler), **unsaid(config, to), "provenance": provenance}
    (folder / FILE).write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", "utf-8")


def read(folder: Path) -> dict[str, Any]:
    """The file's contents; empty if it is not there.

    Raises:
      UserError: it is there and broken.
    """
    path = folder / FILE
    if not path.is_file():
        return {}
    values = read_json(path, "copy it again, or remove it")
    if values.get("format") not in tuple(BUILT_IN):  # a tuple: what cannot be a key is only not there
        raise UserError(f"{path} does not name its format; copy it again, or remove it")
    return values


def restore(folder: Path, configs: dict[str, Any]) -> SamplerConfig:
    """Puts what `folder`'s file says into the sizes of the parts; returns its sampler, the default one without a file.

    Raises:
      UserError: the file is broken.
    """
    values, where = read(folder), folder / FILE
    for part, settings in BUILT_IN[values["format"]].items() if values else ():
        changes = values.get(part, {})
        if part in configs and isinstance(changes, dict):
            try:
                configs[part] = replace(configs[part], **{name: changes[name] for name in settings if name in changes})
            except UserError as error:
                raise UserError(f"{where}: {part}: {error}") from None
    return from_dict(SamplerConfig, values.get("sampler", {}), f"{where}: sampler")
