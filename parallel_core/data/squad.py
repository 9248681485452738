"""Questions on paragraphs (SQuAD v1.1) as samples: windows over a context, and where in one the answer stands.

A context is cut at white space into words and these into pieces; windows of pieces follow one another at a stride, each
after the question. The features are those of `transformers`' `squad_convert_examples_to_features`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from parallel_core.data.epochs import EpochOrder
from parallel_core.data.files import read_json
from parallel_core.data.tokenizer.wordpiece import BertWordPieceTokenizer
from parallel_core.errors import ConfigError, DataError

TRAIN, DEV = "train-v1.1.json", "dev-v1.1.json"
_SPACES = " \t\r\n\u202f"


@dataclass(frozen=True)
class Question:
    """One question on one context.

    Attributes:
        name: its id.
        text: the question.
        context: where the answer stands.
        answers: (text, first character) of each answer that counts as right.
    """

    name: str
    text: str
    context: str
    answers: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Words:
    """A context's words: (first character, one after the last) of each, and which one every character belongs to."""

    spans: tuple[tuple[int, int], ...]
    of_character: tuple[int, ...]


@dataclass(frozen=True)
class Feature:
    """A question and one window over its context.

    Attributes:
        question: number of the question.
        tokens: ids, without padding.
        first: position of the window's first piece.
        words: number of the word that each of the window's pieces is of.
        max_context: for each of them, whether no other window has more around it.
        start: position of the answer's first piece; 0 without the whole answer in the window.
        end: position of its last piece.
    """

    question: int
    tokens: tuple[int, ...]
    first: int
    words: tuple[int, ...]
    max_context: tuple[bool, ...]
    start: int = 0
    end: int = 0


def read_squad(path: str | Path, name: str = TRAIN) -> list[Question]:
    """Return the questions of a file in SQuAD v1.1's form.

    Args:
        path: the file, or the folder that holds it.
        name: the file's name in a folder.

    Raises:
        DataError: the file cannot be read or has another form; the place is named.
    """
    file = Path(path) / name if Path(path).is_dir() else Path(path)
    found = read_json(str(file))
    questions: list[Question] = []
    try:
        for article in found["data"]:
            for paragraph in article["paragraphs"]:
                for asked in paragraph["qas"]:
                    answers = tuple((str(a["text"]), int(a["answer_start"])) for a in asked["answers"])
                    context, text = paragraph["context"], asked["question"]
                    if not isinstance(context, str) or not isinstance(text, str):
                        raise TypeError("a context or question is no text")
                    if any(not 0 <= at <= len(context) for _, at in answers):
                        raise ValueError(f"an answer of {asked['id']!r} starts outside its context")
                    questions.append(Question(str(asked["id"]), text, context, answers))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file}, after {len(questions)} questions: no SQuAD v1.1 ({error!r})") from None
    if not questions:
        raise DataError(f"{file} has no questions")
    return questions


def words_of(context: str) -> Words:
    """Return the words of a context, which white space parts."""
    spans: list[list[int]] = []
    of_character, outside = [], True
    for at, c in enumerate(context):
        if c in _SPACES:
            outside = True
        elif outside:
            spans.append([at, at + 1])
            outside = False
        else:
            spans[-1][1] = at + 1
        of_character.append(max(len(spans) - 1, 0))
    return Words(tuple((a, b) for a, b in spans), tuple(of_character))


def features_of(
    questions: Sequence[Question],
    tokenizer: BertWordPieceTokenizer,
    *,
    seq_length: int,
    doc_stride: int = 128,
    max_query_length: int = 64,
    training: bool = False,
) -> list[Feature]:
    """Return the windows of every question, in order.

    In training the first answer of each question counts; one whose answer does not stand where it should is left out.

    Args:
        questions: what is asked.
        tokenizer: of questions and contexts.
        seq_length: positions of a window with its question.
        doc_stride: pieces between the beginnings of two windows.
        max_query_length: pieces of a question that are kept.
        training: look for answers.

    Raises:
        ConfigError: questions leave a window no room for the stride.
    """
    room = seq_length - max_query_length - 3
    if doc_stride < 1 or max_query_length < 1 or room < doc_stride:
        raise ConfigError(
            f"seq_length={seq_length} less max_query_length={max_query_length} and 3 leaves windows of {room} pieces; "
            f"doc_stride={doc_stride} must be 1 to that"
        )
    found: list[Feature] = []
    for number, question in enumerate(questions):
        words = words_of(question.context)
        pieces: list[int] = []
        of_word: list[int] = []
        firsts: list[int] = []
        for index, (begin, end) in enumerate(words.spans):
            firsts.append(len(pieces))
            ids = tokenizer.tokenize(question.context[begin:end])
            pieces += ids
            of_word += [index] * len(ids)
        answer = (0, -1)
        if training:
            span = _answer_pieces(question, words, pieces, firsts, tokenizer)
            if span is None:
                continue
            answer = span
        query = tokenizer.tokenize(question.text)[:max_query_length]
        found += _windows(number, query, pieces, of_word, answer, tokenizer, seq_length, doc_stride)
    return found


def _answer_pieces(
    question: Question, words: Words, pieces: list[int], firsts: list[int], tokenizer: BertWordPieceTokenizer
) -> tuple[int, int] | None:
    """Return the first and the last piece of the answer, narrowed to its own text; None where it is not there."""
    if not question.answers or not words.spans:
        return None
    text, at = question.answers[0]
    last = min(at + len(text) - 1, len(words.of_character) - 1)
    first_word, last_word = words.of_character[min(at, last)], words.of_character[max(last, 0)]
    there = " ".join(question.context[a:b] for a, b in words.spans[first_word : last_word + 1])
    if " ".join(text.split()) not in there:
        return None
    begin = firsts[first_word]
    end = (firsts[last_word + 1] if last_word + 1 < len(firsts) else len(pieces)) - 1
    wanted = tokenizer.tokenize(text)
    for new_begin in range(begin, end + 1 if wanted else begin):
        new_end = new_begin + len(wanted) - 1
        if new_end <= end and pieces[new_begin : new_end + 1] == wanted:
            return new_begin, new_end
    return begin, end


def _windows(
    number: int,
    query: list[int],
    pieces: list[int],
    of_word: list[int],
    answer: tuple[int, int],
    tokenizer: BertWordPieceTokenizer,
    seq_length: int,
    doc_stride: int,
) -> Iterable[Feature]:
    width, first = seq_length - len(query) - 3, len(query) + 2
    begins = [0] if pieces else []
    while begins and begins[-1] + width < len(pieces):
        begins.append(begins[-1] + doc_stride)
    spans = [(begin, min(width, len(pieces) - begin)) for begin in begins]
    for begin, length in spans:
        inside = begin <= answer[0] and answer[1] < begin + length and answer[1] >= 0
        yield Feature(
            number,
            (tokenizer.cls, *query, tokenizer.sep, *pieces[begin : begin + length], tokenizer.sep),
            first,
            tuple(of_word[begin : begin + length]),
            tuple(_fullest(spans, position) == begin for position in range(begin, begin + length)),
            answer[0] - begin + first if inside else 0,
            answer[1] - begin + first if inside else 0,
        )


def _fullest(spans: Sequence[tuple[int, int]], position: int) -> int:
    """Return the beginning of the window that has most around a piece, the first of equals."""
    best, chosen = -1.0, -1
    for begin, length in spans:
        if begin <= position < begin + length:
            score = min(position - begin, begin + length - 1 - position) + 0.01 * length
            if score > best:
                best, chosen = score, begin
    return chosen


def as_arrays(features: Sequence[Feature], seq_length: int, pad: int) -> dict[str, np.ndarray]:
    """Return a batch of features: int32 [B, S] tokens, mask and segments, int32 [B] positions of the answer."""
    shape = (len(features), seq_length)
    batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "attention_mask", "tokentype_ids")}
    batch["tokens"][:] = pad
    for row, feature in enumerate(features):
        count = len(feature.tokens)
        batch["tokens"][row, :count], batch["attention_mask"][row, :count] = feature.tokens, 1
        batch["tokentype_ids"][row, feature.first : count] = 1
    batch["start_positions"] = np.array([feature.start for feature in features], np.int32)
    batch["end_positions"] = np.array([feature.end for feature in features], np.int32)
    return batch


@dataclass
class SpanDataset:
    """Features as samples, shuffled anew in every epoch.

    Attributes:
        features: the windows.
        num_samples: how many samples are drawn, over several epochs.
        seq_length: positions of a sample.
        pad: the tokenizer's id of padding.
        seed: of the order.
    """

    features: list[Feature]
    num_samples: int
    seq_length: int
    pad: int
    seed: int

    def __post_init__(self) -> None:
        self._order = EpochOrder(len(self.features), self.seed)

    @property
    def samples_per_epoch(self) -> int:
        """Number of features."""
        return len(self.features)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Return sample `index`: see `as_arrays`, without the leading dim."""
        feature = self.features[self._order.place(index, self.num_samples)]
        batch = as_arrays([feature], self.seq_length, self.pad)
        return {name: array[0] for name, array in batch.items()}

    def order(self) -> dict[str, Any]:
        """Return what decides which sample comes when."""
        digest = hashlib.sha256(repr([(f.tokens, f.start, f.end) for f in self.features]).encode()).hexdigest()
        return {"class": "SpanDataset", "features_sha256": digest, "random_seed": self.seed}
