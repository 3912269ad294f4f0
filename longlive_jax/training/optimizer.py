"""The optimiser that a stage asks for: AdamW, or Muon for the matrices of transformers and NAdamW for the rest."""

from __future__ import annotations

from typing import Any

import jax
import optax

from longlive_jax.training.run_config import OptimizerConfig

MUON_MOMENTUM, MUON_RMS = 0.95, 0.2
"""Decay of the momentum; and the root mean square of an update at rate 1, about that of AdamW's."""


def learning_rate(config: OptimizerConfig, peak: float, steps: int) -> optax.Schedule:
    """Rises to `peak` over the warmup; then stays, or falls to `final_rate` along a cosine at `steps`."""
    if config.final_rate is None:
        return optax.warmup_constant_schedule(0.0 if config.warmup else peak, peak, config.warmup)
    return optax.warmup_cosine_decay_schedule(
        0.0 if config.warmup else peak, peak, config.warmup, steps, config.final_rate
    )


def make_optimizer(config: OptimizerConfig, peak: float, steps: int) -> optax.GradientTransformation:
    """Clipping and what `config.kind` names.

    AdamW with b1 = 0: the first moment is the gradient. RMSprop with bias correction is the same update, bit for bit,
    without keeping it (for two Wan 1.3B networks 11 GB).
    """
    rate = learning_rate(config, peak, steps)
    clip = [optax.clip_by_global_norm(config.clip)] if config.clip else []
    return optax.chain(*clip, *(_muon(config, rate) if config.kind == "muon" else _adamw(config, rate)))


def _adamw(config: OptimizerConfig, rate: optax.Schedule) -> list[optax.GradientTransformation]:
    if config.b1 == 0:
        adam = optax.scale_by_rms(config.b2, config.eps, eps_in_sqrt=False, bias_correction=True)
    else:
        adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    return [adam, optax.add_decayed_weights(config.weight_decay), optax.scale_by_learning_rate(rate)]


def _muon(config: OptimizerConfig, rate: optax.Schedule) -> list[optax.GradientTransformation]:
    """Orthogonalised momentum (Jordan et al. 2024), with steps as long as AdamW's (Liu et al. 2025, section 2.2): one
    rate serves all parameters."""
    from optax.contrib import MuonDimensionNumbers, muon

    def matrices(params: Any) -> Any:
        def one(path, leaf):
            names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
            stacked = leaf.ndim == 3 and "blocks" in names and names[-1] == "kernel"  # [layers, in, out]
            return MuonDimensionNumbers(1, 2) if stacked else None

        return jax.tree_util.tree_map_with_path(one, params)

    return [
        muon(
            rate, beta=MUON_MOMENTUM, eps=config.eps, weight_decay=config.weight_decay, consistent_rms=MUON_RMS,
            adam_b1=config.b1, adam_b2=config.b2, adam_weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=matrices,
        )
    ]  # fmt: skip
