"""Log-probabilities of given tokens, from the engine that continues texts, and sums of them over windows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from parallel_core.errors import ConfigError
from parallel_core.generate.generator import Generator
from parallel_core.generate.requests import SamplingParams, TokenLogprob


def logprobs_of(it: Generator, rows: Sequence[Sequence[int]], num_top: int = 0) -> list[list[TokenLogprob]]:
    """Return of each row the log-probability of every token but the first, given those before it.

    Args:
        it: the model; rank 0 calls.
        rows: token ids, one or more a row.
        num_top: give this many likeliest tokens at each place too.

    Raises:
        ConfigError: a row is empty, too long, or has a token that does not exist.
    """
    params = SamplingParams(max_new_tokens=0, prompt_logprobs=True, logprobs=num_top, temperature=0)
    return [answer.prompt_logprobs for answer in it.generate([list(row) for row in rows], params)]


@dataclass(frozen=True)
class Window:
    """Tokens that run together, and the first of them whose log-probability counts."""

    tokens: list[int]
    first: int


def windows_of(tokens: Sequence[int], length: int, stride: int) -> Iterator[Window]:
    """Cut tokens into windows in which all but the first are counted once.

    Args:
        tokens: the first one is given, not counted.
        length: tokens of a window at most.
        stride: tokens that each further window counts; it has length - stride before them to go by.

    Raises:
        ConfigError: the sizes cannot be.
    """
    if length < 2 or not 1 <= stride < length:
        raise ConfigError(f"windows of {length} tokens and a stride of {stride}: give a stride from 1 to {length - 1}")
    end = min(length, len(tokens))
    if end > 1:
        yield Window(list(tokens[:end]), 1)
    while end < len(tokens):
        counted = min(stride, len(tokens) - end)
        start = end + counted - length
        yield Window(list(tokens[start : end + counted]), length - counted)
        end += counted


@dataclass(frozen=True)
class Likelihood:
    """The log-probability of a text, and over how many tokens and bytes it is summed."""

    logprob: float
    tokens: int
    bytes: int = 0

    @property
    def perplexity(self) -> float:
        """exp(-log-probability of a token, on average); infinite where it is beyond float64."""
        mean = -self.logprob / max(self.tokens, 1)
        return math.exp(mean) if mean < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits that it takes to write a byte of the text; NaN where the bytes are not known."""
        return -self.logprob / math.log(2) / self.bytes if self.bytes else math.nan

    def __add__(self, other: Likelihood) -> Likelihood:
        return Likelihood(self.logprob + other.logprob, self.tokens + other.tokens, self.bytes + other.bytes)


def likelihoods(
    it: Generator, rows: Sequence[Sequence[int]], stride: int | None = None, num_bytes: Sequence[int] | None = None
) -> list[Likelihood]:
    """Return the log-probability of each row's tokens after the first one, in windows of the model's length.

    Args:
        it: the model.
        rows: token ids; the first of each is given (the end of document, where a text has nothing before it).
        stride: see `windows_of`; None: one less than a window, so that each begins with a token of the one before.
        num_bytes: of each row's text, for bits per byte.
    """
    length = it.max_length
    stride = length - 1 if stride is None else stride
    of_rows = [list(windows_of(row, length, stride)) for row in rows]
    found = iter(logprobs_of(it, [window.tokens for windows in of_rows for window in windows]))
    out = []
    for i, windows in enumerate(of_rows):
        parts = [x.logprob for window in windows for x in next(found)[window.first - 1 :]]
        out.append(Likelihood(math.fsum(parts), len(parts), num_bytes[i] if num_bytes else 0))
    return out
