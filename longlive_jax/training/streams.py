"""What the streams of a step have of their own, and what they share.

Streams run side by side under `jax.vmap`. There a conditional on what each has for itself becomes a selection, all its
branches computed, and a loop runs until the last stream is done. So what decides is shared: how far the videos are,
whether the prompt changes, which step a block ends with. The official code broadcasts these from one rank likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import struct

NOBODY = 2**31 - 1
"""No stream has this number: what is drawn by it is nobody's own."""


@struct.dataclass
class Parted:
    """A batch, a carry or random keys, of which only a part is each stream's own.

    Attributes:
      own: with the leading axes of streams (inside a loss, without).
      shared: without; inside `jax.vmap` it stays unbatched.
    """

    own: Any
    shared: Any


def own(tree: Any) -> Any:
    """What streams have of their own; of a tree that is not `Parted`, all."""
    return tree.own if isinstance(tree, Parted) else tree


def with_own(tree: Any, part: Any) -> Any:
    """The tree with another `own` part."""
    return tree.replace(own=part) if isinstance(tree, Parted) else part


def each(function: Callable[[Any], Any], tree: Any) -> Any:
    """`jax.tree.map` over what streams have of their own; the rest stays."""
    return with_own(tree, jax.tree.map(function, own(tree)))


def axes(tree: Any) -> Any:
    """For `jax.vmap` over the first axis of streams."""
    return Parted(own=0, shared=None) if isinstance(tree, Parted) else 0


def keys_of(key: jax.Array, shape: Sequence[int] = ()) -> Parted:
    """A turn's random keys: `own` of each stream, by its number alone; and one for what they share.

    Args:
      key: of the turn.
      shape: of the streams; () for one alone.
    """
    return Parted(own=jax.random.split(key, tuple(shape)), shared=jax.random.fold_in(key, NOBODY))
