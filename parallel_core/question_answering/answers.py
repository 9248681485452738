"""From begin and end logits to answers, and how right they are: n-best lists, exact match and F1 of SQuAD v1.1."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from parallel_core.data.squad import Feature, Question, words_of
from parallel_core.data.tokenizer.wordpiece import BertWordPieceTokenizer, basic_words

_PUNCTUATION = set(string.punctuation)


@dataclass(frozen=True)
class Answer:
    """A part of a context.

    Attributes:
        text: `context[start:end]`; empty where nothing can be an answer.
        probability: its share among the answers that are kept.
        start: its first character.
        end: the one after its last.
    """

    text: str
    probability: float
    start: int
    end: int

    def as_dict(self) -> dict[str, object]:
        """Return text, score (to four places), start and end."""
        return {"text": self.text, "score": round(self.probability, 4), "start": self.start, "end": self.end}


def best_answers(
    question: Question,
    features: Sequence[Feature],
    logits: Sequence[np.ndarray],
    tokenizer: BertWordPieceTokenizer,
    *,
    n_best_size: int = 20,
    max_answer_length: int = 30,
) -> list[Answer]:
    """Return the likeliest answers of one question, the best first.

    Of every window the `n_best_size` best begins and ends are paired: both in the context, the begin where its window
    has most around it, the end not before it and at most `max_answer_length` pieces on. Of equal texts the first is
    kept.

    Args:
        question: what is asked.
        features: its windows.
        logits: float32 [S, 2] of each.
        tokenizer: the windows'.
        n_best_size: answers that are kept.
        max_answer_length: most pieces of an answer.
    """
    found: list[tuple[float, int, int, int]] = []
    for window, (feature, values) in enumerate(zip(features, logits)):
        begins, ends = (_best(values[:, which], n_best_size) for which in (0, 1))
        last = feature.first + len(feature.words)
        for begin in begins:
            if not feature.first <= begin < last or not feature.max_context[begin - feature.first]:
                continue
            for end in ends:
                if begin <= end < min(last, begin + max_answer_length):
                    found.append((float(values[begin, 0]) + float(values[end, 1]), window, begin, end))
    found.sort(key=lambda candidate: candidate[0], reverse=True)
    kept: dict[str, tuple[float, int, int]] = {}
    for score, window, begin, end in found:
        if len(kept) >= n_best_size:
            break
        start, stop = _characters(question.context, features[window], begin, end, tokenizer)
        kept.setdefault(" ".join(question.context[start:stop].split()), (score, start, stop))
    if not kept:
        return [Answer("", 1.0, 0, 0)]
    highest = max(score for score, _, _ in kept.values())
    weights = [math.exp(score - highest) for score, _, _ in kept.values()]
    return [
        Answer(question.context[start:stop], weight / sum(weights), start, stop)
        for weight, (_, start, stop) in zip(weights, kept.values())
    ]


def _best(values: np.ndarray, count: int) -> list[int]:
    return np.argsort(-values, kind="stable")[:count].tolist()


def _characters(
    context: str, feature: Feature, begin: int, end: int, tokenizer: BertWordPieceTokenizer
) -> tuple[int, int]:
    """Return the characters (first, one after the last) that pieces stand for; those of whole words where unclear.

    The words' text without spaces is compared with what the tokenizer makes of it: where both have one length, a
    character of the one is that of the other.
    """
    words = words_of(context).spans[feature.words[begin - feature.first] : feature.words[end - feature.first] + 1]
    whole = words[0][0], words[-1][1]
    wanted = " ".join(tokenizer.text_of(feature.tokens[begin : end + 1]).split())
    text = " ".join(basic_words(" ".join(context[a:b] for a, b in words), tokenizer.lower_case))
    at = text.find(wanted)
    places = [place for a, b in words for place in range(a, b) if context[place] != " "]
    if at < 0 or not wanted or len(places) != len(text.replace(" ", "")):
        return whole
    first = at - text[:at].count(" ")
    last = first + len(wanted) - wanted.count(" ") - 1
    return places[first], places[last] + 1


def normalized(text: str) -> str:
    """Return an answer as it is compared: without case, punctuation, articles and further spaces."""
    plain = "".join(c for c in text.lower() if c not in _PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def exact_match(text: str, right: str) -> float:
    """Return 1 where two answers are equal once normalized, else 0."""
    return float(normalized(text) == normalized(right))


def f1(text: str, right: str) -> float:
    """Return the harmonic mean of precision and recall over the words of two answers; 0 without a common one."""
    one, other = normalized(text).split(), normalized(right).split()
    common = sum((Counter(one) & Counter(other)).values())
    return 2 * common / (len(one) + len(other)) if common else 0.0


def score(questions: Sequence[Question], texts: Mapping[str, str]) -> dict[str, float]:
    """Return `exact_match` and `f1` in percent, over all questions; each counts by its best right answer.

    A question without an answer in `texts` scores 0.
    """
    totals = [0.0, 0.0]
    for question in questions:
        text = texts.get(question.name)
        if text is not None:
            for which, measure in enumerate((exact_match, f1)):
                totals[which] += max((measure(text, right) for right, _ in question.answers), default=0.0)
    return {"exact_match": 100.0 * totals[0] / len(questions), "f1": 100.0 * totals[1] / len(questions)}
