"""Rules of length and time, schedules, and prompt files with their errors."""

import itertools
import json

import pytest

from longlive_jax.errors import UserError
from longlive_jax.prompts import (
    Schedule,
    applied_switch,
    latent_frames,
    length_note,
    output_stems,
    pixel_frames,
    plan_switches,
    read_schedules,
    slug,
    switch_frame,
)


@pytest.mark.parametrize(
    ("seconds", "block", "frames", "pixels"),
    [
        (5, 3, 21, 81),  # 20 / 3 = 6.67 blocks
        (15, 3, 60, 237),
        (240, 3, 960, 3837),
        (0.1, 3, 3, 9),  # never less than a block
        (1.125, 3, 6, 21),  # 1.5 blocks: halves go to the even neighbour, up here ...
        (1.875, 3, 6, 21),  # ... 2.5 blocks: and down here
        (0.625, 1, 2, 5),
        (5, 1, 20, 77),
        (5, 7, 21, 81),
    ],
)
def test_length(seconds, block, frames, pixels):
    assert latent_frames(seconds, block) == frames
    assert pixel_frames(frames) == pixels


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), "5", True, 10**400])
def test_length_must_be_a_positive_number(seconds):
    with pytest.raises(UserError, match="--seconds 5"):
        latent_frames(seconds, 3)


def test_length_note_tells_what_was_rounded():
    assert length_note(5, 3) == "5 s asked: 7 blocks, 81 frames, 5.0625 s made"
    assert length_note(5.0625, 3) is None


@pytest.mark.parametrize(("seconds", "frame"), [(0, 0), (5, 20), (12.5, 50), (0.125, 0), (0.375, 2), (0.13, 1)])
def test_switch_frame(seconds, frame):
    assert switch_frame(seconds) == frame


@pytest.mark.parametrize(("frame", "block", "start"), [(40, 3, 42), (42, 3, 42), (0, 3, 0), (43, 3, 45), (40, 1, 40)])
def test_applied_switch(frame, block, start):
    assert applied_switch(frame, block) == start


def test_plan_switches():
    assert plan_switches([], 21, 3) == []
    assert plan_switches([0], 21, 3) == [0]
    assert plan_switches([40, 80], 120, 3) == [14, 27]
    assert plan_switches([4, 5, 6], 21, 3) == [2, 3, 4], "a second switch due at a block start lands a block later"
    assert plan_switches([5, 5], 21, 3) == [2, 3]


def test_plan_switches_as_the_reference_loop_does():
    for asked in itertools.combinations(range(14), 3):
        blocks, segment = [], 0
        for start in range(0, 60, 3):
            if segment < 3 and start >= asked[segment]:
                blocks.append(start // 3)
                segment += 1
        assert plan_switches(asked, 60, 3) == blocks


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ([19], r"5.0625 s.*last block starts at 4.5 s"),  # 19 -> block start 21 = the end
        ([100], r"25 s .*5.0625 s"),
        ([17, 18], "after the end"),
        ([8, 4], "rising order"),
        ([-1], "before the start"),
    ],
)
def test_plan_switches_refuses(asked, message):
    with pytest.raises(UserError, match=message):
        plan_switches(asked, 21, 3)


def test_plan_switches_needs_whole_blocks():
    with pytest.raises(UserError, match="nearest: 18 or 21"):
        plan_switches([], 20, 3)


def test_schedule_plan():
    plan = Schedule(("a", "b", "c"), (2.0, 10.0), seconds=15).plan(3)
    assert (plan.num_frames, plan.switch_blocks, plan.applied_seconds) == (60, (3, 14), (2.25, 10.5))
    assert plan.seconds == 237 / 16
    assert Schedule(("a",)).plan(3).num_frames == 21
    assert Schedule(("a",)).plan(3, seconds=1).num_frames == 3
    assert Schedule(("a",), seconds=2).plan(3, seconds=1).num_frames == 9


def test_equal_parts_always_fit():
    for block, blocks in itertools.product((1, 3, 4), range(1, 16)):
        for count in range(1, blocks + 1):
            plan = Schedule(("x",) * count, seconds=block * blocks / 4).plan(block)
            starts = (0, *plan.switch_blocks, blocks)
            lengths = [after - before for before, after in itertools.pairwise(starts)]
            assert min(lengths) >= 1 and max(lengths) - min(lengths) <= 1
    assert Schedule(("a", "b"), (0,), seconds=0.75).plan(3).switch_blocks == (0,), "a switch at 0 only swaps the text"
    with pytest.raises(UserError, match="--seconds 2.25"):
        Schedule(("a", "b", "c"), seconds=1.5).plan(3)


def test_timeline():
    assert Schedule.from_timeline([(0, "a"), (5, "b")], seconds=10) == Schedule(("a", "b"), (5,), 10)
    for wrong in ([], [(1, "a")]):
        with pytest.raises(UserError, match="start at 0 s"):
            Schedule.from_timeline(wrong)


def test_schedule_takes_lists_and_hashes():
    assert hash(Schedule(["a", "b"], [1.0])) == hash(Schedule(("a", "b"), (1.0,)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompts": ()}, "no prompt"),
        ({"prompts": "text"}, "list of texts"),
        ({"prompts": ("a", " ")}, "prompt 2 is empty"),
        ({"prompts": ("a", 3)}, "prompt 2 is not a text"),
        ({"prompts": ("a", "b"), "switch_seconds": ()}, "2 prompts need 1 switch times"),
        ({"prompts": ("a", "b", "c"), "switch_seconds": (5, 5)}, "must rise"),
        ({"prompts": ("a", "b"), "switch_seconds": (-1,)}, "from 0 up"),
        ({"prompts": ("a",), "seconds": 0}, "above 0"),
        ({"prompts": ("a",), "seed": -1}, "seed"),
        ({"prompts": ("a",), "seed": 1.5}, "seed"),
        ({"prompts": ("a",), "name": "../a"}, "file name"),
        ({"prompts": ("a",), "name": ""}, "file name"),
        ({"prompts": ("a\ud83d",)}, "half a character"),
        ({"prompts": ("a",), "name": "\ud83d"}, "file name"),
    ],
)
def test_schedule_refuses(values, message):
    with pytest.raises(UserError, match=message):
        Schedule(**values)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A small red circle, drifting!", "a-small-red-circle-drifting"),
        ("../../etc/passwd", "etc-passwd"),
        ("  …!? ", "video"),
        ("Größe 1.5 猫", "größe-1-5-猫"),
        ("word " * 40, "-".join(["word"] * 12)),
        ("x" * 300, "x" * 60),
    ],
)
def test_slug(text, expected):
    assert slug(text) == expected


def test_output_stems_differ():
    schedules = [
        Schedule(("A cat",)),
        Schedule(("a cat!",)),
        Schedule(("a cat",), seed=7),
        Schedule(("b",), name="Run 1"),
    ]
    assert output_stems(schedules, seed=3) == ["a-cat-3", "a-cat-3-2", "a-cat-7", "Run 1"]


def write(folder, name, *lines):
    path = folder / name
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n", "utf-8")
    return path


def test_text_file(tmp_path):
    path = write(tmp_path, "prompts.txt", "\ufeffa cat", "", "  ein Käfer \r")
    assert read_schedules(path) == [Schedule(("a cat",)), Schedule(("ein Käfer",))]


def test_jsonl_file(tmp_path):
    path = write(
        tmp_path,
        "prompts.jsonl",
        {"prompts": ["a", "b", "c"]},
        {"prompts": ["a", "b"], "switch_seconds": [2.5], "seconds": 8, "seed": 4, "name": "first"},
        "",
        {"prompts": ["a", "b", "c"], "switch_frame_indices": [20, 41]},
    )
    assert read_schedules(path) == [
        Schedule(("a", "b", "c")),
        Schedule(("a", "b"), (2.5,), 8, 4, "first"),
        Schedule(("a", "b", "c"), (5.0, 10.25)),
    ]


GOOD = '{"prompts": ["a", "b"]}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompts": ["a", "b"', "not valid JSON.*looks like"),
        ('["a", "b"]', "not a JSON object"),
        ('"a"', "not a JSON object"),
        ("[" * 100000, "not valid JSON"),
        ("{}", '"prompts" is missing'),
        ('{"prompts": "a"}', "not a list"),
        ('{"prompts": []}', "no prompt"),
        ('{"prompts": ["a", ""]}', "prompt 2 is empty"),
        ('{"prompts": ["a"], "second": 3}', "unknown key 'second'; did you mean 'seconds'"),
        ('{"prompt": ["a"]}', "did you mean 'prompts'"),
        ('{"prompts": ["a"], "zzz": 3}', "known: .*switch_seconds"),
        ('{"prompts": ["a", "b"], "switch_seconds": [1, 2]}', "one fewer than prompts"),
        ('{"prompts": ["a", "b"], "switch_frame_indices": [1, 2]}', "one fewer than prompts"),
        ('{"prompts": ["a", "b"], "switch_frame_indices": [1.5]}', "latent frames"),
        ('{"prompts": ["a", "b"], "switch_seconds": 3}', "list of seconds"),
        ('{"prompts": ["a", "b"], "switch_seconds": ["3"]}', "list of seconds"),
        ('{"prompts": ["a", "b"], "switch_seconds": [3], "switch_frame_indices": [9]}', "keep one"),
        ('{"prompts": ["a"], "seconds": NaN}', "NaN"),
        ('{"prompts": ["a"], "seed": 1, "seed": 2}', "'seed' is given twice"),
        ('{"prompts": ["a"], "name": "x"}', "taken by line 1"),
    ],
)
def test_jsonl_errors_name_file_and_line(tmp_path, line, message):
    path = write(tmp_path, "bad.jsonl", '{"prompts": ["a"], "name": "X"}', "", GOOD, line)
    with pytest.raises(UserError, match=rf"bad\.jsonl:4: .*{message}") as caught:
        read_schedules(path)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(UserError, match="cannot read .*none.txt"):
        read_schedules(tmp_path / "none.txt")
    with pytest.raises(UserError, match="holds no prompts"):
        read_schedules(write(tmp_path, "empty.txt", "", "  "))
    with pytest.raises(UserError, match=r"neither \.txt"):
        read_schedules(write(tmp_path, "prompts.csv", "a"))
    (tmp_path / "latin.txt").write_bytes(b"fine\nK\xe4fer\n")
    with pytest.raises(UserError, match=r"latin\.txt:2: not UTF-8"):
        read_schedules(tmp_path / "latin.txt")
