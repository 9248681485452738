"""Atomic files and locks: what makes shared caches safe when several processes, or several jobs, build at once."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np


@contextlib.contextmanager
def exclusive_lock(path: str) -> Iterator[None]:
    """Hold an exclusive lock on the file `path` (created if needed); others wait. A killed holder frees it.

    The file stays behind on purpose: removing it would let two processes lock two different files of one name.
    """
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "a+b") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)


@contextlib.contextmanager
def atomic_write(path: str) -> Iterator[BinaryIO]:
    """Give a binary file that becomes `path` in one step when the block ends, and leaves nothing if it fails."""
    directory = os.path.dirname(path) or "."
    os.makedirs(directory, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{os.path.basename(path)}.", suffix=".tmp", dir=directory)
    try:
        with os.fdopen(descriptor, "wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def atomic_save_array(path: str, array: np.ndarray) -> None:
    """Write `array` to the `.npy` file `path` in one step."""
    with atomic_write(path) as handle:
        np.save(handle, array, allow_pickle=False)


def _umask() -> int:
    # mkstemp makes private files; a shared cache must be readable by whom the user's umask allows
    current = os.umask(0)
    os.umask(current)
    return current
