"""The two losses: normalisation, guidance, noise levels, masks."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.config import SamplerConfig
from longlive_jax.schedule import sigma_of
from longlive_jax.training import dmd
from longlive_jax.training.config import DistillationConfig, Quirks

SHAPE = (2, 4, 3, 2, 2)
SAMPLER = SamplerConfig()


def draw(seed: int):
    return jax.random.normal(jax.random.key(seed), SHAPE)


def test_gradient_is_normalised_for_each_video():
    x, fake, real = draw(0), draw(1), draw(2)
    gradient, lost = dmd.dmd_gradient(x, fake, real)
    assert float(lost) == 0
    for b in range(2):
        expected = (fake[b] - real[b]) / np.mean(np.abs(x[b] - real[b]))
        np.testing.assert_allclose(gradient[b], expected, rtol=1e-5)


def test_what_is_not_a_number_is_no_gradient():
    x, fake, real = draw(0), draw(1), draw(2)
    gradient, lost = dmd.dmd_gradient(x, fake.at[0, 1].set(jnp.nan), real)
    assert not gradient[0, 1].any()
    assert float(lost) == pytest.approx(1 / 8), "one frame of four, of one video of two"
    np.testing.assert_array_equal(gradient[1], dmd.dmd_gradient(x, fake, real)[0][1])
    # A video that is where the teacher wants it: 0 / 0.
    gradient, lost = dmd.dmd_gradient(x, x, x)
    assert not gradient.any() and float(lost) == 1


def test_guidance_is_the_official_form_plus_one():
    a, b = draw(0), draw(1)
    np.testing.assert_allclose(dmd.guided(a, b, 4.0), a + 3.0 * (a - b), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dmd.guided(a, b, 1.0), a, atol=1e-6)


def test_loss_equals_its_definition():
    x, gradient, frames = draw(0), draw(1), jnp.asarray([False, True, True, False])

    def plain(x):
        return 0.5 * jnp.mean(jnp.square(x - jax.lax.stop_gradient(x - gradient))[:, 1:3])

    loss, by_x = jax.value_and_grad(dmd.dmd_loss)(x, gradient, frames)
    expected, expected_by_x = jax.value_and_grad(plain)(x)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(by_x, expected_by_x, atol=1e-6)
    assert not by_x[:, ::3].any()


def test_noise_levels():
    config = DistillationConfig()
    exact = dmd.NoiseLevels.of(SAMPLER, config)
    np.testing.assert_allclose(exact.timestep[[0, 500, 999]], [20, 5000 / 6, 980], rtol=1e-6)
    np.testing.assert_array_equal(exact.added, exact.removed)
    np.testing.assert_allclose(exact.added, exact.timestep / 1000, rtol=1e-6)
    official = dmd.NoiseLevels.of(SAMPLER, dataclasses.replace(config, quirks=Quirks.reference()))
    np.testing.assert_array_equal(official.timestep, exact.timestep)
    ratio = official.removed / official.added
    assert 0.90 < ratio.min() < 0.92 and 1.19 < ratio.max() < 1.20
    np.testing.assert_allclose(official.removed, sigma_of(exact.timestep, 8.0), rtol=1e-6)
    at = official.at(jnp.asarray([3, 700]))
    assert at.timestep.shape == (2,) and at.added.shape == (2, 1, 1, 1, 1)
    assert float(at.removed[1, 0, 0, 0, 0]) == official.removed[700]
    given, not_given = (at.without_first(jnp.asarray(b), 3) for b in (True, False))
    assert given.timestep.shape == (2, 3) and given.added.shape == (2, 3, 1, 1, 1)
    np.testing.assert_array_equal(given.timestep[:, 0], 0)
    np.testing.assert_array_equal(given.timestep[:, 1:], not_given.timestep[:, :2])
    np.testing.assert_array_equal(not_given.added, jnp.repeat(at.added, 3, axis=1))


@dataclasses.dataclass(frozen=True)
class FakeScore(dmd.Score):
    """A score whose flow is known."""

    given: Any = None

    def flow(self, params, x_t, timestep, prompt_embeds, remat=None):
        return self.given * params * jnp.mean(prompt_embeds)


def test_critic_loss_equals_the_official_way_through_x0():
    x, noise, flow, frames = draw(0), draw(1), draw(2), jnp.asarray([False, True, True, True])
    config = dataclasses.replace(DistillationConfig(), quirks=Quirks.reference())
    levels = dmd.NoiseLevels.of(SAMPLER, config).at(jnp.asarray([2, 400]))
    embeds = jnp.ones((2, 1, 1))
    loss = dmd.critic_flow_loss(FakeScore(None, given=flow), jnp.ones(()), x, noise, levels, embeds, frames)
    x_t = (1 - levels.added) * x + levels.added * noise
    x0 = x_t - levels.removed * flow
    expected = np.mean(np.square((x_t - x0) / levels.added - (noise - x))[:, 1:])
    assert float(loss) == pytest.approx(expected, rel=1e-4)


def test_difference_of_scores():
    x, noise = draw(0), draw(1)
    config = DistillationConfig()
    levels = dmd.NoiseLevels.of(SAMPLER, config).at(jnp.asarray([100, 900]))
    teacher, critic = (FakeScore(None, given=draw(seed)) for seed in (2, 3))
    params = {"teacher": jnp.ones(()), "critic": jnp.ones(())}
    prompt, negative = jnp.ones((2, 1, 1)), 0.5 * jnp.ones((2, 1, 1))

    def loss(x, guidance=4.0):
        args = levels, prompt, negative, guidance
        return dmd.score_difference(teacher, critic, params, x, noise, *args)[0]

    x_t = (1 - levels.added) * x + levels.added * noise
    real = lambda scale: x_t - levels.added * scale * teacher.given
    fake = x_t - levels.added * critic.given
    np.testing.assert_allclose(loss(x), dmd.dmd_gradient(x, fake, real(2.5))[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(loss(x, 1.0), dmd.dmd_gradient(x, fake, real(1.0))[0], rtol=1e-4, atol=1e-5)
    assert not jax.grad(lambda x: jnp.sum(loss(x)))(x).any()
