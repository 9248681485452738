"""What each rank is doing, where the launcher can read it however the rank ends: open spans, and its stack on request.

A rank writes its open spans into a small file that is mapped into memory, so a write costs microseconds and outlives
the process. On SIGUSR1 it writes its Python stack beside it, even while it is blocked inside a library and whoever
holds the interpreter.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import mmap
import re
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from parallel_core import spans
from parallel_core.errors import CommError, printable
from parallel_core.files import create_file, read_regular
from parallel_core.records import Record, parse_json

_BYTES = 4096
_DEEPEST = 2
"""Level of the spans that are told; one costs as much as a small kernel."""
STACK_SIGNAL = signal.SIGUSR1
"""What makes a rank write its stack."""
_MAX_STACK_BYTES = 1 << 20
_WAITING = re.compile(r"/parallel_core/comm/|/mindspore/mint/distributed/")
"""Files in whose functions a rank waits for others."""
_FRAME = re.compile(r'  File "(?P<file>[^"]*)", line (?P<line>\d+) in (?P<function>.*)')


def activity_path(log_dir: Path, rank: int) -> Path:
    """Return where a rank says what it is doing."""
    return log_dir / f"activity_rank_{rank}.json"


def stack_path(log_dir: Path, rank: int) -> Path:
    """Return where a rank writes its stack."""
    return log_dir / f"stack_rank_{rank}.txt"


class Activity(spans.Listener):
    """Writes the open spans of the thread that makes it into a file, but for parts of layers, which come too often."""

    def __init__(self, path: Path) -> None:
        with create_file(path) as file:
            file.write(" " * _BYTES)
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _BYTES)
        self._thread = threading.get_ident()
        self._open: list[tuple[str, dict[str, Any], float]] = []
        self._write()

    def begin(self, name: str, level: int, details: dict[str, Any]) -> None:
        """Take note of a span that begins."""
        if level <= _DEEPEST and threading.get_ident() == self._thread:
            self._open.append((name, details, time.time()))
            self._write()

    def end(self, name: str, level: int, start_ns: int, end_ns: int, details: dict[str, Any]) -> None:  # noqa: ARG002
        """Take note of a span that ended; one that was told of only afterwards is none of the open ones."""
        if level > _DEEPEST or threading.get_ident() != self._thread or not self._open:
            return
        if self._open[-1][:2] == (name, details):
            self._open.pop()
            self._write()

    def _write(self) -> None:
        text = json.dumps({"time": time.time(), "spans": self._open}, default=str).encode()
        if len(text) <= _BYTES:
            self._memory[:] = text.ljust(_BYTES)


def tell_activity(log_dir: Path, rank: int) -> None:
    """Keep this process's activity in the log directory from now on, and its stack on request."""
    spans.listen(Activity(activity_path(log_dir, rank)))
    global _stack_file
    _stack_file = create_file(stack_path(log_dir, rank))
    faulthandler.register(STACK_SIGNAL, file=_stack_file, all_threads=True)
    faulthandler.enable(file=_stack_file, all_threads=True)  # a rank that dies of SIGSEGV leaves it too


_stack_file: TextIO | None = None
"""Stays open: the handler writes to its descriptor, without the interpreter."""


@dataclass(frozen=True)
class Doing:
    """What a rank was doing when it was asked."""

    rank: int
    spans: tuple[tuple[str, dict[str, Any], float], ...]
    """Open spans from the outside in: name, details, when it began (seconds since the epoch)."""
    stack: tuple[str, ...]
    """Frames, innermost first; empty for a rank that has gone, or did not answer."""

    @property
    def waits(self) -> bool:
        """Whether it waits for other ranks."""
        return bool(self.stack) and _WAITING.search(self.stack[0]) is not None

    def words(self, now: float) -> str:
        """Return the activity in words, with the seconds since the innermost part began."""
        parts = []
        for name, details, _ in self.spans:
            more = ", ".join(str(value) if key == "what" else f"{key} {value}" for key, value in details.items())
            parts.append(f"iteration {details['iteration']}" if name == "iteration" and "iteration" in details else
                         f"{name} ({more})" if more else name)  # fmt: skip
        where = printable(" > ".join(parts)) or "outside of an iteration"
        return where + (f", for {max(0.0, now - self.spans[-1][2]):.0f} s" if self.spans else "")


def forget(log_dir: Path, rank: int) -> None:
    """Remove what a rank wrote here."""
    for path in (activity_path(log_dir, rank), stack_path(log_dir, rank)):
        with contextlib.suppress(OSError):
            path.unlink()


def read_activity(log_dir: Path, rank: int) -> Doing:
    """Return what a rank said of itself; nothing of it where that cannot be read."""
    return Doing(rank, _read_spans(activity_path(log_dir, rank)), _read_stack(stack_path(log_dir, rank)))


def _read_spans(path: Path) -> tuple[tuple[str, dict[str, Any], float], ...]:
    try:
        said = Record(parse_json(read_regular(path, _BYTES), str(path), CommError), str(path), CommError)
    except (OSError, CommError):
        return ()
    found = []
    for entry in said.values.get("spans") or ():
        match entry:
            case [str(name), dict(details), float(start)]:
                found.append((name, details, start))
    return tuple(found)


def _read_stack(path: Path) -> tuple[str, ...]:
    """Return the frames of the main thread: the one that entered through `run_as_rank`."""
    try:
        text = read_regular(path, _MAX_STACK_BYTES).decode(errors="replace")
    except OSError:
        return ()
    for thread in re.split(r"\n\s*\n", text):
        frames = [match.groupdict() for match in map(_FRAME.match, thread.splitlines()) if match]
        if any(frame["function"] == "run_as_rank" for frame in frames):
            return tuple(printable(f"{one['file']}:{one['line']} {one['function']}") for one in frames)
    return ()
