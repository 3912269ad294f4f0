"""The programs that an H100 would run, compiled without one: layouts, copies and kernels that must stay as they are.

Needs the compiler of jax's CUDA plugin (`pip install "longlive-jax[cuda]"`), 4.6 GB that the tests do not ask for.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

AOT = Path(__file__).parents[1] / "experiments" / "speed" / "aot.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="no CUDA compiler installed"),
]

LAYERS = 2
CACHE = 2 * LAYERS * 12 * 1560 * 1536 * 2
"""Bytes of keys and values: 12 frames of 1560 tokens, bfloat16."""


@pytest.fixture
def built(tmp_path):
    """Counts and memory of a program; from a process of its own, where jax is told first that there is no GPU."""

    def run(program: str, *options: str):
        command = [sys.executable, AOT, program, "--layers", LAYERS, *options, "--json", tmp_path / "counts.json"]
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        done = subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        count = json.loads((tmp_path / "counts.json").read_text())["programs"][program]
        return count, count["memory"]

    return run


def test_a_block_moves_nothing_but_its_latents(built):
    count, memory = built("denoise")
    assert count["loops, trips"] == [4], "the host has nothing to decide between passes"
    assert count["custom calls"] == {"__cudnn$fmhaSoftmax": 4 * 2 * LAYERS}, "no other kernel, no callback"
    moved = sum(size for what, size in count["moved, 1 MB or more"].items() if what.endswith("bytes"))
    assert moved <= 2 * 12 * 60 * 104 * 16 * 4, "the recent latents, rolled on"
    assert memory["aliased"] >= CACHE and memory["temporary"] < 2e8


def test_the_clean_pass_skips_what_nothing_reads(built):
    count, memory = built("finish")
    assert count["custom calls"] == {"__cudnn$fmhaSoftmax": 2 * (LAYERS - 1)}
    assert count["moved, 1 MB or more"] == {} and memory["aliased"] >= CACHE


def test_keys_in_parts_are_one_call(built):
    count, _ = built("forward", "--split-kv", "2")
    assert count["custom calls"] == {"__cudnn$fmhaSoftmax": 2 * LAYERS} and count["moved, 1 MB or more"] == {}


@pytest.mark.parametrize("recache", ["window", "rebuild"])
def test_a_switch_makes_no_second_cache(built, recache):
    count, memory = built("switch", "--recache", recache)
    assert not [what for what in count["moved, 1 MB or more"] if "copy" in what]
    assert memory["aliased"] >= CACHE
    assert "__cudnn$fmhaSoftmax" in count["custom calls"] and len(count["custom calls"]) == 1


def test_the_decoder_stays_channels_last(built):
    count, memory = built("vae")
    assert set(count["convolutions"]) == {"b012f_o012i->b012f", "b01f_o01i->b01f"}
    assert set(count["custom calls"]) == {"__cudnn$convBiasActivationForward"}, "biases are in the convolutions"
    assert count["GB read and written"]["all"] < 80 and memory["temporary"] < 4e9
