"""The interface every checkpoint format is read through, and the memory-mapped reader behind most of them."""

from __future__ import annotations

import itertools
import math
import mmap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from parallel_core.checkpoint.common import checked_common
from parallel_core.checkpoint.dtypes import storage_dtype
from parallel_core.checkpoint.layout_files import os_errors_named
from parallel_core.errors import CheckpointError
from parallel_core.files import open_regular
from parallel_core.layout.shard import Range, c_strides, intersect, region, volume
from parallel_core.records import show

_MAX_DIMS = 32
"""NumPy's limit."""
_MAX_CUT_DIMS = 8
"""Each doubles the work of checking that pieces tile a tensor; layouts cut along one or two, flat shards along all."""


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype tag of one global tensor."""

    shape: tuple[int, ...]
    dtype: str


class TensorSource(Protocol):
    """A checkpoint as global tensors, whatever its format and whatever layout wrote it.

    Attributes:
        path: the directory or file it is read from.
        format: what it is, for logs: "native", "megatron torch", "megatron torch_dist", "hugging face".
        common: everything that is not a tensor; the keys are listed in docs/checkpoints.md.
    """

    path: Path
    format: str
    common: dict[str, Any]

    def keys(self) -> list[str]:
        """Return every key: `NAME` for a parameter, `NAME@master`, `NAME@exp_avg`, `NAME@exp_avg_sq` for its state."""

    def info(self, key: str) -> TensorInfo:
        """Return the global shape and the stored dtype of `key`."""

    def read_into(self, key: str, ranges: Sequence[Range], out: np.ndarray) -> int:
        """Fill `out` with one rectangle of `key` and return how many stored pieces it came from."""


@dataclass(frozen=True)
class Blob:
    """A strided array inside a file, not read yet.

    Attributes:
        path: the file.
        offset: byte position of element (0, 0, ...).
        dtype: dtype tag.
        shape: shape of the array.
        strides: distance between neighbours along each dim, in elements.
    """

    path: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def contiguous(cls, path: Path, offset: int, dtype: str, shape: Sequence[int]) -> Blob:
        """Return a blob whose elements follow one another in C order."""
        return cls(path, offset, dtype, tuple(shape), c_strides(shape))

    def crop(self, ranges: Sequence[Range]) -> Blob:
        """Return the rectangle `ranges` of this array."""
        skip = sum(start * stride for (start, _), stride in zip(ranges, self.strides))
        shape = tuple(stop - start for start, stop in ranges)
        return Blob(self.path, self.offset + skip * self.itemsize, self.dtype, shape, self.strides)

    def pick(self, index: int) -> Blob:
        """Return element `index` along the first dim, without that dim."""
        picked = self.crop([(index, index + 1), *((0, n) for n in self.shape[1:])])
        return Blob(self.path, picked.offset, self.dtype, self.shape[1:], self.strides[1:])

    def transposed(self) -> Blob:
        """Return a matrix, or each of several, with rows and columns exchanged."""
        (*some, rows, columns), (*more, of_rows, of_columns) = self.shape, self.strides
        return Blob(
            self.path, self.offset, self.dtype, (*some, columns, rows), (*more, of_columns, of_rows)
        )

    def every(self, step: int) -> Blob:
        """Return rows 0, `step`, 2 `step`, ... of this array."""
        rows = -(-self.shape[0] // step)
        strides = (self.strides[0] * step, *self.strides[1:])
        return Blob(self.path, self.offset, self.dtype, (rows, *self.shape[1:]), strides)

    def reshape(self, shape: Sequence[int]) -> Blob:
        """Return the same elements in another shape; only for an array that is contiguous."""
        if self.strides != c_strides(self.shape) and math.prod(self.shape) > 1:
            raise CheckpointError(f"{self.path}: a strided tensor of shape {list(self.shape)} cannot be reshaped")
        if math.prod(shape) != math.prod(self.shape):
            raise CheckpointError(f"{self.path}: shape {list(self.shape)} cannot be seen as {list(shape)}")
        return Blob.contiguous(self.path, self.offset, self.dtype, shape)

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return storage_dtype(self.dtype).itemsize

    def read_into(self, out: np.ndarray) -> None:
        """Copy the array into `out`, touching only its own bytes of the file.

        Raises:
            CheckpointError: the file is shorter than the array needs.
        """
        if math.prod(self.shape) == 0:
            return
        span = (sum((n - 1) * s for n, s in zip(self.shape, self.strides)) + 1) * self.itemsize
        begin = self.offset - self.offset % mmap.ALLOCATIONGRANULARITY
        with os_errors_named(self.path), open_regular(self.path) as handle:
            size = handle.seek(0, 2)
            if size < self.offset + span:  # reading a mapping past the end would kill the process
                raise CheckpointError(
                    f"{self.path} is truncated: {size} bytes, a tensor in it needs {self.offset + span}"
                )
            # A mapping per read, closed at once: what it touched does not stay in this process's memory.
            length = self.offset + span - begin
            with mmap.mmap(handle.fileno(), length, offset=begin, access=mmap.ACCESS_READ) as mapped:
                dtype = storage_dtype(self.dtype)
                flat = np.frombuffer(mapped, dtype, span // self.itemsize, self.offset - begin)
                view = np.lib.stride_tricks.as_strided(
                    flat, self.shape, [s * self.itemsize for s in self.strides], writeable=False
                )
                np.copyto(out, view)
                del flat, view  # the mapping cannot close while arrays point into it

    def read(self) -> np.ndarray:
        """Return the array as a new contiguous one, in the storage dtype."""
        out = np.empty(self.shape, storage_dtype(self.dtype))
        self.read_into(out)
        return out


@dataclass(frozen=True)
class LazyBlob:
    """An array whose place in its file is found out when it is read.

    Attributes:
        resolve: finds the array.
        shape: its shape, known before.
        dtype: its dtype tag, known before.
    """

    resolve: Callable[[], Blob]
    shape: tuple[int, ...]
    dtype: str

    def crop(self, ranges: Sequence[Range]) -> LazyBlob:
        """Return the rectangle `ranges` of this array."""
        kept = tuple(ranges)
        return LazyBlob(lambda: self.resolve().crop(kept), tuple(b - a for a, b in kept), self.dtype)

    def pick(self, index: int) -> LazyBlob:
        """Return element `index` along the first dim, without that dim."""
        return LazyBlob(lambda: self.resolve().pick(index), self.shape[1:], self.dtype)

    def transposed(self) -> LazyBlob:
        """Return a matrix, or each of several, with rows and columns exchanged."""
        (*some, rows, columns) = self.shape
        return LazyBlob(lambda: self.resolve().transposed(), (*some, columns, rows), self.dtype)

    def reshape(self, shape: Sequence[int]) -> LazyBlob:
        """Return the same elements in another shape; only for an array that is contiguous."""
        kept = tuple(shape)
        return LazyBlob(lambda: self.resolve().reshape(kept), kept, self.dtype)

    def read_into(self, out: np.ndarray) -> None:
        """Copy the array into `out`, touching only its own bytes of the file."""
        self.resolve().read_into(out)


@dataclass(frozen=True)
class ArrayBlob:
    """An array in memory with the reading interface of a `Blob`."""

    array: np.ndarray

    def crop(self, ranges: Sequence[Range]) -> ArrayBlob:
        """Return the rectangle `ranges` of this array."""
        return ArrayBlob(region(self.array, ranges))

    def read_into(self, out: np.ndarray) -> None:
        """Copy the array into `out`."""
        np.copyto(out, self.array)


class Readable(Protocol):
    """An array somewhere, of which a rectangle can be read."""

    def crop(self, ranges: Sequence[Range]) -> Readable:
        """Return the rectangle `ranges` of this array."""

    def read_into(self, out: np.ndarray) -> None:
        """Copy the array into `out`."""


@dataclass(frozen=True)
class Piece:
    """One stored rectangle of a global tensor: where it starts there, and the bytes that hold it."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    blob: Readable

    @property
    def globe(self) -> tuple[Range, ...]:
        """The rectangle, in global coordinates."""
        return tuple((first, first + n) for first, n in zip(self.start, self.shape))


class PieceSource:
    """A `TensorSource` made of stored rectangles: a read copies the intersections, each needed byte once."""

    def __init__(
        self, path: Path, format: str, tensors: dict[str, tuple[TensorInfo, list[Piece]]], common: dict[str, Any]
    ) -> None:
        """Index the pieces.

        Args:
            path: the checkpoint, for messages.
            format: what it is, for messages.
            tensors: the global tensors by key, each with its pieces in any order; pieces never overlap.
            common: everything that is not a tensor.

        Raises:
            CheckpointError: pieces leave a tensor's bounds, overlap, or leave a hole (a missing shard); or `common`
                or a key holds what does not belong there.
        """
        self.path, self.format, self.common = path, format, checked_common(common, str(path))
        self._tensors = tensors
        for key, (info, pieces) in tensors.items():
            if not key or not key.isprintable():
                raise CheckpointError(f"{path} is damaged: {show(key)} cannot be a tensor's name")
            parameter = tensors.get(key.partition("@")[0])
            if parameter is not None and parameter[0].shape != info.shape:
                shapes = f"{list(info.shape)}, its parameter {list(parameter[0].shape)}"
                raise CheckpointError(f"{path} is damaged: {key} has shape {shapes}")
            check_tiling(key, info.shape, [(piece.start, piece.shape) for piece in pieces], str(path))

    def keys(self) -> list[str]:
        """Return every key, in the order of the file."""
        return list(self._tensors)

    def info(self, key: str) -> TensorInfo:
        """Return the global shape and the stored dtype of `key`.

        Raises:
            CheckpointError: there is no such key.
        """
        return self._entry(key)[0]

    def pieces(self, key: str) -> list[Piece]:
        """Return the stored rectangles of `key`."""
        return list(self._entry(key)[1])

    def read_into(self, key: str, ranges: Sequence[Range], out: np.ndarray) -> int:
        """Fill `out` (storage dtype of the key) with the rectangle `ranges` and return the number of pieces read."""
        count = 0
        for piece in self._entry(key)[1]:
            common = intersect(ranges, piece.globe)
            if common is None and volume(ranges) > 0:
                continue
            if common is None:
                break
            inside = [(a - first, b - first) for (a, b), first in zip(common, piece.start)]
            target = region(out, [(a - r0, b - r0) for (a, b), (r0, _) in zip(common, ranges)])
            piece.blob.crop(inside).read_into(target)
            count += 1
        return count

    def _entry(self, key: str) -> tuple[TensorInfo, list[Piece]]:
        if key not in self._tensors:
            raise CheckpointError(f"{self.path} holds no tensor {key!r}")
        return self._tensors[key]


def read_tensor(source: TensorSource, key: str) -> np.ndarray:
    """Return the whole global tensor `key`, in its storage dtype (`uint16` bits for bfloat16)."""
    info = source.info(key)
    out = np.empty(info.shape, storage_dtype(info.dtype))
    source.read_into(key, [(0, n) for n in info.shape], out)
    return out


def check_tiling(
    key: str, shape: Sequence[int], rectangles: Iterable[tuple[Sequence[int], Sequence[int]]], where: str
) -> None:
    """Check that rectangles cover a tensor of `shape` exactly once.

    Args:
        key: the tensor, for the message.
        shape: its global shape.
        rectangles: (start, shape) of each piece.
        where: the checkpoint, for the message.

    Raises:
        CheckpointError: the shape is none an array can have, a piece is outside, two overlap, or elements are missing.
    """
    check_shape(key, shape, where)
    pieces = [(tuple(start), tuple(extent)) for start, extent in rectangles]
    for start, extent in pieces:
        fits = len(start) == len(extent) == len(shape) and all(
            first >= 0 and n >= 0 and first + n <= size for first, n, size in zip(start, extent, shape)
        )
        if not fits:
            raise CheckpointError(
                f"{where}: a piece of {key} at {list(start)} of shape {list(extent)} does not fit the global shape "
                f"{list(shape)}"
            )
    pieces = [(start, extent) for start, extent in pieces if math.prod(extent)]
    total, held = math.prod(shape), sum(math.prod(extent) for _, extent in pieces)
    if held < total:
        raise CheckpointError(f"{where}: {total - held} of {total} elements of {key} are in no file (a missing shard?)")
    if held > total or (total and not _corners_cancel(key, shape, pieces, where)):
        raise CheckpointError(f"{where}: pieces of {key} overlap: a part of it is stored twice, by different ranks")


def check_shape(key: str, shape: Sequence[int], where: str) -> None:
    """Check that an array of this shape can exist at all.

    Raises:
        CheckpointError: it has more dims than an array can have, or more elements than can be counted.
    """
    if len(shape) > _MAX_DIMS or math.prod(max(n, 1) for n in shape) * 8 >= 1 << 63:
        found = f"shape {show(list(shape))} of {len(shape)} dims"
        raise CheckpointError(f"{where}: {key} has {found}, which no array can have")


def _corners_cancel(
    key: str, shape: Sequence[int], pieces: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], where: str
) -> bool:
    """Tell whether rectangles tile the whole, in time proportional to their number.

    A rectangle's indicator function is determined by its corners with alternating signs (they are what differencing
    along every dim leaves). So rectangles cover the whole exactly once if and only if their corners, added up with
    signs, leave those of the whole. Worked example, [0, 2) and [2, 5) of 5: +1 at 0, -1 at 2, +1 at 2, -1 at 5.
    """
    cut = [dim for dim, size in enumerate(shape) if any(extent[dim] != size for _, extent in pieces)]
    if len(cut) > _MAX_CUT_DIMS:
        raise CheckpointError(f"{where}: {key} is cut along {len(cut)} dims; at most {_MAX_CUT_DIMS} can be read")
    corners: Counter[tuple[int, ...]] = Counter()
    whole = (tuple(0 for _ in shape), tuple(shape))
    for sign, (start, extent) in [(-1, whole), *((1, piece) for piece in pieces)]:
        for ends in itertools.product((0, 1), repeat=len(cut)):
            corner = tuple(start[dim] + end * extent[dim] for dim, end in zip(cut, ends))
            corners[corner] += sign * (-1) ** sum(ends)
    return not any(corners.values())
