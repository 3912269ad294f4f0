"""The ablations' harness on a tiny random model: same clips in every arm, shortcuts equal to the pipeline, resuming."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from test_pipeline import QuickPipeline

from longlive_jax import checkpoint
from longlive_jax.data.sprite_prompts import canonical
from longlive_jax.data.sprites import ATTRIBUTES, is_test, render_schedule
from longlive_jax.errors import UserError
from longlive_jax.pipeline import LongLivePipeline
from longlive_jax.tokenizer import PromptTokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments" / "ablations"))
import records
import report
import rollouts
import run
import studies
from studies import STUDIES, Arm, Study

POINTS = Study(
    "steps",
    (Arm("euler 2", {"solver": "euler", "steps": [1000, 500]}), Arm("euler 1", {"solver": "euler", "steps": [1000]})),
    reference="euler 2",
    seconds=2.0,
    points=(1.0, 2.0),
)
SWITCH = dataclasses.replace(STUDIES["switch"], seconds=4.0, switch_at=2.0)


@pytest.fixture(scope="module")
def folder(tiny_checkpoint, tmp_path_factory):
    """The tiny checkpoint at 64 x 64 pixels, which the evaluator reads."""
    config = checkpoint.load_config(tiny_checkpoint)
    config = dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, height=64, width=64))
    params = {part: checkpoint.load(tiny_checkpoint, part, "float32") for part in checkpoint.MODULES}
    tokenizer = PromptTokenizer.from_folder(tiny_checkpoint, config.transformer.text_length)
    target = tmp_path_factory.mktemp("ablations") / "tiny64"
    checkpoint.save(target, config, params, tokenizer, {"source": "random numbers"})
    return target


@pytest.fixture(scope="module")
def pipe(folder):
    return LongLivePipeline.from_pretrained(folder)


# Clips and arms


def test_clips_are_a_function_of_their_number_and_of_the_test_set():
    for study in STUDIES.values():
        many = studies.clips_of(study, list(range(250)))
        assert many[7:9] == studies.clips_of(study, [7, 8]) and [c.index for c in many] == list(range(250))
        assert all(is_test(c.before) for c in many)
        assert len({c.before for c in many[:150]}) == 150


def test_a_switch_changes_background_and_colour_and_nothing_else():
    for clip in studies.clips_of(STUDIES["switch"], list(range(184))):
        changed = {name for name in ATTRIBUTES if getattr(clip.before, name) != getattr(clip.after, name)}
        assert changed == {"background", "colour"} and is_test(clip.after)


def test_every_study_names_its_reference_and_settings_that_exist(pipe):
    for study in STUDIES.values():
        assert study.reference in [arm.name for arm in study.arms]
        for arm in study.arms:
            pipe.prepare("a star", seconds=study.seconds, **arm.settings)


def test_even_steps_are_those_of_the_shipped_and_of_the_few_step_model():
    assert studies.evenly(4) == [1000, 750, 500, 250] and studies.evenly(16)[:3] == [1000, 938, 875]


# Shortcuts against the pipeline


@pytest.mark.slow
def test_a_branch_equals_a_video_of_its_own(folder):
    pipe = QuickPipeline.from_pretrained(folder)
    policies = {arm.name: None if arm.name == studies.NO_SWITCH else arm.settings for arm in SWITCH.arms}
    texts = [(canonical(c.before), canonical(c.after)) for c in studies.clips_of(SWITCH, [0, 1])]
    head, tails, _ = rollouts.switched_latents(pipe, texts, [3, 4], 4.0, 2.0, policies)
    assert head.shape[1] == 8
    schedule = [[(0, a), (2.0, b)] for a, b in texts]
    for arm in SWITCH.arms:
        alone = [a for a, _ in texts] if arm.name == studies.NO_SWITCH else schedule
        video = pipe(alone, seconds=4.0, seed=[3, 4], decode="blocks", **arm.settings)
        np.testing.assert_allclose(np.concatenate([head, tails[arm.name]], axis=1), video.latents, atol=1e-5)
    for name, tail in tails.items():
        others = [np.abs(tail - other).max() for key, other in tails.items() if key != name]
        # A new sink differs from a kept one only once the video has outgrown its window: 6 of 8 frames here.
        assert min(others) > 1e-3, name


def test_pixels_from_the_start_and_of_a_stretch_are_the_pipelines(pipe):
    text = [canonical(studies.clips_of(POINTS, [0])[0].before)]
    latents, sampler = rollouts.video_latents(pipe, text, [5], 4.0, {})
    video = pipe(text, seconds=4.0, seed=5, decode="blocks")
    np.testing.assert_allclose(latents, video.latents, atol=1e-5)
    block = sampler.block_frames
    head, cache = rollouts.pixels(pipe, latents[:, :8], block)
    for _ in range(2):  # the memory can be gone on from more than once
        tail, _ = rollouts.pixels(pipe, latents[:, 8:], block, cache)
        assert levels(np.concatenate([head, tail], axis=1), video.frames) <= 1
    assert levels(rollouts.last_second(pipe, latents, block, 4.0, warm_up=8), video.frames[:, -16:]) <= 1
    # The last second of 2 of its 4 seconds is that of a video of 2 seconds.
    shorter = pipe(text, seconds=2.0, seed=5, decode="blocks").frames[:, -16:]
    assert levels(rollouts.last_second(pipe, latents, block, 2.0), shorter) <= 1


def levels(a, b) -> int:
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b.astype(int)).max())


# Resuming


class Killed(Exception):
    pass


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "study", [POINTS, dataclasses.replace(SWITCH, arms=(SWITCH.arms[0], SWITCH.arms[-1]))], ids=["points", "switch"]
)
def test_an_interrupted_run_goes_on_to_the_same_results(study, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(STUDIES, study.name, study)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run.run(study, {"given": folder}, 3, whole, batch_size=2, say=lambda line: None)

    def killed_after_the_first_batch(line):
        raise Killed

    with pytest.raises(Killed):
        run.run(study, {"given": folder}, 3, parts, batch_size=2, say=killed_after_the_first_batch)
    path = parts / f"{study.name}.jsonl"
    written = len(lines(path))
    assert 1 < written < 1 + 3 * len(study.arms)
    with open(path, "a") as file:
        file.write('{"arm": "recache", "cl')  # killed in the middle of a line
    run.run(study, {"given": folder}, 1, parts, batch_size=2, say=lambda line: None)
    run.run(study, {"given": folder}, 3, parts, batch_size=2, say=lambda line: None)

    ours, theirs = ({(r["arm"], r["clip"]): r for r in lines(p / path.name)[1:]} for p in (parts, whole))
    assert len(lines(path)) == 1 + 3 * len(study.arms), "no line twice"
    assert ours == theirs
    assert {clip for _, clip in ours} == {0, 1, 2}
    report.report(path)
    made = {p.name for p in parts.iterdir() if p.is_file()}
    sheets = {f"{study.name}-frames-{clip}.png" for clip in range(3)}
    assert made == sheets | {study.name + suffix for suffix in (".jsonl", ".json", ".md", ".png")}


def test_results_of_another_checkpoint_are_not_mixed(folder, tmp_path):
    setup = {"study": "steps", "checkpoint": {"given": "a"}}
    results = run.Results(tmp_path / "steps.jsonl", setup, {})
    results.add([{"arm": "euler 2", "clip": 0}])
    assert run.Results(tmp_path / "steps.jsonl", setup, {"jax": "other"}).done == {("euler 2", 0)}
    before = (tmp_path / "steps.jsonl").read_bytes()
    with pytest.raises(UserError, match="another checkpoint"):
        run.Results(tmp_path / "steps.jsonl", setup | {"checkpoint": {"given": "b"}}, {})
    assert (tmp_path / "steps.jsonl").read_bytes() == before
    (tmp_path / "other.jsonl").write_text("[1]\n")
    with pytest.raises(UserError, match="no results"):
        run.Results(tmp_path / "other.jsonl", setup, {})


def test_arms_that_cannot_run_are_said_and_left_out(folder, tmp_path):
    said = []
    arms = (Arm("ours", {"steps": [1000]}), Arm("later", load={"teleport": True}))
    study = dataclasses.replace(POINTS, arms=arms, reference="ours", seconds=1.0, points=(1.0,))
    run.run(study, {"given": folder}, 1, tmp_path, batch_size=1, say=said.append)
    assert {r["arm"] for r in lines(tmp_path / "steps.jsonl")[1:]} == {"ours"}
    assert "does not take teleport" in said[0]
    with pytest.raises(UserError, match="has no arm 'hours'"):
        run.run(study, {"given": folder}, 1, tmp_path, arms=["hours"])
    with pytest.raises(UserError, match="give the other one as --before DIR"):
        run.run(STUDIES["tuning"], {"given": folder}, 1, tmp_path)
    assert not (tmp_path / "tuning.jsonl").exists()


def test_no_batch_starts_when_the_time_is_up(folder, tmp_path):
    said = []
    run.run(POINTS, {"given": folder}, 4, tmp_path, batch_size=2, minutes=0, say=said.append)
    assert len(lines(tmp_path / "steps.jsonl")) == 1 and "goes on" in said[-1]


# Reading


@pytest.mark.parametrize("shift", [0, 12])
def test_a_true_switch_is_read_as_one(shift):
    clip = studies.clips_of(SWITCH, [2])[0]
    frames = render_schedule([(0, clip.before), (81 + shift, clip.after)], 153, np.random.default_rng(0))
    record = records.around_the_switch(frames, 81, clip, switched=True)
    assert record["latency"] == {name: pytest.approx(shift / 16, abs=0.13) for name in records.CHANGED}
    assert all(record[part]["right"] == dict.fromkeys(ATTRIBUTES, True) for part in ("before", "second", "last"))
    timeline = record["timeline"]["background"]
    assert timeline.count("o") == pytest.approx(81 + shift, abs=2) and set(timeline) == {"o", "n"}
    assert record["step"] < 2 and record["largest_jump"] < 2 and record["last"]["sprite_error"] < 1
    kept = records.around_the_switch(frames, 81, clip, switched=False)
    assert kept["latency"] == {} and not kept["last"]["right"]["colour"] and kept["before"]["right"]["colour"]


# The report, of records whose figures are known


def synthetic(right: dict[str, list[bool]]) -> list[dict]:
    """Records of `POINTS`; colour is right as given, clip by clip, and the background's error is the clip's number."""
    return [
        {
            "arm": arm, "clip": i,
            "at": {
                t: {
                    "read": {"colour": None if i == 0 else "red"},
                    "right": {name: ok if name == "colour" else True for name in ATTRIBUTES},
                    "background_error": float(i), "sprite_error": None if i == 0 else 5.0 + (arm == "renoise 1"),
                } for t in ("5",)
            },
        }
        for arm, oks in right.items() for i, ok in enumerate(oks)
    ]  # fmt: skip


def test_figures_are_those_of_the_clips_that_all_arms_have(tmp_path):
    rights = {"renoise 4": [True] * 8 + [False] * 2, "renoise 1": [True] * 4 + [False] * 6, "renoise 2": [True] * 30}
    path = tmp_path / "steps.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in [{"study": "steps"}, *synthetic(rights)]) + "\n")
    study, arms = report.read_study(path)
    summary = report.summarise(study, arms)
    assert summary["clips"] == 10 and list(summary["arms"]) == ["renoise 4", "renoise 2", "renoise 1"]
    colour = {arm: figures["colour"] for arm, figures in summary["arms"].items()}
    assert {arm: one["value"] for arm, one in colour.items()} == {"renoise 4": 0.8, "renoise 2": 1.0, "renoise 1": 0.4}
    assert colour["renoise 4"]["interval"] == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert "difference" not in colour["renoise 4"] and colour["renoise 1"]["difference"][0] == pytest.approx(-0.4)
    sprite = summary["arms"]["renoise 1"]["sprite error"]
    assert sprite["clips"] == 9 and sprite["value"] == 6 and sprite["difference"] == pytest.approx((1, 1, 1))
    rows = report.table(summary).splitlines()
    assert len(rows) == 5 and rows[2].startswith("| renoise 4 | 100 (72 to 100) | 80 (49 to 94) |")
    assert "<br>**-40.0 (" in rows[4] and "<br>+0.0 (" in rows[4], "bold only where the interval is not on 0"


def test_a_damaged_or_empty_study_is_refused_in_a_line(tmp_path):
    path = tmp_path / "steps.jsonl"
    path.write_text("")
    with pytest.raises(UserError, match="steps.jsonl"):
        report.read_study(path)
    records_ = [{"study": "steps"}, {"arm": "renoise 4", "clip": 0}, {"arm": "renoise 2", "clip": 1}]
    path.write_text("\n".join(json.dumps(r) for r in records_) + "\n")
    with pytest.raises(UserError, match="no clip that all of its arms have"):
        report.read_study(path)
