"""The folder of a run: whose it is, when it is free again, what must not change. On the toy stage."""

import dataclasses
import json
import resource
import time

import pytest
from toy_stage import Silent, ToyConfig, ToyPhase, ToyStage

from longlive_jax.cli import main
from longlive_jax.errors import UserError
from longlive_jax.training import trainer
from longlive_jax.training.trainer import train


@dataclasses.dataclass(frozen=True)
class Prompted(ToyConfig):
    prompts: tuple[str, ...] = ()


def few(kind=ToyConfig, **changes):
    return kind(phases=(ToyPhase("one", 2),), **changes)


def test_a_full_disk_when_a_phase_gets_fewer_steps(tmp_path):
    """run.json cannot be written: one line, and where to go on."""
    config = dataclasses.replace(ToyConfig(), phases=(ToyPhase("one", 30, minutes=1e-9),))
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, save_every=1))
    old, first = resource.getrlimit(resource.RLIMIT_FSIZE), tmp_path / "state" / "1"

    def on_step(step):
        if step == 1:
            for _ in range(600):  # it is written in the background
                if first.exists():
                    break
                time.sleep(0.1)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1, old[1]))

    message = (
        r"cannot note in .*/run.json that phase one has 3 steps \(File too large\); free some space "
        rf"\(last good checkpoint: {first}; go on with --resume\)"
    )
    try:
        with pytest.raises(UserError, match=message):
            train(ToyStage(config, tmp_path, on_step=on_step), tmp_path, Silent())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert not (tmp_path / "run.tmp").exists()
    assert train(ToyStage(config, tmp_path), tmp_path, Silent(), resume=True)


class Faulty(ToyStage):
    def parameters(self):
        raise UserError("the teacher has no transformer")


def test_an_output_is_free_again_if_nothing_was_saved(tmp_path):
    with pytest.raises(UserError, match=r"the teacher has no transformer \(no checkpoint was written yet\)"):
        train(Faulty(few(), tmp_path), tmp_path, Silent())
    assert not (tmp_path / "run.json").exists()
    assert train(ToyStage(few(), tmp_path), tmp_path, Silent()) == tmp_path / "checkpoint"


def test_an_output_with_somebodys_run_stays_theirs(tmp_path):
    """A failure of a call that did not make the folder, and one after a checkpoint."""
    config = few()
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, save_every=1))

    def on_step(step):
        if step == 1:
            raise RuntimeError("the cable was pulled")

    (tmp_path / "new").mkdir()
    with pytest.raises(RuntimeError):
        train(ToyStage(config, tmp_path / "new", on_step=on_step), tmp_path / "new", Silent())
    assert (tmp_path / "new" / "run.json").exists(), "there is a checkpoint"
    killed = tmp_path / "killed"
    trainer.claim(killed, config, {}, resume=False)
    with pytest.raises(UserError):
        train(Faulty(config, killed), killed, Silent(), resume=True)
    assert (killed / "run.json").exists(), "the call did not make it"


def test_time_that_is_over_is_no_end(tmp_path, monkeypatch):
    """Nothing comes back, and the command says so to the shell."""
    config = few(run=dataclasses.replace(ToyConfig().run, minutes=1e-9))
    assert train(ToyStage(config, tmp_path), tmp_path, Silent()) is None
    monkeypatch.setattr(trainer, "train", lambda *_, **__: None)
    with pytest.raises(SystemExit) as ended:
        main(["train", "vae", "--smoke", "--output", str(tmp_path / "vae")])
    assert ended.value.code == 3


def test_a_run_goes_on_with_its_own_prompts_only(tmp_path):
    files = [tmp_path / name for name in ("a.txt", "b.txt")]
    for file in files:
        file.write_text("one\ntwo\n")
    output, config = tmp_path / "run", few(Prompted, prompts=tuple(map(str, files)))
    train(ToyStage(config, output), output, Silent())
    assert train(ToyStage(config, output), output, Silent(), resume=True)
    files[1].write_text("one\nthree\n")
    with pytest.raises(UserError, match=rf"goes on only as it began, but the prompts in {files[1]} are others; leave"):
        train(ToyStage(config, output), output, Silent(), resume=True)
    values = json.loads((output / "run.json").read_text())
    del values["prompts"]
    (output / "run.json").write_text(json.dumps(values))
    assert train(ToyStage(config, output), output, Silent(), resume=True), "a run of before"


def test_prompts_that_cannot_be_read(tmp_path):
    config = few(Prompted, prompts=(str(tmp_path / "none.txt"),))
    with pytest.raises(UserError, match=r"cannot read .*none.txt \(No such file or directory\); check --prompts"):
        train(ToyStage(config, tmp_path / "run"), tmp_path / "run", Silent())
