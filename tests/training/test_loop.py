"""The training loop resumes exactly: N steps, a stop, M steps equal N + M steps, bit for bit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax

from longlive_jax.training.loop import run

OPTIMIZER = optax.adam(1e-1)


def loss(w, x, key):
    return jnp.mean(jnp.square(x @ w - jax.random.normal(key, (4, 2))))


@jax.jit
def step(state, x, key):
    value, grads = jax.value_and_grad(loss)(state["w"], x, key)
    updates, opt = OPTIMIZER.update(grads, state["opt"])
    return {"w": optax.apply_updates(state["w"], updates), "opt": opt}, {"loss": value}


def start():
    w = jnp.ones((3, 2))
    return {"w": w, "opt": OPTIMIZER.init(w)}


def batch(index):
    return np.random.default_rng(index).standard_normal((4, 3)).astype(np.float32)


def test_resume_is_exact(tmp_path):
    whole = run(step, start(), batch, steps=12, folder=tmp_path / "whole", log_every=1)
    run(step, start(), batch, steps=7, folder=tmp_path / "parts", save_every=5, log_every=1)
    resumed = run(step, start(), batch, steps=12, folder=tmp_path / "parts", log_every=1)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    lines = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_finished_run_does_nothing_more(tmp_path):
    done = run(step, start(), batch, steps=3, folder=tmp_path)
    again = run(step, start(), lambda index: 1 / 0, steps=3, folder=tmp_path)
    np.testing.assert_array_equal(done["w"], again["w"])


def test_time_limit_stops_and_saves(tmp_path):
    run(step, start(), batch, steps=1000, folder=tmp_path, seconds=0.0)
    resumed = run(step, start(), batch, steps=2, folder=tmp_path)
    whole = run(step, start(), batch, steps=2, folder=tmp_path / "whole")
    np.testing.assert_array_equal(resumed["w"], whole["w"])
