"""Reading and writing safetensors files as streams: a header parsed with suspicion, tensors written as they come."""

from __future__ import annotations

import json
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from parallel_core.checkpoint.dtypes import SAFETENSORS_NAMES, TAGS_BY_SAFETENSORS_NAME, as_storage, storage_dtype
from parallel_core.checkpoint.source import Blob, check_shape
from parallel_core.errors import CheckpointError
from parallel_core.files import open_regular
from parallel_core.records import Record, parse_json

MAX_HEADER_BYTES = 100_000_000
"""The safetensors format's own limit."""
_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class FileDigest:
    """Size and checksum of a file: enough to notice truncation, flipped bits, and two files swapped."""

    bytes: int
    crc32: str


class ChecksumWriter:
    """A binary stream that remembers how much went through it and the CRC-32 of it."""

    def __init__(self, handle: BinaryIO) -> None:
        self._handle = handle
        self._crc = 0
        self._bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        """Write `data` and add it to the checksum."""
        self._handle.write(data)
        self._crc = zlib.crc32(data, self._crc)
        self._bytes += len(data)

    def write_array(self, array: np.ndarray) -> None:
        """Write the elements of `array` in C order, without a second copy of more than one row block."""
        if not array.flags.c_contiguous and array.ndim > 0 and array.nbytes > _CHUNK_BYTES and len(array) > 1:
            half = len(array) // 2
            self.write_array(array[:half])
            self.write_array(array[half:])
            return
        if array.size == 0:
            return
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        for start in range(0, len(flat), _CHUNK_BYTES):
            self.write(flat[start : start + _CHUNK_BYTES])

    def digest(self) -> FileDigest:
        """Return size and checksum of everything written so far."""
        return FileDigest(self._bytes, f"{self._crc:08x}")


def file_digest(path: Path) -> FileDigest:
    """Return size and checksum of a file, read in blocks."""
    crc, size = 0, 0
    buffer = bytearray(1 << 20)
    with open_regular(path) as handle:
        while count := handle.readinto(buffer):
            crc = zlib.crc32(memoryview(buffer)[:count], crc)
            size += count
    return FileDigest(size, f"{crc:08x}")


def header_bytes(
    entries: Mapping[str, tuple[tuple[int, ...], str]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """Return the header of a file that holds `entries` (shape and dtype tag by name), and each entry's byte offset."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, (shape, tag) in entries.items():
        size = math.prod(shape) * storage_dtype(tag).itemsize
        header[name] = {"dtype": SAFETENSORS_NAMES[tag], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts 8-aligned, as the format asks
    start = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {name: start + header[name]["data_offsets"][0] for name in entries}


@dataclass(frozen=True)
class StreamTensor:
    """A tensor that is produced only when its turn to be written comes.

    Attributes:
        shape: its shape.
        dtype: its dtype tag.
        parts: returns its elements in C order, as arrays one after another (in the storage dtype, or any NumPy
            `bfloat16`), so that a large one need not exist at once.
    """

    shape: tuple[int, ...]
    dtype: str
    parts: Callable[[], Iterable[np.ndarray]]

    @classmethod
    def of(cls, array: np.ndarray, dtype: str) -> StreamTensor:
        """Return an array that exists already as a stream tensor."""
        values = as_storage(array, dtype)
        return cls(tuple(values.shape), dtype, lambda: (values,))

    @classmethod
    def reading(cls, shape: tuple[int, ...], dtype: str, read: Callable[[], np.ndarray]) -> StreamTensor:
        """Return a tensor that `read` gives whole."""
        return cls(shape, dtype, lambda: (read(),))

    @property
    def nbytes(self) -> int:
        """Bytes of all its elements."""
        return math.prod(self.shape) * storage_dtype(self.dtype).itemsize

    def write_to(self, name: str, write_array: Callable[[np.ndarray], None]) -> None:
        """Hand the elements to `write_array`, part by part.

        Raises:
            CheckpointError: the parts are not what was announced; `name` is named.
        """
        left = math.prod(self.shape)
        for part in self.parts():
            left -= part.size
            write_array(as_storage(part, self.dtype))
        if left:
            raise CheckpointError(
                f"{name} has {math.prod(self.shape) - left} elements, shape {list(self.shape)} has not"
            )

    def array(self) -> np.ndarray:
        """Return the tensor as one array."""
        parts = [as_storage(part, self.dtype) for part in self.parts()]
        whole = parts[0] if len(parts) == 1 else np.concatenate([part.reshape(-1) for part in parts])
        return whole.reshape(self.shape)


def write_safetensors(
    path: Path, tensors: Mapping[str, StreamTensor], metadata: Mapping[str, str]
) -> tuple[FileDigest, dict[str, int]]:
    """Write a safetensors file, flush it to the disk, and return its digest and each tensor's byte offset in it.

    Args:
        path: the file; replaced when it exists.
        tensors: by name, asked for one after another.
        metadata: strings for the header.

    Raises:
        CheckpointError: a tensor is not what was announced.
    """
    header, offsets = header_bytes({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}, metadata)
    with path.open("wb") as handle:
        out = ChecksumWriter(handle)
        out.write(header)
        for name, tensor in tensors.items():
            tensor.write_to(name, out.write_array)
        handle.flush()
        os.fsync(handle.fileno())
    return out.digest(), offsets


def read_header(path: Path) -> tuple[dict[str, Blob], dict[str, str]]:
    """Return the tensors of a safetensors file, unread, and its metadata.

    Raises:
        CheckpointError: the file is no safetensors file, or its header promises what the file does not hold.
    """
    try:
        with open_regular(path) as handle:
            size = os.fstat(handle.fileno()).st_size
            start = handle.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{path} is not a safetensors file: header length {length}, file of {size} bytes")
            text = handle.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} is missing or unreadable ({error.strerror})") from None
    where = f"{path}: the safetensors header"
    header = Record(parse_json(text, where, CheckpointError), where, CheckpointError)
    metadata = header.record("__metadata__", {}).values
    entries = {name: spec for name, spec in header.items() if name != "__metadata__"}
    items = {name: _entry(path, 8 + length, size, name, spec) for name, spec in entries.items()}
    end = 0
    for name, blob in sorted(items.items(), key=lambda item: item[1].offset):
        if blob.offset < 8 + length + end:
            raise CheckpointError(f"{path}: tensor {name} overlaps the one before it")
        end = blob.offset - 8 - length + _nbytes(blob)
    return items, {str(k): str(v) for k, v in metadata.items()}


def _nbytes(blob: Blob) -> int:
    return math.prod(blob.shape) * blob.itemsize


def _entry(path: Path, base: int, size: int, name: str, spec: Record) -> Blob:
    dtype = spec.text("dtype")
    if dtype not in TAGS_BY_SAFETENSORS_NAME:
        raise CheckpointError(f"{path}: tensor {name} has dtype {dtype}, which cannot be read")
    tag, shape, place = TAGS_BY_SAFETENSORS_NAME[dtype], spec.integers("shape"), spec.integers("data_offsets")
    if len(place) != 2:
        spec.refuse("data_offsets", "a pair of byte positions")
    check_shape(name, shape, str(path))
    begin, end = place
    blob = Blob.contiguous(path, base + begin, tag, shape)
    if end - begin != _nbytes(blob) or base + end > size:
        raise CheckpointError(
            f"{path}: tensor {name} of shape {list(shape)} and dtype {tag} needs {_nbytes(blob)} bytes; the header "
            f"gives it [{begin}, {end}) of {size - base}"
        )
    return blob
