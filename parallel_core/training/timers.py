"""Megatron-LM's timers: how long the parts of an iteration take, on the slowest and on the fastest rank."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from parallel_core import spans
from parallel_core.comm.interface import Group

NAMES = (
    "forward-backward", "forward-compute", "backward-compute", "batch-generator", "forward-recv", "forward-send",
    "backward-recv", "backward-send", "all-grads-sync", "optimizer",
)  # fmt: skip
"""What is timed, in the order in which it is shown; names and levels are Megatron-LM's."""

Times = dict[str, list[float]]
"""Timer -> milliseconds per iteration on every rank that has it, in rank order."""


class Timers(AbstractContextManager["Timers"]):
    """Adds up the spans up to a level, while used as a context.

    Args:
        level: 0 nothing, 1 the parts of an iteration, 2 also what happens within them.
        world: all ranks.
        barrier: let all ranks begin a part of the iteration at the same time, so that what one of them waits for the
            others does not count as its own.
    """

    def __init__(self, level: int, world: Group, barrier: bool = True) -> None:
        self.level, self._world, self._barrier = level, world, barrier and world.size > 1
        self._seconds: dict[str, float] = {}
        self._iterations = 0

    def __enter__(self) -> Timers:
        if self.level:
            spans.listen(self)
        return self

    def __exit__(self, *error: object) -> None:
        spans.ignore(self)
        self._iterations += 1

    def begin(self, name: str, level: int, details: dict[str, Any]) -> None:
        """Meet the other ranks before a part of the iteration; Communication: a barrier."""
        if level == 1 and self._barrier:
            self._world.barrier()

    def end(self, name: str, level: int, start_ns: int, end_ns: int, details: dict[str, Any]) -> None:
        """Add a span."""
        if level <= self.level:
            self._seconds[name] = self._seconds.get(name, 0.0) + (end_ns - start_ns) / 1e9

    def collect(self, reset: bool) -> Times:
        """Return the mean over the iterations since the last reset, of every rank; collective over the world.

        Args:
            reset: begin anew.
        """
        if not self.level:
            return {}
        own = {name: self._seconds[name] * 1e3 / max(self._iterations, 1) for name in NAMES if name in self._seconds}
        of_ranks = self._world.all_gather_object(own)
        if reset:
            self._seconds.clear()
            self._iterations = 0
        return {name: [times[name] for times in of_ranks if name in times]
                for name in NAMES if any(name in times for times in of_ranks)}  # fmt: skip


def times_text(times: Mapping[str, list[float]], option: str) -> str:
    """Return timers as Megatron-LM prints them; empty without any.

    Args:
        times: see `Times`.
        option: max, minmax or all.
    """
    if not times:
        return ""
    title = {"max": "max time across ranks (ms):", "minmax": "(min, max) time across ranks (ms):",
             "all": "times across ranks (ms):"}[option]  # fmt: skip
    lines = [title]
    for name, of_ranks in times.items():
        if option == "all":
            shown = ", ".join(f"{milliseconds:.2f}" for milliseconds in of_ranks)
        elif option == "minmax":
            shown = f"({min(of_ranks):.2f}, {max(of_ranks):.2f})"
        else:
            shown = f"{max(of_ranks):.2f}"
        lines.append(f"    {(name + ' ').ljust(48, '.')}: {shown}")
    return "\n".join(lines)
