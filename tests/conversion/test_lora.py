"""LoRA files: merged as the formula says, by any of the names people have, and never half or in silence."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from longlive_jax.conversion.lora import MODULES, lora_faults, merge, open_lora, original_module
from longlive_jax.conversion.tables import WAN_TRANSFORMER
from longlive_jax.conversion.tables_diffusers import TRANSFORMER_MODULES
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
    assert (one.ranks, one.alpha_values, one.faults) == ([4], [4], [])
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


# MARK: namings

DOTTED = {
    "blocks.0.self_attn.q": "blocks.0.attn1.to_q",
    "blocks.0.cross_attn.o": "blocks.0.attn2.to_out.0",
    "blocks.1.ffn.0": "blocks.1.ffn.net.0.proj",
    "blocks.1.ffn.2": "blocks.1.ffn.net.2",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
}
"""Some linear layers by their original name, and diffusers'."""

NAMINGS = {
    "peft": ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight", None),
    "comfyui": ("diffusion_model.{}.lora_down.weight", "diffusion_model.{}.lora_up.weight", "diffusion_model.{}.alpha"),
    "comfyui peft": ("diffusion_model.{}.lora_A.weight", "diffusion_model.{}.lora_B.weight", None),
    "diffusers": ("transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight", None),
    "diffusers old": ("transformer.{}.lora.down.weight", "transformer.{}.lora.up.weight", None),
    "kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight", "lora_unet_{}.alpha"),
}


@pytest.mark.parametrize("spelling", ["original", "diffusers"])
@pytest.mark.parametrize("naming", NAMINGS)
def test_namings(naming, spelling, states, weights, tmp_path):
    down, up, alpha = NAMINGS[naming]
    generator = torch.Generator().manual_seed(2)
    tensors, expected = {}, {}
    for original, diffusers in DOTTED.items():
        outer, inner = weights[f"{original}.weight"]
        a, b = torch.randn(3, inner, generator=generator), torch.randn(outer, 3, generator=generator)
        module = original if spelling == "original" else diffusers
        module = module.replace(".", "_") if naming == "kohya" else module
        tensors |= {down.format(module): a, up.format(module): b}
        if alpha:
            tensors[alpha.format(module)] = torch.tensor(6.0)
        w = states["transformer"][f"{original}.weight"]
        expected[f"{original}.weight"] = w + 0.5 * (2 if alpha else 1) * (b @ a)
    save_file(tensors, tmp_path / "lora.safetensors")
    found = open_lora(tmp_path / "lora.safetensors", scale=0.5)
    assert found.faults + lora_faults(found, weights) == []
    assert set(found.sides) == set(expected)
    assert (found.ranks, found.alpha_values, found.says_alpha) == ([3], [6.0 if alpha else 3], bool(alpha))
    for name, values in expected.items():
        np.testing.assert_allclose(merge(name, states["transformer"][name].numpy(), [found]), values, atol=1e-5)


def test_every_module_has_a_diffusers_name():
    """Both tables speak of the same modules, and no spelling means two of them."""
    original = {row.torch.removesuffix(".weight").removesuffix(".bias") for row in WAN_TRANSFORMER}
    assert set(TRANSFORMER_MODULES.values()) == original
    pairs = TRANSFORMER_MODULES.items()
    spellings = {(form(name), o) for d, o in pairs for name in (d, o) for form in (str, lambda n: n.replace(".", "_"))}
    assert len(spellings) == len(MODULES)


def test_diffusers_names_are_those_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=12, text_dim=4, freq_dim=4, ffn_dim=4, num_layers=2
    )
    theirs = {name.removesuffix(".weight").removesuffix(".bias") for name in model.state_dict()}
    assert theirs == {name.format(i=i) for name in TRANSFORMER_MODULES for i in range(2)}
    assert all(original_module(name) in MODULES or "blocks" in original_module(name) for name in theirs)


# MARK: alpha


def test_alpha_of_each_weight(lora, states, weights, tmp_path):
    """A weight with an alpha tensor has that; the others what was asked for, else their own rank."""
    alpha = "base_model.model.blocks.0.self_attn.q.alpha"
    torch.save({**lora, alpha: torch.tensor([1.0])}, tmp_path / "lora.pt")
    w = states["transformer"][Q].numpy()
    a, b = (lora[f"base_model.model.blocks.0.self_attn.q.lora_{side}.weight"].numpy() for side in "AB")
    for asked, values in ((None, [1, 4]), (12.0, [1, 12])):
        found = open_lora(tmp_path / "lora.pt", alpha=asked)
        assert (found.alpha_values, found.says_alpha) == (values, False)
        np.testing.assert_allclose(merge(Q, w, [found]), w + b @ a / 4, atol=1e-5)


def test_alpha_that_diffusers_notes_in_the_header(lora, tmp_path):
    path = tmp_path / "pytorch_lora_weights.safetensors"
    tensors = {name.replace("base_model.model", "transformer"): t for name, t in lora.items()}
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 8, "transformer.r": 4})})
    found = open_lora(path)
    assert (found.alpha_values, found.says_alpha, found.faults) == ([8], True, [])
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": "much"})})
    with pytest.raises(UserError, match="the header of .* does not say how the LoRA was made"):
        open_lora(path)


def test_alpha_in_pefts_config(lora, tmp_path):
    path = tmp_path / "adapter_model.safetensors"
    save_file(lora, path)
    assert "no adapter_config.json beside it" in open_lora(path).faults[0]
    assert open_lora(path, alpha=3).faults == []
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 16, "use_rslora": False}))
    assert open_lora(path).alpha_values == [16]
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 16, "use_rslora": True}))
    assert "made with use_rslora, which is not supported" in open_lora(path).faults[0]


# MARK: whole differences

DIFFS = {
    "diffusion_model.blocks.0.self_attn.norm_q.diff": "blocks.0.self_attn.norm_q.weight",
    "diffusion_model.blocks.1.ffn.0.diff_b": "blocks.1.ffn.0.bias",
    "transformer.blocks.1.norm2.diff_b": "blocks.1.norm3.bias",
    "lora_unet_blocks_0_cross_attn_o.diff_b": "blocks.0.cross_attn.o.bias",
    "diffusion_model.blocks.0.self_attn.q.diff": Q,
    "diffusion_model.patch_embedding.diff": "patch_embedding.weight",
    "diffusion_model.head.modulation.diff": "head.modulation",
}


def with_diffs(lora, weights) -> dict[str, torch.Tensor]:
    """A LoRA that also has a whole difference of each kind of parameter."""
    generator = torch.Generator().manual_seed(3)
    diffs = {name: torch.randn(weights[original], generator=generator) for name, original in DIFFS.items()}
    return {**lora, **diffs}


def test_whole_differences(lora, states, weights, tmp_path):
    """They are added with the scale, whatever alpha is, to weights, norms and biases; one may have a pair besides."""
    tensors = with_diffs(lora, weights)
    save_file(tensors, tmp_path / "lora.safetensors")
    found = open_lora(tmp_path / "lora.safetensors", scale=0.5, alpha=16)
    assert found.faults + lora_faults(found, weights) == []
    assert set(found.diffs) == set(DIFFS.values())
    a, b = (lora[f"base_model.model.blocks.0.self_attn.q.lora_{side}.weight"] for side in "AB")
    for name, original in DIFFS.items():
        before = states["transformer"][original]
        expected = before + 0.5 * tensors[name] + (2 * (b @ a) if original == Q else 0)
        np.testing.assert_allclose(merge(original, before.numpy(), [found]), expected, atol=1e-5)
    other = states["transformer"]["head.head.bias"].numpy()
    assert merge("head.head.bias", other, [found]) is other
    save_file({name: tensors[name] for name in DIFFS}, tmp_path / "alone.safetensors")
    alone = open_lora(tmp_path / "alone.safetensors")
    assert (alone.faults + lora_faults(alone, weights), alone.ranks) == ([], [])


def test_faults_of_whole_differences(weights, tmp_path):
    norm, same = "blocks.0.self_attn.norm_q.diff", "lora_unet_blocks_0_self_attn_norm_q.diff"
    both = {norm: torch.ones(32), same: torch.ones(32)}
    assert f"{norm} and {same}, which are the same tensor" in faults(both, weights, tmp_path)
    tensors = {
        norm: torch.ones(31),
        "blocks.1.self_attn.norm_q.diff": torch.ones(31),
        "head.head.diff_b": torch.ones(64),
    }
    text = faults(tensors, weights, tmp_path)
    assert "a difference [31] does not fit blocks.0-1.self_attn.norm_q.weight [32]" in text
    text = faults({**both, "img_emb.proj.0.diff": torch.ones(3)} | {same: torch.ones(1)}, weights, tmp_path)
    assert "changes img_emb.proj.0.weight, which the transformer does not have" in text
    assert "matches nothing" in faults({"img_emb.proj.0.diff": torch.ones(3)}, weights, tmp_path)


# MARK: faults


def faults(tensors, weights, tmp_path, **kwargs) -> str:
    torch.save(tensors, tmp_path / "lora.pt")
    found = open_lora(tmp_path / "lora.pt", **kwargs)
    return "; ".join(found.faults + lora_faults(found, weights))


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


def test_all_faults_at_once(lora, weights, tmp_path):
    tensors = {name: tensor for name, tensor in lora.items() if "ffn.2.lora_B" not in name}
    text = faults(
        {
            **tensors,
            "base_model.model.blocks.0.self_attn.q.lora_A.weight": torch.ones(4, 31),
            "lora_unet_blocks_0_self_attn_q.lora_up.weight": torch.ones(32, 4),
            "blocks.0.self_attn.q.dora_scale": torch.ones(3),
            "blocks.0.self_attn.k.alpha": torch.ones(2),
            "blocks.0.self_attn.v.alpha": torch.ones(()),
        },
        weights,
        tmp_path,
        scale=float("nan"),
    )
    for part in (
        "half a pair for blocks.1.ffn.2.weight, blocks.0.self_attn.v.weight "
        "(only base_model.model.blocks.1.ffn.2.lora_A.weight, blocks.0.self_attn.v.alpha)",
        "has blocks.0.self_attn.q.dora_scale, blocks.0.self_attn.k.alpha, which are no LoRA matrices",
        "lora_B.weight and lora_unet_blocks_0_self_attn_q.lora_up.weight, which are the same tensor",
        f"times A [4, 31] does not fit {Q}",
        "is not a finite number",
    ):
        assert part in text


def test_files_without_a_lora(lora, tmp_path):
    path = tmp_path / "lora.pt"
    torch.save({"generator_lora": {}}, path)
    with pytest.raises(UserError, match="empty LoRA"):
        open_lora(path)
    torch.save({"critic_lora": lora}, path)
    with pytest.raises(UserError, match="has critic_lora; expected one of generator_lora"):
        open_lora(path)
