"""What stands behind a job that failed: every rank's activity and stack, in one file; whom the others waited for."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from parallel_core.errors import printable
from parallel_core.files import create_file
from parallel_core.launch.activity import STACK_SIGNAL, Doing, read_activity, stack_path
from parallel_core.launch.console import last_lines
from parallel_core.launch.host_memory import host_memory
from parallel_core.launch.outcome import RankFailure, first_failure
from parallel_core.launch.processes import send
from parallel_core.versions import describe_versions

REPORT_NAME = "crash_report.txt"
_ANSWER_S = 1.0
"""How long the ranks have to write their stacks."""
_CONSOLE_RANKS = 8
_CONSOLE_FRAMES = 6
_LOG_LINES = 30


def ask_ranks(log_dir: Path, process_of: Mapping[int, int]) -> list[Doing]:
    """Return what living ranks are doing, by {rank: process}; those that failed before are to be left out."""
    before = {rank: _size(stack_path(log_dir, rank)) for rank in process_of}
    asked = [rank for rank, size in before.items() if size is not None]  # others would die of the signal
    for rank in asked:
        send(process_of[rank], STACK_SIGNAL)
    deadline = time.monotonic() + _ANSWER_S
    while time.monotonic() < deadline and any(_size(stack_path(log_dir, rank)) == before[rank] for rank in asked):
        time.sleep(0.02)
    time.sleep(0.05 if asked else 0)  # a stack is several writes
    return [read_activity(log_dir, rank) for rank in asked]


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def describe_wait(failures: Sequence[RankFailure], doings: Sequence[Doing], now: float) -> list[str]:
    """Return lines for the console where the first failure is that of a rank that waited: who was late, and where.

    Args:
        failures: one or more.
        doings: what the ranks that had not failed were doing.
        now: when they were asked.
    """
    if not first_failure(failures).is_consequence:
        return []
    lines = []
    for doing in sorted(doings, key=lambda one: one.waits)[:_CONSOLE_RANKS]:
        what = "waited too" if doing.waits else "was late" if doing.stack else "did not answer"
        lines.append(f"  rank {doing.rank} {what}: {doing.words(now)}")
        if not doing.waits:
            lines += [f"    at {frame}" for frame in doing.stack[:_CONSOLE_FRAMES]]
    left = len(doings) - _CONSOLE_RANKS
    return [*lines, f"  ... and {left} more"] if left > 0 else lines


def write_crash_report(
    log_dir: Path,
    command: Sequence[str],
    ranks: Sequence[int],
    console: str,
    failures: Sequence[RankFailure],
    doings: Sequence[Doing],
    now: float,
) -> Path | None:
    """Write everything that is known into one file, and return its path, or None where it cannot be written."""
    of_rank = {one.rank: one for one in doings}
    failed = {one.role: one for one in failures}
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
    lines = [
        f"{when} on {platform.node()}, {os.cpu_count()} cores, {_available_memory()}",
        describe_versions(),
        "command: " + " ".join(map(printable, command)),
        "",
        console,
    ]
    for rank in ranks:
        doing = of_rank.get(rank) or read_activity(log_dir, rank)
        failure = failed.get(rank)
        lines += ["", f"== rank {rank} ==", f"{failure.summary(None)}" if failure else "had not failed"]
        lines.append(f"activity: {doing.words(now)}")
        if failure is not None and failure.report is not None and failure.report.traceback:
            lines += [printable(line) for line in failure.report.traceback.splitlines()]
        if doing.stack:
            lines += ["stack, innermost first:", *(f"  {frame}" for frame in doing.stack)]
        tail = last_lines(log_dir / f"worker_{rank}.log", _LOG_LINES)
        lines += [f"the last lines of worker_{rank}.log:", *(f"  {printable(line)}" for line in tail)]
    path = log_dir / REPORT_NAME
    try:
        with create_file(path) as file:
            file.write("\n".join(lines) + "\n")
    except OSError:
        return None
    return path


def _available_memory() -> str:
    try:
        host = host_memory()
    except (OSError, KeyError, ValueError):
        return "memory unknown"
    container = "" if host.limit is None else f", the container's limit {host.limit[0] >> 20} MiB"
    return f"memory {host.total >> 20} MiB, {host.free >> 20} MiB free{container}"
