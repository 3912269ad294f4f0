"""Training against the official modules: rollout, losses and gradients of three chunks, and of one with adapters."""

import json

import numpy as np
import pytest

from longlive_jax.conversion.parity import run_case
from longlive_jax.errors import UserError

NAME = "streaming_training"


@pytest.mark.slow
def test_case(checkpoints, networks, write_case):
    entry = run_case(checkpoints["base"], write_case(NAME), 2e-5, networks)
    wrong = {name: quantity for name, quantity in entry["quantities"].items() if not quantity["ok"]}
    assert entry["ok"] and not wrong, wrong
    # Every parameter of both networks, in every chunk; and measured errors are far below the bounds.
    assert sum("generator_grad_norms:" in name for name in entry["quantities"]) == 3 * 96
    assert sum("critic_grad_norms:" in name for name in entry["quantities"]) == 3 * 96
    assert max(q["rel"] for q in entry["quantities"].values()) < 2e-4


@pytest.mark.slow
def test_adapters(checkpoints, networks, write_case):
    """Only the adapters have gradients, as peft gives them; the first stage has a chunk a video."""
    entry = run_case(checkpoints["base"], write_case("training_lora"), 2e-5, networks)
    wrong = {name: quantity for name, quantity in entry["quantities"].items() if not quantity["ok"]}
    assert entry["ok"] and not wrong, wrong
    for prefix in ("", "detach:"):
        norms = [name for name in entry["quantities"] if name.startswith(f"{prefix}chunk0_generator_grad_norms:")]
        assert len(norms) == 3 * 20 and all(".lora_" in name for name in norms)
    assert max(q["rel"] for q in entry["quantities"].values()) < 2e-4


@pytest.mark.slow
def test_detached_gradients_are_told_apart(checkpoints, networks, write_case, tmp_path):
    """The official gradients of one chunk, given out as those of a detached cache."""
    with np.load(write_case(NAME)) as file:
        case = {name: file[name] for name in file.files if name == "meta" or not name.startswith(("chunk1", "chunk2"))}
    case = {name: value for name, value in case.items() if "generator_grad:" not in name}
    case["detach:chunk0_generator_grad_norms"] = case.pop("chunk0_generator_grad_norms")
    np.savez(tmp_path / "detached.npz", **case)
    quantities = run_case(checkpoints["base"], tmp_path / "detached.npz", 2e-5, networks)["quantities"]
    wrong = [name for name, quantity in quantities.items() if not quantity["ok"]]
    assert wrong and all(name.startswith("detach:") for name in wrong)


def test_cases_that_cannot_be_run(checkpoints, networks, write_case, tmp_path):
    def message(networks, **change) -> str:
        with np.load(write_case(NAME)) as file:
            np.savez(tmp_path / "case.npz", **({name: file[name] for name in file.files} | change))
        with pytest.raises(UserError) as error:
            run_case(checkpoints["base"], tmp_path / "case.npz", networks=networks)
        return str(error.value)

    assert "needs --critic FILE" in message({}) and "needs --teacher FILE" in message({})
    no_file = networks | {"critic": tmp_path / "none.safetensors"}
    assert "none.safetensors" in message(no_file)
    assert "chunk0_start is not 0" in message(networks, chunk0_start=np.int32(3))
    assert "chunk0_exit_step is 3" in message(networks, chunk0_exit_step=np.int32(3))
    meta = {"kind": NAME, "window": 12, "chunk_frames": 20}
    assert "chunk_frames is 20; whole blocks" in message(networks, meta=json.dumps(meta))
