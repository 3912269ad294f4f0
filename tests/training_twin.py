"""The rollout as it reads in the paper: a Python loop over blocks, and a list of frames with their keys and values."""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from longlive_jax.models import rope
from longlive_jax.models.attention import attention
from longlive_jax.models.layers import run_layers
from longlive_jax.schedule import few_step_list, sigma_of

stop = jax.lax.stop_gradient


class Twin:
    """One video in the making; `chunk` goes on with it.

    Args:
      rollout: what is to be checked; only its settings and the network's structure are used.
      params: of the student; gradients flow to these from the exit passes.
      embeds: of both prompts.
      switch_frame: where the second begins.
    """

    def __init__(self, rollout, params, embeds, switch_frame: int):
        self.graph, self.params, self.frozen = rollout.transformer, params, stop(params)
        self.sampler, self.window, self.config = rollout.sampler, rollout.window, rollout.config
        self.embeds, self.switch_frame, self.prompt = embeds, switch_frame, 0
        self.memory = []  # frames: [(clean k, v) a layer, (exit k, v) a layer or None], oldest first
        self.made = []

    def chunk(self, exit_step: int, noise):
        """Latents of a chunk; noise as in `RolloutDraws`."""
        steps, shift, f = few_step_list(self.sampler), self.sampler.shift, self.sampler.block_frames
        sigmas, out = sigma_of(steps, shift), []
        self.memory = [(clean, None) for clean, _ in self.memory]  # nothing flows from chunk to chunk
        end = len(self.made) + f * len(noise)
        for fresh in noise:
            start = len(self.made)
            if self.prompt == 0 and start >= self.switch_frame:
                self.prompt = 1
                self.switch(start)
            learns = self.prompt == 1 or not self.switch_frame <= end - f
            positions, x = list(range(start, start + f)), fresh[0]
            for k in range(exit_step):
                flow, _ = self.network(self.frozen, x, steps[k], positions)
                # Not only by frozen parameters: what it read of the past may carry a gradient (straight_through).
                x = stop((1 - sigmas[k + 1]) * (x - sigmas[k] * flow) + sigmas[k + 1] * fresh[k + 1])
            params = self.params if learns else self.frozen
            flow, exits = self.network(params, x, steps[exit_step], positions)
            x0 = x - sigmas[exit_step] * flow
            context, t = stop(x0), self.sampler.context_noise
            if self.config.quirks.noisy_context:
                sigma = sigma_of([t], shift)[0]
                context = (1 - sigma) * context + sigma * fresh[-1]
            _, clean = self.network(self.frozen, context, t, positions)
            self.memory += [(stop(c), e if learns else None) for c, e in zip(clean, exits)]
            self.made += [stop(x0)[:, i : i + 1] for i in range(f)]
            out.append(x0)
        return jnp.concatenate(out, axis=1)

    def attended(self, new: int):
        """The frames that `new` others see before themselves."""
        room = self.window.slots - new
        sink, rest = self.memory[: self.window.sink], self.memory[self.window.sink :]
        keep = min(len(rest), room - self.window.sink)
        return [*sink, *rest[len(rest) - keep :]]

    def switch(self, start: int):
        """A recache; see `decoding/switch.py` and `training/switch.py`."""
        quirk, size, s = self.config.quirks.sink, self.window.slots, self.window.sink
        if start == 0:
            return
        if start <= size or (quirk == "zero" and start <= self.config.chunk_frames):
            frames = [*range(min(s, start)), *range(max(s, start - size + s), start)]
            seen = []
        elif quirk == "refresh":
            frames, seen = list(range(start - size, start)), []
        else:
            frames, seen = list(range(start - size + s, start)), self.memory[:s]
            if quirk == "zero":
                seen = [(jax.tree.map(jnp.zeros_like, clean), None) for clean, _ in seen]
        latents = jnp.concatenate([self.made[i] for i in frames], axis=1)
        _, again = self.network(self.frozen, latents, self.sampler.context_noise, frames, seen)
        self.memory = [*seen, *((clean, None) for clean in again)]

    def network(self, params, x, t, positions, past=None):
        """Flow of the frames x, and the keys and values of each."""
        past = self.attended(x.shape[1]) if past is None else past
        embeds = self.embeds[self.prompt]
        return network(self.graph, params, x, float(t), embeds, jnp.asarray(positions), [self.read(*p) for p in past])

    def read(self, clean, exits):
        """A frame's keys and values as later blocks read them."""
        if exits is None or self.config.quirks.cache_gradient == "detach":
            return clean
        return jax.tree.map(lambda c, e: c + e - stop(e), clean, exits)


@functools.partial(jax.jit, static_argnums=0)
def network(graph, params, x, t, embeds, positions, past):
    """The model with a list of frames as its past, each a list of (keys, values) a layer."""
    model = nnx.merge(graph, params)
    cfg, frames = model.cfg, x.shape[1]
    turn = rope.rotation(positions, x.shape[2] // 2, x.shape[3] // 2, cfg.head_dim, cfg.rope_theta)
    tokens, e, e6 = model._embed(x, jnp.full(x.shape[:2], t, jnp.float32))
    stored, layers = [], iter(range(cfg.num_layers))

    def layer(block, tokens, kv):
        i = next(layers)

        def attend(q, k, v):
            q, k = rope.rotate(q, turn), rope.rotate(k, turn)
            stored.append((k, v))
            keys, values = (jnp.concatenate([*(p[i][j] for p in past), new], axis=1) for j, new in enumerate((k, v)))
            flat = lambda a: rearrange(a, "b t n h d -> b (t n) h d")
            return attention(flat(q), flat(keys), flat(values)).reshape(q.shape), None

        return block(tokens, e6, kv, attend)

    block_graph, stacked = nnx.split(model.blocks)
    one = lambda i: nnx.merge(block_graph, jax.tree.map(lambda a: a[i], stacked))
    blocks = nnx.List([one(i) for i in range(cfg.num_layers)])
    tokens, _ = run_layers(blocks, layer, tokens, model.text_kv(embeds))
    by_frame = [[(k[:, j : j + 1], v[:, j : j + 1]) for k, v in stored] for j in range(frames)]
    return model._unpatchify(model.head(tokens, e), x), by_frame
