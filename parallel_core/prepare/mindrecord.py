"""MindRecord files of fixed-length `input_ids`, as PanGu and GPT-2 recipes of MindSpore make and read them.

MindSpore is imported only when a file is written (and, in a process of its own, when one is read).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence

import numpy as np

from parallel_core.data.indexed_dataset import (
    IndexedDataset,
    IndexedDatasetBuilder,
    bin_path,
    idx_path,
    open_token_ids,
    optimal_dtype,
)
from parallel_core.data.mindrecord_reader import mindspore_reason, read_mindrecord
from parallel_core.data.tokenizer.base import MegatronTokenizer
from parallel_core.errors import ConfigError, DataError

_COLUMNS = ("input_ids", "attention_mask", "labels")
_RECORDS_PER_WRITE = 256


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
            raise DataError(f"{output} cannot be written: {mindspore_reason(error)}. Nothing of it is left.") from error
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
