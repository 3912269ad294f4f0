"""Teacher and critic must read prompts as the student does: same text encoder, same tokeniser, in whatever dtype."""

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from longlive_jax import checkpoint
from longlive_jax.errors import UserError
from longlive_jax.tokenizer import PromptTokenizer, train_unigram
from longlive_jax.training.stage_config import InitTrainConfig
from longlive_jax.training.stages.distillation import InitStage


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    """A checkpoint of the sizes of `--smoke`, with random numbers."""
    stage = InitStage(InitTrainConfig().shrunk(), Path("none"), lambda line: None)
    folder, rng = tmp_path_factory.mktemp("student") / "checkpoint", np.random.default_rng(0)
    shapes = {part: checkpoint.abstract_params(part, getattr(stage.model, part)) for part in checkpoint.MODULES}
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)
    checkpoint.save(folder, stage.model, params, stage._tokenizer)
    return folder


def made(student: Path, folder: Path, *, dtype=None, change=None, tokenizer=None, parts=checkpoint.MODULES) -> Path:
    """The student again, with changes."""
    config = checkpoint.load_config(student)
    params = {part: checkpoint.load(student, part) for part in parts}
    if change is not None:
        change(params)
    tokenizer = tokenizer or PromptTokenizer.from_folder(student, config.transformer.text_length)
    checkpoint.save(folder, config, params, tokenizer, dtype=dtype)
    return folder


def begin(student: Path, **folders: Path) -> InitStage:
    config = InitTrainConfig().shrunk()
    text = checkpoint.load_config(student).text_encoder
    folders = {role: str(folder) for role, folder in folders.items()}
    config = dataclasses.replace(config, init=str(student), text_encoder=text, **folders)
    return InitStage(config, student.parent / "run", lambda line: None)


def nudge(params) -> None:
    params["text_encoder"]["token_embedding"] = params["text_encoder"]["token_embedding"] + 0.1


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("role", ["teacher", "critic"])
def test_another_text_encoder_is_refused(student, tmp_path, role, dtype):
    other = made(student, tmp_path / "other", change=nudge, dtype=dtype)
    message = rf"^the text encoder of {role} .*other is not the student's .*--init STUDENT --no-train-text-encoder$"
    with pytest.raises(UserError, match=message):
        begin(student, **{"teacher": student, role: other})


def test_another_tokenizer_is_refused(student, tmp_path):
    size = PromptTokenizer.from_folder(student, 24).vocab_size
    words = train_unigram(["one prompt", "another prompt of other words"], size, max_length=24)
    other = made(student, tmp_path / "other", tokenizer=words)
    with pytest.raises(UserError, match="^the tokenizer of teacher .*other is not the student's"):
        begin(student, teacher=other)


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
def test_the_same_text_encoder_is_taken_in_any_dtype(student, tmp_path, dtype):
    def learnt(params):
        params["transformer"] = jax.tree.map(lambda a: 2 * a, params["transformer"])

    other = made(student, tmp_path / "other", dtype=dtype, change=learnt)
    assert begin(student, teacher=other).sources.keys() == {"init", "vae", "teacher", "critic"}


def test_int8_says_nothing_of_what_it_rounds(student, tmp_path):
    config, size = checkpoint.load_config(student), PromptTokenizer.from_folder(student, 24)
    for name, change in (("same", None), ("other", nudge)):
        source = made(student, tmp_path / name, change=change)
        files = {p: checkpoint.open_part(source, p, getattr(config, p)) for p in checkpoint.MODULES}
        tensors = {p: checkpoint.stored_tensors(f) for p, f in files.items()}
        tensors["text_encoder"] = checkpoint.quantized(tensors["text_encoder"], "text_encoder", config.text_encoder)
        target = tmp_path / f"{name}-int8"
        checkpoint.save(target, config, tensors, size, quantization={"text_encoder": "int8"})
    assert checkpoint.same_part(student, tmp_path / "same-int8", "text_encoder")
    assert not checkpoint.same_part(student, tmp_path / "other-int8", "text_encoder")


def test_checkpoints_without_text_are_taken(student, tmp_path):
    other = made(student, tmp_path / "other", parts=("transformer", "vae"))
    (other / "tokenizer.json").unlink()
    begin(student, teacher=other)
    gone = tmp_path / "gone"
    shutil.copytree(student, gone)
    (gone / "text_encoder.safetensors").unlink()
    begin(student, teacher=gone)


def test_tensors_without_hashes_are_read(student, tmp_path, monkeypatch):
    """Not ours: values are compared."""
    other = made(student, tmp_path / "other", change=nudge)
    opened = checkpoint.SafetensorsPart.open

    def bare(path):
        files = opened(path)
        for file in files.files:
            file.metadata = {}
        return files

    monkeypatch.setattr(checkpoint.SafetensorsPart, "open", bare)
    assert checkpoint.same_part(student, student, "text_encoder")
    assert not checkpoint.same_part(student, other, "text_encoder")
    monkeypatch.setattr(checkpoint, "COMPARED", 0)
    assert checkpoint.same_part(student, other, "text_encoder"), "too large to be read"
