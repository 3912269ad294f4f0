"""LoRA files: merged as the formula says, and never half or in silence."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from longlive_jax.conversion.lora import lora_faults, merge, open_lora
from longlive_jax.errors import UserError

Q = "blocks.0.self_attn.q.weight"


@pytest.fixture
def weights(states):
    return {name: tuple(tensor.shape) for name, tensor in states["transformer"].items()}


def test_merge_is_the_formula(lora, states, weights, tmp_path):
    torch.save({"generator_lora": lora, "critic_lora": {}, "step": 7}, tmp_path / "lora.pt")
    w = states["transformer"][Q].numpy()
    a, b = (lora[f"base_model.model.blocks.0.self_attn.q.lora_{side}.weight"].numpy() for side in "AB")
    one = open_lora(tmp_path / "lora.pt")
    assert one.rank == 4
    assert lora_faults(one, weights) == []
    np.testing.assert_allclose(merge(Q, w, [one]), w + b @ a, atol=1e-5)
    half = open_lora(tmp_path / "lora.pt", scale=0.5, alpha=16)
    np.testing.assert_allclose(merge(Q, w, [half]), w + 2 * (b @ a), atol=1e-5)
    both = merge(Q, w.astype(np.float16), [one, half])
    assert both.dtype == np.float32
    np.testing.assert_allclose(both, w.astype(np.float16) + 3 * (b @ a), atol=1e-4)
    other = states["transformer"]["blocks.1.self_attn.q.weight"].numpy()
    assert merge("blocks.1.self_attn.q.weight", other, [one]) is other


@pytest.mark.parametrize("form", ["{}", "base_model.model.model.{}", "model._fsdp_wrapped_module.{}"])
def test_names(lora, weights, tmp_path, form):
    plain = {name.removeprefix("base_model.model."): tensor for name, tensor in lora.items()}
    renamed = {form.format(name).replace("lora_A.weight", "lora_A.default.weight"): t for name, t in plain.items()}
    save_file(renamed, tmp_path / "bare.safetensors")
    torch.save(renamed, tmp_path / "bare.pt")
    for file in ("bare.safetensors", "bare.pt"):
        found = open_lora(tmp_path / file)
        assert set(found.sides) == {Q, "blocks.1.ffn.2.weight"}
        assert lora_faults(found, weights) == []


def faults(tensors, weights, tmp_path) -> str:
    torch.save(tensors, tmp_path / "lora.pt")
    return "; ".join(lora_faults(open_lora(tmp_path / "lora.pt"), weights))


def test_it_must_match(lora, weights, tmp_path):
    renamed = {name.replace("blocks", "layers"): tensor for name, tensor in lora.items()}
    assert "matches nothing in the transformer" in faults(renamed, weights, tmp_path)
    some = {name.replace("blocks.1", "blocks.9"): tensor for name, tensor in lora.items()}
    text = faults(some, weights, tmp_path)
    assert "blocks.9.ffn.2.weight, which the transformer does not have" in text
    narrow = {name: t[:, :-1] if "q.lora_A" in name else t for name, t in lora.items()}
    assert f"does not fit {Q}" in faults(narrow, weights, tmp_path)
    ranks = {name: t[:3] if "q.lora_A" in name else t for name, t in lora.items()}
    assert f"does not fit {Q}" in faults(ranks, weights, tmp_path)


def test_broken_files(lora, tmp_path):
    path = tmp_path / "lora.pt"
    torch.save({name: tensor for name, tensor in lora.items() if "ffn.2.lora_B" not in name}, path)
    with pytest.raises(UserError, match=r"half a pair for blocks.1.ffn.2.weight \(only lora_A\)"):
        open_lora(path)
    torch.save({**lora, "blocks.0.self_attn.q.dora": torch.ones(3)}, path)
    with pytest.raises(UserError, match="blocks.0.self_attn.q.dora, which are no LoRA matrices"):
        open_lora(path)
    torch.save({"generator_lora": {}}, path)
    with pytest.raises(UserError, match="empty LoRA"):
        open_lora(path)
    torch.save({"critic_lora": lora}, path)
    with pytest.raises(UserError, match="has critic_lora; expected one of generator_lora"):
        open_lora(path)
