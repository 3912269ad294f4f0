"""Flow matching: the loss by hand, and what it leaves out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import TRANSFORMER, structure

from longlive_jax.config import TextEncoderConfig
from longlive_jax.models.text_encoder import TextEncoder
from longlive_jax.models.transformer import WanTransformer
from longlive_jax.training.batch import Batch
from longlive_jax.training.flow_matching import draw_sigma, euler_sample, flow_matching_loss

TEXT = TextEncoderConfig(vocab_size=20, dim=8, attention_dim=8, ffn_dim=16, num_heads=2, num_layers=1)
MAKE = (
    lambda: WanTransformer(TRANSFORMER, rngs=nnx.Rngs(0)),
    lambda: TextEncoder(TEXT, rngs=nnx.Rngs(1)),
)


@pytest.fixture(scope="module")
def networks():
    # The head starts at zero, which would make every flow zero and every test blind.
    params = [nnx.to_pure_dict(nnx.split(make())[1]) for make in MAKE]
    keys = iter(jax.random.split(jax.random.key(9), 1000))
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(next(keys), p.shape), params)
    return [nnx.merge(structure(make), p) for make, p in zip(MAKE, params)]


@pytest.fixture(scope="module")
def example():
    return Batch(
        latents=jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 4)),
        positions=jnp.arange(3),
        ids=jnp.array([[3, 4, 1, 0, 0, 0], [5, 1, 0, 0, 0, 0]]),
        mask=jnp.array([[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]]),
        learn=jnp.ones((2, 3), bool),
    )


def test_equals_the_loss_by_hand(networks, example):
    model, text = networks
    key = jax.random.key(5)
    keys = jax.random.split(key)
    errors = []
    for clip in range(2):  # one clip and one noise level at a time
        sigma = float(draw_sigma(keys[0], (2, 1), 3.0)[clip, 0])
        eps = jax.random.normal(keys[1], example.latents.shape)[clip : clip + 1]
        x0 = example.latents[clip : clip + 1]
        kv = model.text_kv(text(example.ids[clip : clip + 1], example.mask[clip : clip + 1]))
        flow = model.bidirectional((1 - sigma) * x0 + sigma * eps, jnp.full((1, 3), 1000 * sigma), kv)
        errors.append(np.mean(np.square(flow - (eps - x0))))
    loss = flow_matching_loss(model, text, example, key, shift=3.0)
    np.testing.assert_allclose(loss, np.mean(errors), rtol=1e-4)


def test_counts_only_frames_to_learn(networks, example):
    key, learn = jax.random.key(5), jnp.array([[True, False, True], [False, False, True]])
    whole = flow_matching_loss(*networks, example, key, shift=3.0)
    parts = [
        flow_matching_loss(*networks, dataclasses.replace(example, learn=mask), key, shift=3.0)
        for mask in (learn, ~learn)
    ]
    np.testing.assert_allclose((parts[0] + parts[1]) / 2, whole, rtol=1e-5)  # three frames of six each
    assert float(parts[0]) != float(parts[1])


def test_a_given_first_frame_comes_without_noise_and_is_not_judged(networks, example):
    model, text = networks
    key, clips = jax.random.key(5), example.latents.shape[0]
    keys = jax.random.split(key)
    sigma = jnp.repeat(draw_sigma(keys[0], (clips, 1), 3.0), 3, axis=1).at[:, 0].set(0.0)
    eps, x0 = jax.random.normal(keys[1], example.latents.shape), example.latents
    noisy = x0 + sigma[..., None, None, None] * (eps - x0)
    flow = model.bidirectional(noisy, 1000 * sigma, model.text_kv(text(example.ids, example.mask)))
    by_hand = jnp.mean(jnp.square(flow - (eps - x0))[:, 1:])
    loss = lambda share, at: float(flow_matching_loss(*networks, example, at, shift=3.0, first_given=share))
    np.testing.assert_allclose(loss(1.0, key), by_hand, rtol=1e-5)
    some = {loss(0.5, k) in (loss(0.0, k), loss(1.0, k)) for k in jax.random.split(key, 8)}
    assert some == {True, False}, "of two clips both, one or none"


def test_euler_follows_the_guided_flow(networks, example):
    model, text = networks
    embeds, empty = text(example.ids, example.mask), text(example.ids * 0 + 1, example.mask)
    noise, settings = example.latents, dict(steps=2, shift=3.0)
    made = euler_sample(model, embeds, empty, noise, guidance=2.0, **settings)
    x, sigmas = noise, [1.0, 3 * 0.5 / 2, 0.0]
    for sigma, after in zip(sigmas, sigmas[1:]):
        flows = [model.bidirectional(x, jnp.full((2, 3), 1000 * sigma), model.text_kv(e)) for e in (embeds, empty)]
        x = x + (after - sigma) * (2 * flows[0] - flows[1])
    np.testing.assert_allclose(made, x, rtol=1e-4, atol=1e-4)


def test_bfloat16_and_rematerialisation(networks, example):
    plain = flow_matching_loss(*networks, example, jax.random.key(5), shift=3.0)
    half = flow_matching_loss(*networks, example, jax.random.key(5), shift=3.0, dtype="bfloat16")
    assert half.dtype == jnp.float32 and half != plain
    np.testing.assert_allclose(half, plain, rtol=0.03)
    again = flow_matching_loss(*networks, example, jax.random.key(5), shift=3.0, remat=jax.checkpoint)
    np.testing.assert_allclose(again, plain, rtol=1e-6)
