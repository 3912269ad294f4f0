"""The optimiser is optax's AdamW, and with b1 = 0 the same without a first moment."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from longlive_jax.errors import UserError
from longlive_jax.training.optimizer import learning_rate, make_optimizer
from longlive_jax.training.run_config import OptimizerConfig


def run(optimizer, steps=5):
    """Parameters after updates by random gradients, and the state."""
    rng = np.random.default_rng(0)
    draw = lambda: {
        "a": jnp.asarray(rng.standard_normal((3, 4)), jnp.float32),
        "b": jnp.asarray(rng.random(2), jnp.float32),
    }
    params = draw()
    state = optimizer.init(params)
    for _ in range(steps):
        updates, state = optimizer.update(draw(), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


@pytest.mark.parametrize("b1", [0.0, 0.9])
def test_equals_adamw(b1):
    config = OptimizerConfig(b1=b1, b2=0.999, weight_decay=0.01, clip=0.0, warmup=0)
    ours, _ = run(make_optimizer(config, 1e-2, 10))
    theirs, _ = run(optax.adamw(1e-2, b1=b1, b2=0.999, eps=1e-8, weight_decay=0.01))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)


def test_no_first_moment_without_b1():
    size = lambda b1: sum(a.size for a in jax.tree.leaves(run(make_optimizer(OptimizerConfig(b1=b1), 1.0, 200))[1]))
    assert size(0.9) - size(0.0) == 14, "a moment of twelve and two numbers"


def test_clips_the_global_norm():
    huge = {"a": jnp.full(4, 1e6)}
    sgd_like = make_optimizer(OptimizerConfig(b1=0.0, clip=1.0, eps=1e6, weight_decay=0.0, warmup=0), 1.0, 10)
    updates, _ = sgd_like.update(huge, sgd_like.init(huge), huge)
    # Far below eps, Adam's step is the gradient over eps.
    np.testing.assert_allclose(1e6 * np.linalg.norm(updates["a"]), 1.0, rtol=1e-4)


def test_schedule():
    falling = learning_rate(OptimizerConfig(warmup=10, final_rate=0.1), 1.0, 110)
    np.testing.assert_allclose([falling(0), falling(5), falling(10), falling(110)], [0, 0.5, 1, 0.1], atol=1e-6)
    constant = learning_rate(OptimizerConfig(warmup=0), 2.0, 10)
    np.testing.assert_allclose([constant(0), constant(100)], 2.0)


def test_muon_learns_the_matrices_of_blocks_and_nadamw_the_rest():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    make = lambda: {
        "transformer": {
            "blocks": {"q": {"kernel": draw(3, 6, 4), "bias": draw(3, 4)}, "modulation": draw(3, 6, 4)},
            "head": {"kernel": draw(6, 4)},
        }
    }
    params, grads = make(), make()
    config = OptimizerConfig(kind="muon", weight_decay=0.1, clip=0.0, warmup=0)
    update = lambda optimizer: jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    updates, state = update(make_optimizer(config, 1e-2, 10))
    rest, _ = update(optax.nadamw(1e-2, b1=0.9, b2=0.99, weight_decay=0.1))
    kernel, adams = (tree["transformer"]["blocks"]["q"].pop("kernel") for tree in (updates, rest))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), updates, rest)
    assert np.abs(kernel - adams).max() > 1e-3

    # A layer's step is its gradient's orthogonal factor, to what five Newton-Schulz steps leave of it (0.7 to 1.2), at
    # 0.2 of the square root of the longer side; then the decay.
    for layer in range(3):
        step = -(kernel[layer] + 1e-2 * 0.1 * params["transformer"]["blocks"]["q"]["kernel"][layer]) / 1e-2
        values = np.linalg.svd(step, compute_uv=False) / (0.2 * 6**0.5)
        assert (values > 0.6).all() and (values < 1.3).all()
        u, _, vt = np.linalg.svd(grads["transformer"]["blocks"]["q"]["kernel"][layer], full_matrices=False)
        assert np.vdot(step, u @ vt) > 0.98 * np.linalg.norm(step) * np.linalg.norm(u @ vt)
    moments = sum(leaf.size for leaf in jax.tree.leaves(state))
    others = 12 + 72 + 24
    assert 72 + 2 * others <= moments < 72 + 2 * others + 10, "one moment of the matrices, two of the rest"


def test_all_faults_at_once():
    with pytest.raises(UserError, match="^optimizer: 2 faults: b1 is 1.5.*; clip is -1.0"):
        OptimizerConfig(b1=1.5, clip=-1.0)
