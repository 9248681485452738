"""Opening files that others may have put in place: none that are no files, and none through somebody else's link."""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import TextIO


def open_regular(path: str | Path) -> BufferedReader:
    """Open a file for reading; a pipe or a device, which may block or never end, is refused.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    # Without O_NONBLOCK the open itself waits for a pipe's writer.
    descriptor = os.open(_encodable(path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _require_regular(descriptor, path)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: str | Path, limit_bytes: int) -> bytes:
    """Return the content of a regular file.

    Args:
        path: the file.
        limit_bytes: the largest size that makes sense.

    Raises:
        OSError: it cannot be read, is no regular file, or is larger.
    """
    with open_regular(path) as handle:
        size = os.fstat(handle.fileno()).st_size
        if size > limit_bytes:
            raise OSError(errno.EFBIG, f"{size} bytes, more than {limit_bytes} cannot be meant", str(path))
        return handle.read(size)


def create_file(path: str | Path) -> TextIO:
    """Open a new text file in place of whatever has its name: a link there is removed, never followed.

    Raises:
        OSError: it cannot be made.
    """
    Path(path).unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.fdopen(os.open(path, flags, 0o666), "w", encoding="utf-8")


def _require_regular(descriptor: int, path: str | Path) -> None:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def _encodable(path: str | Path) -> bytes:
    try:
        name = os.fsencode(path)
    except UnicodeEncodeError:
        raise OSError(errno.EINVAL, "not a name a file can have", ascii(str(path))) from None
    if b"\0" in name:
        raise OSError(errno.EINVAL, "not a name a file can have", ascii(str(path)))
    return name
