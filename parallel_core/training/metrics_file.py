"""`metrics.jsonl`: one JSON object a line, continued by a run that resumes. Pure Python."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from parallel_core.errors import ConfigError
from parallel_core.files import create_file


class MetricsFile:
    """Appends rows to a file.

    Args:
        path: the file; its directory is made.
        keeps: which of the rows that are there stay; a line that is no object (cut short by a crash) goes.

    Raises:
        ConfigError: if it cannot be written.
    """

    def __init__(self, path: Path, keeps: Callable[[Mapping[str, Any]], bool]) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = [row for row in _rows(path) if keeps(row)]
            partial = path.with_name(path.name + ".partial")
            # Written on through this handle: what is opened by its name may be somebody's link by then.
            self._file: TextIO = create_file(partial)
            self._file.write("".join(map(row_text, kept)))
            self._file.flush()
            os.replace(partial, path)
        except OSError as error:
            raise ConfigError(f"the metrics cannot be written to {path}: {error.strerror or error}") from None

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row and flush it; a number that is not finite, which JSON cannot hold, is written as null."""
        self._file.write(row_text(row))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def row_text(row: Mapping[str, Any]) -> str:
    """Return a row as a line of JSON, null where a number is not finite."""
    values = {key: None if _is_not_finite(value) else value for key, value in row.items()}
    return json.dumps(values, allow_nan=False) + "\n"


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def up_to(iteration: int) -> Callable[[Mapping[str, Any]], bool]:
    """Return a function that keeps the rows of this iteration and of those before it."""

    def keeps(row: Mapping[str, Any]) -> bool:
        number = row.get("iteration")
        return isinstance(number, int) and number <= iteration

    return keeps


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    if path.is_file() and not path.is_symlink():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict):
                rows.append(row)
    return rows
