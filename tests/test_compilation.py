"""Where compiled programs are kept."""

import json
import os
import subprocess
import sys

import pytest

from longlive_jax.compilation import compiler_options

SCRIPT = """
import json
{first}
from longlive_jax.compilation import keep_compiled_programs
folder = keep_compiled_programs()
import jax
print(json.dumps([folder and str(folder), jax.config.jax_compilation_cache_dir]))
"""


@pytest.mark.parametrize("first", ["", "import jax"])
@pytest.mark.parametrize(
    "told, kept, used",
    [
        ({}, "{home}/longlive_jax/compiled", "{home}/longlive_jax/compiled"),
        ({"LONGLIVE_COMPILATION_CACHE": "{home}/mine"}, "{home}/mine", "{home}/mine"),
        ({"LONGLIVE_COMPILATION_CACHE": "off"}, None, None),
        ({"JAX_COMPILATION_CACHE_DIR": "{home}/jax"}, None, "{home}/jax"),
    ],
)
def test_where_programs_are_kept(tmp_path, first, told, kept, used):
    """Whether jax was imported before or not."""
    here = lambda text: text and text.format(home=tmp_path)
    environment = {k: v for k, v in os.environ.items() if "COMPILATION_CACHE" not in k}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"} | {k: here(v) for k, v in told.items()}
    run = [sys.executable, "-c", SCRIPT.format(first=first)]
    found = json.loads(subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout)
    assert found == [here(kept), here(used)]


def test_options_are_for_gpus_alone():
    assert compiler_options("gpu") == {"xla_gpu_force_conv_nhwc": True}
    assert compiler_options("cpu") is None and compiler_options("tpu") is None
