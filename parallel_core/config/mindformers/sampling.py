"""MindFormers' rules of continuing texts, as parameters of sampling here.

There are two. Since release 0.8 its rules are `transformers`', which are those here. Those before it count: the
repetition penalty r takes r from the log-probability of a token for each time that it was generated, and r once more;
what is taken is given to no other token; and either the fewest tokens whose probabilities reach `top_p` are kept, or,
with `top_p` 1, the `top_k` likeliest.
"""

from __future__ import annotations

from typing import Any

from parallel_core.errors import ConfigError


def mindformers_since_0_8(
    do_sample: bool, top_k: int, top_p: float, temperature: float, repetition_penalty: float
) -> dict[str, Any]:
    """Return the values of `SamplingParams` that these settings mean, as for `transformers`."""
    found: dict[str, Any] = {"repetition_penalty": float(repetition_penalty)}
    if not do_sample:
        return {**found, "temperature": 0.0}
    return {**found, "temperature": float(temperature), "top_k": int(top_k), "top_p": float(top_p)}


def mindformers_before_0_8(
    do_sample: bool = True,
    top_k: int = 5,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    temperature: float = 1.0,
) -> dict[str, Any]:
    """Return the values of `SamplingParams` that these settings meant there.

    Each sequence has its own counts; there the sequences of a batch shared one table, so that a text depended on its
    neighbours.

    Args:
        do_sample: whether tokens are drawn; else the likeliest one is taken.
        top_k: how many are kept where `top_p` is 1.
        top_p: which sum of probabilities is kept, below 1.
        repetition_penalty: see above; 1: none.
        temperature: there is none there; 1.

    Raises:
        ConfigError: a value cannot be.
    """
    if temperature != 1:
        raise ConfigError(f"temperature={temperature}: MindFormers before 0.8 has none; leave it out")
    if repetition_penalty < 1:
        raise ConfigError(f"repetition_penalty={repetition_penalty}: give 1 (none) or more")
    found: dict[str, Any] = {"renormalize": False}
    if repetition_penalty != 1:
        found.update(frequency_penalty=float(repetition_penalty), presence_penalty=float(repetition_penalty))
    if not do_sample:
        return {**found, "temperature": 0.0}
    return {**found, "top_p": float(top_p)} if top_p < 1 else {**found, "top_k": int(top_k)}
