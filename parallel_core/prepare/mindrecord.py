"""MindRecord files of fixed-length `input_ids`, as PanGu and GPT-2 recipes of MindSpore make and read them.

The only module of this package that imports MindSpore, and only when a file is read or written. A damaged file can end
the process inside MindSpore (an abort, not an exception), so files are read in a process of their own.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection

import numpy as np

from parallel_core.data.files import why_not_a_file
from parallel_core.data.indexed_dataset import (
    IndexedDataset,
    IndexedDatasetBuilder,
    bin_path,
    idx_path,
    open_token_ids,
    optimal_dtype,
)
from parallel_core.data.tokenizer.base import MegatronTokenizer
from parallel_core.errors import ConfigError, DataError

_COLUMNS = ("input_ids", "attention_mask", "labels")
_RECORDS_PER_WRITE = 256
_SILENCE_LIMIT_S = 300.0
_RECORD, _FAILURE, _END = b"R", b"F", b"E"


def indexed_to_mindrecord(
    path_prefix: str,
    output: str,
    length: int,
    *,
    columns: Sequence[str] = ("input_ids",),
    num_splits: int = 1,
) -> int:
    """Write the tokens of `path_prefix`, one document after the other, as records of `length` ids.

    The tokens left over at the end, fewer than `length`, are dropped. A model of sequence length S reads records of
    S + 1 ids.

    Args:
        path_prefix: The `.bin/.idx` pair to read.
        output: MindRecord file to make (and its `.db`); with several splits MindSpore appends a number to the name.
        length: Ids per record.
        columns: Of `input_ids`, `attention_mask` (all ones) and `labels` (equal to `input_ids`).
        num_splits: Number of files.

    Returns:
        Number of records.

    Raises:
        ConfigError: A column or a number is wrong.
        DataError: There are fewer than `length` tokens, or the file exists.
    """
    unknown = sorted(set(columns) - set(_COLUMNS))
    if unknown or "input_ids" not in columns:
        raise ConfigError(f"columns={list(columns)}: use input_ids and, if wanted, attention_mask and labels.")
    if length < 2 or num_splits < 1:
        raise ConfigError(f"length={length} must be 2 or more and num_splits={num_splits} 1 or more.")
    dataset = open_token_ids(path_prefix)
    if dataset.num_tokens < length:
        raise DataError(f"{path_prefix} has {dataset.num_tokens} tokens, not enough for one record of {length}.")
    existing = _files_of(output)
    if existing:
        raise DataError(f"{existing[0]} exists; remove it first, MindRecord files are not overwritten.")
    from mindspore.mindrecord import FileWriter

    writer = FileWriter(output, num_splits)
    writer.add_schema({name: {"type": "int32", "shape": [-1]} for name in columns}, "lm-schema")
    num_records = 0
    try:
        rows: list[dict[str, np.ndarray]] = []
        for ids in _fixed_length(dataset, length):
            rows.append({name: np.ones_like(ids) if name == "attention_mask" else ids for name in columns})
            num_records += 1
            if len(rows) == _RECORDS_PER_WRITE:
                writer.write_raw_data(rows)
                rows = []
        if rows:
            writer.write_raw_data(rows)
        writer.commit()
    except BaseException as error:
        for leftover in _files_of(output):
            os.unlink(leftover)
        if isinstance(error, (RuntimeError, OSError)):
            raise DataError(f"{output} cannot be written: {_reason(error)}. Nothing of it is left.") from error
        raise
    return num_records


def _files_of(output: str) -> list[str]:
    """Return the existing files MindSpore names after `output`: itself or with the split's number, and their `.db`."""
    pattern = re.compile(re.escape(os.path.basename(output)) + r"\d*(\.db)?")
    folder = os.path.dirname(output) or "."
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    return [os.path.join(folder, name) for name in names if pattern.fullmatch(name)]


def _fixed_length(dataset: IndexedDataset, length: int) -> Iterator[np.ndarray]:
    pending = np.empty(0, np.int32)
    for tokens in dataset.blocks():
        pending = np.concatenate((pending, tokens), dtype=np.int32, casting="unsafe")
        whole = len(pending) // length * length
        yield from pending[:whole].reshape(-1, length)
        pending = pending[whole:]


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
        problem = f"cannot be read as a MindRecord with column {column!r}: {_reason(error)!r}"
        sender.send_bytes(_FAILURE + problem.encode("utf-8", "replace"))


def _reason(error: Exception) -> str:
    """Return MindSpore's own sentence out of its several lines of report."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    marked = [line.removeprefix("[ERROR]").strip() for line in lines if line.startswith("[ERROR]")]
    return (marked or lines or [type(error).__name__])[0][:300]


def mindrecord_to_indexed(
    files: Sequence[str], path_prefix: str, tokenizer: MegatronTokenizer, column: str = "input_ids"
) -> tuple[int, int]:
    """Write the records of MindRecord files as documents of a `.bin/.idx` pair.

    Args:
        files: MindRecord files, in order.
        path_prefix: Pair to write.
        tokenizer: The tokenizer the ids belong to; it decides the stored dtype and which ids are legal.
        column: A column of token ids.

    Returns:
        Number of documents and of tokens.

    Raises:
        DataError: A file cannot be read, there are no records, or an id is outside the vocabulary.
    """
    records = tokens = 0
    with IndexedDatasetBuilder(bin_path(path_prefix), optimal_dtype(tokenizer.vocab_size)) as builder:
        for ids in read_mindrecord(files, column):
            if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= tokenizer.vocab_size):
                raise DataError(
                    f"record {records} has token id {int(ids.max()) if ids.min() >= 0 else int(ids.min())}, outside "
                    f"the vocabulary of {tokenizer.vocab_size} ids. Give the tokenizer these records were made with."
                )
            builder.add_document(ids, [len(ids)])
            records += 1
            tokens += len(ids)
        if not records:
            raise DataError(f"no records in {', '.join(files)}.")
        builder.finalize(idx_path(path_prefix))
    return records, tokens
