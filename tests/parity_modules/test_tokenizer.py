"""Our prompts to ids against sentencepiece's own, transformers' T5 tokenizer and diffusers' cleaning of prompts.

The vocabulary is trained here, by sentencepiece, as umT5's was: unigram, its NFKC table, `<pad>`, `</s>` and `<unk>`
first, sentinels as symbols of their own.
"""

import io
import random

import numpy as np
import pytest
import sentencepiece
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, T5Tokenizer

from longlive_jax.tokenizer import PromptTokenizer, clean

LENGTH = 24
WORDS = (
    "a the red green blue circle square star moon drifts left right over night sky ocean field of snow slowly "
    "cinematic camera cat dog 1080p wide-angle it's don't café naïve"
).split()
CHINESE = "一只猫在雪地里慢慢走过红色的月亮星空下海洋蓝色镜头推进人物微笑夜晚城市"
PROMPTS = [
    "a red cat",
    "  a   red\tcat\n over the  night sky. ",
    "一只猫在雪地里慢慢走过，镜头推进。",
    "红色的月亮 over the ocean",
    "ｗｉｄｅ-angle ﬁeld, ①②½",  # full width, a ligature, compatibility characters
    "schÃ¶n, itâ€™s a cafÃ©",  # mojibake
    "cats &amp;amp; dogs &lt;b&gt; &nbsp; a<b &amp;amp; c",
    "café and cafe\u0301, Ünïcode",
    "🎬 🦊 ∑ Привет שלום",  # not in the vocabulary
    "a\u200bred\u00a0cat\u3000\ufeffdog",
    "zzzqqq",
    "▁a red",  # sentencepiece's own blank
    "",
    "   ",
    " ".join(["a slow red star drifts over the ocean"] * 5),  # too long
]


def train(folder, byte_fallback: bool):
    """Writes a spiece.model."""
    rng = random.Random(0)
    lines = [" ".join(rng.choices(WORDS, k=rng.randint(3, 12))) + rng.choice([".", "!", ", ", ""]) for _ in range(900)]
    lines += ["".join(rng.choices(CHINESE, k=rng.randint(4, 14))) + rng.choice(["。", "，"]) for _ in range(300)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=500, hard_vocab_limit=False, model_type="unigram",
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, byte_fallback=byte_fallback, num_threads=1, minloglevel=2,
        user_defined_symbols=["<extra_id_1>", "<extra_id_0>"],
    )  # fmt: skip
    (folder / "spiece.model").write_bytes(model.getvalue())
    return folder


@pytest.fixture(scope="module", params=[False, True], ids=["unknown", "bytes"])
def folder(request, tmp_path_factory):
    """A folder with a spiece.model; what is not in the vocabulary becomes `<unk>` or, as in umT5, bytes."""
    return train(tmp_path_factory.mktemp("spiece"), request.param)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Without bytes for unknown characters: transformers 5 reads such a model as if it had none."""
    return train(tmp_path_factory.mktemp("plain"), False)


@pytest.fixture(scope="module")
def theirs(plain):
    return T5Tokenizer.from_pretrained(plain, extra_ids=0)


def padded(tokenizer, prompts):
    """Their ids and mask, called as their Wan pipeline does it."""
    options = dict(padding="max_length", max_length=LENGTH, truncation=True, add_special_tokens=True)
    batch = tokenizer([prompt_clean(p) for p in prompts], return_tensors="np", **options)
    return batch.input_ids, batch.attention_mask


def equal(tokens, expected):
    for got, want in zip((tokens.ids, tokens.mask), expected):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_cleaning(prompt):
    assert clean(prompt) == prompt_clean(prompt)


@settings(max_examples=300, deadline=None)
@given(st.text() | st.text(st.sampled_from("a <>&;#x26amp\t\n\u00a0Ã¶â€™é")))
def test_cleaning_of_anything(text):
    assert clean(text) == prompt_clean(text)


def test_ids_are_sentencepieces(folder):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    tokens = PromptTokenizer.from_folder(folder, 512)(PROMPTS)
    for prompt, ids, length in zip(PROMPTS, tokens.ids, tokens.lengths):
        assert ids[:length].tolist() == [*processor.encode(prompt_clean(prompt)), processor.eos_id()], prompt


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from([*WORDS, *CHINESE, *"é🎬ß，", "ﬁ", "②"]), max_size=30).map(" ".join) | st.text(max_size=20)
)
def test_ids_of_anything(folder, text):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    tokens = PromptTokenizer.from_folder(folder, 512)(text)
    assert tokens.ids[0, : tokens.lengths[0]].tolist() == [*processor.encode(clean(text)), 1]


def test_batches_are_transformers(plain, theirs):
    """Padding, truncation before the `</s>`, the mask."""
    tokens = PromptTokenizer.from_folder(plain, LENGTH)(PROMPTS)
    equal(tokens, padded(theirs, PROMPTS))
    assert tokens.truncated.any() and not tokens.truncated.all()


def test_special_tokens_in_a_prompt(plain, theirs):
    """Here sentencepiece alone would spell them out."""
    prompts = ["<extra_id_0> red", "a </s> b", "a<pad>b", "red<extra_id_1>moon"]
    equal(PromptTokenizer.from_folder(plain, LENGTH)(prompts), padded(theirs, prompts))


def test_their_tokenizer_json(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    assert not (tmp_path / "spiece.model").exists()
    equal(PromptTokenizer.from_folder(tmp_path, LENGTH)(PROMPTS), padded(theirs, PROMPTS))


def test_our_tokenizer_json(folder, tmp_path):
    """Ours, saved, is the same for transformers, bytes included."""
    tokenizer = PromptTokenizer.from_folder(folder, LENGTH)
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "TokenizersBackend", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}'
    )
    equal(tokenizer(PROMPTS), padded(AutoTokenizer.from_pretrained(tmp_path), PROMPTS))


def test_a_missing_step_would_be_seen(plain, theirs):
    """Without cleaning the ids of these prompts are others, so the tests above would fail without it."""
    for prompt in (PROMPTS[5], PROMPTS[6]):
        assert theirs(prompt).input_ids != theirs(prompt_clean(prompt)).input_ids
