"""What `experiments/speed/tpu_aot.py` finds must stay so: a small block compiled for TPUs, which need not be there.

libtpu is part of the `tpu` extra, not of `test`: 0.2 GB to download and 0.7 GB on disk, for this file alone. Without it
there is nothing here that could run. The compiler wants a process of its own: this file.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "experiments" / "speed" / "tpu_aot.py"
CASES = [("v5e", 1, None, True), ("v5p", 1, None, False), ("v6e", 1, None, False), ("v5e", 4, "context", False)]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs pip install longlive-jax[tpu]"),
]


def main() -> None:
    """Prints a row of the script for each case, of a model of two layers at 64 x 96."""
    spec = importlib.util.spec_from_file_location("tpu_aot", SCRIPT)
    script = sys.modules["tpu_aot"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    from longlive_jax.config import ModelConfig, SamplerConfig, TransformerConfig, VAEConfig

    config = ModelConfig(
        TransformerConfig(dim=512, ffn_dim=512, num_layers=2, num_heads=4, text_dim=16, text_length=24),
        VAEConfig(base_width=8, multipliers=(1, 1, 1, 1), res_blocks=0),
        None,
        SamplerConfig(height=64, width=96, steps=(1000.0, 500.0)),
    )
    print(json.dumps([script.row(script.Case(*case, "default"), config) for case in CASES]))


@pytest.fixture(scope="module")
def rows():
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("index", range(len(CASES)))
def test_a_block_runs_splash_and_writes_its_cache_in_place(rows, index):
    row = rows[index]
    assert (row["chip"], row["chips"], row["fits"]) == (*CASES[index][:2], True)
    assert any(name.startswith("splash_mha_fwd_segmented") for name in row["kernels"]), "the window, padded"
    assert sum(row["kernels"].values()) >= 2, "and the prompt"
    # Sizes are those of one chip, in GB to three digits.
    assert row["memory_gb"]["aliased"] >= row["memory_gb"]["cache"] / row["chips"] - 1e-3 > 0


def test_one_chip_talks_to_nobody_and_four_change_heads_for_tokens(rows):
    assert not any(row["collectives"] for row in rows[:3])
    assert any(name.startswith("all-to-all") for name in rows[3]["collectives"])


if __name__ == "__main__":
    main()
