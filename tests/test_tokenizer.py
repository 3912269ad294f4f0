"""Prompt cleaning, the tokenizer in its three origins, and the reader of sentencepiece files."""

import html
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import ftfy
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from longlive_jax.errors import UserError
from longlive_jax.tokenizer import PLAIN, PromptTokenizer, clean, read_sentencepiece, train_unigram

PROMPTS = [
    f"a {size} {colour} circle {motion} over a {place}"
    for size in ("small", "large")
    for colour in ("red", "blue", "green")
    for motion in ("drifts left", "stays still", "moves in circles")
    for place in ("night sky", "field of snow")
]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("schÃ¶n", "schön"),  # UTF-8 once read as Latin-1
        ("itâ€™s", "it's"),  # and as Windows-1252; ftfy also straightens quotes
        ("cats &amp;amp; dogs", "cats & dogs"),
        ("1 &lt; 2", "1 < 2"),
        ("a<b &amp;amp; c", "a<b & c"),  # ftfy leaves entities alone beside a "<": these two levels are ours
        ("a<b &amp;amp;amp;", "a<b &amp;"),
        ("&amp;lt;b&amp;gt;", "<b>"),
        ("  a\t cat \n\n sits\u00a0\u3000here ", "a cat sits here"),
        ("a&nbsp; b&nbsp;", "a b"),
        ("ﬁne ｗｉｄｅ", "fine wide"),
        ("", ""),
        ("猫 🎬", "猫 🎬"),
    ],
)
def test_clean(text, expected):
    assert clean(text) == expected


@given(st.text(st.characters(codec="ascii"), max_size=40))
def test_what_is_not_mended_has_nothing_to_mend(text):
    """Plain prompts are cleaned without ftfy, which a training machine may lack."""
    if PLAIN.fullmatch(text):
        mended = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
        assert clean(text) == re.sub(r"\s+", " ", mended).strip()


# MARK: a spiece.model written by hand


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def message(field: int, value: bytes | str) -> bytes:
    value = value.encode() if isinstance(value, str) else value
    return varint(field << 3 | 2) + varint(len(value)) + value


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def piece(text: str, score: float = 0.0, kind: int | None = None) -> bytes:
    encoded = message(1, text) + varint(2 << 3 | 5) + struct.pack("<f", score)
    return message(1, encoded + (b"" if kind is None else number(3, kind)))


SPECIAL = piece("<pad>", kind=3) + piece("</s>", kind=3) + piece("<unk>", kind=2)
WORDS = {"▁a": -1.0, "▁red": -2.0, "▁cat": -2.5, "▁": -3.0, "re": -4.0, "d": -4.5, "c": -5.0, "a": -5.0, "t": -5.5}
NORMAL = b"".join(piece(text, score) for text, score in WORDS.items())
IDS = {text: index for index, text in enumerate(WORDS, 3)}


def model_folder(folder: Path, extra: bytes = b"", pieces: bytes = SPECIAL + NORMAL) -> Path:
    (folder / "spiece.model").write_bytes(pieces + extra)
    return folder


def tokens(folder: Path, text: str) -> list[int]:
    result = PromptTokenizer.from_folder(folder, 16)(text)
    return result.ids[0, : result.lengths[0]].tolist()


def test_spiece_model_gives_the_best_split(tmp_path):
    unknown_field = number(99, 300) + message(98, "ignored")
    folder = model_folder(tmp_path, message(2, number(40, 2) + number(3, 1)) + unknown_field)
    assert tokens(folder, "a red cat") == [IDS["▁a"], IDS["▁red"], IDS["▁cat"], 1]
    assert tokens(folder, "a  \n reda") == [IDS["▁a"], IDS["▁red"], IDS["a"], 1], "blanks collapse"
    assert tokens(folder, "cred") == [IDS["▁"], IDS["c"], IDS["re"], IDS["d"], 1]
    assert tokens(folder, "a zzz") == [IDS["▁a"], IDS["▁"], 2, 1], "unknown characters fuse to one <unk>"
    assert tokens(folder, "a</s>") == [IDS["▁a"], 1, 1], "as transformers does"
    assert tokens(folder, "") == [1]
    model = read_sentencepiece(tmp_path / "spiece.model")
    assert model.pieces[0] == ("<pad>", 0.0, 3) and model.pieces[4] == ("▁red", -2.0, 1)
    assert (model.charsmap, model.add_dummy_prefix, model.byte_fallback) == (b"", True, False)


def test_spiece_model_switches(tmp_path):
    folder = model_folder(tmp_path, message(3, number(3, 0)))  # add_dummy_prefix off
    assert tokens(folder, "cat red") == [IDS["c"], IDS["a"], IDS["t"], IDS["▁red"], 1]
    byte_pieces = b"".join(piece(f"<0x{byte:02X}>", kind=6) for byte in range(256))
    folder = model_folder(tmp_path, message(2, number(35, 1)), SPECIAL + NORMAL + byte_pieces)
    first = 3 + len(WORDS)
    assert tokens(folder, "a é") == [IDS["▁a"], IDS["▁"], first + 0xC3, first + 0xA9, 1]


def charsmap(replacements: dict[str, str]) -> bytes:
    """A compiled normalisation table for single-byte keys: a double-array trie, then the replacements' bytes.

    A unit holds a character in its low byte and the distance to its children from bit 10; bit 8 says that a value
    follows, and a value has bit 31 set (darts-clone's layout, which sentencepiece uses).
    """
    units, texts = [0] * 512, b""
    root_base = 256
    units[0] = root_base << 10
    for key, text in replacements.items():
        place, value = root_base ^ ord(key), len(texts)
        leaf = place ^ 128  # any free place: its label is 0, so it stands at the unit's base itself
        units[place] = ord(key) | 1 << 8 | (place ^ leaf) << 10
        units[leaf] = value | 1 << 31
        texts += text.encode() + b"\0"
    trie = struct.pack(f"<{len(units)}I", *units)
    return struct.pack("<I", len(trie)) + trie + texts


def test_spiece_model_normalisation_table(tmp_path):
    folder = model_folder(tmp_path, message(3, message(2, charsmap({"R": "r", "_": " "}))))
    assert tokens(folder, "a_Red__cat_") == [IDS["▁a"], IDS["▁red"], IDS["▁cat"], 1]


def test_spiece_model_saved_as_json_is_the_same(tmp_path):
    tokenizer = PromptTokenizer.from_folder(model_folder(tmp_path), 8)
    (tmp_path / "saved").mkdir()
    assert tokenizer.save(tmp_path / "saved").name == "tokenizer.json"
    again = PromptTokenizer.from_folder(tmp_path / "saved", 8)
    for text in ("a red cat", "cred zzz", "  a\u00a0cat", ""):
        np.testing.assert_array_equal(again(text).ids, tokenizer(text).ids)
    assert os.listdir(tmp_path / "saved") == ["tokenizer.json"]
    with_eos = Tokenizer.from_file(str(tmp_path / "saved" / "tokenizer.json")).encode("a red cat")
    assert with_eos.ids[-1] == 1, "other programs get </s> from the file itself"


@pytest.mark.parametrize("size", [5, 40, 77, 100])
def test_cut_off_spiece_model(tmp_path, size):
    path = tmp_path / "spiece.model"
    path.write_bytes((SPECIAL + NORMAL)[:size])
    with pytest.raises(UserError, match="spiece.model.*download it again"):
        PromptTokenizer.from_folder(tmp_path, 8)


@pytest.mark.parametrize(
    "data", [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", b"\x00" * 50, NORMAL]
)
def test_no_spiece_model(tmp_path, data):
    (tmp_path / "spiece.model").write_bytes(data)
    with pytest.raises(UserError, match="no sentencepiece model"):
        PromptTokenizer.from_folder(tmp_path, 8)


def test_other_kinds_of_spiece_model(tmp_path):
    with pytest.raises(UserError, match="not a unigram model.*tokenizer.json"):
        PromptTokenizer.from_folder(model_folder(tmp_path, message(2, number(3, 2))), 8)
    with pytest.raises(UserError, match="download it again"):
        PromptTokenizer.from_folder(model_folder(tmp_path, message(3, message(2, b"damaged"))), 8)


# MARK: lengths and files


def test_shapes_padding_and_truncation():
    tokenizer = train_unigram(PROMPTS, 128, max_length=6)
    batch = tokenizer(["a red circle", "a small red circle drifts left over a night sky", ""])
    assert batch.ids.shape == batch.mask.shape == (3, 6)
    assert batch.ids.dtype == batch.mask.dtype == batch.lengths.dtype == np.int32
    assert batch.lengths.tolist() == [4, 6, 1]
    assert batch.truncated.tolist() == [False, True, False]
    assert batch.ids[0, 3] == tokenizer.eos_id == 1 and batch.ids[0, 4:].tolist() == [tokenizer.pad_id] * 2 == [0, 0]
    assert batch.ids[1, 5] == 1, "</s> is kept"
    np.testing.assert_array_equal(batch.mask.sum(1), batch.lengths)
    np.testing.assert_array_equal(tokenizer("a red circle").ids[0], batch.ids[0])


def test_tokenizer_json_is_preferred_and_its_own_padding_ignored(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "cat": 3}, unk_token="<unk>"))
    tokenizer.enable_padding(length=3, pad_id=3)
    tokenizer.enable_truncation(1)
    tokenizer.save(str(model_folder(tmp_path) / "tokenizer.json"))
    assert PromptTokenizer.from_folder(tmp_path, 4)("cat").ids.tolist() == [[3, 1, 0, 0]]


def test_missing_or_broken_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"expected .*tokenizer\.json .*spiece\.model"):
        PromptTokenizer.from_folder(tmp_path, 8)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="no tokenizer file"):
        PromptTokenizer.from_folder(tmp_path, 8)
    with pytest.raises(UserError, match="no </s>"):
        PromptTokenizer(Tokenizer(models.WordLevel({"cat": 0})), 8)
    with pytest.raises(UserError, match="max_length is 1"):
        train_unigram(PROMPTS, 128, max_length=1)


# MARK: training


def test_trained_vocabulary_keeps_words_whole_and_spells_the_rest(tmp_path):
    tokenizer = train_unigram(PROMPTS, 256)
    assert tokenizer.vocab_size <= 256 and (tokenizer.pad_id, tokenizer.eos_id) == (0, 1)
    text = "a small red circle moves in circles over a field of snow"
    result = tokenizer(text)
    assert result.lengths[0] == len(text.split()) + 1
    assert tokenizer.decode(result.ids[0]) == text
    np.testing.assert_array_equal(
        tokenizer("A  SMALL Red circle moves in circles over a field of snow").ids, result.ids
    )
    assert 2 not in tokenizer("a tiny dog, 17 of them").ids, "no ASCII word is unknown"
    assert tokenizer.decode(tokenizer("a tiny dog, 17 of them").ids[0]) == "a tiny dog, 17 of them"
    assert 2 in tokenizer("猫").ids
    tokenizer.save(tmp_path)
    np.testing.assert_array_equal(PromptTokenizer.from_folder(tmp_path, 64)(PROMPTS).ids, tokenizer(PROMPTS).ids)


def test_a_small_vocabulary_drops_what_costs_least():
    full, small = train_unigram(PROMPTS, 256), train_unigram(PROMPTS, 64)
    assert small.vocab_size <= 64 < full.vocab_size
    assert small(PROMPTS).lengths.mean() > full(PROMPTS).lengths.mean()
    assert small.decode(small(PROMPTS[0]).ids[0]) == PROMPTS[0]


def test_training_is_deterministic(tmp_path):
    script = (
        "import sys; from longlive_jax.tokenizer import train_unigram\n"
        "train_unigram(sys.argv[2].split(';'), 80).save(sys.argv[1])"
    )
    for seed in ("1", "2"):  # of Python's hashes, which decide the order of sets
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[1])}
        command = [sys.executable, "-c", script, str(tmp_path / seed), ";".join(PROMPTS)]
        subprocess.run(command, check=True, env=environment)
    assert (tmp_path / "1" / "tokenizer.json").read_bytes() == (tmp_path / "2" / "tokenizer.json").read_bytes()


def test_training_refuses():
    with pytest.raises(UserError, match="no prompts"):
        train_unigram(["", "  "], 100)
    with pytest.raises(UserError, match="vocab_size is 20"):
        train_unigram(PROMPTS, 20)
