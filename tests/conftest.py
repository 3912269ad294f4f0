"""A tiny model with random weights that the tests share, at sizes where everything compiles in seconds.

While tests run, the shapes in the signatures of the numerical modules are checked, XLA compiles without LLVM's
optimisations and with its older, quicker emitters of fusions, and what it compiled is kept on disk for the other
worker, the other modules and the next run: each of the three nearly halves the time. All is set here, before anything
imports jax.
"""
# ruff: noqa: E402 - see above

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path

import jaxlib.version
import jaxtyping

FLAGS = ["--xla_backend_optimization_level=0"]
if jaxlib.version.__version_info__ < (0, 11):  # a flag that XLA does not know ends the process
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "programs"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Not `cache`, `decoding.state`, `training.state`: JAX builds the pytrees there of whatever a `tree.map` gives.
TRAINING = Path(__file__).parents[1] / "longlive_jax" / "training"
CHECKED = (
    "decoding.decoder",
    "decoding.switch",
    "models",
    "schedule",
    *(f"training.{file.stem}" for file in TRAINING.glob("[a-z]*.py") if file.stem != "state"),
)
warnings.filterwarnings("ignore", ".*deprecated by PEP 585")  # beartype on `typing.MutableSequence` in flax
jaxtyping.install_import_hook([f"longlive_jax.{module}" for module in CHECKED], "beartype.beartype")

import jax
import numpy as np
import pytest

from longlive_jax import checkpoint
from longlive_jax.config import (
    ModelConfig,
    SamplerConfig,
    TextEncoderConfig,
    TransformerConfig,
    VAEConfig,
)
from longlive_jax.data.sprite_prompts import all_combinations, canonical
from longlive_jax.pipeline import LongLivePipeline
from longlive_jax.tokenizer import train_unigram


def pytest_configure(config):
    """JAX warns of every fork; ours are followed at once by an exec, which is safe."""
    config.addinivalue_line("filterwarnings", "ignore:os.fork:RuntimeWarning")


@pytest.fixture(scope="module", autouse=True)
def compiled_programs():
    """Frees the memory of a module's programs at its end: of all modules they come to 5 GB a worker."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    """32 x 32 pixels, latents of 4 x 4, 4 tokens a frame; blocks of 2 frames, window 6, sink 2."""
    return ModelConfig(
        TransformerConfig(
            dim=32, ffn_dim=64, num_layers=2, num_heads=2, in_channels=4, out_channels=4, text_dim=16, text_length=24,
            time_dim=32,
        ),
        VAEConfig(
            base_width=8, multipliers=(1, 1, 1, 1), res_blocks=0, z_channels=4, latent_mean=(0.1, 0.0, -0.1, 0.2),
            latent_std=(1.5, 1.0, 0.5, 1.0),
        ),
        TextEncoderConfig(vocab_size=128, dim=16, attention_dim=16, ffn_dim=32, num_heads=2, num_layers=1),
        SamplerConfig(height=32, width=32, window=6, sink_frames=2, block_frames=2, steps=(1000.0, 500.0)),
    )  # fmt: skip


def random_params(config: ModelConfig) -> dict[str, checkpoint.Params]:
    """Parameters of all parts, drawn on the host: scaled as at initialisation, but biases and norms are random too."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name, x = path[-1].key, rng.standard_normal(leaf.shape, np.float32)
        if name == "kernel":
            inputs = leaf.shape[-2] if path[0].key == checkpoint.STACKED else np.prod(leaf.shape[:-1])
            return x / np.sqrt(inputs, dtype=np.float32)
        return x if name == "token_embedding" else 0.1 * x + (name in ("weight", "gamma"))

    parts = {part: checkpoint.abstract_params(part, getattr(config, part)) for part in checkpoint.MODULES}
    return {part: jax.tree_util.tree_map_with_path(draw, abstract) for part, abstract in parts.items()}


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_config, tmp_path_factory):
    """A checkpoint folder; its tokeniser knows the words of the sprites' canonical prompts."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny"
    text = tiny_config.text_encoder
    tokenizer = train_unigram(
        (canonical(c) for c in all_combinations()), text.vocab_size, tiny_config.transformer.text_length
    )
    checkpoint.save(folder, tiny_config, random_params(tiny_config), tokenizer, {"source": "random numbers"})
    return folder


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_checkpoint) -> LongLivePipeline:
    return LongLivePipeline.from_pretrained(tiny_checkpoint)


@pytest.fixture
def hub_cache(tmp_path):
    """Puts a folder or file into a hub cache, in its layout: blobs, refs, and a snapshot of links."""
    revision = "0123456789abcdef0123456789abcdef01234567"

    def put(repo: str, source: Path, name: str | None = None) -> Path:
        root = tmp_path / "home/hub" / f"models--{repo.replace('/', '--')}"
        (root / "blobs").mkdir(parents=True, exist_ok=True)
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs/main").write_text(revision)
        for path in [source] if source.is_file() else [path for path in source.rglob("*") if path.is_file()]:
            blob = root / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
            path.replace(blob)
            link = root / "snapshots" / revision / (name or path.relative_to(source))
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
        return root / "snapshots" / revision

    return put
