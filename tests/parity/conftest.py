"""Rebuilds the recorded cases: weights and inputs from seeds, expected outputs from `data/`. See data/README.md."""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from longlive_jax.checkpoint import tensor_shapes
from longlive_jax.config import TextEncoderConfig, TransformerConfig, VAEConfig
from longlive_jax.conversion import tables
from longlive_jax.conversion.convert import convert_wan

DATA = Path(__file__).parent / "data"
MANIFEST = json.loads((DATA / "manifest.json").read_text())
CONFIGS = {
    "transformer": TransformerConfig(
        dim=128, ffn_dim=320, num_layers=3, num_heads=2, text_dim=48, text_length=16, time_dim=256
    ),
    "vae": VAEConfig(base_width=8),
    "text_encoder": TextEncoderConfig(vocab_size=300, dim=48, attention_dim=64, ffn_dim=96, num_heads=4, num_layers=3),
}
TEACHER = dataclasses.replace(CONFIGS["transformer"], dim=96, ffn_dim=160, num_layers=2, num_heads=3)
LATENT = (16, 8, 12)  # channels, rows and columns of the DiT's cases


def digest(arrays: dict[str, np.ndarray]) -> str:
    """sha256 over named arrays."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        total.update(f"{name} {arrays[name].shape} {arrays[name].dtype}".encode())
        total.update(np.ascontiguousarray(arrays[name]).tobytes())
    return total.hexdigest()


def checked(arrays: dict[str, np.ndarray], expected: str) -> dict[str, np.ndarray]:
    """The arrays, if they are bit-equal to those the official code ran with."""
    assert digest(arrays) == expected, "this numpy draws other numbers than the one the cases were recorded with"
    return arrays


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Weights of a micro model: one generator, tensors in the order of their names."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name in sorted(shapes):
        shape = shapes[name]
        values = rng.standard_normal(shape)
        if name.endswith("bias"):
            values = values.astype(np.float32) * np.float32(0.1)
        elif name.endswith("modulation"):
            values = values.astype(np.float32) * np.float32(0.3)
        elif name.endswith("gamma") or len(shape) == 1:
            values = values.astype(np.float32) * np.float32(0.1) + np.float32(1)
        else:
            values = (values.astype(np.float32) / np.sqrt(np.float64(np.prod(shape[1:])))).astype(np.float32)
        weights[name] = values
    return weights


def random_lora(shapes: dict[str, tuple[int, ...]], rank: int, seed: int) -> dict[str, np.ndarray]:
    """A LoRA with peft's names on every linear layer of the blocks."""
    sides = {}
    for name, shape in shapes.items():
        if name.startswith("blocks.") and name.endswith(".weight") and len(shape) == 2:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            sides[f"{module}.lora_A.weight"] = (rank, shape[1])
            sides[f"{module}.lora_B.weight"] = (shape[0], rank)
    rng = np.random.default_rng(seed)
    scale = lambda name: 0.15 if "lora_B" in name else sides[name][1] ** -0.5
    return {name: (rng.standard_normal(sides[name]) * scale(name)).astype(np.float32) for name in sorted(sides)}


def random_rollout(expected: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Inputs of a rollout; prompt p has p + 1 rows of padding at its end."""
    batch, frames = expected["latents"].shape[:2]
    prompts = len(expected["switch_frames"]) + 1
    rng = np.random.default_rng(seed)
    embeds = rng.standard_normal((prompts, batch, 16, 48)).astype(np.float32)
    for i in range(prompts):
        embeds[i, :, -(i + 1) :] = 0
    noise = rng.standard_normal((batch, frames, *LATENT)).astype(np.float32)
    renoise = np.random.default_rng(seed + 1).standard_normal((frames // 3, 3, batch, 3, *LATENT)).astype(np.float32)
    return {"prompt_embeds": embeds, "noise": noise, "renoise": renoise}


def random_parts(seed: int) -> dict[str, dict[str, np.ndarray]]:
    """Inputs of the bidirectional and the VAE case: one generator for both."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    whole = {"x": draw(2, 9, *LATENT), "prompt_embeds": draw(2, 16, 48)}
    latents = draw(1, 7, 16, 4, 6)
    video = (rng.random((1, 3, 13, 32, 48)) * 2 - 1).astype(np.float32).swapaxes(1, 2)
    return {"bidirectional": whole, "vae": {"latents": latents, "video": video}}


@pytest.fixture(scope="session")
def configs() -> dict[str, TransformerConfig | VAEConfig | TextEncoderConfig]:
    return CONFIGS | {"teacher": TEACHER}


@pytest.fixture(scope="session")
def originals(tmp_path_factory) -> dict[str, Path]:
    """Files in the official formats: a Wan folder, a LongLive generator and its LoRA."""
    root = tmp_path_factory.mktemp("originals")
    shapes = {p: tables.WAN[p](cfg).torch_shapes(tensor_shapes(p, cfg)) for p, cfg in CONFIGS.items()}
    made = {
        name: checked(random_weights(shapes[part], seed), MANIFEST["weights"][name])
        for name, part, seed in (
            ("wan", "transformer", 1),
            ("base", "transformer", 11),
            ("vae", "vae", 41),
            ("text_encoder", "text_encoder", 51),
        )
    }
    made["lora"] = checked(random_lora(shapes["transformer"], 8, 21), MANIFEST["weights"]["lora"])
    tensors = {name: {key: torch.from_numpy(value) for key, value in made[name].items()} for name in made}
    wan = root / "wan"
    wan.mkdir()
    settings = {"model_type": "t2v", "dim": 128, "ffn_dim": 320, "num_heads": 2, "num_layers": 3, "text_len": 16}
    (wan / "config.json").write_text(json.dumps(settings))
    save_file(made["wan"], wan / "diffusion_pytorch_model.safetensors")
    torch.save(tensors["vae"], wan / "Wan2.1_VAE.pth")
    torch.save(tensors["text_encoder"], wan / "models_t5_umt5-xxl-enc-bf16.pth")
    torch.save(
        {"generator": {f"model.{k}": v for k, v in tensors["base"].items()}, "step": 1}, root / "longlive_base.pt"
    )
    torch.save({"generator_lora": tensors["lora"], "critic_lora": {}, "step": 1}, root / "lora.pt")
    return {"wan": wan, "base": root / "longlive_base.pt", "lora": root / "lora.pt"}


@pytest.fixture(scope="session")
def checkpoints(originals, tmp_path_factory) -> dict[str, Path]:
    """The three checkpoints that cases name in `meta.weights`, converted in float32."""
    root = tmp_path_factory.mktemp("checkpoints")
    wan, base, lora = originals["wan"], originals["base"], originals["lora"]
    convert_wan(wan, root / "wan", dtype="float32", verify=True)
    convert_wan(wan, root / "base", generator=base, dtype="float32")
    convert_wan(wan, root / "lora", generator=base, loras=[(lora, 1.0)], dtype="float32")
    return {name: root / name for name in ("wan", "base", "lora")}


@pytest.fixture(scope="session")
def networks(tmp_path_factory) -> dict[str, Path]:
    """Files of the critic and the teacher of the training case, the latter with a head count of its own."""
    root, files = tmp_path_factory.mktemp("networks"), {}
    for name, cfg, seed in (("critic", CONFIGS["transformer"], 61), ("teacher", TEACHER, 71)):
        shapes = tables.WAN["transformer"](cfg).torch_shapes(tensor_shapes("transformer", cfg))
        weights = checked(random_weights(shapes, seed), MANIFEST["weights"][name])
        files[name] = root / f"{name}.safetensors"
        save_file(weights, files[name])
    (root / "teacher.json").write_text(json.dumps({"num_heads": TEACHER.num_heads}))
    return files


@pytest.fixture(scope="session")
def write_case(tmp_path_factory):
    """Writes a whole case by its name, as the recorder would; returns the file."""
    root = tmp_path_factory.mktemp("cases")

    def write(name: str) -> Path:
        with np.load(DATA / f"{name}.npz") as file:
            arrays = {key: file[key] for key in file.files}
        record = MANIFEST["cases"][name]
        if "seed" in record:
            parts = random_parts(record["seed"]) if name in ("bidirectional", "vae") else None
            inputs = parts[name] if parts else random_rollout(arrays, record["seed"])
            arrays |= checked(inputs, record["inputs"])
        for network, (seed, expected) in record.get("adapters", {}).items():
            cfg = CONFIGS["transformer"]
            shapes = tables.WAN["transformer"](cfg).torch_shapes(tensor_shapes("transformer", cfg))
            adapters = checked(random_lora(shapes, 2, seed), expected)
            arrays |= {f"{network}_lora:{key}": value for key, value in adapters.items()}
        np.savez(root / f"{name}.npz", **arrays)
        return root / f"{name}.npz"

    return write
