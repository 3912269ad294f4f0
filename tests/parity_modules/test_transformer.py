"""Our transformer, from a norm to the whole, against diffusers' `WanTransformer3DModel`, float32.

Each module of ours gets what its counterpart saw inside the whole network. Sizes are odd on purpose: heads of 20
channels, a feed-forward width that is a multiple of nothing, oblong latents.

Tolerances are in units of the output's root mean square (`error`). Measured: modules 0.3e-6 to 1.5e-6, the network
0.9e-6 to 1.6e-6, which is the rounding of a few sums of 60 to 101 products (6e-8 each); the bounds leave another BLAS
room. An eps of 1e-5 for 1e-6, the smallest mistake in practice, is 1e-5 and breaks them (last test).
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from einops import rearrange
from flax import nnx
from parity_modules.published import converted, error, ours, randomised, recorded, run, stacked

from longlive_jax.cache import KVCache, Window
from longlive_jax.config import TransformerConfig
from longlive_jax.models import rope
from longlive_jax.models.attention import attention
from longlive_jax.models.layers import LayerNorm, RMSNorm, layer_norm, structure
from longlive_jax.models.transformer import MLP, Attention, Block, Head, WanTransformer, gelu_tanh, time_embedding

CFG = TransformerConfig(
    dim=60, ffn_dim=101, num_layers=3, num_heads=3, in_channels=5, out_channels=5, text_dim=28, text_length=7,
    time_dim=34,
)  # fmt: skip
MODULE = 3e-6
NETWORK = 4e-6
ROWS, COLUMNS = 3, 5  # tokens


def inputs(batch: int, frames: int, timesteps):
    """Latents, a timestep a frame and prompts with 0, 1, ... rows of padding, as torch tensors."""
    generator = torch.Generator().manual_seed(batch + frames)
    x = torch.randn((batch, CFG.in_channels, frames, 2 * ROWS, 2 * COLUMNS), generator=generator)
    text = torch.randn((batch, CFG.text_length, CFG.text_dim), generator=generator)
    for i in range(batch):
        text[i, CFG.text_length - 2 * i :] = 0
    return x, torch.tensor(timesteps), text


@pytest.fixture(scope="module")
def theirs():
    network = WanTransformer3DModel(
        patch_size=CFG.patch, num_attention_heads=CFG.num_heads, attention_head_dim=CFG.head_dim,
        in_channels=CFG.in_channels, out_channels=CFG.out_channels, text_dim=CFG.text_dim, freq_dim=CFG.time_dim,
        ffn_dim=CFG.ffn_dim, num_layers=CFG.num_layers, eps=CFG.eps,
    )  # fmt: skip
    return randomised(network)


@pytest.fixture(scope="module")
def params(theirs):
    return converted("transformer", CFG, theirs)


def flow(theirs, x, timesteps, text):
    """Their flow; a timestep a frame is one a token there."""
    tokens = timesteps if timesteps.ndim == 1 else timesteps.repeat_interleave(ROWS * COLUMNS, dim=1)
    return theirs(x, tokens, text).sample


@pytest.fixture(scope="module")
def calls(theirs):
    """What went into and came out of every module of theirs: two clips of 3 frames, each frame at its own timestep."""
    x, timesteps, text = inputs(2, 3, [[1.0, 3.0, 7.0], [2.0, 0.0, 5.0]])
    return recorded(theirs, lambda: flow(theirs, x, timesteps, text))


def by_frame(tokens):
    """[B, T n, ...] to [B, T, n, ...]."""
    return rearrange(ours(tokens), "b (t n) ... -> b t n ...", n=ROWS * COLUMNS)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 100.0])  # at 1e-3, eps is half of what the root is taken of
def test_norms(theirs, params, scale):
    block, mine = theirs.blocks[0], params["blocks"][0]
    x = scale * torch.randn(2, 9, CFG.dim, generator=torch.Generator().manual_seed(5))
    got = run(lambda: RMSNorm(CFG.dim, CFG.eps), mine["self_attn"]["norm_q"], lambda m, x: m(x), ours(x))
    assert error(got, block.attn1.norm_q(x)) < MODULE
    got = run(lambda: LayerNorm(CFG.dim, CFG.eps), mine["cross_norm"], lambda m, x: m(x), ours(x))
    assert error(got, block.norm2(x)) < MODULE
    assert error(layer_norm(ours(x), CFG.eps), block.norm1(x)) < MODULE


def test_modulated_norm(calls, params):
    """What the self-attention gets: layer norm of the block's input, scaled and shifted by its frame's timestep."""
    (x, _, e6, _), _, _ = calls["blocks.1"][0]
    m = by_frame(e6)[:, :, :1] + params["blocks"][1]["modulation"]
    got = layer_norm(by_frame(x), CFG.eps) * (1 + m[..., 1, :]) + m[..., 0, :]
    assert error(got, by_frame(calls["blocks.1.attn1"][0][0][0])) < MODULE


def test_rope_tables(calls):
    cos, sin = (ours(table)[0, :, 0] for table in calls["rope"][0][2])
    mine = rope.rotation(jnp.arange(3), ROWS, COLUMNS, CFG.head_dim, CFG.rope_theta)
    for got, expected in zip(mine, (cos, sin)):
        np.testing.assert_allclose(rearrange(got, "t n d -> (t n) d"), expected[:, ::2], atol=6e-8, rtol=0)


def test_self_attention(calls, params):
    args, _, expected = calls["blocks.0.attn1"][0]
    turn = rope.rotation(jnp.arange(3), ROWS, COLUMNS, CFG.head_dim, CFG.rope_theta)

    def call(attn, x):
        (k, v), q = attn.keys_values(x), attn.queries(x)
        q, k, v = (rearrange(a, "b t n h d -> b (t n) h d") for a in (rope.rotate(q, turn), rope.rotate(k, turn), v))
        return attn.out(attention(q, k, v))

    got = run(lambda: Attention(CFG, rngs=nnx.Rngs(0)), params["blocks"][0]["self_attn"], call, by_frame(args[0]))
    assert error(got, expected) < MODULE


def test_cross_attention(calls, params):
    args, _, expected = calls["blocks.0.attn2"][0]
    call = lambda attn, x, text: attn.out(attention(attn.queries(x), *attn.keys_values(text)))
    make = lambda: Attention(CFG, rngs=nnx.Rngs(0))
    got = run(make, params["blocks"][0]["cross_attn"], call, ours(args[0]), ours(args[1]))
    assert error(got, expected) < MODULE


def test_feed_forward(calls, params):
    args, _, expected = calls["blocks.2.ffn"][0]
    make = lambda: MLP(CFG.dim, CFG.ffn_dim, CFG.dim, gelu_tanh, rngs=nnx.Rngs(0))
    got = run(make, params["blocks"][2]["ffn"], lambda m, x: m(x), ours(args[0]))
    assert error(got, expected) < MODULE


def test_text_embedding(calls, params):
    args, _, expected = calls["condition_embedder.text_embedder"][0]
    make = lambda: MLP(CFG.text_dim, CFG.dim, CFG.dim, gelu_tanh, rngs=nnx.Rngs(0))
    assert error(run(make, params["text_embedding"], lambda m, x: m(x), ours(args[0])), expected) < MODULE


def test_patch_and_time_embedding(calls, params):
    """The tokens, the time embedding and its six projections."""
    x, timesteps, _ = inputs(2, 3, [[1.0, 3.0, 7.0], [2.0, 0.0, 5.0]])
    tokens, e, e6 = run(network(), stacked(params), lambda m, x, t: m._embed(x, t), ours(x), ours(timesteps))
    assert error(rearrange(tokens, "b t (h w) D -> b t h w D", h=ROWS), calls["patch_embedding"][0][2]) < MODULE
    frames = lambda name: by_frame(calls[f"condition_embedder.{name}"][0][2])[:, :, 0]
    assert error(e, frames("time_embedder")) < MODULE
    assert error(rearrange(e6, "b t s D -> b t (s D)"), frames("time_proj")) < MODULE


def test_time_embedding_is_limited_by_their_angles(theirs):
    """Their angles are float32, ours as good as float64: near 1000 they differ by what theirs are off."""
    t = torch.tensor([0.0, 5.0, 625.0, 937.5, 1000.0])
    expected = theirs.condition_embedder.timesteps_proj(t).numpy()
    got = np.asarray(time_embedding(ours(t)[None], CFG.time_dim)[0])
    angles = t.numpy().astype(np.float64)[:, None] * 10000.0 ** (-np.arange(CFG.time_dim // 2) / (CFG.time_dim // 2))
    exact = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)
    assert np.abs(got - exact).max() < 1e-6
    assert np.abs(got - expected)[:2].max() < 1e-6
    assert np.abs(got - expected).max() < 1.1 * np.abs(expected - exact).max() < 5e-5


def test_block(calls, params):
    turn = rope.rotation(jnp.arange(3), ROWS, COLUMNS, CFG.head_dim, CFG.rope_theta)

    def attend(q, k, v):
        q, k, v = (rearrange(a, "b t n h d -> b (t n) h d") for a in (rope.rotate(q, turn), rope.rotate(k, turn), v))
        return rearrange(attention(q, k, v), "b (t n) h d -> b t n h d", t=3), None

    call = lambda block, x, e6, text: block(x, e6, block.cross_attn.keys_values(text), attend)[0]
    make = lambda: Block(CFG, rngs=nnx.Rngs(0))
    for index in range(CFG.num_layers):
        (x, text, e6, _), _, expected = calls[f"blocks.{index}"][0]
        got = run(make, params["blocks"][index], call, by_frame(x), by_frame(e6)[:, :, 0], ours(text))
        assert error(got, by_frame(expected)) < MODULE


def test_head(calls, params):
    (x,), _, _ = calls["norm_out"][0]
    e = by_frame(calls["condition_embedder.time_embedder"][0][2])[:, :, 0]
    got = run(lambda: Head(CFG, rngs=nnx.Rngs(0)), params["head"], lambda m, x, e: m(x, e), by_frame(x), e)
    assert error(got, by_frame(calls["proj_out"][0][2])) < MODULE


# MARK: the whole


@functools.cache
def network(cfg: TransformerConfig = CFG, scan: bool = True) -> nnx.GraphDef:
    """Structure of ours; `scan` over the layers, or a loop."""
    return structure(lambda: WanTransformer(cfg, stacked=scan, rngs=nnx.Rngs(0)))


def whole(net, x, timesteps, text):
    return net.bidirectional(x, timesteps, net.text_kv(text))


def bidirectional(params, cfg, scan: bool, x, timesteps, text):
    """Our flow."""
    t = timesteps if timesteps.ndim == 2 else timesteps[:, None].expand(-1, x.shape[2])
    return run(network(cfg, scan), stacked(params) if scan else params, whole, ours(x), ours(t), ours(text))


CASES = {
    "a timestep a frame": (2, 3, [[1.0, 3.0, 7.0], [2.0, 0.0, 5.0]]),
    "one frame": (1, 1, [4.0]),
    "batch": (2, 2, [6.0, 1.0]),
}


@pytest.mark.parametrize("scan", [True, False], ids=["scan", "loop"])
@pytest.mark.parametrize("case", CASES)
def test_network(theirs, params, case, scan):
    given = inputs(*CASES[case])
    assert error(bidirectional(params, CFG, scan, *given), flow(theirs, *given)) < NETWORK


def test_network_at_high_noise(theirs, params):
    """Measured 1.2e-5: their float32 angles, see above."""
    given = inputs(2, 2, [937.5, 1000.0])
    assert error(bidirectional(params, CFG, True, *given), flow(theirs, *given)) < 4e-5


@pytest.mark.parametrize("scan", [True, False], ids=["scan", "loop"])
def test_first_block_of_a_video(theirs, params, scan):
    """The causal path with nothing in the cache is their network on the block alone; the rest has no counterpart."""
    x, timesteps, text = inputs(2, 3, [[4.0] * 3] * 2)
    window = Window(6, 3, 3, False)

    def call(net, x, t, text):
        cache = KVCache.zeros(net.cache_shape(2, 6, ROWS, COLUMNS), jnp.float32, stacked=scan)
        return net.causal(x, t, net.text_kv(text), cache, window, jnp.asarray(0))[0]

    weights = stacked(params) if scan else params
    got = run(network(CFG, scan), weights, call, ours(x), ours(timesteps), ours(text))
    assert error(got, flow(theirs, x, timesteps, text)) < NETWORK


def test_prompts_shorter_than_the_models(theirs, params):
    """Rows that are not given are zeros, and attended: their pipeline pads, our network does."""
    x, timesteps, text = inputs(2, 2, [6.0, 1.0])
    text[:, 4:] = 0
    got = bidirectional(params, CFG, True, x, timesteps, text[:, :4])
    assert error(got, flow(theirs, x, timesteps, text)) < NETWORK


def moved(params, path: tuple, by: float):
    """The weights with one tensor changed by a share of itself."""
    head, *rest = path
    value = moved(params[head], tuple(rest), by) if rest else params[head] * (1 + by)
    return {**params, head: value}


@pytest.mark.parametrize(
    "change",
    [
        {"path": ("blocks", 1, "ffn", "down", "kernel"), "by": 1e-3},
        {"path": ("blocks", 2, "cross_attn", "norm_k", "weight"), "by": 1e-3},
        {"eps": 1e-5},
        {"rope_theta": 10100.0},
    ],
    ids=["weight", "norm", "eps", "theta"],
)
def test_a_small_mistake_is_seen(theirs, params, change):
    given = inputs(*CASES["batch"])
    cfg = dataclasses.replace(CFG, **{k: v for k, v in change.items() if k in ("eps", "rope_theta")})
    mistaken = moved(params, change["path"], change["by"]) if "path" in change else params
    assert error(bidirectional(mistaken, cfg, True, *given), flow(theirs, *given)) > 1.5 * NETWORK
