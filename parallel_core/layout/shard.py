"""What a rank holds of a global tensor, as rectangles: the one description that saving, loading and converting share.

Every layout this project has is a set of boxes. A column-parallel weight is one box. A gated fc1 under tensor
parallelism is two (the rank's gates and the rank's ups, which are far apart in the global tensor). A flat range of a
distributed optimizer's shard is at most `2 * ndim - 1` boxes per box it cuts through.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from parallel_core.errors import CheckpointError

Range = tuple[int, int]
"""Half-open interval `(start, stop)` along one dim."""


@dataclass(frozen=True)
class Box:
    """One rectangle of a shard: where it sits in the rank's array, and where in the global tensor.

    Attributes:
        local: a range per dim of the rank's array. When the array is flat (one dim) and the global rectangle is not,
            the local range holds the rectangle's elements in C order.
        globe: a range per dim of the global tensor.
    """

    local: tuple[Range, ...]
    globe: tuple[Range, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The rectangle's extent in the global tensor."""
        return tuple(stop - start for start, stop in self.globe)


@dataclass(frozen=True)
class TensorShard:
    """A rank's part of one global tensor.

    Attributes:
        name: global name, for example `decoder.layers.3.mlp.linear_fc1.weight`.
        global_shape: shape of the whole tensor.
        dtype: tag such as "float32" or "bfloat16" (see `dtypes`).
        local_shape: shape of the rank's array.
        boxes: the rectangles the array consists of; together they cover the array exactly once.
    """

    name: str
    global_shape: tuple[int, ...]
    dtype: str
    local_shape: tuple[int, ...]
    boxes: tuple[Box, ...]

    def __post_init__(self) -> None:
        covered = 0
        for box in self.boxes:
            _check_box(self, box)
            covered += math.prod(box.shape)
        if covered != math.prod(self.local_shape):
            raise CheckpointError(
                f"{self.name}: the boxes hold {covered} elements, the local array of shape {list(self.local_shape)} "
                f"has {math.prod(self.local_shape)}"
            )

    @classmethod
    def full(cls, name: str, shape: Sequence[int], dtype: str) -> TensorShard:
        """Return the shard of a rank that holds the whole tensor."""
        whole = tuple((0, int(n)) for n in shape)
        return cls(name, tuple(shape), dtype, tuple(shape), (Box(whole, whole),))

    @classmethod
    def split(
        cls, name: str, global_shape: Sequence[int], dtype: str, dim: int, rank: int, num_ranks: int, parts: int = 1
    ) -> TensorShard:
        """Return the shard of a rank under tensor parallelism.

        Args:
            name: global name.
            global_shape: shape of the whole tensor.
            dtype: dtype tag.
            dim: the dim that is cut.
            rank: this rank's position among `num_ranks`.
            num_ranks: into how many equal pieces each part is cut.
            parts: how many stacked parts `dim` consists of, each cut separately: 2 for a gated fc1, whose global
                layout is [all gates ; all ups] and whose local layout is [this rank's gates ; this rank's ups].

        Raises:
            CheckpointError: the dim does not divide.
        """
        shape = tuple(int(n) for n in global_shape)
        if shape[dim] % (parts * num_ranks):
            raise CheckpointError(
                f"{name}: dim {dim} of length {shape[dim]} cannot be cut into {parts} part(s) x {num_ranks} ranks"
            )
        part, piece = shape[dim] // parts, shape[dim] // parts // num_ranks
        local_shape = shape[:dim] + (piece * parts,) + shape[dim + 1 :]
        whole = [(0, n) for n in shape]
        boxes = []
        for i in range(parts if num_ranks > 1 else 1):
            width = piece if num_ranks > 1 else piece * parts
            start = i * part + rank * piece
            local, globe = list(whole), list(whole)
            local[dim], globe[dim] = (i * width, (i + 1) * width), (start, start + width)
            boxes.append(Box(tuple(local), tuple(globe)))
        return cls(name, shape, dtype, local_shape, tuple(boxes))

    def flat_range(self, start: int, stop: int, dtype: str | None = None) -> TensorShard:
        """Return the shard that holds elements `[start, stop)` of this shard's array, flattened, as a 1-D array.

        This is what a distributed optimizer's rank owns of a parameter.

        Args:
            start: first element, in C order of `local_shape`.
            stop: one past the last element.
            dtype: dtype tag of the new shard; this shard's when None.

        Raises:
            CheckpointError: the range leaves the array, or this shard is flat already.
        """
        if not 0 <= start <= stop <= math.prod(self.local_shape):
            raise CheckpointError(f"{self.name}: elements [{start}, {stop}) are outside shape {list(self.local_shape)}")
        strides = c_strides(self.local_shape)
        boxes = []
        for rectangle in flat_rectangles(self.local_shape, start, stop):
            for box in self.boxes:
                common = intersect(rectangle, box.local)
                if common is None:
                    continue
                for run in _contiguous_runs(common, self.local_shape):
                    at = sum(first * stride for (first, _), stride in zip(run, strides)) - start
                    globe = tuple(
                        (g0 + first - l0, g0 + last - l0)
                        for (first, last), (l0, _), (g0, _) in zip(run, box.local, box.globe)
                    )
                    boxes.append(Box(((at, at + volume(run)),), globe))
        return TensorShard(self.name, self.global_shape, dtype or self.dtype, (stop - start,), tuple(boxes))

    def with_dtype(self, dtype: str) -> TensorShard:
        """Return the same part of a tensor with another dtype, as an optimizer state has it."""
        return TensorShard(self.name, self.global_shape, dtype, self.local_shape, self.boxes)


def _check_box(shard: TensorShard, box: Box) -> None:
    inside = len(box.globe) == len(shard.global_shape) and len(box.local) == len(shard.local_shape)
    inside = inside and all(0 <= a <= b <= n for (a, b), n in zip(box.globe, shard.global_shape))
    inside = inside and all(0 <= a <= b <= n for (a, b), n in zip(box.local, shard.local_shape))
    local = tuple(stop - start for start, stop in box.local)
    same = local == box.shape or (len(local) == 1 and local[0] == math.prod(box.shape))
    if not inside or not same:
        raise CheckpointError(
            f"{shard.name}: box {box.local} -> {box.globe} does not fit local shape {list(shard.local_shape)} "
            f"and global shape {list(shard.global_shape)}"
        )


def region(array: np.ndarray, ranges: Sequence[Range]) -> np.ndarray:
    """Return the rectangle `ranges` of `array` as a view, also of an array without dims."""
    index: tuple[Any, ...] = (*(slice(start, stop) for start, stop in ranges), ...)
    view: np.ndarray = array[index]
    return view


def volume(ranges: Sequence[Range]) -> int:
    """Return the number of elements in a rectangle."""
    return math.prod(stop - start for start, stop in ranges)


def intersect(a: Sequence[Range], b: Sequence[Range]) -> tuple[Range, ...] | None:
    """Return the common rectangle of `a` and `b`, or None when they do not meet."""
    common = tuple((max(a0, b0), min(a1, b1)) for (a0, a1), (b0, b1) in zip(a, b))
    return None if any(start >= stop for start, stop in common) else common


def c_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the C-order strides of `shape`, in elements."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def flat_rectangles(shape: Sequence[int], start: int, stop: int) -> list[tuple[Range, ...]]:
    """Cut elements `[start, stop)` of a C-ordered array into rectangles that are each contiguous, in order.

    Worked example: shape (4, 10), elements 7..33 -> row 0 columns 7..10, rows 1..3 whole, row 3 columns 0..3.
    """
    if start >= stop:
        return []
    if len(shape) <= 1:
        return [((start, stop),)] if shape else [()]
    inner = math.prod(shape[1:])
    rectangles: list[tuple[Range, ...]] = []
    row, offset = divmod(start, inner)
    if offset:
        end = min(inner, stop - row * inner)
        rectangles += [((row, row + 1), *rest) for rest in flat_rectangles(shape[1:], offset, end)]
        row += 1
    last, tail = divmod(stop, inner)
    if last > row:
        rectangles.append(((row, last), *((0, n) for n in shape[1:])))
    if tail and last >= row:
        rectangles += [((last, last + 1), *rest) for rest in flat_rectangles(shape[1:], 0, tail)]
    return rectangles


def _contiguous_runs(rectangle: tuple[Range, ...], shape: Sequence[int]) -> list[tuple[Range, ...]]:
    """Cut a rectangle of a C-ordered array into pieces that are contiguous in memory."""
    for dim in range(len(shape)):
        start, stop = rectangle[dim]
        if stop - start == 1:
            continue
        if all(rectangle[d] == (0, shape[d]) for d in range(dim + 1, len(shape))):
            return [rectangle]
        cut = (rectangle[:dim] + ((i, i + 1),) + rectangle[dim + 1 :] for i in range(start, stop))
        return [run for piece in cut for run in _contiguous_runs(piece, shape)]
    return [rectangle]
