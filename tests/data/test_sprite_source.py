"""What sprites training draws."""

import numpy as np

from longlive_jax.data.sprite_source import KEPT, changed
from longlive_jax.data.sprites import ATTRIBUTES, combinations_of, is_test


def test_a_clip_changes_to_what_may_be_trained_on_and_keeps_half_of_its_attributes():
    rng, pool = np.random.default_rng(0), combinations_of("train")
    pairs = [(first, changed(first, rng)) for first in (pool[int(i)] for i in rng.integers(len(pool), size=2000))]
    assert not any(is_test(second) for _, second in pairs)
    for name, values in ATTRIBUTES.items():
        kept = np.mean([getattr(a, name) == getattr(b, name) for a, b in pairs])
        assert abs(kept - (KEPT + (1 - KEPT) / len(values))) < 0.04, name
    assert changed(pool[0], np.random.default_rng(1)) == changed(pool[0], np.random.default_rng(1))
