"""AdamW as a stage asks for it."""

from __future__ import annotations

import optax

from longlive_jax.training.run_config import OptimizerConfig


def learning_rate(config: OptimizerConfig, peak: float, steps: int) -> optax.Schedule:
    """Rises to `peak` over the warmup; then stays, or falls to `final_rate` along a cosine at `steps`."""
    if config.final_rate is None:
        return optax.warmup_constant_schedule(0.0 if config.warmup else peak, peak, config.warmup)
    return optax.warmup_cosine_decay_schedule(
        0.0 if config.warmup else peak, peak, config.warmup, steps, config.final_rate
    )


def make_optimizer(config: OptimizerConfig, peak: float, steps: int) -> optax.GradientTransformation:
    """Clipping and AdamW.

    With b1 = 0 the first moment is the gradient: RMSprop with bias correction is the same update, bit for bit, without
    keeping it (for two Wan 1.3B networks 11 GB).
    """
    if config.b1 == 0:
        adam = optax.scale_by_rms(config.b2, config.eps, eps_in_sqrt=False, bias_correction=True)
    else:
        adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    clip = [optax.clip_by_global_norm(config.clip)] if config.clip else []
    decay = optax.add_decayed_weights(config.weight_decay)
    return optax.chain(*clip, adam, decay, optax.scale_by_learning_rate(learning_rate(config, peak, steps)))
