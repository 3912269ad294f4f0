"""One step: streams are summed alike over time and devices, unfit gradients change nothing, averages average.

Four devices need a process of their own: this file, run.
"""

import dataclasses
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from longlive_jax import sharding
from longlive_jax.config import TransformerConfig
from longlive_jax.models.layers import structure
from longlive_jax.models.transformer import WanTransformer
from longlive_jax.training.learner import SPIKE_AFTER, Learner, TrainState
from longlive_jax.training.run_config import OptimizerConfig
from longlive_jax.training.step import Teaching, Turn, arrange, gradient, make_step, put
from longlive_jax.training.streams import Parted, keys_of

CONFIG = OptimizerConfig(warmup=0, ema=0.9, clip=0.0, spike=4.0)
CFG = TransformerConfig(
    dim=24, ffn_dim=32, num_layers=2, num_heads=2, in_channels=4, out_channels=4, text_dim=8, text_length=6, time_dim=16
)


def quadratic(params, nets, carry, batch, keys):
    error = jnp.mean(jnp.square(batch["x"] @ params["w"] - batch["y"]))
    return error, (jax.tree.map(lambda c: c + 1, carry), {"error": error})


def start(config=CONFIG, carry=()):
    optimizer = optax.sgd(0.1)
    learner = Learner.begin({"w": jnp.ones((3, 2))}, optimizer, config)
    return TrainState.begin({"net": learner}, seed=0, carry=carry), {"net": Teaching(optimizer, config)}


def batch(streams=4, size=2, scale=1.0):
    rng = np.random.default_rng(0)
    draw = lambda n: (scale * rng.standard_normal((streams, size, n))).astype(np.float32)
    return arrange({"x": draw(3), "y": draw(2)}, 1)


def test_accumulation_equals_the_big_batch():
    parts = batch()
    big = jax.tree.map(lambda a: a.reshape(1, 1, 8, a.shape[-1]), parts)
    params = {"w": jnp.ones((3, 2))}
    one, two = (gradient(quadratic, params, {}, (), b, jax.random.key(0)) for b in (parts, big))
    np.testing.assert_allclose(one[0]["w"], two[0]["w"], rtol=1e-6)
    np.testing.assert_allclose(one[1], two[1], rtol=1e-6)
    np.testing.assert_allclose(one[3]["error"], two[3]["error"], rtol=1e-6)


def test_devices_and_times_are_alike():
    parts = batch()
    noisy = lambda p, n, c, b, k: quadratic(p, n, c, b | {"y": b["y"] + jax.random.normal(k.own, b["y"].shape)}, k)
    params = {"w": jnp.ones((3, 2))}
    side_by_side = jax.tree.map(lambda a: a.reshape(2, 2, *a.shape[2:]), parts)
    one, two = (gradient(noisy, params, {}, (), b, jax.random.key(0)) for b in (parts, side_by_side))
    np.testing.assert_allclose(one[0]["w"], two[0]["w"], rtol=1e-5)


def test_sums_are_float32():
    half = lambda p, n, c, b, key: (jnp.sum(p["w"].astype(jnp.bfloat16) * b["x"].astype(jnp.bfloat16)), (c, {}))
    x = np.full((4, 1, 1), 1.0, np.float32)
    x[0] = 256.0  # bfloat16 has no 257
    grads, *_ = gradient(half, {"w": jnp.ones(1)}, {}, (), arrange({"x": x}, 1), jax.random.key(0))
    assert grads["w"].dtype == jnp.float32
    assert float(grads["w"][0]) == 259 / 4


def test_the_carry_of_every_stream_goes_on():
    state, teaching = start(carry=jnp.zeros((4, 1)))
    state, _ = make_step([Turn("net", quadratic), Turn("net", quadratic, "again_")], teaching)(state, {}, batch())
    np.testing.assert_array_equal(state.carry, np.full((4, 1), 2.0))


@pytest.mark.parametrize("devices", [1, 2])
def test_what_streams_carry_lies_in_memory_once(devices):
    """Its place is given away, and so the step's: what is left beside it is one row of streams."""
    times = 8
    array = lambda *shape: jax.ShapeDtypeStruct((times, devices, *shape), jnp.float32)

    def loss(params, nets, carry, batch, keys):
        new = jnp.tanh(carry + batch["x"])
        return jnp.sum(params["w"] * new[0, 0]), (new, {})

    def run(carry, batch, key):
        return gradient(loss, {"w": jnp.ones(1)}, {}, carry, batch, key)

    key = jax.eval_shape(lambda: jax.random.key(0))
    compiled = jax.jit(run, donate_argnums=0).lower(array(512, 256), {"x": array(1)}, key).compile()
    memory, whole = compiled.memory_analysis(), times * devices * 4 * 512 * 256
    assert memory.alias_size_in_bytes >= whole > 4 * memory.temp_size_in_bytes


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_what_streams_share_is_told_once(devices):
    """Own: each stream's number; shared: how often. By what is shared the program decides."""
    carry = Parted(own=jnp.arange(4.0).reshape(4 // devices, devices), shared=jnp.ones((), jnp.int32))
    x = np.arange(4, dtype=np.float32)[:, None]
    told = arrange(Parted(own={"x": x}, shared={"add": np.float32(10)}), devices)

    def loss(params, nets, carry, batch, keys):
        assert keys.shared.shape == keys.own.shape == batch.shared["add"].shape == carry.shared.shape == ()
        gone = jax.lax.cond(carry.shared > 0, lambda a: a + batch.shared["add"], jnp.sin, carry.own)
        draws = {"own": jax.random.normal(keys.own), "shared": jax.random.normal(keys.shared)}
        return jnp.sum(params["w"] * batch.own["x"]), (Parted(own=gone, shared=carry.shared + 1), draws)

    run = lambda: gradient(loss, {"w": jnp.ones(1)}, {}, carry, told, jax.random.key(3))
    assert "cond" in str(jax.make_jaxpr(run)())
    grads, _, after, draws = run()
    assert float(grads["w"][0]) == 1.5 and int(after.shared) == 2
    np.testing.assert_array_equal(after.own.reshape(4), np.arange(4) + 10)
    keys = jax.random.key(3)
    np.testing.assert_allclose(draws["shared"], jax.random.normal(keys_of(keys).shared), rtol=1e-6)
    np.testing.assert_allclose(
        draws["own"], jnp.mean(jax.vmap(jax.random.normal)(jax.random.split(keys, 4))), rtol=1e-6
    )


def test_a_gradient_that_is_no_number_changes_nothing():
    state, teaching = start()
    step = make_step([Turn("net", quadratic)], teaching)
    state, metrics = step(state, {}, batch())
    before = jax.tree.map(np.array, state.learners["net"])
    for _ in range(2):
        state, metrics = step(state, {}, batch(scale=np.nan))
    after = state.learners["net"]
    for name in ("params", "opt", "ema", "usual_norm", "updates"):
        jax.tree.map(np.testing.assert_array_equal, getattr(before, name), getattr(after, name))
    assert (int(after.skipped), int(metrics["skipped_in_a_row"]), int(state.step)) == (2, 2, 3)
    state, _ = step(state, {}, batch())
    assert int(state.learners["net"].skipped_in_a_row) == 0
    assert not np.array_equal(state.learners["net"].params["w"], before.params["w"])


def test_a_spike_is_skipped_once_the_usual_is_known():
    state, teaching = start(CONFIG)
    step = make_step([Turn("net", quadratic)], teaching)
    state, _ = step(state, {}, batch(scale=30.0))
    assert int(state.learners["net"].skipped) == 0, "nobody knows yet"
    state, teaching = start(CONFIG)
    for _ in range(SPIKE_AFTER):
        state, _ = step(state, {}, batch())
    before = np.array(state.learners["net"].params["w"])
    state, metrics = step(state, {}, batch(scale=1000.0))
    np.testing.assert_array_equal(state.learners["net"].params["w"], before)
    assert int(metrics["skipped"]) == 1


def test_average_of_the_weights():
    config = dataclasses.replace(CONFIG, ema_start=2, spike=0.0)
    state, teaching = start(config)
    step, average = make_step([Turn("net", quadratic)], teaching), None
    for i in range(5):
        state, _ = step(state, {}, batch())
        params = np.array(state.learners["net"].params["w"])
        average = params if i < 2 else 0.9 * average + 0.1 * params
        np.testing.assert_allclose(state.learners["net"].ema["w"], average, rtol=1e-5)
    assert state.learners["net"].best is state.learners["net"].ema


def test_turns_see_the_parameters_from_before_the_step():
    optimizer = optax.sgd(1.0)
    teaching = {name: Teaching(optimizer, CONFIG) for name in "ab"}
    state = TrainState.begin({n: Learner.begin({"w": jnp.ones(1)}, optimizer, CONFIG) for n in "ab"}, 0)
    product = lambda p, nets, c, b, key: (jnp.sum(nets["a"]["w"] * p["w"]), (c, {}))
    other = lambda p, nets, c, b, key: (jnp.sum(nets["b"]["w"] * p["w"]), (c, {}))
    state, metrics = make_step([Turn("a", other), Turn("b", product, "b_")], teaching)(state, {}, batch())
    assert float(state.learners["a"].params["w"][0]) == float(state.learners["b"].params["w"][0]) == 0.0
    assert {"loss", "b_loss", "b_grad_norm"} <= metrics.keys()


# MARK: four devices


def main(output: str) -> None:
    """Two steps of a tiny transformer on four streams: alone, and on meshes. Numbers and places are saved."""
    graph = structure(lambda: WanTransformer(CFG, rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(WanTransformer(CFG, rngs=nnx.Rngs(0))))
    # The head begins at nothing, which would hide the rest.
    params = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(a.size), a.shape), params)

    def loss(params, nets, carry, batch, keys):
        model = nnx.merge(graph, params["transformer"])
        noise = jax.random.normal(keys.own, batch["x"].shape)
        text = model.text_kv(nets["embeds"])
        flow = model.bidirectional(batch["x"] + noise, jnp.full(noise.shape[:2], 500.0), text)
        return jnp.mean(jnp.square(flow - noise)), (carry, {})

    # Not Adam: it divides by the gradient, so where that is nothing but rounding the update is anything.
    optimizer = optax.sgd(0.1, momentum=0.9)
    x = np.random.default_rng(0).standard_normal((4, 2, 3, 4, 4, 4)).astype(np.float32)
    arrays = {}
    for name, sizes in {
        "alone": None,
        "both": {"data": 2, "fsdp": 2},
        "half": {"fsdp": 2},
    }.items():
        mesh = sharding.make_mesh(**sizes) if sizes else None
        learner = Learner.begin({"transformer": params}, optimizer, CONFIG)
        state = put(TrainState.begin({"net": learner}, 0), mesh)
        frozen = put({"embeds": jnp.ones((2, 6, 8))}, mesh)
        step = make_step([Turn("net", loss)], {"net": Teaching(optimizer, CONFIG)}, mesh)
        devices = 1 if mesh is None else mesh.size
        batch = put(arrange({"x": x}, devices), mesh, streams=True)
        if name == "half":
            sent = sent_shapes(step.lower(state, frozen, batch).compile().as_text())
            arrays["sent"] = np.array([",".join(map(str, shape)) for shape in sent])
        for _ in range(2):
            state, metrics = step(state, frozen, batch)
        learner = state.learners["net"]
        for path, leaf in jax.tree_util.tree_leaves_with_path(learner.params):
            arrays[f"{name}:{jax.tree_util.keystr(path)}"] = np.asarray(leaf)
        arrays[f"{name}:loss"] = np.asarray(metrics["loss"])
        kernel = learner.opt[0].trace["transformer"]["blocks"]["self_attn"]["q"]["kernel"]
        arrays[f"{name}-shard"] = np.array(kernel.addressable_shards[0].data.shape)
    np.savez(output, **arrays)


def sent_shapes(program: str) -> set[tuple[int, ...]]:
    """Shapes of all that crosses between devices, without axes of one."""
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    results = re.findall(rf" = (.*?) (?:{kinds})(?:-start)?\(", program)
    found = [dims for result in results for dims in re.findall(r"\w+\[([\d,]*)\]", result)]
    return {tuple(int(n) for n in dims.split(",") if n and n != "1") for dims in found}


@pytest.fixture(scope="module")
def four_devices(tmp_path_factory):
    output = tmp_path_factory.mktemp("step") / "arrays.npz"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, __file__, str(output)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with np.load(output) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("mesh", ["both", "half"])
def test_a_step_is_the_same_on_a_mesh(four_devices, mesh):
    alone = {name.removeprefix("alone:"): a for name, a in four_devices.items() if name.startswith("alone:")}
    assert len(alone) > 20
    for name, value in alone.items():
        np.testing.assert_allclose(four_devices[f"{mesh}:{name}"], value, atol=1e-6, err_msg=name)


def test_weights_and_gradients_cross_between_devices_and_no_activations(four_devices):
    """The compiler left alone computes with parts of weights, and sends the activations of every layer around."""
    sent = {tuple(int(n) for n in dims.split(",") if n) for dims in four_devices["sent"]}
    shapes = [a.shape for name, a in four_devices.items() if name.startswith("alone:")]
    known = {tuple(n for n in shape if n > 1) for shape in shapes} | {shape[1:] for shape in shapes}  # or of a layer
    halves = {(*shape[:i], n // 2, *shape[i + 1 :]) for shape in known for i, n in enumerate(shape)}
    assert {(24, 24), (24, 32)} <= sent, "weights of a layer"
    assert {(2, 12, 24), (2, 12, 32)} <= sent, "sums of gradients, each device its half"
    assert not sent & {(2, 24, 24), (2, 24, 32)}, "and no device all of them"
    assert sent <= known | halves | {()}, sent - known - halves


def test_optimiser_states_are_cut_up(four_devices):
    assert four_devices["alone-shard"].tolist() == [2, 24, 24]
    assert four_devices["both-shard"].tolist() == [2, 12, 24]


if __name__ == "__main__":
    main(*sys.argv[1:])
