"""Where compiled code is kept between runs: a folder that only its owner can write, files that prove to be whole."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

_SEAL = b"\nparallel_core sha256 "
_SEAL_BYTES = len(_SEAL) + 64
_TELL_AFTER_S = 2.0


class CacheError(Exception):
    """A folder or file of the cache cannot be used; the message is one line that says why."""


def open_private_folder(folder: Path) -> int:
    """Return a descriptor of `folder`, made if it is not there, that is this user's own and that nobody else can write.

    What is opened relative to the descriptor stays in this folder, whatever happens to its path.

    Raises:
        CacheError: it cannot be made or written, is a link, or others could put files into it.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        link = folder.is_symlink()
        why = "it is a link; name the folder it leads to" if link else error.strerror
        raise CacheError(f"{folder} cannot be used: {why}") from None
    reason = _not_private(os.fstat(descriptor)) or ("" if os.access(folder, os.W_OK) else "it cannot be written")
    if reason:
        os.close(descriptor)
        raise CacheError(f"{folder} cannot be used: {reason}")
    return descriptor


def read_sealed(folder: int, name: str) -> int | None:
    """Return a descriptor of a whole file that was put here by `write_sealed`, or None when it has to be made.

    Raises:
        CacheError: it is there, but somebody else's, or writable by others, or no plain file.
    """
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CacheError(f"{name} cannot be opened ({error.strerror}); remove it") from None
    status = os.fstat(descriptor)
    reason = "it is no plain file" if not stat.S_ISREG(status.st_mode) else _not_private(status)
    if reason:
        os.close(descriptor)
        raise CacheError(f"{name} is not loaded: {reason}; remove it")
    data = os.pread(descriptor, status.st_size, 0)
    if data[-_SEAL_BYTES:] == _SEAL + hashlib.sha256(data[:-_SEAL_BYTES]).hexdigest().encode():
        return descriptor
    os.close(descriptor)
    return None


def write_sealed(folder: int, name: str, data: bytes) -> None:
    """Put a file into the folder in one step, with a hash at its end that tells a whole one from a damaged one.

    Raises:
        OSError: the disk is full, or fails.
    """
    partial = f"{name}.{os.getpid()}.tmp"
    _remove(partial, folder)  # a crash's, whose process had the same number
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with open(os.open(partial, flags, 0o700, dir_fd=folder), "wb") as file:
            file.write(data + _SEAL + hashlib.sha256(data).hexdigest().encode())
            file.flush()
            os.fsync(file.fileno())  # before the rename: a crash must not leave the name with half the content
        os.replace(partial, name, src_dir_fd=folder, dst_dir_fd=folder)
        os.fsync(folder)
    except OSError:
        _remove(partial, folder)
        raise


def in_memory(data: bytes) -> int:
    """Return a descriptor of a file without a name that holds `data`, for where nothing can be kept."""
    descriptor = os.memfd_create("parallel_core-kernels", os.MFD_CLOEXEC)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(data)
    return descriptor


@contextmanager
def building_lock(folder: int, name: str, patience_s: float, done: Callable[[], bool]) -> Iterator[None]:
    """Hold a lock that keeps processes which start together from all doing the same work.

    It saves work and decides nothing: where the file system has no locks, or the holder takes longer than
    `patience_s` seconds, the block runs without it. The operating system drops the lock when its holder dies.

    Args:
        folder: the folder's descriptor.
        name: the lock's file in it, which stays behind.
        patience_s: how long to wait.
        done: whether the work has been done by another; then the wait ends too.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(name, flags, 0o600, dir_fd=folder)
    except OSError as error:
        logger.warning("kernels: no lock (%s: %s); every process compiles for itself", name, error.strerror)
        yield
        return
    try:
        _wait_for(descriptor, name, patience_s, done)
        yield
    finally:
        os.close(descriptor)


def _wait_for(descriptor: int, name: str, patience_s: float, done: Callable[[], bool]) -> None:
    start, told = time.monotonic(), False
    while not done():
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            waited = time.monotonic() - start
        except OSError as error:  # NFS without a lock server, among others
            logger.warning("kernels: no lock (%s: %s); every process compiles for itself", name, error.strerror)
            return
        if waited > patience_s:
            logger.warning("kernels: %s has been held for %g s; going on without it", name, patience_s)
            return
        if waited > _TELL_AFTER_S and not told:
            told = True
            logger.warning("kernels: waiting for the process that holds %s and compiles them", name)
        time.sleep(0.05)


def scratch_folder() -> tempfile.TemporaryDirectory[str]:
    """Return a new private folder for intermediate files; on the machine's own disk, not in the user's quota."""
    return tempfile.TemporaryDirectory(prefix="parallel_core-build-", ignore_cleanup_errors=True)


def _not_private(status: os.stat_result) -> str:
    if status.st_uid not in (os.geteuid(), 0):
        return f"it belongs to user {status.st_uid}"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write it (mode {stat.S_IMODE(status.st_mode):04o})"
    return ""


def _remove(name: str, folder: int) -> None:
    try:
        os.unlink(name, dir_fd=folder)
    except OSError:
        return  # gone already, or a disk that fails: the first error is the one to tell
