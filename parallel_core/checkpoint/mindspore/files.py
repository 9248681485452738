"""`.ckpt` and `strategy.ckpt` files: where their tensors' bytes are, and how slices were cut. Nothing is loaded.

Both are protobuf messages (MindSpore's checkpoint.proto and node_strategy.proto), read here in their wire format: the
library would have to hold a file of gigabytes in memory, and its MindSpore classes need MindSpore.
"""

from __future__ import annotations

import math
import mmap
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from parallel_core.checkpoint.dtypes import storage_dtype
from parallel_core.checkpoint.layout_files import os_errors_named
from parallel_core.checkpoint.source import Blob, Readable, check_shape
from parallel_core.errors import CheckpointError
from parallel_core.files import open_regular
from parallel_core.layout.shard import Range, region
from parallel_core.records import show

_DTYPES = {
    "Float32": "float32",
    "Float16": "float16",
    "BFloat16": "bfloat16",
    "Float64": "float64",
    "Int32": "int32",
    "Int64": "int64",
    "Int8": "int8",
    "UInt8": "uint8",
    "Bool": "bool",
}
_PART_BYTES = 512 << 20
"""Above it MindSpore stores a tensor in several parts, and so does `tensor_message`."""
_TRAILER = b"crc_num"
_TRAILER_BYTES = len(_TRAILER) + 10
_MAX_STRATEGY_BYTES = 64 << 20
_MAX_TAG = 1000


class Malformed(Exception):
    """Bytes that are no message; the text says what is wrong."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a `.ckpt` file.

    Attributes:
        path: the file.
        shape: its shape.
        dtype: its dtype tag.
        spans: (offset, bytes) of its content; large tensors are stored in several parts.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: str
    spans: tuple[tuple[int, int], ...]

    def blob(self) -> Readable:
        """Return the array, unread."""
        if len(self.spans) == 1:
            return Blob.contiguous(self.path, self.spans[0][0], self.dtype, self.shape)
        return PartedBlob(self, tuple((0, n) for n in self.shape))


@dataclass(frozen=True)
class PartedBlob:
    """A tensor whose content is in several parts, which is read whole."""

    tensor: StoredTensor
    ranges: tuple[Range, ...]
    turned: bool = False

    def crop(self, ranges: Sequence[Range]) -> PartedBlob:
        """Return the rectangle `ranges` of this array."""
        kept = swapped(tuple(ranges)) if self.turned else tuple(ranges)
        inner = tuple((first + a, first + b) for (a, b), (first, _) in zip(kept, self.ranges))
        return PartedBlob(self.tensor, inner, self.turned)

    def transposed(self) -> PartedBlob:
        """Return matrices with rows and columns exchanged."""
        return PartedBlob(self.tensor, self.ranges, not self.turned)

    def read_into(self, out: np.ndarray) -> None:
        """Copy the array into `out`."""
        dtype = storage_dtype(self.tensor.dtype)
        whole = np.empty(math.prod(self.tensor.shape), dtype)
        at = 0
        for offset, length in self.tensor.spans:
            count = length // dtype.itemsize
            Blob.contiguous(self.tensor.path, offset, self.tensor.dtype, (count,)).read_into(whole[at : at + count])
            at += count
        part = region(whole.reshape(self.tensor.shape), self.ranges)
        np.copyto(out, part.swapaxes(-1, -2) if self.turned else part)


def swapped(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return what belongs to each dim of matrices with rows and columns exchanged."""
    return (*values[:-2], values[-1], values[-2])


@dataclass(frozen=True)
class Layout:
    """How one parameter is cut over the devices of a pipeline stage, as a strategy file says.

    Attributes:
        device_matrix: sizes of the device dims, the first outermost.
        tensor_map: for each tensor dim the device dim that cuts it, counted from the right; -1: none.
        shard_step: optimizer shards are so many ranks apart; 0: none.
        shard_size: how many there are; 0 or less: as many as fit.
    """

    device_matrix: tuple[int, ...]
    tensor_map: tuple[int, ...]
    shard_step: int = 0
    shard_size: int = 0


def read_ckpt(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a `.ckpt` file by name, in the file's order; its checksum, where there is one, is compared.

    Raises:
        CheckpointError: it is no such file, or a damaged or encrypted one.
    """
    with os_errors_named(path), open_regular(path) as handle:
        size = handle.seek(0, 2)
        if not size:
            raise CheckpointError(f"{path} is empty")
        with mmap.mmap(handle.fileno(), size, access=mmap.ACCESS_READ) as data:
            try:
                return _tensors(path, data, _checked_end(data, size))
            except Malformed as error:
                raise CheckpointError(
                    f"{path} is no MindSpore .ckpt file, or a damaged or encrypted one: {error}"
                ) from None


def read_strategy(path: Path) -> dict[str, Layout]:
    """Return the layout of every parameter that a strategy file names.

    Raises:
        CheckpointError: it is no such file, or asks for what is not read (uneven cuts).
    """
    with os_errors_named(path), open_regular(path) as handle:
        data = handle.read(_MAX_STRATEGY_BYTES + 1)
    if len(data) > _MAX_STRATEGY_BYTES:
        raise CheckpointError(f"{path} has more than {_MAX_STRATEGY_BYTES} bytes, which no strategy file has")
    try:
        found: dict[str, Layout] = {}
        for number, item in _messages(data, 0, len(data)):
            if number != 3:
                continue
            fields = list(_fields(data, *item))
            name = _text(data, _one(fields, 1, "a parameter's name"))
            if name in found:
                raise Malformed(f"{show(name)} is in it twice")
            found[name] = _layout(data, name, _one(fields, 2, "a parameter's layout"))
        return found
    except Malformed as error:
        raise CheckpointError(f"{path} is no strategy file, or a damaged one: {error}") from None


# ---- messages -------------------------------------------------------------------------------------------------------
def _layout(data: bytes, name: str, span: Range) -> Layout:
    numbers: dict[int, list[int]] = {}
    scalars: dict[int, int] = {}
    for field, value in _fields(data, *span):
        if isinstance(value, int):
            scalars[field] = _signed(value)
        else:
            numbers.setdefault(field, []).extend(_integers(data, value))
    if numbers.get(3) or scalars.get(5, 0):
        raise Malformed(f"{show(name)} is cut unevenly (param_split_shape or field), which is not read")
    matrix, tensor_map = tuple(numbers.get(1, [])), tuple(numbers.get(2, []))
    if not matrix or any(not 1 <= n <= 1 << 20 for n in matrix):
        raise Malformed(f"{show(name)} has the device matrix {show(list(matrix))}")
    if any(not -1 <= m < len(matrix) for m in tensor_map):
        raise Malformed(f"{show(name)} has the tensor map {show(list(tensor_map))} for {len(matrix)} device dims")
    cuts = [m for m in tensor_map if m >= 0]
    if len(set(cuts)) != len(cuts):
        raise Malformed(f"{show(name)} has two dims cut by one device dim")
    return Layout(matrix, tensor_map, max(scalars.get(6, 0), 0), scalars.get(7, 0))


def _integers(data: Buffer, span: Range) -> Iterator[int]:
    """Yield the numbers of field 1 of a message, packed or not, as signed ones."""
    for field, value in _fields(data, *span):
        if field != 1:
            continue
        if isinstance(value, int):
            yield _signed(value)
            continue
        at, end = value
        while at < end:
            number, at = _varint(data, at, end)
            yield _signed(number)


def _tensors(path: Path, data: mmap.mmap, end: int) -> dict[str, StoredTensor]:
    found: dict[str, StoredTensor] = {}
    last = ""
    for number, value in _messages(data, 0, end):
        if number != 1:
            raise Malformed(f"field {number} of the file")
        fields = list(_fields(data, *value))
        name = _text(data, _one(fields, 1, "a tensor's name"))
        if any(field == 3 for field, _ in fields):
            raise Malformed(f"{show(name)} is a map tensor, which is not read")
        part = _tensor(path, data, name, _one(fields, 2, f"the tensor of {show(name)}"))
        if name in found:
            before = found[name]
            if name != last or (before.shape, before.dtype) != (part.shape, part.dtype):
                raise Malformed(f"{show(name)} is in it twice")
            part = StoredTensor(path, part.shape, part.dtype, (*before.spans, *part.spans))
        found[name] = part
        last = name
    for name, tensor in found.items():
        held, needed = sum(n for _, n in tensor.spans), math.prod(tensor.shape) * storage_dtype(tensor.dtype).itemsize
        if held != needed:
            raise Malformed(f"{show(name)} of shape {list(tensor.shape)} needs {needed} bytes and has {held}")
    if not found:
        raise Malformed("it holds no tensor")
    return found


def _tensor(path: Path, data: mmap.mmap, name: str, span: Range) -> StoredTensor:
    shape = list(_integers(data, span))
    kind, content = "", (0, 0)
    for field, value in _messages(data, *span):
        if field == 2:
            kind = _text(data, value)
        elif field == 3:
            content = value
    if kind not in _DTYPES:
        raise Malformed(f"{show(name)} is of type {show(kind)}; read are {', '.join(_DTYPES)}")
    if any(n < 0 for n in shape):
        raise Malformed(f"{show(name)} has shape {show(shape)}")
    check_shape(show(name), shape, str(path))
    return StoredTensor(path, tuple(shape), _DTYPES[kind], ((content[0], content[1] - content[0]),))


def _checked_end(data: mmap.mmap, size: int) -> int:
    """Return where the messages end: before MindSpore's checksum, which is compared."""
    start = size - _TRAILER_BYTES
    if start < 0 or data[start : start + len(_TRAILER)] != _TRAILER:
        return size
    told, found, step = int.from_bytes(data[size - 10 : size], "big"), 0, 16 << 20
    for at in range(0, start, step):
        found = zlib.crc32(data[at : min(at + step, start)], found)
    if told != found:
        raise Malformed("its checksum is another than that of its bytes")
    return start


def tensor_message(
    name: str, shape: tuple[int, ...], dtype: str, data: memoryview, part_bytes: int = _PART_BYTES
) -> Iterator[tuple[bytes, memoryview]]:
    """Yield what a `.ckpt` file holds of one tensor, as pairs of bytes to write one after the other.

    Args:
        name: its name there.
        shape: its shape.
        dtype: its dtype tag.
        data: its bytes, in C order.
        part_bytes: bytes of the largest part.

    Raises:
        CheckpointError: MindSpore's files have no such type.
    """
    kind = next((theirs for theirs, ours in _DTYPES.items() if ours == dtype), None)
    if kind is None:
        raise CheckpointError(f"{show(name)} is of type {dtype}, which MindSpore's files do not have")
    dims = b"".join(b"\x08" + _as_varint(n) for n in shape)
    described = dims + _field(2, kind.encode())
    tag = _field(1, name.encode())
    for start in range(0, max(len(data), 1), part_bytes):
        part = data[start : start + part_bytes]
        content = b"\x1a" + _as_varint(len(part))
        tensor = b"\x12" + _as_varint(len(described) + len(content) + len(part)) + described + content
        yield b"\x0a" + _as_varint(len(tag) + len(tensor) + len(part)) + tag + tensor, part


# ---- wire format ----------------------------------------------------------------------------------------------------
Buffer = bytes | mmap.mmap
Value = int | Range


def _messages(data: Buffer, at: int, end: int) -> Iterator[tuple[int, Range]]:
    for number, value in _fields(data, at, end):
        if not isinstance(value, int):
            yield number, value


def _fields(data: Buffer, at: int, end: int) -> Iterator[tuple[int, Value]]:
    """Yield (field number, value): an integer, or where the bytes begin and end."""
    while at < end:
        key, at = _varint(data, at, end)
        number, kind = key >> 3, key & 7
        if not number:
            raise Malformed("a field of number 0")
        if kind == 0:
            value, at = _varint(data, at, end)
            yield number, value
        elif kind == 2:
            length, at = _varint(data, at, end)
            if length > end - at:
                raise Malformed(f"it is cut short: {length} bytes are announced and {end - at} left")
            yield number, (at, at + length)
            at += length
        else:
            at += {1: 8, 5: 4}.get(kind, end - at + 1)
            if at > end:
                raise Malformed(f"a field of wire type {kind}")


def _varint(data: Buffer, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise Malformed("a number without an end")


def _as_varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes((*out, value))


def _field(number: int, data: bytes) -> bytes:
    return _as_varint(number << 3 | 2) + _as_varint(len(data)) + data


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _one(fields: list[tuple[int, Value]], number: int, what: str) -> Range:
    values = [value for field, value in fields if field == number]
    if len(values) != 1 or isinstance(values[0], int):
        raise Malformed(f"{what} is there {len(values)} times")
    return values[0]


def _text(data: Buffer, span: Range) -> str:
    if span[1] - span[0] > _MAX_TAG:
        raise Malformed(f"a name of {span[1] - span[0]} bytes")
    try:
        return data[span[0] : span[1]].decode("utf-8")
    except UnicodeDecodeError:
        raise Malformed("a name that is not UTF-8") from None
