"""What a GPU machine without a network may lack: training, evaluation and packaging do not need it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

REFUSED = ("grain", "tyro", "ftfy", "omegaconf", "imageio_ffmpeg", "tensorboardX", "torch", "beartype")

CODE = """
import sys
from pathlib import Path

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {refused}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Refuse())
sys.path[:0] = [{tests!r}, {sprites!r}]
import run, evaluate, toy_stage
from longlive_jax.training.stages.distillation import DistillStage
from longlive_jax.training.stages.student import StudentStage
from longlive_jax.training.stages.teacher import TeacherStage
from longlive_jax.training.stages.vae import VAEStage
from longlive_jax.tokenizer import clean
assert clean("a  small red star\\n drifts") == "a small red star drifts"
assert run.Run(Path({output!r}), 25.0, None, True, None).config("long").critic.endswith("init/critic")
toy_stage.main({output!r})
"""


def test_a_run_without_them(tmp_path):
    code = CODE.format(
        refused=set(REFUSED), tests=str(ROOT / "tests"), sprites=str(ROOT / "experiments" / "sprites"),
        output=str(tmp_path / "run"),
    )  # fmt: skip
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "checkpoint" / "w.npy").exists()
    assert sorted(p.suffix for p in (tmp_path / "run" / "validation").iterdir()) == [".png", ".png"]
    assert not list((tmp_path / "run" / "state").glob("*/data")), "the step is the position"
