"""What is asked of the engine, and what it answers: values that JSON can hold, checked as they are made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from parallel_core.errors import ConfigError

MOST_LOGPROBS = 20
"""Alternatives that may be asked for at a position."""

_RANGES: dict[str, tuple[float, float, str]] = {
    "max_new_tokens": (0, 2**31 - 1, "0 or more"),
    "temperature": (0.0, 100.0, "0 (greedy) to 100"),
    "top_k": (0, 2**31 - 1, "0 (all) or more"),
    "top_p": (1e-9, 1.0, "above 0, up to 1"),
    "min_p": (0.0, 1.0, "0 to 1"),
    "repetition_penalty": (0.01, 100.0, "0.01 to 100; 1 is none"),
    "frequency_penalty": (-100.0, 100.0, "-100 to 100; 0 is none"),
    "presence_penalty": (-100.0, 100.0, "-100 to 100; 0 is none"),
    "seed": (0, 2**63 - 1, "0 to 2**63 - 1"),
    "n": (1, 128, "1 to 128"),
    "logprobs": (0, MOST_LOGPROBS, f"0 to {MOST_LOGPROBS}"),
}
"""Smallest and largest value of each number, and the range in words."""


@dataclass(frozen=True)
class SamplingParams:
    """How a prompt is continued.

    Attributes:
        max_new_tokens: tokens to add at most; 0 only scores the prompt.
        temperature: logits are divided by it; 0 takes the likeliest token, the lowest id of equal ones.
        top_k: keep the k likeliest tokens (those equal to the last of them too); 0: all.
        top_p: of those keep the fewest whose probabilities reach this sum.
        min_p: of those keep tokens with at least this share of the likeliest one's probability.
        repetition_penalty: divides positive logits of tokens of the prompt and of the answer, and multiplies negative
            ones, as `transformers` does.
        frequency_penalty: subtracted from a token's logit for each time that it is in the answer.
        presence_penalty: subtracted once from the logits of tokens in the answer.
        renormalize: `top_p` sums probabilities after the penalties. False: what penalties take from a token is given
            to none, so that `top_p` keeps more tokens, as in PanGu-Alpha's prediction.
        stop: texts that end the answer; they are cut off.
        stop_token_ids: tokens that end the answer, beside the tokenizer's end of document.
        ignore_eos: the end of document is a token like others.
        seed: the answer to a prompt is the same for the same seed, in any batch and layout; None: another each time.
        n: answers to the prompt.
        logprobs: give the log-probability of each token, and of this many likeliest ones at its place; None: none.
        prompt_logprobs: the same of the prompt's tokens.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    renormalize: bool = True
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: bool = False

    def __post_init__(self) -> None:
        for name, (low, high, words) in _RANGES.items():
            value, kind = getattr(self, name), int if isinstance(_DEFAULTS[name], int) else float
            if value is None and name in ("seed", "logprobs"):
                continue
            right_type = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
            if not right_type or not math.isfinite(value) or not low <= value <= high:
                raise ConfigError(f"{name}={value!r}: give {'a whole' if kind is int else 'a'} number, {words}")
        for name in ("renormalize", "ignore_eos", "prompt_logprobs"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r}: give true or false")
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, (tuple, list)) or not all(isinstance(text, str) and text for text in stop):
            raise ConfigError(f"stop={self.stop!r}: give a text, or a list of texts, none of them empty")
        ids = self.stop_token_ids
        if not isinstance(ids, (tuple, list)) or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
            raise ConfigError(f"stop_token_ids={ids!r}: give a list of token ids")
        object.__setattr__(self, "stop", tuple(stop))
        object.__setattr__(self, "stop_token_ids", tuple(ids))

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> SamplingParams:
        """Return the parameters that a mapping gives by their names.

        Raises:
            ConfigError: if a name is unknown or a value out of its range.
        """
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ConfigError(f"{', '.join(unknown)}: no such parameter of sampling; there are {', '.join(_DEFAULTS)}")
        return cls(**values)


_DEFAULTS: dict[str, Any] = {f.name: f.default for f in fields(SamplingParams)} | {"seed": 0, "logprobs": 0}


@dataclass(frozen=True)
class Request:
    """One prompt to continue, once (`n` answers are n requests that differ in `sample`)."""

    key: str
    tokens: tuple[int, ...]
    params: SamplingParams
    seed: int
    sample: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` takes."""
        return {**vars(self), "tokens": list(self.tokens), "params": asdict(self.params)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Request:
        """Return the request that another rank sent."""
        own = {**values, "tokens": tuple(values["tokens"]), "params": SamplingParams(**values["params"])}
        return cls(**own)


@dataclass
class TokenLogprob:
    """A token's log-probability under the model (before temperature and penalties), and the likeliest tokens'."""

    token: int
    logprob: float
    top: list[tuple[int, float]] = field(default_factory=list)


@dataclass
class Completion:
    """The answer to a request, as far as it has come.

    Attributes:
        key: the request's.
        sample: which of its `n` answers.
        text: new text, without the stop text; empty without a tokenizer.
        certain: how many characters of it stay, whatever comes; a stop text may begin in the others.
        tokens: new tokens, with the one that ended the answer.
        logprobs: of the new tokens, where they were asked for.
        prompt_logprobs: of the prompt's tokens from the second on.
        prompt_tokens: how many tokens the prompt has.
        finish_reason: `stop` (end of document, stop token or text), `length`, `cancelled`; None while it goes on.
    """

    key: str
    sample: int
    prompt_tokens: int
    text: str = ""
    certain: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
