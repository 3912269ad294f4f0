"""The loop: exact resume (also after kill -9), a full disk, refusals, figures. On the toy stage."""

import dataclasses
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import toy_stage
from run_state import assert_same_state
from toy_stage import Silent, ToyConfig, ToyPhase, ToyStage

from longlive_jax import memory
from longlive_jax.errors import UserError
from longlive_jax.training import data, first_state, trainer
from longlive_jax.training.footprint import required_memory
from longlive_jax.training.metrics import Metrics
from longlive_jax.training.optimizer import make_optimizer
from longlive_jax.training.runs import shortened, stored_config
from longlive_jax.training.trainer import Interrupted, train


def run(folder: Path, config=None, *, resume=False, reporter=None, **options):
    """Trains the toy stage; returns its reporter."""
    reporter = reporter or Silent()
    train(ToyStage(config or ToyConfig(), folder, **options), folder, reporter, resume=resume)
    return reporter


def changed(**run_changes):
    return dataclasses.replace(ToyConfig(), run=dataclasses.replace(ToyConfig().run, **run_changes))


def assert_same_run(one: Path, two: Path):
    assert_same_state(one, two)
    assert_same_results(one, two)


def assert_same_results(one: Path, two: Path):
    np.testing.assert_array_equal(np.load(one / "checkpoint" / "w.npy"), np.load(two / "checkpoint" / "w.npy"))
    figures = [[(r["step"], r.get("loss"), r.get("grad_norm")) for r in lines(folder)] for folder in (one, two)]
    assert figures[0] == figures[1]


def lines(folder: Path):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nothing interrupts: 6 + 6 steps, checkpoints at 4, 6, 8 and 12."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(folder)
    return folder


def test_a_run_learns_and_leaves_what_it_should(whole):
    steps = [r for r in lines(whole) if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 13))
    errors = [r["validation_error"] for r in lines(whole) if "validation_error" in r]
    assert errors[1] < errors[0] < 2.0, "2 is where it begins"
    assert {r["phase"] for r in steps} == {"one", "two"}
    assert {"grad_norm", "skipped", "seconds_data", "seconds_step", "seconds_save", "flops", "twice"} <= steps[
        -1
    ].keys()
    assert "mfu" not in steps[-1], "nobody knows a CPU's peak"
    videos = sorted(p.name for p in (whole / "validation").iterdir())
    assert videos == ["step-000006.mp4", "step-000006.png", "step-000012.mp4", "step-000012.png"]
    assert {p.name for p in (whole / "state").iterdir() if p.name.isdigit()} == {"8", "12"}


@pytest.mark.parametrize("step", [2, 5, 6, 7])
def test_killed_and_resumed_is_the_same_run(whole, tmp_path, step):
    """kill -9 before the first checkpoint, between two, at a phase's first step, and after it."""
    command = [sys.executable, toy_stage.__file__, str(tmp_path / "run")]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([*command, "--die-at", str(step)], env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    run(tmp_path / "run", resume=True)
    assert_same_run(whole, tmp_path / "run")


def test_a_signal_saves_and_resume_goes_on(whole, tmp_path):
    def on_step(step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    reporter = Silent()
    with pytest.raises(Interrupted):
        run(tmp_path, on_step=on_step, reporter=reporter)
    assert reporter.lines[-2] == "stopped at step 5 of 12 (SIGTERM)"
    assert reporter.lines[-1] == f"last good checkpoint: {tmp_path / 'state' / '5'}; go on with --resume"
    reporter = run(tmp_path, resume=True)
    assert reporter.lines[0] == "resumed at step 5 of 12"
    assert reporter.steps == list(range(6, 13))
    assert_same_run(whole, tmp_path)


@pytest.mark.parametrize("phase", ["one", "two"])
def test_a_signal_while_data_are_made_ends_that(whole, tmp_path, monkeypatch, phase):
    def source(stage, of, seed, made=ToyStage.source):
        if of.name == phase:
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("went on making data")
        return made(stage, of, seed)

    reporter = Silent()
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(ToyStage, "source", source)
        run(tmp_path, reporter=reporter)
    notes = {"one": "no checkpoint was written yet", "two": f"last good checkpoint: {tmp_path / 'state' / '6'}"}
    assert reporter.lines[-1].startswith(notes[phase])
    run(tmp_path, resume=phase == "two")  # where nothing was saved, the same call is allowed again
    assert_same_run(whole, tmp_path)


def test_time_limit(whole, tmp_path):
    assert run(tmp_path, changed(minutes=1e-9)).steps == [1]
    run(tmp_path, resume=True)
    assert_same_run(whole, tmp_path)


def test_an_interrupted_save_leaves_the_last_good_one(whole, tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path, on_step=lambda step: step == 4 and os.kill(os.getpid(), signal.SIGTERM))
    half = tmp_path / "state" / "8.orbax-checkpoint-tmp"
    (half / "state").mkdir(parents=True)
    (half / "state" / "_METADATA").write_text("{")
    run(tmp_path, resume=True)
    assert_same_run(whole, tmp_path)


def test_training_goes_on_when_the_disk_is_full_and_then_is_not(whole, tmp_path):
    """A limit on the size of files stands for a disk that has no room: every write of more than a byte fails."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_step(step):
        if step in (3, 5):  # the save after step 4 falls in between
            resource.setrlimit(resource.RLIMIT_FSIZE, (1, old[1]) if step == 3 else old)

    try:
        reporter = run(tmp_path, changed(log_every=2), on_step=on_step)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    warnings = [line for line in reporter.lines if line.startswith("warning")]
    assert any("checkpoint" in line and "training goes on" in line for line in warnings), reporter.lines
    np.testing.assert_array_equal(np.load(tmp_path / "checkpoint" / "w.npy"), np.load(whole / "checkpoint" / "w.npy"))
    assert not list((tmp_path / "state").glob("*tmp*"))


def test_a_save_that_failed_does_not_take_the_next_along(tmp_path):
    """The disk is full in the save after step 4 only; that of step 6 is written, and a signal would find it."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    seen = []

    def on_step(step):
        if step in (3, 5):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1, old[1]) if step == 3 else old)
        if step == 7:
            seen.extend(sorted(int(path.name) for path in (tmp_path / "state").iterdir() if path.name.isdigit()))

    try:
        run(tmp_path, changed(log_every=2), on_step=on_step)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert seen == [6]


def test_training_goes_on_without_a_validation_video(whole, tmp_path, monkeypatch):
    def refused(*_):
        raise UserError("the video takes 71 GiB")

    monkeypatch.setattr(ToyStage, "validate", refused)
    said = run(tmp_path).lines
    assert "warning: no validation video (the video takes 71 GiB); training goes on" in said
    np.testing.assert_array_equal(np.load(tmp_path / "checkpoint" / "w.npy"), np.load(whole / "checkpoint" / "w.npy"))


def test_figures_that_cannot_be_written_are_said_once(tmp_path):
    said = []
    metrics = Metrics(tmp_path, 0, said.append, tensorboard=False)
    metrics.write(1, {"loss": 1.0})
    metrics.path.unlink()
    metrics.path.mkdir()
    metrics.write(2, {"loss": 1.0})
    metrics.write(3, {"loss": 1.0})
    assert len(said) == 1 and "figures cannot be written" in said[0]


def test_nan_is_null_in_json(tmp_path):
    metrics = Metrics(tmp_path, 0, print, tensorboard=False)
    metrics.write(1, {"loss": float("nan"), "phase": "one"})
    assert lines(tmp_path) == [{"step": 1, "loss": None, "phase": "one"}]


def test_tensorboard_files(tmp_path):
    metrics = Metrics(tmp_path, 0, print)
    metrics.write(1, {"loss": 1.0})
    metrics.close()
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_a_phase_that_would_take_too_long_has_fewer_steps(tmp_path, monkeypatch):
    asked = []

    def make(config, rate, steps):
        asked.append(steps)
        return make_optimizer(config, rate, steps)

    monkeypatch.setattr(first_state, "make_optimizer", make)
    config = dataclasses.replace(ToyConfig(), phases=(ToyPhase("one", 30, minutes=1e-9), ToyPhase("two", 6)))

    def on_step(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        run(tmp_path, config, on_step=on_step)
    assert shortened(tmp_path) == {"one": 3} and set(asked) == {30, 3}
    reporter = run(tmp_path, config, resume=True)
    assert reporter.lines[0] == "resumed at step 3 of 9" and reporter.steps == list(range(4, 10))
    assert [r["phase"] for r in lines(tmp_path) if "loss" in r] == ["one"] * 3 + ["two"] * 6


def test_the_phase_after_a_shortened_one_follows_at_once(tmp_path):
    config = dataclasses.replace(ToyConfig(), phases=(ToyPhase("one", 30, minutes=1e-9), ToyPhase("two", 6)))
    assert run(tmp_path, config).steps == list(range(1, 10))
    assert [r["phase"] for r in lines(tmp_path) if "loss" in r] == ["one"] * 3 + ["two"] * 6


def test_a_phase_with_enough_time_keeps_its_steps(tmp_path):
    config = dataclasses.replace(ToyConfig(), phases=(ToyPhase("one", 30, minutes=60),))
    assert run(tmp_path, config).steps[-1] == 30 and shortened(tmp_path) == {}


@pytest.mark.parametrize(
    ("seconds", "second_program"),
    [([5.0, 1e-3, 1e6], None), ([5.0, 1e6, 1e-3], 1)],
    ids=["a pause", "another program to compile"],
)
def test_what_is_no_step_does_not_shorten_a_phase(tmp_path, monkeypatch, seconds, second_program):
    log, times = trainer._Loop._log, iter(seconds)  # the first is compilation

    def timed(loop, phase):
        log(loop, phase)
        return next(times, 1e-3)

    monkeypatch.setattr(trainer._Loop, "_log", timed)
    config = dataclasses.replace(ToyConfig(), phases=(ToyPhase("one", 30, minutes=1),))
    poison = () if second_program is None else (second_program,)
    assert run(tmp_path, config, poison=poison).steps[-1] == 30 and shortened(tmp_path) == {}


def test_parts_of_a_step_are_timed_apart(whole, tmp_path):
    run(tmp_path, changed(split_every=4))
    timed = [r for r in lines(tmp_path) if "seconds_add" in r]
    assert [r["step"] for r in timed] == [1, 5, 9]
    assert all(r["seconds_double"] > 0 and r["seconds_split"] >= r["seconds_add"] for r in timed)
    assert not any("seconds_add" in r for r in lines(whole))
    np.testing.assert_array_equal(np.load(tmp_path / "checkpoint" / "w.npy"), np.load(whole / "checkpoint" / "w.npy"))


def test_our_own_batches_go_on_too(whole, tmp_path, monkeypatch):
    """Without grain a position is the step; the numbers are the same."""
    monkeypatch.setattr(data, "grain_batches", lambda *_: None)
    with pytest.raises(Interrupted):
        run(tmp_path, on_step=lambda step: step == 4 and os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.undo()
    with pytest.raises(UserError, match="state/5 was written without grain .*; give --run.workers 1"):
        run(tmp_path, resume=True)
    run(tmp_path, changed(workers=1), resume=True)
    np.testing.assert_array_equal(np.load(tmp_path / "checkpoint" / "w.npy"), np.load(whole / "checkpoint" / "w.npy"))


@pytest.mark.slow
def test_two_processes_are_one_with_two_devices(tmp_path):
    command = [sys.executable, toy_stage.__file__]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    one = environment | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    subprocess.run([*command, str(tmp_path / "one"), "--devices", "2"], env=one, check=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    several = environment | {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
    options = [str(tmp_path / "two"), "--devices", "2", "--distributed"]
    processes = [
        subprocess.Popen([*command, *options], env=several | {"JAX_PROCESS_ID": str(i)}) for i in range(2)
    ]  # fmt: skip
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    # Not bit for bit: the two devices' gradients are summed by gloo, not by one program.
    one, two = (np.load(tmp_path / name / "checkpoint" / "w.npy") for name in ("one", "two"))
    np.testing.assert_allclose(two, one, rtol=1e-6)
    losses = [[r["loss"] for r in lines(tmp_path / name) if "loss" in r] for name in ("one", "two")]
    np.testing.assert_allclose(*losses, rtol=1e-6)
    positions = list((tmp_path / "two" / "state" / "12" / "data").glob("process_*.json"))
    assert len(positions) == 2, "each process has its own"


def test_weights_and_biases(tmp_path, monkeypatch):
    """A stand-in for wandb: a run that goes on is the same run there; words are not logged."""
    begun, logged = [], []

    class Run:
        log = staticmethod(lambda figures, step: logged.append((step, figures)))
        finish = staticmethod(lambda: logged.append("finished"))

    stand_in = types.SimpleNamespace(init=lambda **settings: begun.append(settings) or Run)
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    for step in (1, 2):
        metrics = Metrics(tmp_path, step - 1, print, tensorboard=False, wandb="sprites", config={"a": 1})
        metrics.write(step, {"loss": 1.0, "phase": "one"})
        metrics.close()
    assert begun[0] == begun[1] and (begun[0]["project"], begun[0]["resume"]) == ("sprites", "allow")
    assert logged == [(1, {"loss": 1.0}), "finished", (2, {"loss": 1.0}), "finished"]


def test_weights_and_biases_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="run.wandb is 'sprites', but wandb is not installed: pip install wandb"):
        Metrics(tmp_path, 0, print, tensorboard=False, wandb="sprites")


# MARK: refusals


def test_an_output_that_holds_a_run_is_kept(whole):
    before = (whole / "metrics.jsonl").read_text()
    with pytest.raises(
        UserError, match="holds a run and is kept; go on with it by --resume, or choose another --output"
    ):
        run(whole)
    assert (whole / "metrics.jsonl").read_text() == before


def test_two_processes_do_not_go_on_with_one_run(tmp_path):
    run(tmp_path)
    holds = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(flush=True); input()"
    command = [sys.executable, "-c", holds, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match="another process is at work on the run in .*; let it end, stop it, or cho"):
            run(tmp_path, resume=True)
        other.kill()
    run(tmp_path, resume=True)


def test_nothing_to_resume(tmp_path):
    with pytest.raises(UserError, match="holds no run to resume; leave --resume out"):
        run(tmp_path / "none", resume=True)


def test_a_run_goes_on_with_its_own_settings_only(whole):
    other = dataclasses.replace(changed(seed=1, log_every=7), width=4)
    with pytest.raises(UserError, match="goes on only as it began, but run.seed: 0, now 1; width: 3, now 4; leave"):
        run(whole, other, resume=True)
    assert stored_config(whole, ToyConfig) == ToyConfig()


def test_a_finished_run_has_nothing_more_to_do(whole):
    assert run(whole, resume=True).steps == []


def test_a_run_with_another_checkpoint_is_refused(tmp_path):
    run(tmp_path, dataclasses.replace(ToyConfig(), phases=(ToyPhase("one", 2),)))
    stage = ToyStage(dataclasses.replace(ToyConfig(), phases=(ToyPhase("one", 2),)), tmp_path)
    stage.sources = {"init": "abc"}
    with pytest.raises(UserError, match="the checkpoint given as init is another one"):
        train(stage, tmp_path, Silent(), resume=True)


def test_a_state_of_another_model_is_named(whole):
    class Wider(ToyStage):
        def parameters(self):
            return {"toy": {"w": np.zeros(5, np.float32)}}, {}

    with pytest.raises(UserError, match=r"is of another model: .* such as .*\(\(3,\), expected \(5,\)\)"):
        train(Wider(ToyConfig(), whole), whole, Silent(), resume=True)


def test_gives_up_after_too_many_skips(tmp_path):
    with pytest.raises(UserError, match=r"3 updates in a row .* at step 5.*last good checkpoint: .*/state/4; go on"):
        run(tmp_path, changed(max_skips=3), poison=(2, 3, 4, 5))


def test_what_is_not_finite_is_told(tmp_path):
    assert (
        run(tmp_path, poison=(2,)).lines.count(
            "warning: toy_not_finite is 0.25: nothing is learnt from so much; training goes on"
        )
        == 2
    ), "step 2 of either phase"


def test_an_error_names_the_last_good_checkpoint(tmp_path):
    def on_step(step):
        if step == 5:
            raise RuntimeError("the cable was pulled")

    reporter = Silent()
    with pytest.raises(RuntimeError):
        run(tmp_path, on_step=on_step, reporter=reporter)
    assert reporter.lines[-1] == f"last good checkpoint: {tmp_path / 'state' / '4'}; go on with --resume"


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda mesh=None: 100)
    with pytest.raises(
        UserError, match="^training needs about .*weights .*, but only .* are free; use more run.streams"
    ):
        run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_memory_counts_what_there_is():
    settings = dataclasses.replace(ToyConfig().optimizer, b1=0.0, ema=0.0, warmup=1, final_rate=0.0)
    config = dataclasses.replace(ToyConfig(), optimizer=settings)
    parts = required_memory(ToyStage(config, Path("none")))
    assert parts == {
        "weights": 12, "optimiser": 12, "averaged weights": 0, "gradients": 24, "frozen networks": 0, "activations": 96
    }  # fmt: skip


def test_a_mesh_larger_than_the_machine(tmp_path):
    with pytest.raises(UserError, match="mesh data 2 .* needs 2 devices, there are 1"):
        run(tmp_path / "run", changed(data=2))
