"""The recorder of training cases, as far as it goes without the official code: tests/parity/test_record_training.py."""

from pathlib import Path

import pytest
import torch

from longlive_jax import checkpoint
from longlive_jax.conversion import tables
from longlive_jax.conversion.lora import open_lora
from longlive_jax.conversion.lora_file import write_lora
from longlive_jax.conversion.official_capture import given_draws
from longlive_jax.conversion.record_training import RecordTraining, main, record_training
from longlive_jax.errors import UserError

STAND_IN = Path(__file__).parent / "stand_in"
SMALL = {"dim": 32, "ffn_dim": 48, "layers": 1, "height": 16, "width": 32, "vae_width": 4}


def message(tmp_path, **change) -> str:
    command = RecordTraining(**{"torch_repo": STAND_IN, "output": tmp_path / "case"} | SMALL | change)
    with pytest.raises(UserError) as error:
        record_training(command)
    assert not list(tmp_path.iterdir())
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"torch_repo": Path("none")}, "there is no folder none"),
        ({"torch_repo": STAND_IN}, "has no pipeline/self_forcing_training.py, so it is not branch v1.0"),
        ({"output": STAND_IN}, "exists; name a folder to make"),
        ({"exit_steps": (0, 4)}, "--exit-steps needs one or more of 0 to 3"),
        ({"exit_steps": ()}, "--exit-steps needs one or more of 0 to 3"),
        ({"batch": 2, "stage": "init"}, "fails with more than one video"),
        ({"lora_rank": -1, "seed": -1}, "2 faults: --seed is -1"),
        ({"height": 40}, "height 40 is not a multiple of 16 pixels"),
        ({"heads": 3}, "dim 32 does not split into 3 heads"),
    ],
)
def test_what_is_refused(tmp_path, change, expected):
    assert expected in message(tmp_path, **change)


def test_command_line(tmp_path, capsys):
    assert main(["--torch-repo", str(tmp_path / "none"), "--output", str(tmp_path / "case"), "--stage", "init"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_draws_in_turn():
    noise, like, steps = torch.ones(2, 3), torch.zeros(4), torch.tensor([7])
    draws = [("randn", noise), ("randint", steps), ("randn_like", like)]
    before = torch.randn
    with given_draws(draws):
        assert torch.randn([2, 3], dtype=torch.float32) is noise
        assert torch.randint(0, 9, (1,), device="cpu").tolist() == [7]
        torch.testing.assert_close(torch.randn_like(torch.ones(4)), like)
    with pytest.raises(UserError, match="out of turn"), given_draws(draws):
        torch.randn_like(noise)
    with pytest.raises(UserError, match="left 3 draws"), given_draws(draws):
        pass
    assert torch.randn is before


def test_names_of_adapters(configs, tmp_path):
    """Those that a LoRA is written and read by, ten layers a block."""
    cfg = configs["transformer"]
    rows, shapes = tables.wan_lora(cfg).rows, checkpoint.tensor_shapes("transformer", cfg)
    factors = {}
    for name in {row.ours.rpartition(".")[0] for row in rows}:
        inputs, outputs = shapes[f"{name}.kernel"]
        factors[f"{name}.kernel"] = (torch.ones(inputs, 2).numpy(), torch.ones(2, outputs).numpy())
    assert len(rows) == 2 * len(factors) == 2 * 10 * cfg.num_layers
    write_lora(tmp_path / "lora.pt", {"generator_lora": factors}, cfg)
    written = torch.load(tmp_path / "lora.pt", weights_only=True)["generator_lora"]
    assert set(written) == {row.torch for row in rows}
    assert len(open_lora(tmp_path / "lora.pt").sides) == len(factors)
