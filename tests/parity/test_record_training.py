"""The recorder of training cases on a real clone of the official repository, which the tests cannot contain.

Run by hand:

    git clone -b v1.0 https://github.com/NVlabs/LongLive official
    LONGLIVE_REPO=official python -m pytest -m slow tests/parity/test_record_training.py
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from longlive_jax.config import SamplerConfig
from longlive_jax.conversion.parity import read_case, run_case
from longlive_jax.conversion.record_training import CASE, RecordTraining, record_training

REPO = os.environ.get("LONGLIVE_REPO")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REPO is None, reason="LONGLIVE_REPO names no official clone")]
SMALL = {"dim": 64, "ffn_dim": 96, "layers": 2, "height": 32, "width": 64}


def test_it_records_what_was_recorded(configs, originals, networks, write_case):
    """The official modules, run by the recorder, give the numbers of the case, which was recorded without it."""
    from longlive_jax.conversion.official_training import Chunk, Training, run_training

    case = read_case(write_case("streaming_training"))
    of = lambda name: torch.from_numpy(case.arrays[name])
    student = torch.load(originals["base"], weights_only=True)["generator"]
    chunks = [
        Chunk(
            exits=of(f"chunk{i}_exit_step").repeat(len(of(f"chunk{i}_context_noise"))),
            dmd_tau=of(f"chunk{i}_dmd_tau").reshape(-1),
            critic_tau=of(f"chunk{i}_critic_tau").reshape(-1),
            **{n: of(f"chunk{i}_{n}") for n in ("noise", "renoise", "context_noise", "dmd_noise", "critic_noise")},
        )
        for i in range(3)
    ]
    training = Training(
        wan=originals["wan"],
        networks={
            "generator": (
                configs["transformer"],
                {name.removeprefix("model."): tensor for name, tensor in student.items()},
            ),
            "critic": (configs["transformer"], load_file(networks["critic"])),
            "teacher": (configs["teacher"], load_file(networks["teacher"])),
        },
        vae_width=configs["vae"].base_width,
        sampler=SamplerConfig(),
        guidance=case.meta["guidance_scale"],
        streaming=True,
        lora=None,
        prompts=of("prompt_embeds"),
        negative=of("negative_embeds"),
        switch_frame=case.meta["switch_frame"],
        chunks=chunks,
    )
    found = run_training(Path(REPO), training, detach=False)
    error = lambda ours, expected: np.linalg.norm(ours - expected) / np.linalg.norm(expected)
    errors = {name: error(value, case.arrays[name]) for name, value in found.items() if name in case.arrays}
    for key in [name for name in case.arrays if name.endswith("_grad_norms") and not name.startswith("detach:")]:
        for name, norm in json.loads(str(case.arrays[key])).items():
            errors[f"{key}:{name}"] = error(np.linalg.norm(found[f"{key.removesuffix('_norms')}:{name}"]), norm)
    assert len(errors) > 3 * 2 * 96
    assert max(errors.values()) < 1e-4, max(errors, key=errors.get)


@pytest.mark.parametrize(
    "settings",
    [
        {"stage": "init", "exit_steps": (0, 3), "detach": True},
        {"lora_rank": 4, "lora_alpha": 6.0, "exit_steps": (1, 3, 0)},
        {"switch_frame": 21, "exit_steps": (3, 2, 1), "heads": 4, "layers": 3, "batch": 2, "window": 9},
        {"switch_frame": 48, "exit_steps": (0, 1, 2), "sink_frames": 0},
    ],
    ids=["first stage", "adapters", "other sizes", "switch within a chunk"],
)
def test_ours_agrees(tmp_path, settings):
    """Within the bounds, and the errors seen are far below them."""
    folder = tmp_path / "case"
    record_training(RecordTraining(torch_repo=Path(REPO), output=folder, **SMALL | settings))
    networks = {name: folder / f"{name}.safetensors" for name in ("critic", "teacher")}
    entry = run_case(folder / "checkpoint", folder / CASE, 2e-5, networks)
    wrong = {name: quantity for name, quantity in entry["quantities"].items() if not quantity["ok"]}
    assert entry["ok"] and not wrong, wrong
    assert max(q["rel"] for q in entry["quantities"].values()) < 2e-4
