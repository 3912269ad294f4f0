"""The ring of slots against what it stands for: a list of frames, the sink and the newest of the others."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longlive_jax.cache import KVCache, Window, write_frames
from longlive_jax.config import SamplerConfig
from longlive_jax.errors import UserError


@st.composite
def windows(draw):
    sink, block = draw(st.integers(0, 5)), draw(st.integers(1, 4))
    return Window(sink + block + draw(st.integers(0, 7)), sink, block, draw(st.booleans()))


def remembered(window: Window, count: int) -> list[int]:
    """Frames attended once `count` are in, oldest first: the definition."""
    frames = list(range(count))
    return frames if count <= window.slots else frames[: window.sink] + frames[count - window.ring :]


def fill(window: Window, blocks: int, *, layers: int | None = None) -> np.ndarray:
    """Slots after writing `blocks` blocks whose content is their frame number (empty ones -1)."""
    shape = (1, window.slots, 1, 1, 1)
    buffer = -jnp.ones(shape if layers is None else (layers, *shape))
    for i in range(blocks):
        count = jnp.asarray(i * window.block)
        frames = (count + jnp.arange(window.block, dtype=jnp.float32)).reshape(1, -1, 1, 1, 1)
        layer = None if layers is None else jnp.asarray(1)
        buffer = write_frames(buffer, frames, window, count, layer)
    return np.asarray(buffer if layers is None else buffer[1]).reshape(-1)


@settings(deadline=None, max_examples=60)
@given(windows(), st.integers(1, 12))
def test_slots_hold_the_sink_and_the_newest_frames(window, blocks):
    count = blocks * window.block
    slots = fill(window, blocks)
    length = int(window.length(jnp.asarray(count)))
    assert sorted(slots[:length]) == remembered(window, count)
    assert (slots[length:] == -1).all()


@settings(deadline=None, max_examples=60)
@given(windows(), st.integers(1, 12))
def test_positions_are_the_order_of_age(window, blocks):
    count = blocks * window.block
    slots, positions = fill(window, blocks), np.asarray(window.positions(jnp.asarray(count)))
    length = int(window.length(jnp.asarray(count)))
    in_order = slots[:length][np.argsort(positions[:length])]
    assert list(in_order) == remembered(window, count)
    assert sorted(positions) == list(range(window.slots))


@settings(deadline=None, max_examples=60)
@given(windows(), st.integers(1, 6))
def test_stacked_buffer_is_written_like_a_single_one(window, blocks):
    np.testing.assert_array_equal(fill(window, blocks, layers=3), fill(window, blocks))


def test_figure_of_the_module():
    slots = fill(Window(12, 3, 3, False), 7)
    assert list(slots) == [0, 1, 2, *range(12, 21)]


def test_window_of_minus_one_remembers_all():
    assert Window.of(SamplerConfig(window=-1), 30).slots == 30
    assert Window.of(SamplerConfig(window=9), 30).slots == 9


def test_window_below_sink_and_block_is_refused():
    with pytest.raises(UserError, match="at least 6"):
        SamplerConfig(window=5, sink_frames=3, block_frames=3)


def test_empty_cache_has_separate_buffers():
    for stacked in (True, False):
        cache = KVCache.zeros((2, 1, 4, 1, 1, 2), jnp.float32, stacked=stacked)
        keys, values = (a if stacked else a[0] for a in (cache.k, cache.v))
        assert keys.unsafe_buffer_pointer() != values.unsafe_buffer_pointer()
