"""The VAE's loss: it learns, and the statistics of its latents are those of its latents."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from longlive_jax import checkpoint
from longlive_jax.config import ModelConfig, VAEConfig
from longlive_jax.data.sprite_source import make_clip
from longlive_jax.errors import UserError
from longlive_jax.models.vae import VAE
from longlive_jax.training.phases import VAEPhase
from longlive_jax.training.run_config import OptimizerConfig
from longlive_jax.training.stage_config import VAETrainConfig
from longlive_jax.training.stages.vae import VAEStage
from longlive_jax.training.trainer import train
from longlive_jax.training.vae import inflate, latent_statistics, vae_loss

CFG = VAEConfig(base_width=4, multipliers=(1, 2, 2, 2), res_blocks=1, latent_mean=(0.0,) * 16, latent_std=(1.0,) * 16)


def frames(clips: int, length: int) -> np.ndarray:
    return np.stack([make_clip(0, i, length)["frames"][:, ::2, ::2] for i in range(clips)])


@pytest.mark.slow
def test_vae_learns_stills():
    graph, params = nnx.split(inflate(VAE(CFG, rngs=nnx.Rngs(0))))
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params, opt, clips, key):
        loss = lambda params: vae_loss(nnx.merge(graph, params), clips, key, kl_weight=1e-4)
        grads, metrics = jax.grad(loss, has_aux=True)(params)
        updates, opt = optimizer.update(grads, opt)
        return optax.apply_updates(params, updates), opt, metrics

    params = nnx.to_pure_dict(params)
    opt, first = optimizer.init(params), None
    for i in range(60):
        params, opt, metrics = step(params, opt, frames(8, 1), jax.random.key(i))
        first = first or float(metrics["l1"])
    assert float(metrics["l1"]) < 0.5 * first
    assert float(metrics["kl"]) > 0


def test_statistics_normalise_the_latents():
    vae = VAE(CFG, rngs=nnx.Rngs(0))
    clips = frames(6, 5)
    mean, std = latent_statistics(vae, [clips[:3], clips[3:]])
    normal = VAE(dataclasses.replace(CFG, latent_mean=tuple(mean), latent_std=tuple(std)), rngs=nnx.Rngs(0))
    latents, _ = normal.encode(jnp.asarray(clips, jnp.float32) / 127.5 - 1)
    np.testing.assert_allclose(np.mean(latents, axis=(0, 1, 2, 3)), 0, atol=1e-4)
    assert (np.std(latents, axis=(0, 1, 2, 3)) <= 1).all()  # the posterior's own spread counts too


def test_a_decoder_alone_leaves_the_latents_as_they_are(tmp_path):
    cfg = dataclasses.replace(CFG, latent_mean=(0.5,) * 16, latent_std=(2.0,) * 16)
    began = nnx.to_pure_dict(nnx.state(VAE(cfg, rngs=nnx.Rngs(0))))
    whole = dataclasses.replace(ModelConfig.sprites(), vae=cfg)
    checkpoint.save(tmp_path / "began", whole, {"vae": began}, None, {}, dtype=np.float32)
    config = VAETrainConfig(
        phases=(VAEPhase("stills", 1, 2, 1e-2),), optimizer=OptimizerConfig(warmup=0), vae=cfg,
        init=str(tmp_path / "began"), train_encoder=False,
    )  # fmt: skip
    stage = VAEStage(config, tmp_path / "run", print)
    assert train(stage, tmp_path / "run", Quiet()) == tmp_path / "run" / "checkpoint"
    left = checkpoint.load(tmp_path / "run" / "checkpoint", "vae", np.float32)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), began, left)
    assert all(jax.tree.leaves([same["encoder"], same["quant"]]))
    assert not any(jax.tree.leaves([same["decoder"]["conv_in"], same["post_quant"]]))
    assert checkpoint.load_config(tmp_path / "run" / "checkpoint").vae == cfg, "with their mean and spread"
    with pytest.raises(UserError, match="there is no encoder yet: give init"):
        VAEStage(dataclasses.replace(config, init=None), tmp_path, print)


class Quiet:
    def say(self, line):
        pass

    def progress(self, *args):
        pass
