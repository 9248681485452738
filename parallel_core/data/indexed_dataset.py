r"""Megatron's `.bin/.idx` pair: tokens in one flat file, sequence lengths and document boundaries in the other.

Layout of `.idx`, little endian: magic `MMIDIDX\0\0`, u64 version 1, u8 dtype code, u64 number of sequences n, u64
number of document bounds d, i32[n] lengths in tokens, i64[n] byte offsets into `.bin`, i64[d] document bounds in
sequences (first 0, last n), and i8[n] modes in multimodal files.
"""

from __future__ import annotations

import os
import struct
from types import TracebackType

import numpy as np

from parallel_core.errors import DataError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
# float64 is 6 and float32 is 7: the order comes from fairseq
DTYPE_CODES: dict[int, np.dtype] = {
    1: np.dtype(np.uint8),
    2: np.dtype(np.int8),
    3: np.dtype(np.int16),
    4: np.dtype(np.int32),
    5: np.dtype(np.int64),
    6: np.dtype(np.float64),
    7: np.dtype(np.float32),
    8: np.dtype(np.uint16),
}
_CODES_BY_DTYPE = {dtype: code for code, dtype in DTYPE_CODES.items()}


def dtype_code(dtype: np.typing.DTypeLike) -> int:
    """Return the `.idx` code of `dtype`.

    Raises:
        DataError: The format has no code for it.
    """
    code = _CODES_BY_DTYPE.get(np.dtype(dtype))
    if code is None:
        known = ", ".join(str(known) for known in _CODES_BY_DTYPE)
        raise DataError(f"dtype {np.dtype(dtype)} cannot be stored in a .bin/.idx pair; use one of {known}.")
    return code


def optimal_dtype(vocab_size: int | None) -> np.dtype:
    """Return the smallest dtype Megatron stores ids of a `vocab_size`-large vocabulary in: uint16 below 65500."""
    return np.dtype(np.uint16) if vocab_size is not None and vocab_size < 65500 else np.dtype(np.int32)


def idx_path(path_prefix: str) -> str:
    """Return the index file of `path_prefix`."""
    return path_prefix + ".idx"


def bin_path(path_prefix: str) -> str:
    """Return the token file of `path_prefix`."""
    return path_prefix + ".bin"


class IndexedDataset:
    """Sequences of tokens of one `.bin/.idx` pair, read without copying.

    Args:
        path_prefix: Path without `.bin` or `.idx`.
        multimodal: The index has a mode per sequence; indexing then gives `(tokens, mode)`.
        mmap: Map `.bin` into memory (views, no copy); otherwise read each sequence from the file.

    Raises:
        DataError: A file is missing, truncated or damaged, or the two disagree.
    """

    def __init__(self, path_prefix: str, multimodal: bool = False, mmap: bool = True) -> None:
        self.path_prefix = path_prefix
        self.multimodal = multimodal
        for path in (idx_path(path_prefix), bin_path(path_prefix)):
            if not os.path.isfile(path):
                raise DataError(
                    f"data path {path_prefix!r}: {path} does not exist. Give the path without .bin or .idx; "
                    "tools/preprocess_data.py writes both files."
                )
        self._read_index()
        self._bin_size = os.path.getsize(bin_path(path_prefix))
        self._check_bin()
        self._file_descriptor: int | None = None
        if mmap and self._bin_size:
            self._buffer: np.ndarray | None = np.memmap(bin_path(path_prefix), dtype=np.uint8, mode="r")
        else:
            self._buffer = None
            self._file_descriptor = os.open(bin_path(path_prefix), os.O_RDONLY)

    def _read_index(self) -> None:
        path = idx_path(self.path_prefix)
        size = os.path.getsize(path)
        if size < _HEADER.size:
            raise DataError(f"{path} is damaged: {size} bytes, a header alone has {_HEADER.size}. Preprocess again.")
        with open(path, "rb") as handle:
            magic, version, code, num_sequences, num_bounds = _HEADER.unpack(handle.read(_HEADER.size))
        if magic != _MAGIC:
            raise DataError(f"{path} is not an index file: it starts with {magic!r} instead of {_MAGIC!r}.")
        if version != 1:
            raise DataError(f"{path} has version {version}; only version 1 is known.")
        if code not in DTYPE_CODES:
            raise DataError(f"{path} has dtype code {code}; known codes are {sorted(DTYPE_CODES)}.")
        expected = _HEADER.size + 12 * num_sequences + 8 * num_bounds + (num_sequences if self.multimodal else 0)
        if size != expected:
            modes = " and no modes" if not self.multimodal and size == expected + num_sequences else ""
            raise DataError(
                f"{path} is truncated or damaged: {size} bytes, but {num_sequences} sequences and {num_bounds} "
                f"document bounds{modes} take {expected}. "
                + ("It has modes: open it with multimodal=True." if modes else "Preprocess again.")
            )
        self.dtype = DTYPE_CODES[code]
        buffer = np.memmap(path, dtype=np.uint8, mode="r")
        offset = _HEADER.size
        self.sequence_lengths: np.ndarray = np.frombuffer(buffer, "<i4", num_sequences, offset)
        offset += 4 * num_sequences
        self.sequence_pointers: np.ndarray = np.frombuffer(buffer, "<i8", num_sequences, offset)
        offset += 8 * num_sequences
        self.document_indices: np.ndarray = np.frombuffer(buffer, "<i8", num_bounds, offset)
        offset += 8 * num_bounds
        self.sequence_modes: np.ndarray | None = (
            np.frombuffer(buffer, "<i1", num_sequences, offset) if self.multimodal else None
        )
        bounds = self.document_indices
        if num_bounds == 0 or bounds[0] != 0 or bounds[-1] != num_sequences or np.any(bounds[1:] < bounds[:-1]):
            raise DataError(
                f"{path} is damaged: document bounds must rise from 0 to the number of sequences, {num_sequences}. "
                "Preprocess again."
            )

    def _check_bin(self) -> None:
        item_size = self.dtype.itemsize
        block = 1 << 22  # bounded memory for indices of any size
        for start in range(0, len(self), block):
            lengths = self.sequence_lengths[start : start + block].astype(np.int64)
            pointers = self.sequence_pointers[start : start + block]
            bad = (lengths < 0) | (pointers < 0) | (pointers + lengths * item_size > self._bin_size)
            if np.any(bad):
                index = int(np.argmax(bad))
                raise DataError(
                    f"{idx_path(self.path_prefix)} and its .bin disagree: sequence {start + index} has "
                    f"{lengths[index]} tokens of {item_size} bytes at byte {pointers[index]}, but "
                    f"{bin_path(self.path_prefix)} has {self._bin_size} bytes. One of them is truncated or belongs "
                    "to another run: preprocess again."
                )

    def __len__(self) -> int:
        return int(self.sequence_lengths.shape[0])

    def __del__(self) -> None:
        descriptor = getattr(self, "_file_descriptor", None)
        if descriptor is not None:
            os.close(descriptor)
            self._file_descriptor = None

    def __getitem__(self, index: int) -> np.ndarray | tuple[np.ndarray, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)} in {self.path_prefix}")
        index = index % len(self)
        tokens = self.get(index)
        return (tokens, int(self.sequence_modes[index])) if self.sequence_modes is not None else tokens

    def get(self, index: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Return `length` tokens of sequence `index` from token `offset` on (all the rest by default).

        Returns:
            A read-only array of the file's dtype; a view of the mapped file when memory-mapped.
        """
        sequence_length = int(self.sequence_lengths[index])
        if length is None:
            length = sequence_length - offset
        if offset < 0 or length < 0 or offset + length > sequence_length:
            raise DataError(
                f"{self.path_prefix}: tokens [{offset}, {offset + length}) of sequence {index}, "
                f"which has {sequence_length}"
            )
        start = int(self.sequence_pointers[index]) + offset * self.dtype.itemsize
        if self._buffer is not None:
            return np.frombuffer(self._buffer, self.dtype, length, start)
        if self._file_descriptor is None or length == 0:
            return np.empty(0, self.dtype)
        # pread has no file position, so several loader threads can share one descriptor
        return np.frombuffer(os.pread(self._file_descriptor, length * self.dtype.itemsize, start), self.dtype)

    @property
    def num_documents(self) -> int:
        """Number of documents (a document is one sequence unless sentences were split)."""
        return len(self.document_indices) - 1

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all sequences."""
        return int(np.sum(self.sequence_lengths, dtype=np.int64))

    @staticmethod
    def exists(path_prefix: str) -> bool:
        """Return whether both files of `path_prefix` exist."""
        return os.path.isfile(idx_path(path_prefix)) and os.path.isfile(bin_path(path_prefix))


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
        self._temporary = f"{bin_file}.{os.getpid()}.tmp"
        os.makedirs(os.path.dirname(bin_file) or ".", exist_ok=True)
        self._handle = open(self._temporary, "wb")  # noqa: SIM115 - closed by finalize or abort
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
        other = IndexedDataset(path_prefix, multimodal=self.multimodal)
        if other.dtype != self.dtype:
            raise DataError(f"cannot merge {path_prefix}: it stores {other.dtype}, the output {self.dtype}.")
        self._flush_pending()
        self._lengths.append(np.array(other.sequence_lengths))
        self._bounds.append(other.document_indices[1:] + self._num_sequences)
        if other.sequence_modes is not None:
            self._modes.append(np.array(other.sequence_modes))
        self._num_sequences += len(other)
        for start in range(0, len(other), 1 << 16):  # sequence by sequence would be slow, all at once large
            self._copy_block(other, start, min(start + (1 << 16), len(other)))

    def _copy_block(self, other: IndexedDataset, start: int, stop: int) -> None:
        pointers = other.sequence_pointers[start:stop]
        ends = pointers + other.sequence_lengths[start:stop].astype(np.int64) * other.dtype.itemsize
        if np.array_equal(pointers[1:], ends[:-1]):
            with open(bin_path(other.path_prefix), "rb") as source:
                source.seek(int(pointers[0]))
                remaining = int(ends[-1] - pointers[0])
                while remaining:
                    chunk = source.read(min(remaining, 1 << 24))
                    self._handle.write(chunk)
                    remaining -= len(chunk)
        else:
            for index in range(start, stop):
                self._handle.write(other.get(index).tobytes())

    def finalize(self, idx_file: str) -> None:
        """Write the index to `idx_file` and put both files in place, tokens first."""
        self._flush_pending()
        self._handle.flush()
        os.fsync(self._handle.fileno())
        self._handle.close()
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
        temporary = f"{idx_file}.{os.getpid()}.tmp"
        with open(temporary, "wb") as handle:
            handle.write(_HEADER.pack(_MAGIC, 1, dtype_code(self.dtype), len(lengths), len(bounds)))
            for part in (lengths, pointers, bounds):
                handle.write(part.tobytes())
            if self.multimodal:
                handle.write(np.concatenate([np.empty(0, np.int8), *self._modes]).tobytes())
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(self._temporary, self._bin_file)
        os.replace(temporary, idx_file)

    def abort(self) -> None:
        """Remove what was written, if `finalize` has not put it in place."""
        self._handle.close()
        if os.path.exists(self._temporary):
            os.unlink(self._temporary)

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
        self._handle.write(values.tobytes())

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
