"""The noise schedule, against numbers worked out by hand from its formulas."""

import numpy as np
import pytest

from longlive_jax.config import SamplerConfig
from longlive_jax.schedule import Passes, add_noise, few_step_list, sigma_of, sigma_table, to_x0


def test_table():
    table = sigma_table(5.0)
    assert table.shape == (1000,) and table.dtype == np.float64
    assert np.all(np.diff(table) < 0)
    # r = 1, 0.75, 0.5, 0.25 and 0.001: 5 r / (1 + 4 r)
    np.testing.assert_allclose(table[[0, 250, 500, 750, 999]], [1, 15 / 16, 5 / 6, 5 / 8, 0.005 / 1.004], rtol=1e-14)
    np.testing.assert_allclose(sigma_table(1.0), 1 - np.arange(1000) / 1000, rtol=1e-14)


def test_warped_steps():
    steps = few_step_list(SamplerConfig(steps=(1000.0, 750.0, 500.0, 250.0)))
    np.testing.assert_allclose(steps, [1000, 937.5, 2500 / 3, 625], rtol=1e-14)


def test_a_step_of_zero_is_timestep_zero():
    np.testing.assert_allclose(few_step_list(SamplerConfig(steps=(1000.0, 500.0, 0.0))), [1000, 2500 / 3, 0])


def test_without_warp_steps_are_timesteps():
    sampler = SamplerConfig(steps=(1000.0, 937.5, 0.0), warp=False)
    np.testing.assert_array_equal(few_step_list(sampler), [1000, 937.5, 0])


def test_sigma_is_the_nearest_of_the_table():
    table = sigma_table(5.0)
    np.testing.assert_array_equal(sigma_of(1000 * table, 5.0), table)
    assert sigma_of([0.0], 5.0) == [table[-1]] == pytest.approx([0.00498], abs=1e-5)
    between = 1000 * (0.6 * table[10] + 0.4 * table[11])
    assert sigma_of([between], 5.0) == [table[10]]
    assert sigma_of([[1000, 0]], 5.0).shape == (1, 2)


def test_of_two_equally_near_the_first():
    table = sigma_table(1.0)  # 1, 0.999, 0.998 ...: 500.5 lies between two of them; the larger stands first
    assert sigma_of([500.5], 1.0) == [table[499]] == pytest.approx([0.501])


def test_passes_of_a_block():
    passes = Passes.of(SamplerConfig(steps=(1000.0, 750.0, 500.0, 250.0), context_noise=7.0))
    assert passes.timestep.dtype == passes.sigma.dtype == passes.next_sigma.dtype == np.float32
    np.testing.assert_allclose(passes.timestep, [1000, 937.5, 2500 / 3, 625, 7])
    np.testing.assert_allclose(passes.sigma, [1, 15 / 16, 5 / 6, 5 / 8, 0], rtol=1e-6)
    np.testing.assert_allclose(passes.next_sigma, [15 / 16, 5 / 6, 5 / 8, 0, 0], rtol=1e-6)


def test_the_clean_pass_changes_nothing():
    passes, x0 = Passes.of(SamplerConfig(steps=(500.0,))), np.float32([1.5, -2.0])
    after_last = add_noise(x0, 9.0, passes.next_sigma[-2])
    np.testing.assert_array_equal(after_last, x0)
    np.testing.assert_array_equal(add_noise(to_x0(x0, 9.0, passes.sigma[-1]), 9.0, passes.next_sigma[-1]), x0)


def test_a_last_step_of_zero_still_removes_the_least_noise():
    passes = Passes.of(SamplerConfig(steps=(1000.0, 0.0)))
    np.testing.assert_allclose(passes.sigma, [1, 0.005 / 1.004, 0], rtol=1e-6)
    np.testing.assert_allclose(passes.next_sigma, [0.005 / 1.004, 0, 0], rtol=1e-6)


def test_noise_and_flow_are_inverse():
    rng = np.random.default_rng(0)
    x0, noise, sigma = rng.normal(size=5), rng.normal(size=5), 0.3
    x_t = add_noise(x0, noise, sigma)
    np.testing.assert_allclose(x_t, 0.7 * x0 + 0.3 * noise)
    np.testing.assert_allclose(to_x0(x_t, noise - x0, sigma), x0)
