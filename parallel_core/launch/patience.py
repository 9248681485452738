"""A rank's promise to the launcher: asked to stop, it ends its iteration, saves, and ends by itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from parallel_core.launch.report import LOG_DIR_VARIABLE


def promise_path(log_dir: Path, rank: int) -> Path:
    """Return the file that stands for the promise of `rank`."""
    return log_dir / f"stops_itself_rank_{rank}"


@contextmanager
def promise_to_stop() -> Iterator[None]:
    """Promise it while the block runs; without a launcher, do nothing.

    A log directory that takes no file costs the launcher's patience only: the rank then has its fixed grace.
    """
    log_dir, rank = os.environ.get(LOG_DIR_VARIABLE), os.environ.get("RANK_ID")
    if not log_dir or rank is None or os.environ.get("MS_ROLE") != "MS_WORKER":
        yield
        return
    path = promise_path(Path(log_dir), int(rank))
    try:
        path.touch()
    except OSError:
        yield
        return
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
