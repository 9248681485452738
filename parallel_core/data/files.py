"""Files of others and files for others: regular ones only, within a size, written in one step, built under a lock."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import numpy as np

from parallel_core.errors import DataError
from parallel_core.records import repeated_key

logger = logging.getLogger(__name__)

MAX_TEXT_BYTES = 1 << 28
"""Largest file that is read whole: the vocabularies and lists of paths there are take a few MB."""

_WORD_AFTER_S = 5.0
_LIMIT_S = 1800.0
_LIMIT_FOR_OTHERS_S = 10.0


class LockHeldError(OSError):
    """Another process held a lock for longer than it is worth waiting for."""


def why_not_a_file(path: str) -> str | None:
    """Return why `path` cannot be read as a file (it is missing, a folder, a pipe, a device), or None if it can."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        return "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be opened ({error})"
    if stat.S_ISREG(mode):
        return None
    kinds = ((stat.S_ISDIR, "folder"), (stat.S_ISFIFO, "pipe"), (stat.S_ISSOCK, "socket"))
    return f"is a {next((name for test, name in kinds if test(mode)), 'device')}, not a file"


def open_file(path: str) -> int:
    """Return a descriptor of the regular file `path` for reading; it does not wait for a writer of a pipe.

    Raises:
        DataError: It is missing, cannot be read, or is no regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} {why_not_a_file(path) or f'cannot be opened ({error})'}.") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DataError(f"{path} {why_not_a_file(path) or 'is not a file'}.")
    return descriptor


def read_file(path: str, limit: int = MAX_TEXT_BYTES) -> bytes:
    """Return the content of the regular file `path`.

    Raises:
        DataError: It cannot be read, is no regular file, or is larger than `limit` bytes.
    """
    try:
        with os.fdopen(open_file(path), "rb") as handle:
            content = handle.read(limit + 1)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    if len(content) > limit:
        raise DataError(f"{path} is larger than {limit >> 20} MB, which no such file is. Is it the right one?")
    return content


def read_text(path: str, limit: int = MAX_TEXT_BYTES) -> str:
    """Return the text of the UTF-8 file `path`, without a byte order mark.

    Raises:
        DataError: As `read_file`, or it is not UTF-8.
    """
    try:
        return read_file(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: byte {error.object[error.start]:#04x} at {error.start}.") from error


def read_json(path: str) -> Any:
    """Return the content of the JSON file `path`.

    Raises:
        DataError: As `read_text`, or it is not JSON, or an object has a key twice.
    """
    try:
        return parse_json(read_text(path))
    except ValueError as error:
        raise error if isinstance(error, DataError) else DataError(f"{path} is not JSON: {error}.") from error


def parse_json(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: It is not JSON, is nested too deep, or an object has a key twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if (twice := repeated_key(pairs)) is not None:
        raise ValueError(f"the key {twice!r} appears twice")
    return dict(pairs)


@contextlib.contextmanager
def exclusive_lock(
    path: str, limit_s: float = _LIMIT_S, limit_for_others_s: float = _LIMIT_FOR_OTHERS_S
) -> Iterator[None]:
    """Hold an exclusive lock on the file `path` (created if needed); others wait. A killed holder frees it.

    A wait of some seconds is said, with the holder. The file stays behind on purpose: removing it would let two
    processes lock two different files of one name.

    Args:
        path: The lock file; a link is not followed.
        limit_s: Longest wait.
        limit_for_others_s: Longest wait when another user's process holds it: whoever may read the file may lock it.

    Raises:
        LockHeldError: The wait was too long.
        OSError: The file cannot be made.
    """
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is not a file", path)
        _wait_for_lock(descriptor, path, limit_s, limit_for_others_s)
        yield
    finally:
        os.close(descriptor)


def _wait_for_lock(descriptor: int, path: str, limit_s: float, limit_for_others_s: float) -> None:
    started = time.monotonic()
    said = False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            pass
        waited = time.monotonic() - started
        holder, is_another_users = _lock_holder(descriptor)
        if waited >= (limit_for_others_s if is_another_users else limit_s):
            raise LockHeldError(errno.EAGAIN, f"its lock has been held by {holder} for {waited:.0f} s", path)
        if waited >= _WORD_AFTER_S and not said:
            said = True
            logger.warning("waiting for the lock %s, held by %s", path, holder)
        time.sleep(min(0.2, 0.01 + waited / 10))


def _lock_holder(descriptor: int) -> tuple[str, bool]:
    """Return who holds the lock, for people, and whether it is another user's process; unknown across machines."""
    status = os.fstat(descriptor)
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    try:
        with open("/proc/locks", encoding="ascii") as handle:
            lines = [line.split() for line in handle]
        process = next(int(words[4]) for words in lines if words[1] == "FLOCK" and words[5] == place)
        owner = os.stat(f"/proc/{process}").st_uid
    except (OSError, StopIteration, IndexError, ValueError):
        return "another process", False
    return f"process {process} of user {owner}", owner != os.geteuid()


class AtomicFile:
    """A binary file that becomes `path` in one step, on `commit`; `abort` leaves nothing of it.

    It is written under a name of its own that nobody can have made before, in the same folder.

    Args:
        path: The file to make or replace.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        directory = os.path.dirname(path) or "."
        os.makedirs(directory, exist_ok=True)
        prefix = f".{os.path.basename(path)[:200]}."
        descriptor, self._temporary = tempfile.mkstemp(prefix=prefix, suffix=".tmp", dir=directory)
        self.handle = os.fdopen(descriptor, "wb")

    def finish(self) -> None:
        """Write everything to the disk; nothing can go wrong in `commit` for want of space then."""
        self.handle.flush()
        os.fchmod(self.handle.fileno(), 0o666 & ~_umask())
        os.fsync(self.handle.fileno())
        self.handle.close()

    def commit(self) -> None:
        """Put the file in place."""
        if not self.handle.closed:
            self.finish()
        os.replace(self._temporary, self.path)

    def abort(self) -> None:
        """Remove what was written, if it is not in place yet."""
        with contextlib.suppress(OSError):  # a full disk fails here too, and the file still has to go
            self.handle.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._temporary)

    def __enter__(self) -> AtomicFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.commit()
        finally:
            self.abort()


def atomic_write(path: str, content: bytes) -> None:
    """Write `content` to the file `path` in one step."""
    with AtomicFile(path) as file:
        file.handle.write(content)


def atomic_save_array(path: str, array: np.ndarray) -> None:
    """Write `array` to the `.npy` file `path` in one step."""
    with AtomicFile(path) as file:
        np.save(file.handle, array, allow_pickle=False)


def _umask() -> int:
    # mkstemp makes private files; a shared cache must be readable by whom the user's umask allows
    current = os.umask(0)
    os.umask(current)
    return current
