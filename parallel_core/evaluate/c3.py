"""C3: choosing answers to questions about Chinese dialogues (Sun et al. 2020, arXiv:1904.09679), as PanGu-Alpha does.

A choice is scored by how likely the dialogue is after the question and that answer; the likeliest wins, the first of
equal ones. The score is the sum of negative log-probabilities of the dialogue's tokens but the first, with that of the
padding token after the last one where there is room, divided by the window of 1024 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel_core.errors import ConfigError
from parallel_core.evaluate.score import logprobs_of
from parallel_core.files import read_regular
from parallel_core.generate.generator import Generator
from parallel_core.records import parse_json

WINDOW = 1024
_LARGEST_FILE = 1 << 28


@dataclass(frozen=True)
class Question:
    """A question about a dialogue, its choices, and which one is right."""

    context: str
    question: str
    choices: tuple[str, ...]
    answer: int

    def texts(self) -> list[tuple[str, str]]:
        """Return for each choice what comes before the dialogue, and all of it."""
        heads = [f"问：{self.question}\n答：{choice}\n该答案来自对话：" for choice in self.choices]
        return [(head, head + self.context) for head in heads]


def read_questions(path: Path) -> list[Question]:
    """Return the questions of a file of C3 (`c3-d-dev.json` and others of its form).

    Raises:
        ConfigError: it cannot be read, or has another form.
    """
    try:
        data = read_regular(path, _LARGEST_FILE)
    except OSError as error:
        raise ConfigError(f"--data {path}: {error.strerror or error}") from None
    found = []
    try:
        for lines, questions, *_ in parse_json(data, str(path), ConfigError):
            for one in questions:
                choices = tuple(one["choice"])
                answer = choices.index(one["answer"])
                if not all(isinstance(text, str) for text in (*lines, *choices, one["question"])):
                    raise TypeError
                found.append(Question("".join(lines), one["question"], choices, answer))
    except (TypeError, KeyError, ValueError, AttributeError):
        raise ConfigError(
            f"--data {path}: is no file of C3: a list of [lines, [{{question, choice, answer}}], id]"
        ) from None
    if not found:
        raise ConfigError(f"--data {path}: has no questions")
    return found


def evaluate(it: Generator, questions: list[Question]) -> dict[str, Any]:
    """Return `top1_acc`, the share of questions whose right answer wins, and how many there are.

    Raises:
        ConfigError: the model has no tokenizer.
    """
    right = 0
    for question in questions:
        scores = scores_of(it, question)
        right += scores.index(min(scores)) == question.answer
    return {"top1_acc": right / len(questions), "questions": len(questions)}


def scores_of(it: Generator, question: Question) -> list[float]:
    """Return the score of each choice; the lowest wins."""
    window, rows, firsts = min(WINDOW, it.max_length), [], []
    for head, text in question.texts():
        tokens = it.tokens_of(text)[:window]
        pad = it.tokenizer.pad if it.tokenizer is not None else None
        firsts.append(len(it.tokens_of(head)))
        rows.append([*tokens, pad] if pad is not None and len(tokens) < window else tokens)
    found = logprobs_of(it, rows)
    return [-sum(x.logprob for x in logprobs[first:]) / WINDOW for logprobs, first in zip(found, firsts)]
