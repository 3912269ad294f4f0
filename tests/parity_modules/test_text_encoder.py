"""Our umT5 encoder, from the position bias to the whole, against transformers' `UMT5EncoderModel`, float32.

Each module of ours gets what its counterpart saw inside the whole network. The prompts are longer than the farthest
distance that the position bias tells apart; heads are wider together than the model. Tolerances as in
`test_transformer.py`; measured: modules 0.7e-6 to 1.8e-6, the network 8e-6, since T5's logits have no scale and the
softmax of random weights is sharp.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from parity_modules.published import converted, error, ours, randomised, recorded, run, stacked
from transformers import UMT5Config, UMT5EncoderModel

from longlive_jax.config import TextEncoderConfig
from longlive_jax.models.layers import RMSNorm
from longlive_jax.models.text_encoder import Attention, Block, GatedFFN, PositionBias, TextEncoder

CFG = TextEncoderConfig(vocab_size=97, dim=26, attention_dim=30, ffn_dim=43, num_heads=5, num_layers=3)
LENGTH = 150
LENGTHS = (150, 37, 1)
MODULE = 5e-6
NETWORK = 2e-5
IDS = torch.randint(3, CFG.vocab_size, (len(LENGTHS), LENGTH), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(LENGTH) < torch.tensor(LENGTHS)[:, None]).int()


@pytest.fixture(scope="module")
def theirs():
    config = UMT5Config(
        vocab_size=CFG.vocab_size, d_model=CFG.dim, d_kv=CFG.attention_dim // CFG.num_heads, d_ff=CFG.ffn_dim,
        num_layers=CFG.num_layers, num_heads=CFG.num_heads, relative_attention_num_buckets=CFG.num_buckets,
        relative_attention_max_distance=CFG.max_distance, layer_norm_epsilon=CFG.eps, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return randomised(UMT5EncoderModel(config))


@pytest.fixture(scope="module")
def params(theirs):
    return converted("text_encoder", CFG, theirs)


@pytest.fixture(scope="module")
def calls(theirs):
    return recorded(theirs, lambda: theirs(IDS * MASK, MASK))


def hidden(calls, name: str):
    """The activations that went into a module of theirs."""
    args, kwargs, _ = calls[name][0]
    return ours(args[0] if args else kwargs["hidden_states"])


def output(calls, name: str):
    out = calls[name][0][2]
    return out[0] if isinstance(out, tuple) else out


def call(module, *arrays):
    return module(*arrays)


def test_norm(calls, params):
    name = "encoder.final_layer_norm"
    got = run(lambda: RMSNorm(CFG.dim, CFG.eps), params["norm"], call, hidden(calls, name))
    assert error(got, output(calls, name)) < MODULE


@pytest.mark.parametrize("length", [1, 20, 129, 300])
def test_position_bias(theirs, params, length):
    """Exactly theirs: one bucket off would be another number."""
    expected = theirs.encoder.block[1].layer[0].SelfAttention.compute_bias(length, length)[0]
    make = lambda: PositionBias(CFG, rngs=nnx.Rngs(0))
    got = run(make, params["blocks"][1]["attn"]["position_bias"], lambda m: m(length))
    np.testing.assert_array_equal(got, ours(expected))


def test_attention(calls, params):
    name = "encoder.block.0.layer.0.SelfAttention"
    make = lambda: Attention(CFG, rngs=nnx.Rngs(0))
    got = run(make, params["blocks"][0]["attn"], call, hidden(calls, name), ours(MASK))
    assert error(got, output(calls, name)) < MODULE


def test_feed_forward(calls, params):
    name = "encoder.block.2.layer.1.DenseReluDense"
    make = lambda: GatedFFN(CFG, rngs=nnx.Rngs(0))
    got = run(make, params["blocks"][2]["ffn"], call, hidden(calls, name))
    assert error(got, output(calls, name)) < MODULE


def test_block(calls, params):
    name = "encoder.block.1"
    make = lambda: Block(CFG, rngs=nnx.Rngs(0))
    got = run(make, params["blocks"][1], call, hidden(calls, name), ours(MASK))
    assert error(got, output(calls, name)) < MODULE


def encode(params, cfg, scan: bool, ids, mask):
    make = lambda: TextEncoder(cfg, stacked=scan, rngs=nnx.Rngs(0))
    args = ours(ids).astype(jnp.int32), ours(mask)
    return run(make, stacked(params) if scan else params, call, *args)


def expected(theirs, ids, mask):
    """Their embeddings, zero past each prompt's end as Wan's pipeline makes them."""
    with torch.no_grad():
        return theirs(ids, mask).last_hidden_state * mask[..., None]


@pytest.mark.parametrize("scan", [True, False], ids=["scan", "loop"])
def test_network(theirs, params, scan):
    assert error(encode(params, CFG, scan, IDS * MASK, MASK), expected(theirs, IDS * MASK, MASK)) < NETWORK


def test_one_short_prompt(theirs, params):
    ids, mask = IDS[:1, :5], MASK[:1, :5]
    assert error(encode(params, CFG, True, ids, mask), expected(theirs, ids, mask)) < NETWORK


@pytest.mark.parametrize("change", ["weight", "eps", "distance"])
def test_a_small_mistake_is_seen(theirs, params, change):
    cfg = {
        "weight": CFG,
        "eps": dataclasses.replace(CFG, eps=1e-4),
        "distance": dataclasses.replace(CFG, max_distance=127),
    }[change]
    if change == "weight":
        block = params["blocks"][1]
        o = {"kernel": block["attn"]["o"]["kernel"] * 1.001}
        params = params | {"blocks": params["blocks"] | {1: block | {"attn": block["attn"] | {"o": o}}}}
    assert error(encode(params, cfg, True, IDS * MASK, MASK), expected(theirs, IDS * MASK, MASK)) > 3 * NETWORK
