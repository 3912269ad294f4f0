"""Opens a clone of the official PyTorch code (NVlabs/LongLive, branch v1.0) on any machine.

Nothing of it is changed on disk or copied here. What stands in the way of importing it is replaced in `sys.modules`:

- its packages have names as general as `utils`, and import training, image-to-video and CLIP as well: empty packages in
  their place lead to the modules that are needed, and everything leaves `sys.modules` at the end;
- of diffusers it uses a base class for `from_pretrained`, which the recorders have no use for, and to switch gradient
  checkpointing on: two nearly empty classes do;
- its tokeniser's packages are needed for prompts as text only;
- attention without flash-attention casts to bfloat16, and with it needs a GPU: PyTorch's own, in the dtype given;
- some defaults ask for the current GPU when they are made.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from longlive_jax.errors import UserError

CLONE = "git clone -b v1.0 https://github.com/NVlabs/LongLive"
PACKAGES = ("model", "pipeline", "utils", "wan", "wan.modules")
TEXT_PACKAGES = ("ftfy", "regex", "transformers")
CLASSES = {
    "pipeline.causal_inference": ("CausalInferencePipeline",),
    "pipeline.interactive_causal_inference": ("InteractiveCausalInferencePipeline",),
    "utils.wan_wrapper": ("WanTextEncoder", "WanVAEWrapper", "CausalWanModel", "CausalWanModelInfinity"),
}
"""What inference takes from the clone, by module."""


def check_repo(repo: Path, classes: dict[str, tuple[str, ...]] = CLASSES) -> None:
    """Raises UserError if there is no clone of branch v1.0, with these modules."""
    if not repo.is_dir():
        raise UserError(f"there is no folder {repo}; give a clone: {CLONE}")
    files = [f"{module.replace('.', '/')}.py" for module in classes]
    missing = [file for file in files if not (repo / file).is_file()]
    if missing:
        raise UserError(
            f"{repo} has no {missing[0]}, so it is not branch v1.0 of LongLive (main is LongLive 2.0, another model); "
            f"git -C {repo} checkout v1.0, or {CLONE}"
        )


@contextlib.contextmanager
def opened(
    repo: Path, *, text: bool, sdpa: bool, classes: dict[str, tuple[str, ...]] = CLASSES
) -> Iterator[types.SimpleNamespace]:
    """The official classes and functions by name; `modules`, those they come from, by name; and `wan_wrapper` of these.

    Args:
      repo: the clone.
      text: whether prompts will be tokenised, which needs `TEXT_PACKAGES`.
      sdpa: whether attention is PyTorch's own in place of flash-attention.
      classes: what to take, by module. Modules that others take from their package's `__init__` come before those.

    Raises:
      UserError: no such clone, another version of it, or a package that it needs is missing.
    """
    check_repo(repo, classes)
    for name in TEXT_PACKAGES if text else ():
        _import(repo, name)
    shells = {name: _module(name, __path__=[str(repo / name.replace(".", "/"))]) for name in PACKAGES}
    unused = _diffusers() | ({} if text else {name: _Absent(name) for name in TEXT_PACKAGES})
    before = _taken_out(sys.modules, lambda name: name.partition(".")[0] in PACKAGES)
    try:
        sys.modules.update(shells)
        with _instead(unused), _a_gpu_to_name():
            attention = _import(repo, "wan.modules.attention")
            if sdpa:
                attention.attention = attention.flash_attention = _attention
            code = types.SimpleNamespace(wan_wrapper=_import(repo, "utils.wan_wrapper"), modules={})
            for path, names in classes.items():
                module = code.modules[path] = _import(repo, path)
                for name in names:
                    if not hasattr(module, name):
                        raise UserError(f"{repo}: {path} has no {name}; take an unchanged clone: {CLONE}")
                    for place in (code, shells[path.rpartition(".")[0]]):
                        setattr(place, name, getattr(module, name))
        yield code
    finally:
        _taken_out(sys.modules, lambda name: name.partition(".")[0] in PACKAGES)
        sys.modules.update(before)


def _import(repo: Path, name: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = (error.name or name).partition(".")[0]
        if package in PACKAGES:
            raise UserError(f"{repo} has no module {error.name}; take an unchanged clone: {CLONE}") from error
        text = " for prompts as text (or give --random-embeds)" if package in TEXT_PACKAGES else ""
        raise UserError(f"the official code needs {package}{text}: pip install {package}") from error
    except ImportError as error:
        raise UserError(f"{repo}: {error}; take an unchanged clone: {CLONE}") from error


def _module(name: str, **contents: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)  # others may ask whether it is there
    module.__dict__.update(contents)
    return module


class _Absent(types.ModuleType):
    """A package that is imported but not used: whatever is asked of it is None."""

    def __init__(self, name: str):
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _diffusers() -> dict[str, types.ModuleType]:
    """What the models take from diffusers: two base classes, of which they use a switch, and a decorator."""
    configuration = _module(
        "diffusers.configuration_utils", ConfigMixin=type("ConfigMixin", (), {}), register_to_config=lambda init: init
    )
    switch = {"enable_gradient_checkpointing": lambda model: setattr(model, "gradient_checkpointing", True)}
    modeling = _module("diffusers.models.modeling_utils", ModelMixin=type("ModelMixin", (torch.nn.Module,), switch))
    packages = [_module(name, __path__=[]) for name in ("diffusers", "diffusers.models")]
    return {module.__name__: module for module in (*packages, configuration, modeling)}


def _taken_out(table: dict[str, Any], chosen) -> dict[str, Any]:
    return {name: table.pop(name) for name in list(table) if chosen(name)}


@contextlib.contextmanager
def _instead(modules: dict[str, types.ModuleType]) -> Iterator[None]:
    """Modules in place of those of the same names, for a while."""
    before = _taken_out(sys.modules, lambda name: name in modules)
    sys.modules.update(modules)
    try:
        yield
    finally:
        _taken_out(sys.modules, lambda name: name in modules)
        sys.modules.update(before)


@contextlib.contextmanager
def _a_gpu_to_name() -> Iterator[None]:
    """Without a GPU, a name for one: defaults that are made at import ask for it, and nothing here uses them."""
    real = torch.cuda.current_device
    if not torch.cuda.is_available():
        torch.cuda.current_device = lambda: 0
    try:
        yield
    finally:
        torch.cuda.current_device = real


def _attention(q, k, v, q_lens=None, k_lens=None, window_size=(-1, -1), **options):
    """Attention [b, l, heads, d] of everything to everything, in the dtype of `v`."""
    padded = k_lens is not None and bool((torch.as_tensor(k_lens) != k.shape[1]).any())
    if q_lens is not None or padded or tuple(window_size) != (-1, -1) or options:
        raise UserError(f"the official code asked for a mask, which it does without in what is recorded; {CLONE}")
    q, k, v = (x.transpose(1, 2).to(v.dtype) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()
