"""Runs of queries and runs of keys that meet; their attention by the functions that a device has for one of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint

from parallel_core.ops import reference


class Meeting(NamedTuple):
    """A run of queries, and a run of keys that they see some of.

    Attributes:
        query_row: row of the first query.
        q_first: its position in the sequence.
        key_row: row of the first key.
        k_first: its position.
        num_keys: keys of the run.
    """

    query_row: int
    q_first: int
    key_row: int
    k_first: int
    num_keys: int


def attend_by_blocks(
    block: Callable[..., tuple[Tensor, Tensor]],
    join: Callable[..., tuple[Tensor, Tensor]],
    query: Tensor,
    keys: Tensor,
    out: Tensor | None,
    log_sum_exp: Tensor | None,
    start: Tensor | None,
    meetings: Sequence[Meeting],
    length: int,
    head_size: int,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Do `attention_of_meetings` by `block`, an `attention_block`, and `join`, a `join_blocks`."""
    (S, B, G, W), E = query.shape, keys.shape[-1] - head_size
    N = G * W // head_size
    found: list[Any] = [None] * (S // length)
    if out is not None and log_sum_exp is not None:
        found = [(_run(out, i * length, length), log_sum_exp[i]) for i in range(S // length)]
    for meeting in meetings:
        place = meeting.query_row // length
        part = block(*_parts(query, keys, start, meeting, length, head_size), **_options(meeting, options))
        known = found[place]
        found[place] = (reference.cast(part[0], ms.float32), part[1]) if known is None else join(*known, *part)
    nothing = mint.zeros((length, B, N * E)), Tensor(np.full((B, N, length), -np.inf, np.float32))
    outs, logs = zip(*(nothing if one is None else one for one in found))
    return mint.cat(outs, 0), mint.cat(logs, 0).reshape(len(logs), B, N, length)


def gradients_by_blocks(
    block_grad: Callable[..., tuple[Tensor, Tensor, Tensor]],
    query: Tensor,
    keys: Tensor,
    out: Tensor,
    dout: Tensor,
    log_sum_exp: Tensor,
    dquery: Tensor | None,
    start: Tensor | None,
    meetings: Sequence[Meeting],
    length: int,
    head_size: int,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Do `attention_of_meetings_grad` by `block_grad`, an `attention_block_grad`."""
    dquery = mint.zeros(query.shape, dtype=ms.float32) if dquery is None else dquery
    dkeys = mint.zeros(keys.shape, dtype=ms.float32)
    for meeting in meetings:
        row = meeting.query_row
        dq, *of_keys = block_grad(
            *_parts(query, keys, start, meeting, length, head_size),
            _run(out, row, length), _run(dout, row, length), log_sum_exp[row // length], **_options(meeting, options),
        )  # fmt: skip
        dquery = _added(dquery, dq.reshape(length, *query.shape[1:]), row)
        dkeys = _added(dkeys, mint.cat(of_keys, -1), meeting.key_row)
    return dquery, dkeys


def _parts(
    query: Tensor, keys: Tensor, start: Tensor | None, meeting: Meeting, length: int, head_size: int
) -> tuple[Tensor | None, ...]:
    """Return queries, keys, values and the first positions that are seen, of one meeting."""
    S, B, G, W = query.shape
    rows = _run(query, meeting.query_row, length).reshape(length, B, G * W // head_size, head_size)
    met = _run(keys, meeting.key_row, meeting.num_keys)
    own = None if start is None else start[:, meeting.q_first : meeting.q_first + length].contiguous()
    return rows, met[..., :head_size].contiguous(), met[..., head_size:].contiguous(), own


def _options(meeting: Meeting, options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "q_first": meeting.q_first, "k_first": meeting.k_first}


def _run(x: Tensor, first: int, count: int) -> Tensor:
    return x if count == x.shape[0] else x[first : first + count]


def _added(whole: Tensor, part: Tensor, first: int) -> Tensor:
    """Return float32 rows with others added from row `first` on."""
    end = first + part.shape[0]
    added = _run(whole, first, part.shape[0]) + reference.cast(part, ms.float32)
    around = [x for x in (whole[:first], added, whole[end:]) if x.shape[0]]
    return added if len(around) == 1 else mint.cat(around, 0)
