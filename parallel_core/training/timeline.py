"""The timeline of some iterations: a trace of every rank that Chrome (chrome://tracing) and Perfetto open."""

from __future__ import annotations

import json
import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from parallel_core import spans
from parallel_core.comm.interface import Group
from parallel_core.comm.observe import observed
from parallel_core.context import ParallelContext
from parallel_core.files import create_file

LANES = {"schedule": 0, "within": 1, "communication": 2, "waiting": 3}
"""Rows of a rank in the picture: steps of the schedule, what they consist of, operations of groups, waiting in them."""
_SCHEDULE = ("-compute", "-recv", "-send", "-backward", "-sync")
_COMMUNICATION = (
    "barrier", "all-reduce", "reduce-scatter", "all-gather", "all-to-all", "broadcast", "send", "receive",
    "communication",
)  # fmt: skip
FORMAT = 1


def lane_of(name: str) -> str:
    """Return the row that a span belongs to."""
    if name in _COMMUNICATION:
        return "communication"
    if name in ("iteration", "optimizer") or name.endswith(_SCHEDULE):
        return "schedule"
    return "within"


class Timeline:
    """Records spans of this rank from `start` to `stop`, and writes them.

    Args:
        file: where the trace goes.
        context: this rank's groups.
    """

    def __init__(self, file: Path, context: ParallelContext) -> None:
        self._file, self._context = file, context
        self._events: list[tuple[str, int, int, dict[str, Any]]] = []
        self._observed = ExitStack()

    def start(self) -> None:
        """Begin to record."""
        groups = [value for value in vars(self._context).values() if isinstance(value, Group)]
        self._observed.enter_context(observed(groups))
        spans.listen(self)

    def begin(self, name: str, level: int, details: dict[str, Any]) -> None:
        """Take no note: a span is recorded when it ends."""

    def end(self, name: str, level: int, start_ns: int, end_ns: int, details: dict[str, Any]) -> None:
        """Record a span."""
        self._events.append((name, start_ns, end_ns, details))

    def stop(self) -> None:
        """End the record and write the trace; one that cannot be written raises an OSError."""
        spans.ignore(self)
        self._observed.close()
        context = self._context
        # The clock of spans counts from somewhere; the ranks of one host share it, those of others the time of day.
        offset = time.time_ns() - time.perf_counter_ns()
        place = {"rank": context.rank, "tp": context.tp.rank, "pp": context.pp.rank, "dp": context.dp.rank,
                 "cp": context.cp.rank}  # fmt: skip
        events = [*_titles(place), *(event for one in self._events for event in _as_trace(context.rank, offset, *one))]
        document = {"displayTimeUnit": "ms", "traceEvents": events,
                    "metadata": {"format": FORMAT, **place, "host": os.uname().nodename}}  # fmt: skip
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with create_file(self._file) as file:
            json.dump(document, file, separators=(",", ":"))
        self._events.clear()


def _titles(place: dict[str, int]) -> list[dict[str, Any]]:
    rank = place["rank"]
    name = " ".join(f"{axis} {number}" for axis, number in place.items())
    titles = [{"ph": "M", "name": "process_name", "pid": rank, "args": {"name": name}},
              {"ph": "M", "name": "process_sort_index", "pid": rank, "args": {"sort_index": rank}}]  # fmt: skip
    return titles + [{"ph": "M", "name": "thread_name", "pid": rank, "tid": lane, "args": {"name": title}}
                     for title, lane in LANES.items()]  # fmt: skip


def _as_trace(rank: int, offset: int, name: str, start: int, end: int, details: dict[str, Any]) -> list[dict[str, Any]]:
    lane = lane_of(name)
    event = {"ph": "X", "name": name, "cat": lane, "pid": rank, "tid": LANES[lane], "ts": (start + offset) / 1e3,
             "dur": (end - start) / 1e3, "args": details}  # fmt: skip
    waited = min(details.get("waited_ns", 0), end - start)
    if not waited:
        return [event]
    waiting = {**event, "name": "waiting", "cat": "waiting", "tid": LANES["waiting"], "dur": waited / 1e3,
               "args": {"in": name, **{key: details[key] for key in ("group",) if key in details}}}  # fmt: skip
    return [event, waiting]
