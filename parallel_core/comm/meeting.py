"""Where the ranks of one host tell each other small values before any group exists: a file in memory that all have."""

from __future__ import annotations

import functools
import json
import os
import struct
import time
from typing import Any

from parallel_core.environment import MEETING_VARIABLE
from parallel_core.errors import CommError
from parallel_core.records import parse_json

_SLOT_BYTES = 1 << 16
_HEAD = struct.Struct("<q")
_LONGEST_PAUSE_S = 2e-3


class Meeting:
    """Gathers values of all ranks, round by round; every rank takes part in every round.

    Args:
        descriptor: the file; empty at first.
        rank: this rank.
        size: number of ranks.
        timeout_s: how long a rank waits for the others.
    """

    def __init__(self, descriptor: int, rank: int, size: int, timeout_s: float) -> None:
        self.rank, self.size, self.ranks = rank, size, tuple(range(size))
        self._descriptor, self._timeout_s, self._round = descriptor, timeout_s, 0

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return the ranks' values in order.

        Args:
            value: what JSON can hold; tuples arrive as lists.

        Raises:
            CommError: it is too long, or a rank has not come in time.
        """
        text = json.dumps(value).encode()
        if len(text) > _SLOT_BYTES - _HEAD.size:
            raise CommError(f"a value of {len(text)} bytes is too long for a meeting of ranks")
        first, self._round = self._round * self.size * _SLOT_BYTES, self._round + 1
        slots = [first + rank * _SLOT_BYTES for rank in self.ranks]
        os.pwrite(self._descriptor, text, slots[self.rank] + _HEAD.size)
        os.pwrite(self._descriptor, _HEAD.pack(len(text)), slots[self.rank])  # last: it says that the value is there
        deadline = time.monotonic() + self._timeout_s
        return [self._await(rank, slot, deadline) for rank, slot in zip(self.ranks, slots)]

    def _await(self, rank: int, slot: int, deadline: float) -> Any:
        pause = 1e-4
        while True:
            head = os.pread(self._descriptor, _HEAD.size, slot)
            length = _HEAD.unpack(head)[0] if len(head) == _HEAD.size else 0
            if length:
                text = os.pread(self._descriptor, length, slot + _HEAD.size)
                return parse_json(text, f"what rank {rank} said", CommError)
            if time.monotonic() > deadline:
                limit = f"{self._timeout_s:g} s (CLUSTER_TIME_OUT)"
                raise CommError(f"rank {rank} has not come within {limit}, seen on rank {self.rank}")
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)


@functools.cache
def meeting() -> Meeting | None:
    """Return the meeting of this job's ranks, or None where the launcher has given them none."""
    number = os.environ.get(MEETING_VARIABLE, "")
    try:
        if not number.isdigit() or "parallel_core-meeting" not in os.readlink(f"/proc/self/fd/{number}"):
            return None
    except OSError:
        return None  # a process that a rank has started: it does not inherit the descriptor
    rank, size = int(os.environ["RANK_ID"]), int(os.environ["MS_WORKER_NUM"])
    return Meeting(int(number), rank, size, float(os.environ.get("MS_TOPO_TIMEOUT") or 300))
