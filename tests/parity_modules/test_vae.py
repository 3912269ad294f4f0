"""Our VAE, from a convolution to the whole, against diffusers' `AutoencoderKLWan`, float32.

Theirs codes a video frame by frame (4 pixel frames a latent one) with caches. Each module of ours gets what its
counterpart saw in all those calls, twice: call by call with our cache, and all at once without. Tolerances as in
`test_transformer.py`; measured: up to 1.7e-6 for a layer, 1.0e-6 for the whole.
"""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    AutoencoderKLWan,
    WanAttentionBlock,
    WanResample,
    WanResidualBlock,
)
from flax import nnx
from parity_modules.published import converted, error, ours, randomised, recorded, run

from longlive_jax.config import VAEConfig
from longlive_jax.models.layers import structure
from longlive_jax.models.vae import VAE, CausalConv

CFG = VAEConfig(
    base_width=6, multipliers=(1, 2, 2, 3), res_blocks=1, z_channels=5, latent_mean=(0.3, -0.2, 0.1, 0.0, -1.0),
    latent_std=(1.5, 0.7, 2.0, 1.0, 0.4),
)  # fmt: skip
MODULE = 4e-6
NETWORK = 3e-6
FRAMES, ROWS, COLUMNS = 3, 2, 3  # of the latents
VIDEO = torch.rand(2, 3, 4 * FRAMES - 3, 8 * ROWS, 8 * COLUMNS, generator=torch.Generator().manual_seed(0)) * 2 - 1
LATENTS = torch.randn(2, CFG.z_channels, FRAMES, ROWS, COLUMNS, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def theirs():
    network = randomised(
        AutoencoderKLWan(
            base_dim=CFG.base_width, z_dim=CFG.z_channels, dim_mult=list(CFG.multipliers),
            num_res_blocks=CFG.res_blocks, temperal_downsample=list(CFG.temporal),
            latents_mean=list(CFG.latent_mean), latents_std=list(CFG.latent_std),
        )
    )  # fmt: skip
    network.decoder.conv_out.weight *= 0.2  # so that few pixels are clipped
    return network


@pytest.fixture(scope="module")
def params(theirs):
    return converted("vae", CFG, theirs)


@pytest.fixture(scope="module")
def calls(theirs):
    return recorded(theirs, lambda: (theirs.encode(VIDEO), theirs.decode(LATENTS)))


def layers(theirs, calls, coder: str) -> list[str]:
    """Names of their layers in the order in which they run, which is that of our list."""
    kinds = (WanResidualBlock, WanAttentionBlock, WanResample)
    return [name for name in calls if name.startswith(coder) and isinstance(theirs.get_submodule(name), kinds)]


@functools.cache
def vae(impl: str = "2d") -> nnx.GraphDef:
    return structure(lambda: VAE(CFG, impl=impl, rngs=nnx.Rngs(0)))


def in_chunks(params, impl, function, chunks, cache=None):
    """`function(vae, x, cache)` chunk by chunk, caches handed on; what it gives, joined in time."""
    outputs = []
    for x in chunks:
        y, cache = run(vae(impl), params, function, x, cache)
        outputs.append(y)
    return jnp.concatenate(outputs, axis=1)


def seen(calls, name):
    """(inputs, outputs) of all calls of a module of theirs."""
    return [ours(args[0]) for args, _, _ in calls[name]], [ours(output) for _, _, output in calls[name]]


KINDS = {
    "residual": ("encoder", 0), "residual with shortcut": ("encoder", 2), "downsample": ("encoder", 1),
    "downsample with time": ("encoder", 3), "attention": ("decoder", 1), "upsample": ("decoder", -3),
    "upsample with time": ("decoder", 5),
}  # fmt: skip
"""One layer of each kind: the coder and the index in our list."""


@pytest.mark.parametrize("kind", KINDS)
def test_layer(theirs, calls, params, kind):
    coder, index = KINDS[kind]
    names = layers(theirs, calls, coder)
    assert len(names) == len(params[coder]["layers"])
    module = theirs.get_submodule(names[index])
    shortcut = isinstance(getattr(module, "conv_shortcut", None), torch.nn.Conv3d)
    described = type(module).__name__.removeprefix("Wan"), getattr(module, "mode", None), shortcut
    assert (
        described
        == {
            "residual": ("ResidualBlock", None, False),
            "residual with shortcut": ("ResidualBlock", None, True),
            "downsample": ("Resample", "downsample2d", False),
            "downsample with time": ("Resample", "downsample3d", False),
            "attention": ("AttentionBlock", None, False),
            "upsample": ("Resample", "upsample2d", False),
            "upsample with time": ("Resample", "upsample3d", False),
        }[kind]
    )
    inputs, outputs = seen(calls, names[index])
    call = lambda m, x, cache: getattr(m, coder).layers[index % len(names)](x, cache, cache is None)
    expected = jnp.concatenate(outputs, axis=1)
    assert error(in_chunks(params, "2d", call, inputs), expected) < MODULE
    assert error(in_chunks(params, "2d", call, [jnp.concatenate(inputs, axis=1)]), expected) < MODULE


@pytest.mark.parametrize("impl", ["2d", "3d"])
def test_causal_convolution(calls, params, impl):
    """The first of the encoder; its history is the cache that theirs is given."""
    inputs, outputs = seen(calls, "encoder.conv_in")
    make = lambda: CausalConv(3, CFG.base_width, (3, 3, 3), impl=impl, rngs=nnx.Rngs(0))
    cache, got = None, []
    for x in inputs:
        y, cache = run(make, params["encoder"]["conv_in"], lambda m, x, *cache: m(x, *cache), x, cache)
        got.append(y)
    assert error(jnp.concatenate(got, axis=1), jnp.concatenate(outputs, axis=1)) < MODULE


@pytest.mark.parametrize("coder", ["encoder", "decoder"])
def test_coder(calls, params, coder):
    """Without the 1 x 1 convolution and the clipping that come outside."""
    inputs, outputs = seen(calls, coder)
    call = lambda m, x, cache: getattr(m, coder)(x, cache, cache is None)
    got = in_chunks(params, "2d", call, [jnp.concatenate(inputs, axis=1)])
    assert error(got, jnp.concatenate(outputs, axis=1)) < NETWORK


# MARK: the whole


def encode(m, x, cache):
    return m.encode(x, cache, first=cache is None)


def decode(m, z, cache):
    return m.decode(z, cache, first=cache is None)


@pytest.fixture(scope="module")
def encoded(theirs):
    """Their latents, normalised as their pipelines do it."""
    with torch.no_grad():
        mean = theirs.encode(VIDEO).latent_dist.mode()
    of_channel = lambda values: torch.tensor(values)[:, None, None, None]
    return ours((mean - of_channel(theirs.config.latents_mean)) / of_channel(theirs.config.latents_std))


@pytest.fixture(scope="module")
def decoded(theirs):
    of_channel = lambda values: torch.tensor(values)[:, None, None, None]
    z = LATENTS * of_channel(theirs.config.latents_std) + of_channel(theirs.config.latents_mean)
    with torch.no_grad():
        return ours(theirs.decode(z).sample)


def cut(x, sizes):
    return jnp.split(x, np.cumsum(sizes)[:-1], axis=1)


@pytest.mark.parametrize(("impl", "sizes"), [("2d", [9]), ("3d", [9]), ("2d", [1, 4, 4]), ("2d", [5, 4])])
def test_encode(params, encoded, impl, sizes):
    assert error(in_chunks(params, impl, encode, cut(ours(VIDEO), sizes)), encoded) < NETWORK


@pytest.mark.parametrize(("impl", "sizes"), [("2d", [3]), ("3d", [3]), ("2d", [1, 1, 1]), ("2d", [2, 1])])
def test_decode(params, decoded, impl, sizes):
    got = in_chunks(params, impl, decode, cut(ours(LATENTS), sizes))
    assert np.mean(np.abs(got) < 1) > 0.9
    assert error(got, decoded) < NETWORK


def test_one_frame(params, encoded, decoded):
    """A still image, both ways: the start of the video alone."""
    assert error(in_chunks(params, "2d", encode, [ours(VIDEO)[:, :1]]), encoded[:, :1]) < NETWORK
    assert error(in_chunks(params, "2d", decode, [ours(LATENTS)[:, :1]]), decoded[:, :1]) < NETWORK


@pytest.mark.parametrize("coder", ["encoder", "decoder"])
def test_a_small_mistake_is_seen(params, encoded, decoded, coder):
    """One weight of the last norm's, a thousandth off."""
    call, given, expected = {"encoder": (encode, VIDEO, encoded), "decoder": (decode, LATENTS, decoded)}[coder]
    norm = {"gamma": params[coder]["norm"]["gamma"].at[2].mul(1.001)}
    mistaken = params | {coder: params[coder] | {"norm": norm}}
    assert error(in_chunks(mistaken, "2d", call, [ours(given)]), expected) > 2 * NETWORK


def test_a_forgotten_frame_is_seen(params, decoded):
    """The older of the two frames that the first convolution remembers, lost between chunks."""
    first, second, third = cut(ours(LATENTS), [1, 1, 1])
    _, cache = run(vae(), params, decode, first, None)
    _, cache = run(vae(), params, decode, second, cache)
    assert error(in_chunks(params, "2d", decode, [third], cache), decoded[:, 5:]) < NETWORK
    cache = (cache[0].at[:, 0].set(0), *cache[1:])
    assert error(in_chunks(params, "2d", decode, [third], cache), decoded[:, 5:]) > 1e-3
