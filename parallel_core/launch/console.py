"""The console of a job: the lines of every rank's log that are meant for it, as they are written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TextIO

from parallel_core.errors import printable
from parallel_core.files import open_regular
from parallel_core.launch.progress import ProgressLine

_FOR_CONSOLE = re.compile(rb"(INFO|WARNING|ERROR) - ")


class LogFollower:
    """Copies the lines that start with `INFO - `, `WARNING - ` or `ERROR - ` from growing log files to one stream.

    A line that concerns the whole job is written by one rank alone, so nothing is filtered twice.
    """

    def __init__(self, paths: list[Path], out: TextIO, progress: ProgressLine | None = None) -> None:
        """Follow `paths`, which may not exist yet, onto `out`, above the line of `progress`."""
        self._out, self._progress = out, progress
        self._files = [_GrowingFile(path) for path in paths]

    def poll(self) -> None:
        """Print every line completed since the last call, file by file."""
        printed = False
        for file in self._files:
            for line in file.new_lines():
                if _FOR_CONSOLE.match(line):
                    text = printable(line.decode(errors="replace"))
                    if self._progress is not None:
                        self._progress.clear()
                        self._progress.saw(text)
                    print(text, file=self._out)
                    printed = True
        if printed:
            self._out.flush()
        if self._progress is not None:
            self._progress.poll()

    def end(self) -> None:
        """Print what is left, and take the line of progress away for good."""
        self.poll()
        if self._progress is not None:
            self._progress.clear()
            self._progress = None


class _GrowingFile:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._position = 0
        self._partial = b""

    def new_lines(self) -> list[bytes]:
        try:
            with open_regular(self.path) as file:
                file.seek(self._position)
                data = file.read()
        except OSError:
            return []
        self._position += len(data)
        *lines, self._partial = (self._partial + data).split(b"\n")
        return [line.rstrip(b"\r") for line in lines]


def last_lines(path: Path, count: int = 15, limit_bytes: int = 16384) -> list[str]:
    """Return up to `count` of the last lines of the file at `path`; none when it cannot be read."""
    try:
        with open_regular(path) as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - limit_bytes))
            data = file.read()
    except OSError:
        return []
    return data.decode(errors="replace").splitlines()[-count:]
