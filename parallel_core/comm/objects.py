"""Small values between ranks, as JSON: what arrives is data, and nothing of it is run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from mindspore import Tensor

from parallel_core.comm.interface import Group
from parallel_core.errors import CommError
from parallel_core.records import parse_json, show

MAX_BYTES = 1 << 30


def gather_objects(group: Group, value: Any) -> list[Any]:
    """Return the members' values in rank order; two all-gathers, of the lengths and of the texts in int32 words.

    Args:
        group: who takes part.
        value: what JSON can hold; tuples arrive as lists.

    Raises:
        CommError: JSON cannot hold `value`, or what a member sent is no JSON.
    """
    try:
        text = json.dumps(value).encode()
    except (TypeError, ValueError) as error:
        raise CommError(f"group {group.name}: {show(value)} cannot be sent, it is not JSON ({error})") from None
    lengths = group.all_gather(Tensor.from_numpy(np.array([len(text)], np.int32))).asnumpy()
    longest = int(lengths.max())
    if not 0 < int(lengths.min()) <= longest <= MAX_BYTES:
        raise CommError(f"group {group.name}: values of {lengths.tolist()} bytes; at most {MAX_BYTES} can be sent")
    padded = np.frombuffer(text.ljust(-(-longest // 4) * 4, b" "), np.int32).copy()
    rows = group.all_gather(Tensor.from_numpy(padded)).asnumpy().reshape(group.size, -1)
    return [
        parse_json(row.tobytes()[:length], f"what rank {rank} sent in group {group.name}", CommError)
        for rank, row, length in zip(group.ranks, rows, lengths)
    ]


def shared_out(group: Group, work: Sequence[Any], do: Callable[[Sequence[Any]], list[Any]]) -> list[Any]:
    """Return what `do` makes of each piece of work, each member doing its part, on all of them; in the work's order.

    Args:
        group: who takes part.
        work: the same on every member.
        do: takes several pieces and returns as many results, which are what JSON can hold.
    """
    if group.size == 1:
        return do(work)
    parts = group.all_gather_object(do(work[group.rank :: group.size]))
    return [parts[i % group.size][i // group.size] for i in range(len(work))]
