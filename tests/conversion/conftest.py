"""Tiny Wan models with random weights in the original file formats."""

import json
from pathlib import Path

import pytest
import torch

from longlive_jax.checkpoint import tensor_shapes
from longlive_jax.config import TextEncoderConfig, TransformerConfig, VAEConfig
from longlive_jax.conversion import tables

CONFIGS = {
    "transformer": TransformerConfig(
        dim=32, ffn_dim=48, num_layers=2, num_heads=2, text_dim=24, text_length=8, time_dim=16
    ),
    "vae": VAEConfig(base_width=4),
    "text_encoder": TextEncoderConfig(vocab_size=90, dim=24, attention_dim=32, ffn_dim=40, num_heads=4, num_layers=2),
}


@pytest.fixture(scope="session")
def configs():
    return CONFIGS


@pytest.fixture(scope="session")
def states() -> dict[str, dict[str, torch.Tensor]]:
    """Random state dicts by original name; tests copy what they change. Names are proven by tests/parity."""
    generator = torch.Generator().manual_seed(0)
    shapes = {part: tables.WAN[part](cfg).torch_shapes(tensor_shapes(part, cfg)) for part, cfg in CONFIGS.items()}
    return {
        part: {name: torch.randn(shape, generator=generator) for name, shape in names.items()}
        for part, names in shapes.items()
    }


@pytest.fixture
def wan(states, tmp_path) -> Path:
    """A Wan folder to convert, or to damage first."""
    from safetensors.torch import save_file

    folder = tmp_path / "wan"
    folder.mkdir()
    cfg = CONFIGS["transformer"]
    settings = {
        "model_type": "t2v", "dim": cfg.dim, "ffn_dim": cfg.ffn_dim, "freq_dim": cfg.time_dim, "in_dim": 16,
        "out_dim": 16, "num_heads": cfg.num_heads, "num_layers": cfg.num_layers, "text_len": cfg.text_length,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings))
    save_file(states["transformer"], folder / "diffusion_pytorch_model.safetensors")
    torch.save(states["vae"], folder / "Wan2.1_VAE.pth")
    half = {name: tensor.bfloat16() for name, tensor in states["text_encoder"].items()}
    torch.save(half, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    return folder


@pytest.fixture
def lora() -> dict[str, torch.Tensor]:
    """A LoRA of rank 4 on two weights, by peft's names."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(shape, generator=generator)
    return {
        "base_model.model.blocks.0.self_attn.q.lora_A.weight": draw(4, 32),
        "base_model.model.blocks.0.self_attn.q.lora_B.weight": draw(32, 4),
        "base_model.model.blocks.1.ffn.2.lora_A.weight": draw(4, 48),
        "base_model.model.blocks.1.ffn.2.lora_B.weight": draw(32, 4),
    }
