"""What a run carries from step to step, and what its checkpoints hold: pytrees of arrays.

The fields have no shapes in their types: JAX builds these of shapes, shardings and whatever a `tree.map` gives, too.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float

from longlive_jax.training.run_config import OptimizerConfig


@struct.dataclass
class Learner:
    """Networks that learn together from one loss.

    Attributes:
      params: what is trained, float32: pure dicts by network.
      opt: the optimiser's state.
      ema: averaged parameters; None if they are not wanted.
      updates: int32, made since the phase began.
      skipped: int32, updates left out because of a gradient that is not finite or too large.
      skipped_in_a_row: int32, of them the newest without an update between.
      usual_norm: float32, running mean of the gradient's norm.
    """

    params: Any
    opt: Any
    ema: Any
    updates: Any
    skipped: Any
    skipped_in_a_row: Any
    usual_norm: Any

    @classmethod
    def begin(cls, params: Any, optimizer: optax.GradientTransformation, config: OptimizerConfig) -> Learner:
        """Before the first update. Arrays are copies: a donated step must not find one of them twice."""
        params = jax.tree.map(lambda p: jnp.array(p, jnp.float32), params)
        zero = lambda: jnp.zeros((), jnp.int32)
        ema = jax.tree.map(jnp.copy, params) if config.ema else None
        return cls(params, optimizer.init(params), ema, zero(), zero(), zero(), jnp.zeros(()))

    @property
    def best(self) -> Any:
        """The parameters to hand on: the averaged ones, if there are."""
        return self.params if self.ema is None else self.ema

    def update(
        self,
        grads: Any,
        loss: Float[Array, ""],
        optimizer: optax.GradientTransformation,
        config: OptimizerConfig,
    ) -> tuple[Learner, Float[Array, ""]]:
        """After an update, or as it was but for the counters if gradient or loss are not fit for one; and the norm."""
        norm = optax.tree.norm(grads)
        fit = jnp.isfinite(norm) & jnp.isfinite(loss)
        if config.spike:
            known = self.updates >= SPIKE_AFTER
            fit &= ~known | (norm <= config.spike * self.usual_norm)
        updates, opt = optimizer.update(grads, self.opt, self.params)
        params = optax.apply_updates(self.params, updates)
        ema = self.ema
        if ema is not None:
            average = optax.incremental_update(params, ema, 1 - config.ema)
            ema = jax.tree.map(lambda a, p: jnp.where(self.updates < config.ema_start, p, a), average, params)
        decay = jnp.where(self.updates == 0, 0.0, 0.95)
        new = self.replace(
            params=params, opt=opt, ema=ema, updates=self.updates + 1, skipped_in_a_row=jnp.zeros_like(self.updates),
            usual_norm=decay * self.usual_norm + (1 - decay) * norm,
        )  # fmt: skip
        old = self.replace(skipped=self.skipped + 1, skipped_in_a_row=self.skipped_in_a_row + 1)
        return jax.tree.map(lambda n, o: jnp.where(fit, n, o), new, old), norm


SPIKE_AFTER = 20
"""Updates before which nobody knows what a usual gradient is."""


@struct.dataclass
class TrainState:
    """All of a run's state.

    Attributes:
      step: int32, steps done, of all phases.
      key: uint32 [2], of the run; that of a step is folded from it.
      learners: by name.
      carry: what streams in flight need of the past, leading axes [streams / devices, devices], but for what they share
        (`Parted`); () where every batch stands alone.
    """

    step: Any
    key: Any
    learners: dict[str, Learner]
    carry: Any = ()

    @classmethod
    def begin(cls, learners: dict[str, Learner], seed: int, carry: Any = ()) -> TrainState:
        return cls(jnp.zeros((), jnp.int32), jax.random.key_data(jax.random.key(seed)), learners, carry)
