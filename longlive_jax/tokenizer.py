"""Prompts to token ids as Wan 2.1 does it, and a small vocabulary for models of our own.

`clean` is Wan's prompt cleaning. `PromptTokenizer` wraps the `tokenizers` library: from a checkpoint folder's
`tokenizer.json`, or from its `spiece.model` (a sentencepiece protobuf, read here without the sentencepiece package),
or trained on prompts. All end each prompt with `</s>` and pad to one length, as umT5 expects.
"""

import html
import math
import os
import re
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from longlive_jax.errors import UserError
from longlive_jax.files import whole_file

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"  # ids 0, 1, 2 in umT5's vocabulary and in ours
SPACE = "\u2581"  # sentencepiece's visible space: it starts every word
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # sentencepiece's piece types that matter here
UNIGRAM = 1  # its model type

MAX_BYTES = 256 * 2**20
"""umT5's tokenizer.json has 17 MB. A larger file is none and is not read."""


PLAIN = re.compile(r"[\t\n -%'-~]*")
"""ASCII without "&" and control characters: ftfy and HTML have nothing to mend in it."""


def clean(text: str) -> str:
    """Wan's prompt cleaning: mends mojibake, unescapes HTML twice, makes each run of white space one blank, strips."""
    if PLAIN.fullmatch(text) is None:
        import ftfy  # here, so that weights can be converted and recorded without it

        text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip()


class Tokens(NamedTuple):
    """A batch of tokenised prompts.

    Attributes:
      ids: int32 `[B, L]`, each row ending in `</s>` and then padding.
      mask: int32 `[B, L]`, 1 on tokens (`</s>` included), 0 on padding.
      truncated: bool `[B]`, which prompts lost their end.
    """

    ids: np.ndarray
    mask: np.ndarray
    truncated: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Tokens a prompt, `</s>` included: int32 `[B]`."""
        return self.mask.sum(axis=1, dtype=np.int32)


class PromptTokenizer:
    """Cleans and tokenises prompts to a fixed length.

    Attributes:
      max_length: tokens L a prompt is padded or cut to, `</s>` included.
      pad_id, eos_id: ids of `<pad>` and `</s>`.
    """

    def __init__(self, tokenizer: Tokenizer, max_length: int):
        """Wraps a `tokenizers.Tokenizer` that knows `</s>`; its own padding and truncation are switched off.

        Raises:
          UserError: there is no `</s>`, or `max_length` leaves no room for a token before it.
        """
        if max_length < 2:
            raise UserError(f"max_length is {max_length}; a prompt needs at least 2 tokens, one of them {EOS}")
        self.eos_id = tokenizer.token_to_id(EOS)
        if self.eos_id is None:
            raise UserError(f"the tokenizer has no {EOS} token; umT5 needs one, so use the tokenizer of its folder")
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.pad_id = tokenizer.token_to_id(PAD) or 0
        self.max_length = max_length
        self._tokenizer, self._where = tokenizer, "the tokenizer"

    @classmethod
    def from_folder(cls, folder: str | os.PathLike, max_length: int) -> Self:
        """Reads `tokenizer.json`, or else `spiece.model`, in `folder`.

        Raises:
          UserError: neither is there, or the file is broken.
        """
        json_file, model_file = Path(folder) / "tokenizer.json", Path(folder) / "spiece.model"
        for file in (json_file, model_file):
            if file.is_file() and file.stat().st_size > MAX_BYTES:
                raise UserError(
                    f"{file} is larger than {MAX_BYTES // 2**20} MB, which no tokenizer is; download it again"
                )
        if json_file.is_file():
            try:
                tokenizer = Tokenizer.from_file(str(json_file))
            except Exception as error:  # the library raises bare Exception
                raise UserError(f"{json_file} is no tokenizer file ({error}); download it again") from error
        elif model_file.is_file():
            model = read_sentencepiece(model_file)
            try:
                tokenizer = _from_sentencepiece(model)
            except Exception as error:  # bare Exception again, for a damaged normalisation table
                raise UserError(f"{model_file} holds no usable vocabulary ({error}); download it again") from error
        else:
            raise UserError(
                f"no tokenizer in {folder}: expected {json_file} (or {model_file}); "
                "copy it there from the model's repository (Wan: google/umt5-xxl/)"
            )
        try:
            made = cls(tokenizer, max_length)
        except UserError as error:
            raise UserError(f"{json_file if json_file.is_file() else model_file}: {error}") from None
        made._where = str(json_file if json_file.is_file() else model_file)
        return made

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return self._tokenizer.get_vocab_size()

    def __call__(self, prompts: str | Sequence[str]) -> Tokens:
        """Tokenises one prompt or a batch; a prompt that is too long is cut before its `</s>`, which stays."""
        texts = [clean(text) for text in ([prompts] if isinstance(prompts, str) else prompts)]
        try:
            encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        except BaseException as error:  # the library's panics are no Exception, and it does not export their class
            if type(error).__name__ != "PanicException":
                raise
            raise UserError(f"{self._where} is damaged ({error}); download it again") from error
        ids = np.full((len(texts), self.max_length), self.pad_id, np.int32)
        mask = np.zeros_like(ids)
        truncated = np.zeros(len(texts), bool)
        for row, encoding in enumerate(encodings):
            kept = encoding.ids[: self.max_length - 1]
            ids[row, : len(kept) + 1] = [*kept, self.eos_id]
            mask[row, : len(kept) + 1] = 1
            truncated[row] = len(kept) < len(encoding.ids)
        return Tokens(ids, mask, truncated)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a row of ids, without padding and `</s>`."""
        return self._tokenizer.decode([int(i) for i in ids if i not in (self.pad_id, self.eos_id)])

    def same_as(self, other: Self) -> bool:
        """Whether both have the same pieces and rules; how long they make a prompt does not count."""
        return self._tokenizer.to_str() == other._tokenizer.to_str()

    def save(self, folder: str | os.PathLike) -> Path:
        """Writes `tokenizer.json` into `folder`, whole or not at all; returns its path."""
        path = Path(folder) / "tokenizer.json"
        with whole_file(path) as partial:
            partial.write_text(self._tokenizer.to_str(pretty=True), encoding="utf-8")
        return path


# MARK: sentencepiece's ModelProto


@dataclass(frozen=True)
class SentencePieceModel:
    """What a unigram `spiece.model` says.

    Attributes:
      pieces: (text, log probability, type) a token id.
      charsmap: sentencepiece's compiled normalisation table, empty for none.
      add_dummy_prefix: a blank goes before the text, so that the first word is like every other.
      remove_extra_whitespaces: runs of blanks become one, those at the ends none.
      byte_fallback: characters without a piece become their UTF-8 bytes' pieces rather than `<unk>`.
    """

    pieces: tuple[tuple[str, float, int], ...]
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    byte_fallback: bool


def read_sentencepiece(path: str | os.PathLike) -> SentencePieceModel:
    """Reads a sentencepiece model file (protobuf `ModelProto`; field numbers are from sentencepiece_model.proto).

    Raises:
      UserError: the file is no such model, is cut off, or is not a unigram model as T5's are.
    """
    pieces, trainer, normalizer = [], {}, {}
    try:
        for field, value in _wire_fields(memoryview(Path(path).read_bytes())):
            if field == 1:
                piece = dict(_wire_fields(value))
                score = struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0
                pieces.append((str(piece[1], "utf-8"), score, piece.get(3, NORMAL)))
            elif field == 2:
                trainer = dict(_wire_fields(value))
            elif field == 3:
                normalizer = dict(_wire_fields(value))
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise UserError(f"{path} is no sentencepiece model, or is cut off; download it again") from error
    if not any(kind == UNKNOWN for _, _, kind in pieces):
        raise UserError(f"{path} is no sentencepiece model: it has no pieces or no unknown token; download it again")
    if trainer.get(3, UNIGRAM) != UNIGRAM or trainer.get(24, 0):  # model_type, treat_whitespace_as_suffix
        raise UserError(f"{path} is not a unigram model as T5's are; put a tokenizer.json beside it instead")
    return SentencePieceModel(
        pieces=tuple(pieces),
        charsmap=bytes(normalizer.get(2, b"")),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        byte_fallback=bool(trainer.get(35, 0)),
    )


def _wire_fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The (field number, value) pairs of a protobuf message; bytes-like values are left as they are."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        kind = tag & 7
        if kind == 0:
            value, position = _varint(data, position)
        elif kind in (1, 2, 5):
            size = {1: 8, 5: 4}.get(kind)
            if size is None:
                size, position = _varint(data, position)
            value, position = data[position : position + size], position + size
            if position > len(data):
                raise ValueError("message is cut off")
        else:
            raise ValueError(f"wire type {kind} is not used by sentencepiece")
        yield tag >> 3, value


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            raise ValueError("message is cut off")
        byte, position = data[position], position + 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("number longer than 64 bits")


def _from_sentencepiece(model: SentencePieceModel) -> Tokenizer:
    """The same tokeniser in the `tokenizers` library: normalisation table, blanks, then the best unigram split."""
    unk_id = next(index for index, (_, _, kind) in enumerate(model.pieces) if kind == UNKNOWN)
    scores = [(text, score) for text, score, _ in model.pieces]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id, model.byte_fallback))
    steps = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    added = [
        AddedToken(text, normalized=False, special=kind != USER_DEFINED)
        for text, _, kind in model.pieces
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    return _assemble(tokenizer, steps, added, "always" if model.add_dummy_prefix else "never")


def _assemble(
    tokenizer: Tokenizer, steps: Sequence[normalizers.Normalizer], added: Sequence[AddedToken], prefix: str
) -> Tokenizer:
    """Puts what comes before and after the unigram model round it, as transformers does for T5."""
    tokenizer.add_tokens(list(added))
    tokenizer.normalizer = normalizers.Sequence(list(steps))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=prefix)
    tokenizer.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme=prefix)
    if tokenizer.token_to_id(EOS) is not None:  # for others who load the saved tokenizer.json; we append it ourselves
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {EOS}", special_tokens=[(EOS, tokenizer.token_to_id(EOS))]
        )
    return tokenizer


# MARK: a small vocabulary of our own

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789.,;:'\"-!?()"
MAX_PIECE = 16  # characters


def train_unigram(prompts: Iterable[str], vocab_size: int, max_length: int = 64) -> PromptTokenizer:
    """Learns a unigram vocabulary of at most `vocab_size` tokens; the same prompts always give the same one.

    Our own few lines, since the library's trainer gives other pieces on every run and, on a few hundred different
    words, keeps hardly any whole. As in sentencepiece: start from frequent substrings, split all words the best way,
    re-estimate, and drop the pieces whose loss costs least. Text is lower-cased; single characters always stay.

    Raises:
      UserError: there are no prompts, or `vocab_size` is too small for the single characters.
    """
    steps = [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    normalise = normalizers.Sequence(steps)
    texts = (normalise.normalize_str(clean(text)) for text in prompts)
    words = Counter(SPACE + word for text in texts for word in text.split())
    if not words:
        raise UserError("there are no prompts to learn a vocabulary from; give at least one")
    characters = sorted({*SPACE, *ALPHABET, *"".join(words)})
    room = vocab_size - 3 - len(characters)
    if room < 0:
        raise UserError(f"vocab_size is {vocab_size}; {3 + len(characters)} are needed for the single characters alone")
    scores = _learn_pieces(words, characters, room)
    ordered = sorted(scores.items(), key=lambda item: (-item[1], item[0]))
    tokenizer = Tokenizer(models.Unigram([(PAD, 0.0), (EOS, 0.0), (UNK, 0.0), *ordered], 2))
    added = [AddedToken(token, normalized=False, special=True) for token in (PAD, EOS, UNK)]
    return PromptTokenizer(_assemble(tokenizer, steps, added, "always"), max_length)


def _learn_pieces(words: Counter[str], characters: Sequence[str], room: int) -> dict[str, float]:
    """Log probabilities of `characters` and of the `room` longer pieces that serve `words` best."""
    found: Counter[str] = Counter()
    for word, count in words.items():
        for start in range(len(word)):
            for end in range(start + 2, min(len(word), start + MAX_PIECE) + 1):
                found[word[start:end]] += count
    gain = {piece: count * len(piece) for piece, count in found.items() if count > 1}
    seeds = sorted(gain, key=lambda piece: (-gain[piece], piece))[: 8 * room]
    scores = _log_shares({**{piece: gain[piece] for piece in seeds}, **dict.fromkeys(characters, 0)})
    while True:
        used: Counter[str] = Counter()
        for word, count in words.items():
            for piece in _best_split(word, scores):
                used[piece] += count
        long = [piece for piece in scores if len(piece) > 1]
        scores = _log_shares({piece: used[piece] for piece in scores})
        if len(long) <= room:  # a long piece that no word uses would only be an id that training never sees
            return {piece: score for piece, score in scores.items() if used[piece] or len(piece) == 1}
        loss = {piece: _loss(piece, used[piece], scores) for piece in long}
        keep = max(room, len(long) * 3 // 4)
        long = sorted(long, key=lambda piece: (-loss[piece], -gain[piece], piece))[:keep]
        scores = {piece: scores[piece] for piece in (*long, *characters)}


def _log_shares(counts: dict[str, int]) -> dict[str, float]:
    """Log of each count's share; half a count for those never seen, and rounded so that the last bit cannot matter."""
    total = math.log(sum(counts.values()) + 1)
    return {piece: round(math.log(max(count, 0.5)) - total, 6) for piece, count in counts.items()}


def _loss(piece: str, count: int, scores: dict[str, float]) -> float:
    """What the words' log probability loses without `piece`: its own against that of the next best split."""
    others = {key: value for key in _substrings(piece) if key != piece and (value := scores.get(key)) is not None}
    return count * (scores[piece] - sum(others[part] for part in _best_split(piece, others)))


def _substrings(text: str) -> set[str]:
    return {text[start:end] for start in range(len(text)) for end in range(start + 1, len(text) + 1)}


def _best_split(word: str, scores: dict[str, float]) -> list[str]:
    """The split of `word` into known pieces with the highest sum of scores (Viterbi)."""
    best: list[tuple[float, int]] = [(0.0, 0)]
    for end in range(1, len(word) + 1):
        starts = range(max(0, end - MAX_PIECE), end)
        best.append(
            max((best[start][0] + scores[word[start:end]], start) for start in starts if word[start:end] in scores)
        )
    parts, end = [], len(word)
    while end:
        parts.append(word[best[end][1] : end])
        end = best[end][1]
    return parts[::-1]
