"""Streaming long tuning: what is judged, what counts, what is trained, what goes on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import TRANSFORMER, shaken

from longlive_jax.config import SamplerConfig, VAEConfig
from longlive_jax.errors import UserError
from longlive_jax.models.transformer import WanTransformer
from longlive_jax.models.vae import VAE
from longlive_jax.training import lora
from longlive_jax.training.config import DistillationConfig, Quirks
from longlive_jax.training.dmd import Score
from longlive_jax.training.rollout import Rollout
from longlive_jax.training.state import Prompts, Tape
from longlive_jax.training.streaming import Distillation, begin_as_video, last_picture
from longlive_jax.training.streams import keys_of

SAMPLER = SamplerConfig(
    height=16, width=32, window=4, sink_frames=1, block_frames=1, steps=(1000, 500), rope="absolute"
)
CONFIG = DistillationConfig(chunk_frames=4, new_frames=3, max_frames=10)
VAE_CONFIG = VAEConfig(
    base_width=4, multipliers=(1, 1, 1, 1), res_blocks=0, z_channels=4, latent_mean=(0.1,) * 4, latent_std=(1.5,) * 4
)


def network(make):
    graph, params = nnx.split(make())
    return graph, shaken(nnx.to_pure_dict(params))


@pytest.fixture(scope="module")
def parts():
    """Structures and parameters; student and critic have adapters."""

    def transformer(seed, adapter):
        model = WanTransformer(TRANSFORMER, rngs=nnx.Rngs(seed))
        return lora.adapt(model, rank=2, alpha=2.0, rngs=nnx.Rngs(seed)) if adapter else model

    made = {
        "generator": network(lambda: transformer(0, True)),
        "critic": network(lambda: transformer(1, True)),
        "teacher": network(lambda: transformer(2, False)),
        "vae": network(lambda: VAE(VAE_CONFIG, rngs=nnx.Rngs(3))),
    }
    graphs, params = ({name: value[i] for name, value in made.items()} for i in range(2))
    return graphs, params | {name: lora.split(params[name]) for name in ("generator", "critic")}


def distillation(graphs, config=CONFIG):
    rollout = Rollout(graphs["generator"], SAMPLER, config)
    return Distillation(rollout, Score(graphs["teacher"]), Score(graphs["critic"]), graphs["vae"])


def prompts(switch_frame: int) -> Prompts:
    embeds = jax.random.normal(jax.random.key(5), (2, 1, 4, TRANSFORMER.text_dim))
    return Prompts(embeds=embeds, negative=0.5 * embeds[0], switch_frame=jnp.asarray(switch_frame))


def test_starts():
    assert DistillationConfig().starts == (0, *range(21, 220, 18))
    assert len(DistillationConfig().starts) == 13
    assert CONFIG.starts == (0, 4, 7)
    assert DistillationConfig(max_frames=21).starts == (0,)


def test_switches():
    """The 11 of the official settings: the last chunk, from 219 on, begins none."""
    assert DistillationConfig().switches == (21, 39, 57, 75, 93, 111, 129, 147, 165, 183, 201)
    assert CONFIG.switches == (4,)
    assert DistillationConfig(max_frames=39).switches == (21,), "of two chunks the second"
    assert DistillationConfig(max_frames=21).switches == (), "one prompt only"


@pytest.mark.slow
def test_steps_train_the_adapters_and_go_on(parts):
    graphs, params = parts
    run, traces = distillation(graphs), []

    def by(method, name):
        def loss(trained, params, *args, first):
            traces.append((name, first))
            adapted = params[name].replace(trained=trained)
            return method(adapted, params, *args, first=first)

        return jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnames="first")

    steps = {"generator": by(run.generator_loss, "generator"), "critic": by(run.critic_loss, "critic")}
    state = run.rollout.init(params["generator"], 1, 2, 4)
    for i, start in enumerate(CONFIG.starts):
        assert int(state.position) == start
        for name, step in steps.items():
            args = params, state, prompts(4), keys_of(jax.random.key(i))
            (loss, (after, metrics)), gradient = step(params[name].trained, *args, first=i == 0)
            assert np.isfinite(float(loss)) and float(loss) > 0
            norms = [float(jnp.linalg.norm(leaf)) for leaf in jax.tree.leaves(gradient)]
            assert np.all(np.isfinite(norms)) and min(norms) > 0
            assert 20 <= float(metrics["timestep"]) <= 980
        state = after
    assert bool(state.switched) and int(state.position) == 10
    assert sorted(traces) == [("critic", False), ("critic", True), ("generator", False), ("generator", True)]


def test_scores_are_given_a_first_frame_as_often_as_is_asked_for(parts):
    graphs, params = parts
    state = distillation(graphs).rollout.init(params["generator"], 1, 2, 4)

    def run(share, method="draw", key=0, **changes):
        of = distillation(graphs, dataclasses.replace(CONFIG, first_given=share))
        draws = of.draw(keys_of(jax.random.key(key)), state, first=True)
        if method == "draw":
            return draws
        name = "generator" if method == "generator_terms" else "critic"
        args = params[name], params, state, prompts(4), draws.replace(**changes)
        return getattr(of, method)(*args, first=True)

    assert run(0.0).first_given is None
    assert {bool(run(0.5, key=key).first_given) for key in range(8)} == {True, False}
    np.testing.assert_array_equal(run(0.0).noise, run(1.0).noise)

    plain, given = (run(share, "generator_terms")[1][1]["dmd_gradient"] for share in (0.0, 1.0))
    assert plain[:, 0].any() and not given[:, 0].any()
    assert float(jnp.abs(given[:, 1:] - plain[:, 1:]).max()) > 1e-3, "scores see another first frame"
    # Its noise is seen by nobody and judged by nobody.
    noise = run(1.0).noise
    losses = [float(run(1.0, "critic_terms", noise=n)[0]) for n in (noise, noise.at[:, 0].add(3.0))]
    assert np.isfinite(losses[0]) and losses[0] == losses[1] != float(run(0.0, "critic_terms")[0])


@pytest.mark.parametrize(("official", "expected"), [(True, [0, 1, 1, 1]), (False, [0, 0, 1, 1])])
def test_frames_that_count(parts, official, expected):
    """A switch at the second block of the second chunk: what came before it need not count."""
    graphs, params = parts
    config = dataclasses.replace(CONFIG, quirks=Quirks(score_before_switch=official))
    run = distillation(graphs, config)
    prompt = jnp.asarray([0, 1, 1])
    tape = Tape(x=None, latents=None, clean=None, prompt=prompt)
    state = run.rollout.init(params["generator"], 1, 2, 4)
    new = jax.random.normal(jax.random.key(0), (1, 3, 2, 4, 4))
    window, frames = run.judged(params, state, new, tape, False)
    assert window.shape == (1, 4, 2, 4, 4)
    np.testing.assert_array_equal(frames, np.asarray(expected, bool))
    np.testing.assert_array_equal(window[:, 1:], new)
    assert run.judged(params, state, new, tape, True)[0] is new


def test_what_is_judged_begins_as_a_video(parts):
    graphs, params = parts
    vae = nnx.merge(graphs["vae"], params["vae"])
    past, new = (jax.random.normal(jax.random.key(i), (1, n, 2, 4, 4)) for i, n in ((0, 4), (1, 3)))
    window, pull = jax.vjp(lambda past, new: begin_as_video(vae, past, new, "float32"), past, new)
    # Seven frames: the last four are judged, the first of those as a picture.
    pixels, _ = vae.decode(jnp.concatenate([past, new], axis=1)[:, :4])
    np.testing.assert_allclose(last_picture(vae, past), pixels[:, -1:], atol=1e-5)
    first, _ = vae.encode(pixels[:, -1:])
    np.testing.assert_allclose(window[:, :1], first, atol=1e-5)
    np.testing.assert_array_equal(window[:, 1:], new)
    to_past, to_new = pull(jnp.ones_like(window))
    assert not to_past.any()
    np.testing.assert_array_equal(to_new, jnp.ones_like(new))


@pytest.mark.parametrize("context", [1, 2, 4, None])
def test_its_picture_is_made_from_as_many_frames_as_are_asked_for(parts, context):
    graphs, params = parts
    run = distillation(graphs, dataclasses.replace(CONFIG, picture_context=context))
    state = run.rollout.init(params["generator"], 1, 2, 4)
    recent = jax.random.normal(jax.random.key(0), state.recent.shape)
    new = jax.random.normal(jax.random.key(1), (1, 3, 2, 4, 4))
    tape = Tape(x=None, latents=None, clean=None, prompt=jnp.zeros(3, jnp.int32))
    window, _ = run.judged(params, state.replace(recent=recent), new, tape, False)
    before = jnp.concatenate([recent[:, -4:], new], axis=1)[:, :4]
    vae = nnx.merge(graphs["vae"], params["vae"])
    pixels, _ = vae.decode(before[:, -(context or 4) :])
    np.testing.assert_allclose(window[:, :1], vae.encode(pixels[:, -1:])[0], atol=1e-5)


@pytest.mark.parametrize(
    ("config", "sampler", "message"),
    [
        (dict(chunk_frames=22), {}, "chunk_frames is 22; whole blocks of 3"),
        (dict(new_frames=17), {}, "new_frames is 17; whole blocks"),
        (dict(new_frames=24), {}, "1 to chunk_frames"),
        (dict(max_frames=20), {}, "the first chunk alone has 21"),
        (dict(remat="layers"), {}, "did you mean 'layer'"),
        (dict(min_timestep=990.0), {}, "min_timestep is 990.0, max_timestep 980.0; 0 < min_timestep"),
        (dict(min_timestep=0.0), {}, "min_timestep is 0.0, .*; 0 < min_timestep"),
        (dict(picture_context=0), {}, "picture_context is 0; 1 or more"),
        (dict(first_given=-0.5), {}, "first_given is -0.5; 0 to 1"),
        (dict(chunk_frames=1, new_frames=1, first_given=0.5), {}, "chunk_frames is 1; after a first frame"),
        ({}, dict(window=-1), "training needs a window"),
        ({}, dict(solver="euler"), "needs 'renoise'"),
        (dict(quirks=Quirks(sink="zero")), dict(window=24), "windows within a chunk"),
    ],
)
def test_settings_that_are_refused(config, sampler, message):
    with pytest.raises(UserError, match=message):
        DistillationConfig(**config).check(dataclasses.replace(SamplerConfig(), **sampler))


def test_quirks_that_are_refused():
    with pytest.raises(UserError, match="did you mean 'zero'"):
        Quirks(sink="zeros")
    with pytest.raises(UserError, match="score_shift is -1"):
        Quirks(score_shift=-1.0)
