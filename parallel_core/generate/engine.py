"""Sequences that share a model: each enters when a row of the cache is free, and leaves when it ends.

Every rank of a model runs an engine, and all are told of the same requests in the same order; what they do follows from
that and from the tokens that the last stage chooses, so nothing else is exchanged. A prompt runs in chunks of a fixed
size, alone; then the sequence gains a token at every step, beside all others. What it gains depends on no other one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from mindspore import Tensor

from parallel_core.comm.interface import Group
from parallel_core.errors import ConfigError
from parallel_core.generate.requests import Completion, Request, TokenLogprob
from parallel_core.generate.runner import StageRunner
from parallel_core.generate.sampling import Choice, Row, Sampler
from parallel_core.generate.text import TextStream

MOST_TOGETHER = 32
"""Sequences that gain a token in one pass over the weights; more take turns."""

PREFILL_CHUNK = 512
"""Tokens of a prompt that run together; what a prompt's logits are rounded to depends on it, so it is fixed."""

Detokenize = Callable[[Sequence[int]], str]


@dataclass
class _Sequence:
    request: Request
    place: int
    row: Row
    completion: Completion
    stream: TextStream | None
    kept: int = 0
    """Tokens in the cache."""
    pending: int | None = None
    """The chosen token that has not run yet."""


class Engine:
    """Continues prompts; see the module.

    Args:
        runner: this rank's stage over its cache.
        sampler: on ranks of the last stage; None elsewhere.
        pp_group: the ranks of the pipeline.
        vocab_size: tokens that exist.
        detokenize: the tokenizer's; None: answers have no text, and stop texts are refused.
        eod: the token that ends a text; None: none does.
    """

    def __init__(
        self,
        runner: StageRunner,
        sampler: Sampler | None,
        pp_group: Group,
        vocab_size: int,
        detokenize: Detokenize | None = None,
        eod: int | None = None,
    ) -> None:
        self._runner, self._sampler, self._pp = runner, sampler, pp_group
        self._vocab_size, self._detokenize, self._eod = vocab_size, detokenize, eod
        self._capacity = runner.cache.capacity
        self._free = list(range(runner.cache.rows))[::-1]
        self._waiting: deque[_Sequence] = deque()
        self._reading: deque[_Sequence] = deque()
        self._answering: list[_Sequence] = []

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self._waiting or self._reading or self._answering)

    @property
    def counts(self) -> dict[str, int]:
        """How many sequences wait for a row, have their prompt read, and are answered; and how many rows are free."""
        waiting, reading = len(self._waiting), len(self._reading)
        return {"waiting": waiting, "reading": reading, "answering": len(self._answering), "free": len(self._free)}

    def check(self, request: Request) -> None:
        """Refuse what the engine cannot do.

        Raises:
            ConfigError: the prompt is empty, too long, or has tokens that do not exist; or stop texts are asked for
                without a tokenizer.
        """
        length, more = len(request.tokens), request.params.max_new_tokens
        if not length:
            raise ConfigError("the prompt is empty; give it at least one token (the end of document, for example)")
        if length + more > self._capacity:
            raise ConfigError(
                f"the prompt has {length} tokens, and max_new_tokens={more} makes {length + more}; there is room for "
                f"{self._capacity}: give a shorter prompt, or max_new_tokens up to {max(0, self._capacity - length)}"
            )
        wrong = [t for t in (*request.tokens, *request.params.stop_token_ids) if not 0 <= t < self._vocab_size]
        if wrong:
            raise ConfigError(f"token {wrong[0]} does not exist; ids are 0 to {self._vocab_size - 1}")
        if request.params.stop and self._detokenize is None:
            raise ConfigError("stop texts need a tokenizer, and this model has none; give stop_token_ids")

    def add(self, request: Request) -> None:
        """Take a request; what is wrong with it raises as in `check`."""
        self.check(request)
        params = request.params
        stream = None if self._detokenize is None else TextStream(self._detokenize, params.stop)
        row = Row(params, request.seed, request.sample, np.array(request.tokens, np.int64))
        completion = Completion(request.key, request.sample, len(request.tokens))
        self._waiting.append(_Sequence(request, -1, row, completion, stream))

    def cancel(self, key: str) -> None:
        """End the sequences of a request, wherever they are; an unknown key is one that has ended already."""
        for members in (self._waiting, self._reading, self._answering):
            for sequence in [s for s in members if s.request.key == key]:
                members.remove(sequence)
                self._end(sequence, "cancelled")

    # ---- a step -----------------------------------------------------------------------------------------------------
    def step(self) -> list[Completion]:
        """Read a chunk of one prompt, and give every answer under way a token; return the answers that changed."""
        while self._free and self._waiting:
            sequence = self._waiting.popleft()
            sequence.place = self._free.pop()
            self._reading.append(sequence)
        changed: list[Completion] = []
        answering = list(self._answering)
        if self._reading:
            changed += self._read(self._reading[0])
        for i in range(0, len(answering), MOST_TOGETHER):
            changed += self._answer(answering[i : i + MOST_TOGETHER])
        return changed

    def _read(self, sequence: _Sequence) -> list[Completion]:
        tokens, params = sequence.request.tokens, sequence.row.params
        first = sequence.kept
        chunk = np.array([tokens[first : first + PREFILL_CHUNK]], np.int32)
        S = chunk.shape[1]
        is_last = first + S == len(tokens)
        logits = self._runner.run(chunk, [sequence.place], [first], last_only=not params.prompt_logprobs)
        sequence.kept += S
        if params.prompt_logprobs:
            targets = np.array(tokens[first + 1 : first + S + 1], np.int64)
            sequence.completion.prompt_logprobs += self._scored(logits, targets, params.logprobs or 0)
        if not is_last:
            return []
        self._reading.popleft()
        if not params.max_new_tokens:
            self._end(sequence, "length")
            return [sequence.completion]
        self._answering.append(sequence)
        self._take([sequence], self._chosen(logits, [sequence]))
        return [sequence.completion]

    def _answer(self, sequences: list[_Sequence]) -> list[Completion]:
        tokens = np.array([[sequence.pending] for sequence in sequences], np.int32)
        logits = self._runner.run(tokens, [s.place for s in sequences], [s.kept for s in sequences], last_only=True)
        for sequence in sequences:
            sequence.kept += 1
        self._take(sequences, self._chosen(logits, sequences))
        return [sequence.completion for sequence in sequences]

    def _take(self, sequences: list[_Sequence], choices: list[Choice]) -> None:
        for sequence, choice in zip(sequences, choices):
            params, done, token = sequence.row.params, sequence.completion, choice.token
            sequence.row.chosen.append(token)
            sequence.pending = token
            done.tokens.append(token)
            if params.logprobs is not None:
                done.logprobs.append(TokenLogprob(token, choice.logprob, choice.top))
            ends = token in params.stop_token_ids or (token == self._eod and not params.ignore_eos)
            if sequence.stream is not None and not ends:
                sequence.stream.add(token)
                done.text, done.certain = sequence.stream.text, sequence.stream.certain
                ends = sequence.stream.stopped
            if ends or len(done.tokens) == params.max_new_tokens:
                self._answering.remove(sequence)
                self._end(sequence, "stop" if ends else "length")

    def _end(self, sequence: _Sequence, reason: str) -> None:
        if sequence.stream is not None:
            sequence.stream.end()
            sequence.completion.text, sequence.completion.certain = sequence.stream.text, len(sequence.stream.text)
        if sequence.stream is not None and sequence.stream.stopped and reason == "length":
            reason = "stop"  # the last character brought the stop text
        sequence.completion.finish_reason = reason
        if sequence.place >= 0:
            self._free.append(sequence.place)

    # ---- the last stage's choices, on every stage -------------------------------------------------------------------
    def _chosen(self, logits: Tensor | None, sequences: list[_Sequence]) -> list[Choice]:
        rows = [sequence.row for sequence in sequences]
        choices = None
        if self._sampler is not None and logits is not None:
            choices = self._sampler.choose(_last_position(logits), rows)
        asked = max((row.params.logprobs + 1 for row in rows if row.params.logprobs is not None), default=0)
        return self._shared(choices, len(rows), asked)

    def _scored(self, logits: Tensor | None, targets: np.ndarray, num_top: int) -> list[TokenLogprob]:
        """Return the log-probabilities of a chunk's targets; of the prompt's last token there is no target."""
        found = None
        if self._sampler is not None and logits is not None and len(targets):
            values = logits.asnumpy()[: len(targets), 0]
            found = [Choice(x.token, x.logprob, x.top) for x in self._sampler.score(values, targets, num_top)]
        shared = self._shared(found, len(targets), num_top + 1) if len(targets) else []
        return [TokenLogprob(choice.token, choice.logprob, choice.top) for choice in shared]

    def _shared(self, choices: list[Choice] | None, count: int, asked: int) -> list[Choice]:
        """Return the last stage's choices on all stages: a word for each token, and three more a log-probability."""
        if self._pp.size == 1:
            return choices or []
        width = 1 + 3 * asked
        words = np.zeros((count, width), np.int32)
        for out, choice in zip(words, choices or []):
            out[0] = choice.token
            for i, (token, value) in enumerate([(choice.token, choice.logprob), *choice.top][:asked]):
                out[1 + 3 * i] = token + 1
                out[2 + 3 * i : 4 + 3 * i] = np.array([value], np.float64).view(np.int32)
        words = self._pp.broadcast_(Tensor.from_numpy(words), self._pp.size - 1).asnumpy()
        if choices is not None:
            return choices
        every = [
            [(int(w[i]) - 1, float(w[i + 1 : i + 3].copy().view(np.float64)[0])) for i in range(1, width, 3) if w[i]]
            for w in words
        ]
        return [Choice(int(w[0]), own[0][1] if own else 0.0, own[1:]) for w, own in zip(words, every)]


def _last_position(logits_SBV: Tensor) -> np.ndarray:
    """Return float32 [B, V / tp] of the last position."""
    values: np.ndarray = logits_SBV.asnumpy()[-1]
    return values.astype(np.float32, copy=False)
