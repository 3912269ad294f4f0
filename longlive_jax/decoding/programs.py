"""The decoder's methods as compiled programs of (decoder, *arguments); states are donated."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax

from longlive_jax.compilation import compiler_options


def _program(name: str, *, static: tuple[int, ...] = (), donate: tuple[int, ...] = ()) -> Callable:
    """A method of the decoder as a compiled program of (decoder, *arguments).

    It is given to jax when it is first called: the options depend on the backend, and to ask for that starts it.
    """

    def run(decoder, *args):
        return getattr(decoder, name)(*args)

    run.__name__ = name

    @functools.cache
    def jitted():
        options = compiler_options(jax.default_backend())
        return jax.jit(run, static_argnums=(0, *static), donate_argnums=donate, compiler_options=options)

    return lambda *args: jitted()(*args)


init = _program("init")
step = _program("step", donate=(2,))
denoise = _program("denoise", donate=(2,))
pixels = _program("pixels", static=(4,))  # donated, its cache would be copied: old and new are needed together
finish = _program("finish", donate=(2,))
switch = _program("switch", static=(4,), donate=(2,))
scan = _program("scan", donate=(2,))
