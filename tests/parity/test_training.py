"""Training against the official modules: rollout, losses and gradients of three chunks, and of one with adapters."""

import json

import numpy as np
import pytest

from longlive_jax.cli import main
from longlive_jax.conversion.parity import read_case, run_case
from longlive_jax.conversion.training_parity import _check_chunks, _variants
from longlive_jax.errors import UserError

NAME = "streaming_training"


def test_case(checkpoints, networks, write_case):
    """Not slow: 54 s of one core, nearly all of which compiles; one later chunk less would save 5."""
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


def test_detached_gradients_of_a_later_chunk_are_compared(checkpoints, networks, write_case, tmp_path):
    """Of a case that has them there only."""
    path = tmp_path / "detached.npz"
    with np.load(write_case(NAME)) as file:
        case = {name: file[name] for name in file.files}
    case["detach:chunk2_generator_grad_norms"] = case["chunk2_generator_grad_norms"]
    np.savez(path, **case)
    assert _variants(read_case(path)) == {"": "straight_through", "detach:": "detach"}


def test_cases_that_cannot_be_run(checkpoints, networks, write_case, tmp_path):
    def message(networks, lacking: str | None = None, **change) -> str:
        with np.load(write_case(NAME)) as file:
            arrays = {name: file[name] for name in file.files if name != lacking}
        if isinstance(meta := change.pop("meta", {}), dict):
            change["meta"] = json.dumps(json.loads(str(arrays["meta"])) | meta)
        np.savez(tmp_path / "case.npz", **(arrays | change))
        with pytest.raises(UserError) as error:
            run_case(checkpoints["base"], tmp_path / "case.npz", networks=networks)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "needs --critic FILE" in message({}) and "needs --teacher FILE" in message({})
    no_file = networks | {"critic": tmp_path / "none.safetensors"}
    assert "none.safetensors" in message(no_file)
    assert "chunk0_start is not 0" in message(networks, chunk0_start=np.int32(3))
    assert "chunk0_exit_step is 3" in message(networks, chunk0_exit_step=np.int32(3))
    assert "chunk_frames is 20; whole blocks" in message(networks, meta={"chunk_frames": 20})
    for key in ("chunk0_dmd_tau", "chunk2_critic_tau", "chunk1_window"):
        assert f"has no {key}, which a streaming_training case needs; record it again" in message(networks, key)
    assert "has chunk1_start, but no chunk1_noise; record" in message(networks, "chunk1_noise")
    assert "window is 24, chunk_frames 21; set sink to keep, or window to 21" in message(
        networks, meta={"local_attn_size": 24}
    )
    one = {"prompt_embeds": np.zeros((1, 1, 16, 48), np.float32)}
    assert "'prompt_embeds' has 1 prompt, a case with a switch_frame needs 2" in message(networks, **one)


@pytest.mark.parametrize(
    ("norms", "expected"),
    [
        ("[1.0, 2.0]", "holds no settings"),
        ("1.0", "holds no settings"),
        ("{", "is not valid JSON"),
        ('{"head.head.weight": "big"}', "has no number for head.head.weight"),
        ('{"head.head.weight": [1]}', "has no number for head.head.weight"),
    ],
)
@pytest.mark.parametrize("key", ["chunk0_generator_grad_norms", "detach:chunk1_generator_grad_norms"])
def test_norms_that_are_no_table(write_case, tmp_path, key, norms, expected):
    with np.load(write_case(NAME)) as file:
        np.savez(tmp_path / "case.npz", **({name: file[name] for name in file.files} | {key: norms}))
    with pytest.raises(UserError, match=f"'{key}' {expected}.*record it again"):
        _check_chunks(read_case(tmp_path / "case.npz"), 3)


def test_detached_keys_that_nobody_compares(write_case, tmp_path):
    with np.load(write_case(NAME)) as file:
        case = {name: file[name] for name in file.files}
    np.savez(tmp_path / "case.npz", **case, **{"detach:chunk0_critic_loss": case["chunk0_critic_loss"]})
    with pytest.raises(UserError, match="has detach:chunk0_critic_loss; of a detached cache only"):
        _variants(read_case(tmp_path / "case.npz"))


@pytest.mark.parametrize(("frame", "fine"), [(36, True), (37, False), (38, False), (39, True), (18, True), (19, False)])
def test_switches_in_the_last_block_of_a_chunk(write_case, tmp_path, frame, fine):
    """The official code neither recaches then nor learns from the chunk."""
    with np.load(write_case(NAME)) as file:
        case = {name: file[name] for name in file.files}
    case["meta"] = json.dumps(json.loads(str(case["meta"])) | {"switch_frame": frame})
    np.savez(tmp_path / "case.npz", **case)
    if fine:
        _check_chunks(read_case(tmp_path / "case.npz"), 3)
    else:
        end = 39 if frame > 21 else 21
        message = f"switch_frame {frame} is inside the last block .* at {end - 3} or {end}"
        with pytest.raises(UserError, match=message):
            _check_chunks(read_case(tmp_path / "case.npz"), 3)


def test_the_command_goes_on_after_a_case_that_cannot_be_run(checkpoints, networks, write_case, tmp_path, capsys):
    with np.load(write_case(NAME)) as file:
        np.savez(tmp_path / "case.npz", **{name: file[name] for name in file.files if name != "chunk0_dmd_tau"})
    files = [f"--{name}={networks[name]}" for name in ("critic", "teacher")]
    with pytest.raises(SystemExit) as ended:
        main(["parity", f"--checkpoint={checkpoints['base']}", *files, str(tmp_path / "case.npz")])
    assert ended.value.code == 2
    assert capsys.readouterr().out.count("\n") == 1
