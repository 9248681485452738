r"""Megatron's `.bin/.idx` pair: tokens in one flat file, sequence lengths and document boundaries in the other.

Layout of `.idx`, little endian: magic `MMIDIDX\0\0`, u64 version 1, u8 dtype code, u64 number of sequences n, u64
number of document bounds d, i32[n] lengths in tokens, i64[n] byte offsets into `.bin`, i64[d] document bounds in
sequences (first 0, last n), and i8[n] modes in multimodal files. Sequences lie in `.bin` one after the other without
gaps, so offsets follow from lengths, and the size of `.bin` from both: whatever does not add up is damage.
"""

from __future__ import annotations

import mmap as memory_map
import os
import struct
from collections.abc import Iterator

import numpy as np

from parallel_core.data.files import open_file, why_not_a_file
from parallel_core.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
"""First bytes of an `.idx`."""
HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, dtype code, number of sequences, number of document bounds."""
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
        self._descriptor: int | None = None
        self.path_prefix = path_prefix
        self.multimodal = multimodal
        for path in (idx_path(path_prefix), bin_path(path_prefix)):
            problem = why_not_a_file(path)
            if problem:
                raise DataError(
                    f"data path {path_prefix!r}: {path} {problem}. Give the path without .bin or .idx; "
                    "python -m parallel_core.prepare.preprocess_data writes both files."
                )
        self._read_index()
        self._descriptor = open_file(bin_path(path_prefix))
        self._bin_size = os.fstat(self._descriptor).st_size
        self._check_bin()
        self._buffer: memory_map.mmap | None = None
        if mmap and self._bin_size:
            self._buffer = memory_map.mmap(self._descriptor, self._bin_size, access=memory_map.ACCESS_READ)

    def _read_index(self) -> None:
        path = idx_path(self.path_prefix)
        descriptor = open_file(path)
        try:
            size = os.fstat(descriptor).st_size
            header = os.read(descriptor, HEADER.size)
            if len(header) < HEADER.size:
                raise DataError(
                    f"{path} is damaged: {size} bytes, a header alone has {HEADER.size}. Preprocess again."
                )
            num_sequences, num_bounds = self._read_header(path, header, size)
            buffer = memory_map.mmap(descriptor, size, access=memory_map.ACCESS_READ)
        finally:
            os.close(descriptor)
        offset = HEADER.size
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

    def _read_header(self, path: str, header: bytes, size: int) -> tuple[int, int]:
        """Set the dtype and return the numbers of sequences and of document bounds."""
        magic, version, code, num_sequences, num_bounds = HEADER.unpack(header)
        if magic != MAGIC:
            raise DataError(f"{path} is not an index file: it starts with {magic!r} instead of {MAGIC!r}.")
        if version != 1:
            raise DataError(f"{path} has version {version}; only version 1 is known.")
        if code not in DTYPE_CODES:
            raise DataError(f"{path} has dtype code {code}; known codes are {sorted(DTYPE_CODES)}.")
        expected = HEADER.size + 12 * num_sequences + 8 * num_bounds + (num_sequences if self.multimodal else 0)
        if size != expected:
            modes = " and no modes" if not self.multimodal and size == expected + num_sequences else ""
            raise DataError(
                f"{path} is truncated or damaged: {size} bytes, but {num_sequences} sequences and {num_bounds} "
                f"document bounds{modes} take {expected}. "
                + ("It has modes: open it with multimodal=True." if modes else "Preprocess again.")
            )
        self.dtype = DTYPE_CODES[code]
        return num_sequences, num_bounds

    def _check_bin(self) -> None:
        item_size = self.dtype.itemsize
        block = 1 << 22  # bounded memory for indices of any size
        index_file, bin_file = idx_path(self.path_prefix), bin_path(self.path_prefix)
        end = 0
        for start in range(0, len(self), block):
            sizes = self.sequence_lengths[start : start + block].astype(np.int64) * item_size
            pointers = self.sequence_pointers[start : start + block]
            ends = end + np.cumsum(sizes)
            bad = (sizes < 0) | (pointers != ends - sizes) | (ends > self._bin_size)
            if np.any(bad):
                index = int(np.argmax(bad))
                what = (
                    f"sequence {start + index} has {sizes[index] // item_size} tokens of {item_size} bytes at byte "
                    f"{pointers[index]}"
                )
                follows = int(ends[index] - sizes[index])
                if sizes[index] < 0 or pointers[index] != follows:
                    raise DataError(
                        f"{index_file} is damaged: {what}, where {follows} follows from the lengths before it. "
                        "Preprocess again."
                    )
                raise DataError(
                    f"{index_file} and its .bin disagree: {what}, but {bin_file} has {self._bin_size} bytes. One of "
                    "them is truncated or belongs to another run: preprocess again."
                )
            end = int(ends[-1])
        if end != self._bin_size:
            raise DataError(
                f"{index_file} and its .bin disagree: all sequences take {end} bytes, but {bin_file} has "
                f"{self._bin_size} bytes. One of them is damaged or belongs to another run: preprocess again."
            )

    def __len__(self) -> int:
        return int(self.sequence_lengths.shape[0])

    def __del__(self) -> None:
        descriptor = getattr(self, "_descriptor", None)
        if descriptor is not None:
            os.close(descriptor)
            self._descriptor = None

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

        Raises:
            DataError: The sequence has no such tokens, or the file has been cut since it was opened.
        """
        sequence_length = int(self.sequence_lengths[index])
        if length is None:
            length = sequence_length - offset
        if offset < 0 or length < 0 or offset + length > sequence_length:
            raise DataError(
                f"{self.path_prefix}: tokens [{offset}, {offset + length}) of sequence {index}, "
                f"which has {sequence_length}"
            )
        return self._read(int(self.sequence_pointers[index]) + offset * self.dtype.itemsize, length)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Return the tokens `start` to `stop` of all sequences one after the other, as `get` does."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise DataError(f"{self.path_prefix}: tokens [{start}, {stop}) of {self.num_tokens}")
        return self._read(start * self.dtype.itemsize, stop - start)

    def blocks(self, num_tokens: int = 1 << 22) -> Iterator[np.ndarray]:
        """Yield all tokens in order, at most `num_tokens` at a time."""
        for start in range(0, self.num_tokens, num_tokens):
            yield self.tokens(start, min(start + num_tokens, self.num_tokens))

    def _read(self, start: int, length: int) -> np.ndarray:
        if length == 0 or self._descriptor is None:
            return np.empty(0, self.dtype)
        if self._buffer is not None:
            # a page beyond the end of a file that was cut kills the process (SIGBUS) when it is touched
            if os.fstat(self._descriptor).st_size < self._bin_size:
                raise self._cut()
            return np.frombuffer(self._buffer, self.dtype, length, start)
        parts: list[bytes] = []
        missing = length * self.dtype.itemsize
        while missing:
            # pread has no file position, so several loader threads can share one descriptor; it may return less
            part = os.pread(self._descriptor, missing, start)
            if not part:
                raise self._cut()
            parts.append(part)
            start, missing = start + len(part), missing - len(part)
        return np.frombuffer(b"".join(parts), self.dtype)

    def _cut(self) -> DataError:
        return DataError(
            f"{bin_path(self.path_prefix)} had {self._bin_size} bytes when it was opened and is shorter now: another "
            "process has cut or is rewriting it. Make it again, and give new data a new name while runs read the old."
        )

    @property
    def num_documents(self) -> int:
        """Number of documents (a document is one sequence unless sentences were split)."""
        return len(self.document_indices) - 1

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all sequences."""
        return self._bin_size // self.dtype.itemsize  # checked to be the sum of the lengths

    @staticmethod
    def exists(path_prefix: str) -> bool:
        """Return whether both files of `path_prefix` exist."""
        return os.path.isfile(idx_path(path_prefix)) and os.path.isfile(bin_path(path_prefix))


def open_token_ids(path_prefix: str, mmap: bool = True) -> IndexedDataset:
    """Return the pair `path_prefix` as a source of token ids.

    Raises:
        DataError: It cannot be read, or stores fractions.
    """
    dataset = IndexedDataset(path_prefix, mmap=mmap)
    if dataset.dtype.kind not in "iu":
        raise DataError(f"{idx_path(path_prefix)} stores {dataset.dtype}, which are no token ids. Is it damaged?")
    return dataset
