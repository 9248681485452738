"""Megatron's `.bin/.idx` pairs: reading (`indexed_reader`), writing byte for byte the same, and merging."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import numpy as np

from parallel_core.data.files import AtomicFile
from parallel_core.data.indexed_reader import (
    DTYPE_CODES,
    HEADER,
    MAGIC,
    IndexedDataset,
    bin_path,
    dtype_code,
    idx_path,
    open_token_ids,
    optimal_dtype,
)
from parallel_core.errors import DataError

__all__ = [
    "DTYPE_CODES",
    "IndexedDataset",
    "IndexedDatasetBuilder",
    "bin_path",
    "dtype_code",
    "idx_path",
    "merge_indexed_datasets",
    "open_token_ids",
    "optimal_dtype",
]
_COPIED_TOKENS = 1 << 22


@contextmanager
def _named_write_errors(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error}. Nothing of it is left.") from error


class IndexedDatasetBuilder:
    """Writes a `.bin/.idx` pair, byte for byte as Megatron does; neither appears before `finalize`.

    Use it as a context manager: leaving the block without `finalize` removes what was written.

    Args:
        bin_file: Path of the token file to make.
        dtype: Stored dtype, see `optimal_dtype`.
        multimodal: Store a mode with each sequence.
    """

    def __init__(self, bin_file: str, dtype: np.typing.DTypeLike = np.int32, multimodal: bool = False) -> None:
        dtype_code(dtype)
        self.dtype = np.dtype(dtype)
        self.multimodal = multimodal
        self._bin_file = bin_file
        with _named_write_errors(bin_file):
            self._file = AtomicFile(bin_file)
        self._lengths: list[np.ndarray] = []
        self._pending_lengths: list[int] = []
        self._bounds: list[np.ndarray] = [np.zeros(1, np.int64)]
        self._pending_bounds: list[int] = []
        self._modes: list[np.ndarray] = []
        self._num_sequences = 0

    def __enter__(self) -> IndexedDatasetBuilder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def add_item(self, tokens: np.typing.ArrayLike, mode: int = 0) -> None:
        """Append one sequence to the current document."""
        self._write(tokens)
        self._add_lengths([int(np.size(tokens))])
        if self.multimodal:
            self._modes.append(np.array([mode], np.int8))

    def add_document(
        self, tokens: np.typing.ArrayLike, lengths: list[int], modes: list[int] | None = None
    ) -> None:
        """Append a document whose `tokens` are the concatenation of sequences with these `lengths`."""
        if sum(lengths) != np.size(tokens):
            raise DataError(f"a document of {np.size(tokens)} tokens cannot have sequences of lengths {lengths[:10]}")
        self._write(tokens)
        self._add_lengths(lengths)
        if self.multimodal:
            self._modes.append(np.array(modes if modes is not None else [0] * len(lengths), np.int8))
        self.end_document()

    def end_document(self) -> None:
        """End the current document; the next sequence starts another."""
        self._pending_bounds.append(self._num_sequences)

    def add_index(self, path_prefix: str) -> None:
        """Append all documents of another pair, which must have the same dtype."""
        other = IndexedDataset(path_prefix, multimodal=self.multimodal, mmap=False)
        if other.dtype != self.dtype:
            raise DataError(f"cannot merge {path_prefix}: it stores {other.dtype}, the output {self.dtype}.")
        self._flush_pending()
        self._lengths.append(np.array(other.sequence_lengths))
        self._bounds.append(other.document_indices[1:] + self._num_sequences)
        if other.sequence_modes is not None:
            self._modes.append(np.array(other.sequence_modes))
        self._num_sequences += len(other)
        for start in range(0, other.num_tokens, _COPIED_TOKENS):
            self._copy_block(other, start, min(start + _COPIED_TOKENS, other.num_tokens))

    def _copy_block(self, other: IndexedDataset, start: int, stop: int) -> None:
        self._write(other.tokens(start, stop))

    def finalize(self, idx_file: str) -> None:
        """Write the index to `idx_file` and put both files in place, tokens first.

        Raises:
            DataError: A sequence belongs to no document, or there is no room for the files; nothing is left then.
        """
        self._flush_pending()
        lengths = np.concatenate([np.empty(0, np.int32), *self._lengths]).astype("<i4")
        pointers = np.zeros(len(lengths), "<i8")
        np.cumsum(lengths[:-1].astype(np.int64) * self.dtype.itemsize, out=pointers[1:])
        bounds = np.concatenate(self._bounds).astype("<i8")
        if bounds[-1] != len(lengths):
            self.abort()
            raise DataError(
                f"{self._bin_file}: {len(lengths) - bounds[-1]} sequences after the last end_document() belong to no "
                "document; end the document before finalize()."
            )
        try:
            with _named_write_errors(self._bin_file), AtomicFile(idx_file) as index:
                index.handle.write(HEADER.pack(MAGIC, 1, dtype_code(self.dtype), len(lengths), len(bounds)))
                for part in (lengths, pointers, bounds):
                    index.handle.write(part.data)
                if self.multimodal:
                    index.handle.write(np.concatenate([np.empty(0, np.int8), *self._modes]).tobytes())
                index.finish()
                self._file.commit()
        finally:
            self.abort()

    def abort(self) -> None:
        """Remove what was written, if `finalize` has not put it in place."""
        self._file.abort()

    def _write(self, tokens: np.typing.ArrayLike) -> None:
        values = np.asarray(tokens)
        if values.dtype != self.dtype:
            if self.dtype.kind in "iu" and values.size:
                limits = np.iinfo(self.dtype)
                low, high = int(values.min()), int(values.max())
                if low < limits.min or high > limits.max:
                    raise DataError(
                        f"token id {low if low < limits.min else high} does not fit {self.dtype} "
                        f"({limits.min}..{limits.max}) of {self._bin_file}: the tokenizer's vocab_size is wrong."
                    )
            values = values.astype(self.dtype)
        with _named_write_errors(self._bin_file):
            self._file.handle.write(np.ascontiguousarray(values).data)

    def _add_lengths(self, lengths: list[int]) -> None:
        self._pending_lengths.extend(lengths)
        self._num_sequences += len(lengths)
        if len(self._pending_lengths) >= 1 << 16:
            self._flush_pending()

    def _flush_pending(self) -> None:
        # Python ints take 36 bytes each, array items 4 and 8: billions of sequences have to fit
        self._lengths.append(np.array(self._pending_lengths, np.int32))
        self._bounds.append(np.array(self._pending_bounds, np.int64))
        self._pending_lengths, self._pending_bounds = [], []


def merge_indexed_datasets(path_prefixes: list[str], output_prefix: str, multimodal: bool = False) -> None:
    """Write one pair with all documents of `path_prefixes`, in that order."""
    if not path_prefixes:
        raise DataError(f"nothing to merge into {output_prefix!r}: give at least one path prefix.")
    dtype = IndexedDataset(path_prefixes[0], multimodal=multimodal).dtype
    with IndexedDatasetBuilder(bin_path(output_prefix), dtype, multimodal) as builder:
        for path_prefix in path_prefixes:
            builder.add_index(path_prefix)
        builder.finalize(idx_path(output_prefix))
