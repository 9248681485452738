"""The line under the log on a terminal: how far the run is, how long it takes, how the loss goes, how fast it is."""

from __future__ import annotations

import json
import re
import shutil
from collections import deque
from pathlib import Path
from typing import Any, TextIO

from parallel_core.files import open_regular

_TOTAL = re.compile(r"; (\d+) iterations$")
"""In the line about the batch that a run begins with."""
_RECENT = 20
_MOST_BYTES = 1 << 20
_CLEAR = "\r\x1b[2K"


class ProgressLine:
    """Follows `metrics.jsonl` and draws one line, on a terminal only.

    Args:
        metrics: the file; it may not exist yet.
        out: where the log goes, too.
    """

    def __init__(self, metrics: Path, out: TextIO) -> None:
        self._path, self._out = metrics, out
        self._is_terminal = out.isatty()
        self._rows: deque[dict[str, Any]] = deque(maxlen=2 * _RECENT)
        self._total = 0
        self._file, self._position, self._partial = _identity(metrics), _size(metrics), b""
        self._drawn = ""

    def clear(self) -> None:
        """Take the line away, before something else is printed."""
        if self._drawn:
            self._out.write(_CLEAR)
            self._out.flush()
            self._drawn = ""

    def saw(self, line: str) -> None:
        """Take note of a line of the log, which may tell how many iterations there are."""
        match = _TOTAL.search(line)
        if match:
            self._total = int(match[1])

    def poll(self) -> None:
        """Read what is new and draw the line if it has changed."""
        if not self._is_terminal:
            return
        self._read()
        text = progress_text(list(self._rows), self._total, shutil.get_terminal_size().columns - 1)
        if text and text != self._drawn:
            self._out.write(_CLEAR + text)
            self._out.flush()
            self._drawn = text

    def _read(self) -> None:
        identity = _identity(self._path)
        # The run has begun the file, or taken it over from the run that it goes on from.
        if identity != self._file or _size(self._path) < self._position:
            self._file, self._position, self._partial = identity, 0, b""
            self._rows.clear()
        try:
            with open_regular(self._path) as file:
                file.seek(max(self._position, file.seek(0, 2) - _MOST_BYTES))
                data = file.read()
                self._position = file.tell()
        except OSError:
            return
        *lines, self._partial = (self._partial + data).split(b"\n")
        for line in lines:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and "split" not in row and isinstance(row.get("iteration"), int):
                self._rows.append(row)


def progress_text(rows: list[dict[str, Any]], total: int, width: int) -> str:
    """Return the line for the newest rows of the metrics; empty without any.

    Args:
        rows: the last iterations, in order.
        total: iterations of the run; 0 when that is not known.
        width: columns that there are; what does not fit is left out from the end.
    """
    if not rows:
        return ""
    iteration = rows[-1]["iteration"]
    recent, before = rows[-_RECENT:], rows[-2 * _RECENT : -_RECENT]
    parts = [f"iteration {iteration}"]
    seconds = _mean(recent, "elapsed_ms") / 1e3
    if total >= iteration:
        done = int(20 * iteration / total)
        parts = [f"[{'#' * done}{'.' * (20 - done)}] {iteration}/{total}"]
        parts.append(f"left {_duration((total - iteration) * seconds)}")
    loss = rows[-1].get("loss")
    if isinstance(loss, (int, float)):
        parts.append(f"loss {loss:.4f}{_trend(_mean(before, 'loss'), _mean(recent, 'loss')) if before else ''}")
    if speed := _mean(recent, "tokens_per_s"):
        parts.append(f"{speed:.0f} tokens/s")
    parts.append(f"{seconds * 1e3:.0f} ms")
    if flops := _mean(recent, "tflops_per_device"):
        share = _mean(recent, "share_of_peak")
        parts.append(f"{flops:.3g} TFLOP/s per device{f', {100 * share:.0f}% of its best' if share else ''}")
    while len(parts) > 1 and len("  ".join(parts)) > width:
        parts.pop()
    return "  ".join(parts)[: max(width, 0)]


def _mean(rows: list[dict[str, Any]], key: str) -> float:
    values = [row[key] for row in rows if isinstance(row.get(key), (int, float))]
    return sum(values) / len(values) if values else 0.0


def _trend(before: float, now: float) -> str:
    if abs(now - before) < 1e-3 * abs(before):
        return " (level)"
    return " (falling)" if now < before else " (rising)"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _identity(path: Path) -> int:
    try:
        return path.stat().st_ino
    except OSError:
        return 0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
