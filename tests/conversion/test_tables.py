"""The tables: every parameter once, every row invertible, layouts that compute what torch computes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from longlive_jax.checkpoint import tensor_shapes
from longlive_jax.config import TextEncoderConfig, TransformerConfig, VAEConfig
from longlive_jax.conversion import tables

SIZES = [
    ("transformer", TransformerConfig.t2v_1_3b()),
    ("transformer", TransformerConfig.t2v_14b()),
    ("text_encoder", TextEncoderConfig.umt5_xxl()),
    ("vae", VAEConfig.wan()),
    ("vae", VAEConfig(base_width=8, multipliers=(1, 1, 3, 2), res_blocks=1, temporal=(True, False, True))),
]


@pytest.mark.parametrize(("part", "cfg"), SIZES)
def test_every_parameter_once(part, cfg):
    rows = tables.WAN[part](cfg).rows
    assert sorted(row.ours for row in rows) == sorted(tensor_shapes(part, cfg))
    assert len({row.torch for row in rows}) == len(rows)


@pytest.mark.parametrize(("part", "tensors", "parameters"), [("transformer", 825, 1.419e9), ("vae", 194, 1.269e8)])
def test_counts_of_the_real_models(part, tensors, parameters):
    cfg = {"transformer": TransformerConfig.t2v_1_3b(), "vae": VAEConfig.wan()}[part]
    shapes = tables.WAN[part](cfg).torch_shapes(tensor_shapes(part, cfg))
    assert len(shapes) == tensors
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == pytest.approx(parameters, rel=1e-3)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_rows_are_invertible(part, configs):
    table = tables.WAN[part](configs[part])
    shapes = tensor_shapes(part, configs[part])
    rng = np.random.default_rng(0)
    for row in table.rows:
        ours = rng.standard_normal(shapes[row.ours])
        torch_array = row.transform.to_torch(ours, **table.sizes)
        assert torch_array.shape == row.torch_shape(shapes[row.ours], table.sizes)
        np.testing.assert_array_equal(row.transform.to_ours(torch_array, **table.sizes), ours)


def test_layouts_compute_the_same():
    """A linear layer on our patches is torch's patch embedding, and so for each kind of convolution."""
    draw = lambda *shape: torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, weight = draw(1, 3, 2, 4, 6), draw(5, 3, 1, 2, 2)
    expected = F.conv3d(x, weight, stride=(1, 2, 2)).permute(0, 2, 3, 4, 1)
    patches = rearrange(x.numpy(), "b c t (h p) (w q) -> b t h w (c p q)", p=2, q=2)
    np.testing.assert_allclose(patches @ tables.PATCHIFY.to_ours(weight.numpy()), expected, atol=1e-12)
    weight = draw(5, 3, 1, 1, 1)
    expected = F.conv3d(x, weight).permute(0, 2, 3, 4, 1)
    ours = rearrange(x.numpy(), "b c t h w -> b t h w c") @ tables.POINT3D.to_ours(weight.numpy())
    np.testing.assert_allclose(ours, expected, atol=1e-12)
    kernel = tables.CONV3D.to_ours(draw(5, 3, 3, 2, 1).numpy())
    assert kernel.shape == (3, 2, 1, 3, 5)


def test_a_wrong_shape_is_an_error():
    with pytest.raises(Exception, match="o i"):
        tables.LINEAR.to_ours(np.zeros(3))
