"""Prompt files for training: pairs stay pairs, and what is wrong is said with counts."""

import pytest

from longlive_jax.data.prompts_source import PromptSource
from longlive_jax.errors import UserError


def write(folder, **files):
    paths = []
    for name, text in files.items():
        paths.append(folder / name.replace("_", "."))
        paths[-1].write_text(text, "utf-8")
    return paths


def test_lines_are_paired(tmp_path):
    source = PromptSource(write(tmp_path, a_txt="one\ntwo\n", b_txt="eins\nzwei\n"), 2)
    assert [source[i] for i in range(len(source))] == [("one", "eins"), ("two", "zwei")]


def test_one_file_of_single_prompts(tmp_path):
    assert PromptSource(write(tmp_path, a_txt="one\n\ntwo"), 1)[1] == ("two",)


def test_jsonl(tmp_path):
    source = PromptSource(write(tmp_path, a_jsonl='{"prompts": ["a", "b", "c"]}\n{"prompts": ["d", "e"]}\n'), 2)
    assert list(source.videos) == [("a", "b"), ("d", "e")]


def test_unequal_length_tells_both_counts(tmp_path):
    with pytest.raises(UserError, match=r"a.txt has 2, .*b.txt has 1 prompts; make them equally long"):
        PromptSource(write(tmp_path, a_txt="one\ntwo\n", b_txt="eins\n"), 2)


def test_a_blank_line_in_one_file_only(tmp_path):
    with pytest.raises(UserError, match="line 2 is blank in one of .*a.txt, .*b.txt only"):
        PromptSource(write(tmp_path, a_txt="one\n\ntwo\n", b_txt="eins\nzwei\n"), 2)


def test_an_empty_file(tmp_path):
    with pytest.raises(UserError, match="b.txt holds no prompts; write one a line$"):
        PromptSource(write(tmp_path, a_txt="one\n", b_txt="\n"), 2)


def test_all_missing_files_at_once(tmp_path):
    with pytest.raises(UserError, match="2 faults: cannot read .*x.txt.*; cannot read .*y.txt"):
        PromptSource([tmp_path / "x.txt", tmp_path / "y.txt"], 2)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no prompt files are given"),
        ({"a_txt": "one"}, "1 prompt files are given; a video with 2 prompts needs 2"),
        ({"a_jsonl": '{"prompts": ["a"]}'}, "video 1 has 1 prompts, 2 are needed"),
        ({"a_jsonl": '{"prompts": ["a", "b"]}', "b_txt": "c"}, "a .jsonl holds all prompts of its videos"),
    ],
)
def test_too_few(tmp_path, files, message):
    with pytest.raises(UserError, match=message):
        PromptSource(write(tmp_path, **files), 2)
