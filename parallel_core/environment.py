"""What the launcher and its ranks tell each other, where neither needs to know the other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOG_DIR_VARIABLE = "PARALLEL_CORE_RUN_DIR"
"""Directory of a launched job's logs, reports and metrics."""

HANDOVER_VARIABLE = "PARALLEL_CORE_RESOLVED_CONFIG"
"""Set by the launcher: the file with the configuration it resolved, for the ranks."""

MEETING_VARIABLE = "PARALLEL_CORE_MEETING"
"""Set by the launcher where all ranks are on one host: the descriptor of the memory by which they meet."""

MEMORY_VARIABLE = "PARALLEL_CORE_MAX_DEVICE_MEMORY"
"""Set by the launcher: a run's `max_device_memory`, which an NPU takes before the ranks join."""


def promise_path(log_dir: Path, rank: int) -> Path:
    """Return the file that stands for the promise of `rank`, see `promise_to_stop`."""
    return log_dir / f"stops_itself_rank_{rank}"


@contextmanager
def promise_to_stop() -> Iterator[None]:
    """Promise the launcher, while the block runs, that this rank ends its iteration, saves and ends when asked to stop.

    Without a launcher it does nothing. A log directory that takes no file costs the launcher's patience only: the rank
    then has its fixed grace.
    """
    log_dir, rank = os.environ.get(LOG_DIR_VARIABLE), os.environ.get("RANK_ID")
    if not log_dir or rank is None or os.environ.get("MS_ROLE") != "MS_WORKER":
        yield
        return
    path = promise_path(Path(log_dir), int(rank))
    with suppress(OSError):
        path.touch()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
