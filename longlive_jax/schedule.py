"""Flow-matching schedule: sigma tables, warped few-step lists, and the conversions between noise, flow and x0.

x_t = (1 - sigma) x0 + sigma eps; the network predicts eps - x0. Reference section 2. Tables are float64 on the host.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from longlive_jax.config import SamplerConfig

TRAIN_STEPS = 1000


def sigma_table(shift: float) -> np.ndarray:
    """float64 [1000], from 1 (pure noise) down."""
    r = 1 - np.arange(TRAIN_STEPS, dtype=np.float64) / TRAIN_STEPS
    return shift * r / (1 + (shift - 1) * r)


def sigma_of(timesteps, shift: float) -> np.ndarray:
    """Sigma of each timestep (0 to 1000): the table's nearest entry, the first of equals, so sigma(0) is 0.00498."""
    table = sigma_table(shift)
    distance = np.abs(1000 * table - np.asarray(timesteps, np.float64)[..., None])
    return table[np.argmin(distance, axis=-1)]


def few_step_list(sampler: SamplerConfig) -> np.ndarray:
    """Timesteps float64 of the denoising steps. Warped: entry n is the shifted table's at index 1000 - n."""
    steps = np.asarray(sampler.steps, np.float64)
    if not sampler.warp:
        return steps
    table = np.append(1000 * sigma_table(sampler.shift), 0.0)
    return table[(TRAIN_STEPS - steps).astype(int)]


@dataclasses.dataclass(frozen=True)
class Passes:
    """The passes of one block: the denoising steps, then the clean pass. float32 [steps + 1] each.

    Attributes:
      timestep: given to the network.
      sigma: turns the network's flow into x0; 0 for the clean pass, which leaves its input as it is.
      next_sigma: noise level the x0 of a pass is brought back to for the next one; 0 from the last step on, so that
        the clean pass reads x0 itself.
    """

    timestep: np.ndarray
    sigma: np.ndarray
    next_sigma: np.ndarray

    @classmethod
    def of(cls, sampler: SamplerConfig) -> Passes:
        steps = few_step_list(sampler)
        timestep = np.append(steps, sampler.context_noise)
        sigma = np.append(sigma_of(steps, sampler.shift), 0.0)
        next_sigma = np.append(sigma[1:], 0.0)
        return cls(*(a.astype(np.float32) for a in (timestep, sigma, next_sigma)))


def add_noise(x0, noise, sigma):
    """x_t from x0 and noise."""
    return (1 - sigma) * x0 + sigma * noise


def to_x0(x_t, flow, sigma):
    """x0 from x_t and the predicted flow."""
    return x_t - sigma * flow
