"""Distillation on a mesh: what decides is shared, so the program still decides; and numbers are those of one device.

Two devices need a process of their own: this file, run.
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from longlive_jax import sharding
from longlive_jax.training.learner import Learner, TrainState
from longlive_jax.training.run_config import OptimizerConfig
from longlive_jax.training.stage_config import LongTrainConfig
from longlive_jax.training.stages.distillation import LongStage
from longlive_jax.training.state import StreamState
from longlive_jax.training.step import Teaching, arrange, gradient, make_step, put
from longlive_jax.training.streams import Parted, keys_of

STREAMS = 2
CONFIG = OptimizerConfig(warmup=0, ema=0.0, clip=0.0)


def make_stage(**run_changes) -> LongStage:
    """The smallest stage long: a video of two chunks, the first the student's turn, the second the critic's."""
    config = LongTrainConfig().shrunk()  # on one device: the mesh comes after
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, streams=STREAMS, **run_changes))
    return LongStage(config, Path("nowhere"), lambda line: None)


def batch_of(stage: LongStage, devices: int, step: int = 0):
    source, size = stage.source(stage.config.phases[0], 0), stage.config.phases[0].batch_size
    records = [source[step * size + i] for i in range(size)]
    streams = [stage.collate(records[s::STREAMS]) for s in range(STREAMS)]
    return arrange(stage.parted(jax.tree.map(lambda *leaves: np.stack(leaves), *streams)), devices)


def programs(jaxpr, name: str):
    """All equations of a primitive, inner programs included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == name:
            yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda v: isinstance(v, jax.extend.core.ClosedJaxpr)):
            inner = getattr(value, "jaxpr", value)
            if isinstance(inner, jax.extend.core.Jaxpr):
                yield from programs(inner, name)


def decisions(jaxpr) -> dict[str, int]:
    """Conditionals and data-dependent loops that compute matrix products: how many, and whether each by one number."""
    holds = lambda inner: any(True for _ in programs(inner, "dot_general"))
    conds = [e for e in programs(jaxpr, "cond") if any(holds(b.jaxpr) for b in e.params["branches"])]
    loops = [e for e in programs(jaxpr, "while") if holds(e.params["body_jaxpr"].jaxpr)]
    by = [e.invars[0].aval for e in conds] + [e.params["cond_jaxpr"].out_avals[0] for e in loops]
    return {"conditionals": len(conds), "loops": len(loops), "by_one": all(aval.shape == () for aval in by)}


def turn_of(turn, mesh, params, nets, carry, batch):
    return gradient(turn.loss, params, nets, carry, batch, jax.random.key(0), mesh)


def main(output: str) -> None:
    """A step alone and on a mesh of two devices: decisions of the traced and compiled programs, and numbers."""
    told, arrays = {}, {}
    for name, devices in (("alone", 1), ("mesh", STREAMS)):
        stage = make_stage(data=devices)
        mesh = sharding.make_mesh(data=devices) if devices > 1 else None
        params, frozen = stage.parameters()
        # The adapters begin at nothing, which would hide the rest.
        params = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(a.size), a.shape), params)
        optimizer = optax.sgd(0.1)  # not Adam: it divides by the gradient, rounding included
        learners = {n: Learner.begin(p, optimizer, CONFIG) for n, p in params.items()}
        phase = stage.config.phases[0]
        state = put(TrainState.begin(learners, 0, stage.carry(phase)), mesh)
        frozen = put(frozen, mesh)
        teaching = {n: Teaching(optimizer, CONFIG) for n in learners}
        step = make_step(stage.turns(phase, 0), teaching, mesh)
        batches = [put(batch_of(stage, devices, index), mesh, streams=True) for index in range(2)]
        for turn in stage.turns(phase, 0):
            function = functools.partial(turn_of, turn, mesh)
            args = params[turn.learner], frozen | params, state.carry, batches[0]
            with sharding.using(mesh):
                told[f"{name} {turn.learner}"] = decisions(jax.make_jaxpr(function)(*args).jaxpr)
                if mesh is not None and turn.learner == "critic":
                    program = jax.jit(function).lower(*args).compile().as_text()
                    told["compiled"] = program.count(" conditional(")
        for batch in batches:
            state, metrics = step(state, frozen, batch)
        for path, leaf in jax.tree_util.tree_leaves_with_path((state.learners, metrics)):
            arrays[f"{name}:{jax.tree_util.keystr(path)}"] = np.asarray(leaf)
        for part, leaf in state.carry.shared.items():
            arrays[f"{name}:shared {part}"] = np.asarray(leaf)
        arrays[f"{name}:recent"] = np.asarray(state.carry.own["recent"]).reshape(
            STREAMS, *state.carry.own["recent"].shape[2:]
        )
        _, arrays[f"video {name}"] = stage.validate(params, frozen)
    np.savez(output, **arrays)
    print(json.dumps(told))


@pytest.fixture(scope="module")
def two_devices(tmp_path_factory):
    """What `main` prints, and its arrays."""
    output = tmp_path_factory.mktemp("distillation") / "arrays.npz"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={STREAMS}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, __file__, str(output)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with np.load(output) as arrays:
        return json.loads(done.stdout.splitlines()[-1]), dict(arrays)


@pytest.mark.slow
def test_a_step_decides_on_a_mesh(two_devices):
    """Recaches are computed when they are due, and blocks denoised up to their exit step: not always, and selected."""
    told, _ = two_devices
    # A block may recache, in two ways: when made, and when its gradient is taken.
    for learner, least in (("generator", 2), ("critic", 1)):
        alone, mesh = told[f"alone {learner}"], told[f"mesh {learner}"]
        assert mesh == alone and mesh["by_one"]
        assert mesh["conditionals"] >= least and mesh["loops"] >= 1
    assert told["compiled"] > 0


@pytest.mark.slow
def test_a_step_of_distillation_is_the_same_on_a_mesh(two_devices):
    _, arrays = two_devices
    alone = {name.removeprefix("alone:"): a for name, a in arrays.items() if name.startswith("alone:")}
    assert len(alone) > 20 and alone["shared position"] > 0
    for name, value in alone.items():
        np.testing.assert_allclose(arrays[f"mesh:{name}"], value, rtol=1e-4, atol=1e-5, err_msg=name)
    assert np.abs(np.diff(alone["recent"], axis=0)).mean() > 0.1, "each stream has its own noise"


def test_streams_of_a_turn_share_exit_step_and_switch_but_not_noise():
    """However they are spread over times and devices, and another step draws others."""

    def drawn(devices: int, seed: int = 0):
        stage = make_stage(data=devices)
        distillation, phase = stage._distillation(False), stage.config.phases[0]

        def draws(state, batch, keys):
            drawn = distillation.draw(keys, StreamState.joined(state), first=True)
            switch_frame = batch.shared["switch_frame"][0]
            shared = {"exit_step": drawn.rollout.exit_step, "switch_frame": switch_frame}
            return Parted(own={"noise": drawn.rollout.noise, "tau": drawn.tau}, shared=shared)

        def loss(params, nets, carry, batch, keys):
            made = draws(states.replace(own=carry.own["states"]), batch, keys)
            own = {"states": carry.own["states"], "made": made.own}
            return 0.0 * jnp.sum(params), (Parted(own=own, shared=made.shared), {})

        # A carry keeps its shapes from stream to stream, so there is a place in it for what is drawn.
        states, batch, key = stage.carry(phase), batch_of(stage, devices), jax.random.key(seed)
        first = jax.tree.map(lambda a: a[0, 0], (states.own, batch.own))
        parts = states.replace(own=first[0]), batch.replace(own=first[1]), keys_of(key)
        places = jax.eval_shape(draws, *parts)
        empty = lambda a: jnp.zeros((STREAMS // devices, devices, *a.shape), a.dtype)
        own = {"states": states.own, "made": jax.tree.map(empty, places.own)}
        carry = Parted(own=own, shared=jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), places.shared))
        made = gradient(loss, jnp.ones(1), {}, carry, batch, key)[2]
        return jax.tree.map(lambda a: a.reshape(STREAMS, *a.shape[2:]), made.own["made"]), made.shared

    (own, shared), (others, also_shared) = drawn(1), drawn(2)
    jax.tree.map(np.testing.assert_array_equal, (own, shared), (others, also_shared))
    assert shared["exit_step"].shape == shared["switch_frame"].shape == ()
    assert int(shared["switch_frame"]) in make_stage().switches
    assert np.abs(own["noise"][0] - own["noise"][1]).mean() > 0.5
    assert {int(drawn(2, seed)[1]["exit_step"]) for seed in range(8)} == {0, 1}


@pytest.mark.slow
def test_validation_videos_are_the_same_on_a_mesh(two_devices):
    alone, mesh = (two_devices[1][f"video {name}"].astype(int) for name in ("alone", "mesh"))
    assert alone.shape == mesh.shape and alone.std() > 1
    assert np.abs(alone - mesh).max() <= 2, "levels of 255, at sums in another order"


if __name__ == "__main__":
    main(*sys.argv[1:])
