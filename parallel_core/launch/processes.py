"""Who descends from whom, read from /proc, and the two kernel promises that keep a job from outliving its launcher."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class ProcessInfo:
    """One line of the process table."""

    pid: int
    parent: int
    started: int
    """Clock ticks since boot."""


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl({option}): {os.strerror(error)}")


def adopt_orphans() -> None:
    """Make this process the parent of every descendant whose own parent ends (a child subreaper).

    However a descendant changes its session or group, it stays in this process's tree, where it is found and reaped.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends, whatever this process is then waiting for."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def die_with(launcher: int, patience_s: float = 300.0) -> None:
    """Tie this process to `launcher`: wait until it is the parent (msrun in between has ended), then `die_with_parent`.

    Ends the process when another one became the parent, which means that the launcher is gone.
    """
    deadline = time.monotonic() + patience_s
    while os.getppid() != launcher:
        if not _exists(launcher) or time.monotonic() > deadline:
            os._exit(1)
        time.sleep(0.01)
    die_with_parent()
    if os.getppid() != launcher:
        os._exit(1)


def _exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def process_table() -> dict[int, ProcessInfo]:
    """Return every process that exists now, zombies included."""
    table = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path(f"/proc/{entry}/stat").read_text(encoding="utf-8", errors="replace")
            except OSError:
                continue
            # The name in parentheses may hold spaces; the fields after the last one are plain: state, parent, ...
            fields = stat.rpartition(")")[2].split()
            table[int(entry)] = ProcessInfo(int(entry), int(fields[1]), int(fields[19]))
    return table


def children(pid: int) -> list[ProcessInfo]:
    """Return the children of `pid`, oldest first."""
    found = [info for info in process_table().values() if info.parent == pid]
    return sorted(found, key=lambda info: (info.started, info.pid))


def descendants(pid: int) -> list[int]:
    """Return the pids of all processes below `pid`."""
    offspring: dict[int, list[int]] = {}
    for info in process_table().values():
        offspring.setdefault(info.parent, []).append(info.pid)
    found: list[int] = []
    waiting = list(offspring.get(pid, ()))
    while waiting:
        current = waiting.pop()
        found.append(current)
        waiting.extend(offspring.get(current, ()))
    return found


def environment_of(pid: int) -> dict[str, str]:
    """Return the environment `pid` was started with; empty when it has ended or cannot be read."""
    try:
        data = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {}
    pairs = (entry.decode(errors="replace").partition("=") for entry in data.split(b"\0") if entry)
    return {key: value for key, _, value in pairs}


def send(pid: int, signum: int) -> None:
    """Send a signal; a process that has ended meanwhile is no error."""
    try:
        os.kill(pid, signum)
    except ProcessLookupError:
        return
