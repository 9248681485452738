"""Where the seconds from the command to the first step go: ends of parts are noted, and told by `--time-startup`."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

STARTUP_VARIABLE = "PARALLEL_CORE_STARTUP"
"""What the processes before this one have noted, as JSON."""

_noted: list[tuple[str, float]] = []
"""(part, when it ended), from the command on."""
_runs: list[float] = []
"""Seconds of the first step of each run of this process."""


def note(part: str, begins: bool = False) -> None:
    """Say that a part of the start-up has just ended. Costs a microsecond.

    Args:
        part: what has ended.
        begins: it is the first one of this process, or of a further run in it; others are noted after such a one only.
    """
    if not (_noted or begins):
        return
    if not _noted:
        # A second run of the same process begins with its first part.
        _noted.extend([("", time.time())] if _runs else _earlier() or [("", _process_began())])
    _noted.append((part, time.time()))


def handed_over() -> str:
    """Return what this process has noted, as the value of `STARTUP_VARIABLE` for those that it starts."""
    return json.dumps(_noted)


def told(wanted: bool) -> list[str]:
    """Return the line of the log, when the first step has ended and it is wanted; later nothing."""
    if not _noted:
        return []
    note("first step")
    *before, (_, seconds) = [(part, end - begin) for (_, begin), (part, end) in zip(_noted, _noted[1:])]
    _noted.clear()
    _runs.append(seconds)
    total, parts = sum(took for _, took in before), ", ".join(f"{part} {took:.2f}" for part, took in before)
    if not wanted:
        return []
    return [f"Start-up: {total:.2f} s from the command to the first step ({parts}); that took {seconds:.2f} s"]


def _earlier() -> list[tuple[str, float]]:
    try:
        return [(str(part), float(end)) for part, end in json.loads(os.environ[STARTUP_VARIABLE])]
    except (KeyError, ValueError, TypeError):
        return []


def _process_began() -> float:
    """Return when this process was started, in seconds since the epoch: `exec` does not change it."""
    try:
        stat = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace")
        ticks = int(stat.rpartition(")")[2].split()[19])
        up = float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0])
    except (OSError, ValueError, IndexError):
        return time.time()
    return time.time() - (up - ticks / os.sysconf("SC_CLK_TCK"))
