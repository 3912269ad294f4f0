"""The transformer's parts against their definitions, and its ways of running against each other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import TRANSFORMER, by_layer, shaken, structure

from longlive_jax.cache import KVCache, Window
from longlive_jax.config import ModelConfig
from longlive_jax.errors import UserError
from longlive_jax.models import rope
from longlive_jax.models.attention import attention
from longlive_jax.models.transformer import WanTransformer, time_embedding
from longlive_jax.training.teacher_forcing import teacher_forcing_mask

CFG = TRANSFORMER
TEXT = jax.random.normal(jax.random.key(3), (2, 4, 8))
X = jax.random.normal(jax.random.key(4), (2, 6, 4, 6, 4))


def network(cfg=CFG, **options) -> WanTransformer:
    model = WanTransformer(cfg, rngs=nnx.Rngs(0), **options)
    graph, params = nnx.split(model)
    return nnx.merge(graph, shaken(nnx.to_pure_dict(params)))


def jitted(model, x, timesteps, text):
    """The flow, compiled: op by op the same takes ten times as long."""
    graph, params = nnx.split(model)

    def flow(params):
        model = nnx.merge(graph, params)
        return model.bidirectional(x, timesteps, model.text_kv(text))

    return jax.jit(flow)(params)


@pytest.mark.parametrize("head_dim", [12, 32, 64, 128])
def test_rope_against_complex_numbers(head_dim):
    rows, columns, positions = 2, 3, np.array([0, 5, 1000])
    x = np.random.default_rng(0).standard_normal((1, 3, 6, 2, head_dim)).astype(np.float32)
    turned = np.asarray(
        rope.rotate(jnp.asarray(x), rope.rotation(jnp.asarray(positions), rows, columns, head_dim, 10000.0))
    )
    sixth = 2 * (head_dim // 6)
    widths = head_dim - 2 * sixth, sixth, sixth
    assert rope.axis_widths(head_dim) == widths
    frequencies = [10000.0 ** (-np.arange(0, w, 2) / w) for w in widths]
    for t, row, column in np.ndindex(3, rows, columns):
        angle = np.concatenate([p * f for p, f in zip((positions[t], row, column), frequencies)])
        pairs = x[0, t, row * columns + column].reshape(2, -1, 2).astype(np.float64)
        expected = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angle)
        got = turned[0, t, row * columns + column].reshape(2, -1, 2)
        np.testing.assert_allclose(got[..., 0] + 1j * got[..., 1], expected, atol=3e-6)


def test_rope_depends_on_distance_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 1, 24))
    dot = lambda i, j: jnp.sum(
        rope.rotate(q, rope.rotation(jnp.array([i]), 1, 1, 24, 1e4))
        * rope.rotate(k, rope.rotation(jnp.array([j]), 1, 1, 24, 1e4))
    )
    np.testing.assert_allclose(dot(7, 3), dot(904, 900), rtol=1e-4)
    assert abs(float(dot(7, 3) - dot(8, 3))) > 1e-3


def test_time_embedding_is_exact():
    t = np.array([[1000.0, 937.5, 833.33331, 625.0, 0.0, 998.9]], np.float32)
    frequencies = 10000.0 ** (-np.arange(128) / 128)
    angles = t.astype(np.float64)[..., None] * frequencies
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)
    # Float32 angles would be off by 6e-5.
    np.testing.assert_allclose(time_embedding(jnp.asarray(t), 256), expected, atol=2e-6)


def test_key_length_equals_cutting_the_keys():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 10, 2, 8))
    np.testing.assert_allclose(
        attention(q, k, v, key_length=jnp.asarray(4)), attention(q, k[:, :4], v[:, :4]), atol=1e-6
    )


def test_attention_that_cannot_run_fails_loudly(monkeypatch):
    q = jnp.ones((1, 4, 2, 8))
    with pytest.raises(Exception, match="(?i)cudnn|dtype|gpu|cuda"):
        jax.block_until_ready(attention(q, q, q, implementation="cudnn"))
    half, odd = q.astype(jnp.bfloat16), jnp.ones((1, 4, 2, 12), jnp.bfloat16)
    monkeypatch.setattr("longlive_jax.sharding.platform", lambda: "gpu")
    with pytest.raises(RuntimeError, match="(?i)cudnn"):  # of jax: it is the choice for a GPU, and this is none
        attention(half, half, half)
    with pytest.raises(UserError, match="heads 12 wide do not fit cuDNN"):
        attention(odd, odd, odd)
    assert attention(odd, odd, odd, implementation="xla").shape == odd.shape
    assert attention(q, q, q).shape == q.shape, "float32 is for comparisons"


@pytest.mark.parametrize("parts", [2, 3, 6])
@pytest.mark.parametrize("length", [None, 1, 3, 6, 7, 12])
def test_keys_in_parts_equal_keys_at_once(parts, length):
    q, k, v = 3 * jax.random.normal(jax.random.key(0), (3, 2, 12, 2, 8))
    length = None if length is None else jnp.asarray(length)
    at_once = attention(q[:, :5], k, v, key_length=length)
    np.testing.assert_allclose(attention(q[:, :5], k, v, key_length=length, split_kv=parts), at_once, atol=1e-5)
    with pytest.raises(UserError, match="split_kv is 5, which does not divide 12 keys"):
        attention(q, k, v, split_kv=5)


def test_queries_in_chunks_equal_queries_at_once(monkeypatch):
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 12, 2, 8))
    mask = jnp.tril(jnp.ones((12, 12), bool))
    ways = [dict(), dict(key_length=jnp.asarray(5)), dict(mask=mask)]
    at_once = [attention(q, k, v, **way) for way in ways]
    monkeypatch.setattr("longlive_jax.models.attention.LOGITS_LIMIT", 4 * 2 * 2 * 12 * 3)
    assert "while" in jax.jit(attention).lower(q, k, v).as_text(), "three queries at a time"
    for way, expected in zip(ways, at_once):
        np.testing.assert_allclose(attention(q, k, v, **way), expected, atol=1e-6)


def test_padding_of_the_prompt_is_attended():
    model = network()
    timesteps = jnp.full((2, 6), 500.0)
    short = jitted(model, X, timesteps, TEXT)
    padded = jitted(model, X, timesteps, jnp.pad(TEXT, [(0, 0), (0, 2), (0, 0)]))
    np.testing.assert_allclose(short, padded, atol=1e-6)
    other = network(dataclasses.replace(CFG, text_length=4))
    assert np.abs(short - jitted(other, X, timesteps, TEXT)).max() > 1e-3


def test_scanned_layers_equal_a_list_of_layers():
    stacked = network()
    params = nnx.to_pure_dict(nnx.split(stacked)[1])
    graph = structure(lambda: WanTransformer(CFG, stacked=False, rngs=nnx.Rngs(0)))
    listed = nnx.merge(graph, by_layer(params, CFG.num_layers))
    run = lambda m: jitted(m, X, jnp.full((2, 6), 500.0), TEXT)
    np.testing.assert_allclose(run(stacked), run(listed), atol=1e-5)


def test_recomputation_changes_nothing():
    model = network()
    run = lambda x, remat: jnp.sum(
        jnp.square(model.bidirectional(x, jnp.full((2, 6), 500.0), model.text_kv(TEXT), remat=remat))
    )
    plain, remat = (jax.jit(jax.grad(run), static_argnums=1)(X, option) for option in (None, jax.checkpoint))
    np.testing.assert_allclose(plain, remat, rtol=1e-4, atol=1e-4)


def test_cached_blocks_equal_one_pass_with_the_causal_mask():
    """What a block sees through the cache is what teacher forcing's mask shows it."""
    model, block = network(), 2
    text_kv, window = model.text_kv(TEXT), Window(6, 0, block, False)
    noisy, timesteps = X + 0.5, jnp.full((2, 6), 700.0)
    mask = jnp.asarray(teacher_forcing_mask(6, block))
    both = model.bidirectional(
        jnp.concatenate([X, noisy], axis=1), jnp.concatenate([jnp.zeros((2, 6)), timesteps], axis=1), text_kv,
        positions=jnp.tile(jnp.arange(6), 2), mask=mask,
    )  # fmt: skip
    cache = KVCache.zeros(model.cache_shape(2, 6, 2, 3), jnp.float32)
    for start in range(0, 6, block):
        frames, position = slice(start, start + block), jnp.asarray(start)
        flow, _ = model.causal(noisy[:, frames], timesteps[:, frames], text_kv, cache, window, position)
        clean, cache = model.causal(X[:, frames], jnp.zeros((2, block)), text_kv, cache, window, position)
        cache = cache.replace(count=cache.count + block)
        np.testing.assert_allclose(flow, both[:, 6 + start : 6 + start + block], atol=2e-5)
        np.testing.assert_allclose(clean, both[:, frames], atol=2e-5)


def test_denoising_leaves_the_past_alone():
    """A noisy pass writes its own slots only: what comes after is the same as if it had never been."""
    model, window = network(), Window(4, 0, 2, False)
    text_kv = model.text_kv(TEXT)
    empty = KVCache.zeros(model.cache_shape(2, 4, 2, 3), jnp.float32)
    _, cache = model.causal(X[:, :2], jnp.zeros((2, 2)), text_kv, empty, window, jnp.asarray(0))
    cache = cache.replace(count=cache.count + 2)
    run = lambda cache: model.causal(X[:, 2:4], jnp.full((2, 2), 300.0), text_kv, cache, window, jnp.asarray(2))
    once, used = run(cache)
    np.testing.assert_array_equal(used.k[:, :, :2], cache.k[:, :, :2])
    twice, _ = run(used)
    np.testing.assert_array_equal(once, twice)


def test_every_size_and_setting_changes_something():
    base = network()
    run = lambda m, cfg: jitted(m, X, jnp.full((2, 6), 500.0), TEXT[..., : cfg.text_dim])
    expected = run(base, CFG)
    changes = dict(eps=1e-2, rope_theta=100.0, text_length=9, num_heads=3, time_dim=128, ffn_dim=48, num_layers=3)
    changes |= dict(dim=36, text_dim=6, patch=(1, 1, 2))
    for name, value in changes.items():
        change = {name: value}
        cfg = dataclasses.replace(CFG, **change)
        assert np.abs(run(network(cfg), cfg) - expected).max() > 1e-4, change


@pytest.mark.parametrize("preset, billions", [("t2v_1_3b", 1.419), ("t2v_14b", 14.29)])
def test_presets_have_the_published_number_of_parameters(preset, billions):
    cfg = getattr(ModelConfig, preset)().transformer
    state = nnx.state(nnx.eval_shape(lambda: WanTransformer(cfg, rngs=nnx.Rngs(0))))
    count = sum(int(np.prod(a.shape)) for a in jax.tree.leaves(state))
    np.testing.assert_allclose(count / 1e9, billions, rtol=1e-3)
