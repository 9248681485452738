"""One writer for a directory of checkpoints: two runs would remove each other's unfinished files."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from parallel_core.errors import ConfigError

CLAIM_NAME = ".in_use"
"""Locked while a run writes checkpoints beside it; says which. It stays, so that a lock is never on a removed file."""


@contextmanager
def claimed(root: str | Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold `root` for this process as long as the block runs; a process that dies lets go of it.

    Args:
        root: the `--save` directory; it is made.
        say: told if the file system has no locks, so that nothing is held.

    Raises:
        ConfigError: another run holds it, or it cannot be written.
    """
    path = Path(root) / CLAIM_NAME
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise ConfigError(f"--save {root} cannot be written: {error.strerror or error}") from None
    try:
        _lock(handle, root, say)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, root: str | Path, say: Callable[[str], None]) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            holder = os.pread(handle, 200, 0).decode("utf-8", "replace")
            name = f" ({holder})" if holder.isprintable() and holder else ""
            raise ConfigError(
                f"--save {root} belongs to a run that is still going{name}; they would remove each other's "
                "checkpoints. Give this one another directory"
            ) from None
        say(
            f"--save {root} cannot be locked ({error.strerror}): nothing keeps another run from writing there too, and "
            "they would remove each other's checkpoints"
        )
        return
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"process {os.getpid()} on {platform.node()}".encode(), 0)
