"""Reading MindRecord files of `input_ids`, which PanGu and GPT-2 recipes of MindSpore make.

MindSpore is imported only in the process that reads: a damaged file can end that process inside MindSpore (an abort,
not an exception), so it is one of its own.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection

import numpy as np

from parallel_core.data.files import why_not_a_file
from parallel_core.errors import DataError

_SILENCE_LIMIT_S = 300.0
_RECORD, _FAILURE, _END = b"R", b"F", b"E"


def read_mindrecord(files: Sequence[str], column: str = "input_ids") -> Iterator[np.ndarray]:
    """Yield `column` of every record, in the order of the files.

    Args:
        files: MindRecord files (with their `.db` beside them).
        column: A column of integers.

    Yields:
        int64 [length].

    Raises:
        DataError: A file cannot be read, ends the process that reads it, or has no such column of integers.
    """
    for path in files:
        problem = why_not_a_file(path)
        if problem:
            raise DataError(f"MindRecord file {path!r} {problem}.")
        problem = why_not_a_file(path + ".db")
        if problem:
            raise DataError(f"{path} has no index file: {path}.db {problem}; MindRecord files come in pairs.")
        yield from _records_of(path, column)


def _records_of(path: str, column: str) -> Iterator[np.ndarray]:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    reader = context.Process(target=_send_records, args=(path, column, sender), daemon=True)
    reader.start()
    sender.close()  # so that the end of the reader is the end of the pipe
    try:
        while True:
            if not receiver.poll(_SILENCE_LIMIT_S):
                raise DataError(f"{path} cannot be read: MindSpore gave nothing for {_SILENCE_LIMIT_S:.0f} s.")
            message = receiver.recv_bytes()
            if message[:1] == _END:
                return
            if message[:1] == _FAILURE:
                raise DataError(f"{path} {message[1:].decode('utf-8', 'replace')}")
            yield np.frombuffer(message, "<i8", offset=1)
    except EOFError:
        reader.join()
        code = reader.exitcode or 0
        how = f"signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"status {code}"
        raise DataError(f"{path} is damaged: the process in which MindSpore reads it ended with {how}.") from None
    finally:
        receiver.close()
        reader.kill()
        reader.join()


def _send_records(path: str, column: str, sender: Connection) -> None:
    """Send every record as bytes; nothing that comes out of a file is unpickled on the other side."""
    from mindspore.mindrecord import FileReader

    try:
        # a list, because a single name would make MindSpore read the sibling files of a split set as well
        reader = FileReader([path], columns=[column])
        for record in reader.get_next():
            ids = np.asarray(record[column]).reshape(-1)
            if ids.dtype.kind not in "iu":
                sender.send_bytes(_FAILURE + f"has {ids.dtype} in column {column!r}, not token ids.".encode())
                return
            sender.send_bytes(_RECORD + ids.astype("<i8").tobytes())
        sender.send_bytes(_END)
    except BrokenPipeError:
        return  # the other side has seen enough
    except Exception as error:  # whatever MindSpore makes of a damaged file
        problem = f"cannot be read as a MindRecord with column {column!r}: {mindspore_reason(error)!r}"
        sender.send_bytes(_FAILURE + problem.encode("utf-8", "replace"))


def mindspore_reason(error: Exception) -> str:
    """Return MindSpore's own sentence out of its several lines of report."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    marked = [line.removeprefix("[ERROR]").strip() for line in lines if line.startswith("[ERROR]")]
    return (marked or lines or [type(error).__name__])[0][:300]
