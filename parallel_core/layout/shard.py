"""What a rank holds of a global tensor, as rectangles: what layers, optimizer and checkpoints share.

Every layout this project has is a set of boxes. A column-parallel weight is one box. A gated fc1 under tensor
parallelism is two (the rank's gates and the rank's ups, which are far apart in the global tensor). A flat range of a
distributed optimizer's shard is at most `2 * ndim - 1` boxes per box it cuts through.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from parallel_core.errors import CheckpointError, ConfigError

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
class Cut:
    """One dim of a tensor, shared out evenly over the ranks of a mesh axis.

    Attributes:
        axis: the mesh axis, such as "tp".
        dim: the dim that is cut.
        rank: this rank's position on the axis.
        size: ranks along the axis.
        parts: blocks stacked along `dim` that are each cut: 2 for a gated fc1, whose global layout is
            [all gates ; all ups] and whose local layout is [this rank's gates ; this rank's ups].
    """

    axis: str
    dim: int
    rank: int
    size: int
    parts: int = 1


@dataclass(frozen=True)
class TensorShard:
    """A rank's part of one global tensor, and what the optimizer asks of a parameter.

    Attributes:
        name: global name, Megatron-core's with global layer numbers, such as `decoder.layers.3.mlp.linear_fc1.weight`.
        global_shape: shape of the whole tensor.
        dtype: tag such as "float32" or "bfloat16" (see `checkpoint.dtypes`).
        local_shape: shape of the rank's array.
        boxes: the rectangles the array consists of; together they cover the array exactly once.
        cuts: how the boxes came about; none for a whole tensor and for a flat range.
        partial_gradient: the gradient of each rank covers only its part of the sequence or of the heads, so it must be
            summed over the tensor parallel group.
        is_embedding_or_output: decoupled learning rates apply.
        shared_embedding: held by the first and by the last pipeline stage; their gradients are summed.
        is_copy: the last stage's copy of a shared embedding; the first stage's is the one that counts in norms and
            checkpoints.
        zero_gradient_at_first: its first gradient is zero, which does not tell that nothing depends on it.
        weight_decay: whether weight decay applies; None: to matrices, and not to biases and norms.
        replicas: the group of `ParallelContext` whose ranks all hold this part and see other data: its gradient is
            summed, and its optimizer state and its checkpoint shared out, over them.
    """

    name: str
    global_shape: tuple[int, ...]
    dtype: str
    local_shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    cuts: tuple[Cut, ...] = ()
    partial_gradient: bool = False
    is_embedding_or_output: bool = False
    shared_embedding: bool = False
    is_copy: bool = False
    zero_gradient_at_first: bool = False
    weight_decay: bool | None = None
    replicas: str = "dp_cp"

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
    def cut(
        cls, name: str, global_shape: Sequence[int], *cuts: Cut, dtype: str = "float32", **traits: Any
    ) -> TensorShard:
        """Return the shard of a rank that holds what `cuts` leave it; without any, the whole tensor.

        Cuts of one dim apply in turn, each to what the one before left.

        Args:
            name: global name.
            global_shape: shape of the whole tensor.
            cuts: over which axes it is shared out; those over a single rank change nothing.
            dtype: dtype tag.
            traits: any of the attributes from `partial_gradient` on.

        Raises:
            ConfigError: a dim does not divide, or is not there.
        """
        shape = tuple(int(n) for n in global_shape)
        pieces: list[list[Range]] = [[(0, n)] for n in shape]
        for cut in cuts:
            if cut.dim >= len(shape):
                raise ConfigError(f"{name}: shape {list(shape)} has no dim {cut.dim} to be cut along")
            pieces[cut.dim] = _cut_ranges(pieces[cut.dim], cut, name, shape)
        local_shape = tuple(sum(stop - start for start, stop in ranges) for ranges in pieces)
        boxes = []
        for globe in itertools.product(*(list(zip(_stacked(ranges), ranges)) for ranges in pieces)):
            boxes.append(Box(tuple(local for local, _ in globe), tuple(there for _, there in globe)))
        return cls(name, shape, dtype, local_shape, tuple(boxes), tuple(cuts), **traits)

    @classmethod
    def full(cls, name: str, shape: Sequence[int], dtype: str) -> TensorShard:
        """Return the shard of a rank that holds the whole tensor."""
        return cls.cut(name, shape, dtype=dtype)

    @classmethod
    def split(
        cls, name: str, global_shape: Sequence[int], dtype: str, dim: int, rank: int, num_ranks: int, parts: int = 1
    ) -> TensorShard:
        """Return the shard of a rank under tensor parallelism; see `Cut` for the arguments."""
        return cls.cut(name, global_shape, Cut("tp", dim, rank, num_ranks, parts), dtype=dtype)

    @property
    def decays(self) -> bool:
        """Whether weight decay applies."""
        if self.weight_decay is not None:
            return self.weight_decay
        return has_weight_decay(self.name, self.global_shape)

    def is_first_copy(self, coordinates: Mapping[str, int]) -> bool:
        """Return whether the rank at `coordinates` has the copy that counts in norms and is written to checkpoints.

        Args:
            coordinates: this rank's position on the axes over which tensors are cut or else repeated, such as
                {"tp": 1}.
        """
        cut_over = {cut.axis for cut in self.cuts if cut.size > 1}
        axes = ("ep", "etp") if self.replicas == "edp" else ("tp",)
        return not self.is_copy and all(coordinates.get(axis, 0) == 0 for axis in axes if axis not in cut_over)

    def take(self, full: np.ndarray) -> np.ndarray:
        """Return this rank's part of the whole tensor `full`, as a C-contiguous copy.

        Raises:
            ConfigError: `full` has another shape.
        """
        if tuple(full.shape) != self.global_shape:
            raise ConfigError(f"{self.name}: expected shape {list(self.global_shape)}, got {list(full.shape)}")
        out = np.empty(self.local_shape, full.dtype)
        for box in self.boxes:
            region(out, box.local)[...] = region(full, box.globe)
        return out

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
        return dataclasses.replace(
            self, dtype=dtype or self.dtype, local_shape=(stop - start,), boxes=tuple(boxes), cuts=()
        )

    def with_dtype(self, dtype: str) -> TensorShard:
        """Return the same part of a tensor with another dtype, as an optimizer state has it."""
        return dataclasses.replace(self, dtype=dtype)


def has_weight_decay(name: str, shape: Sequence[int]) -> bool:
    """Tell whether Megatron decays a parameter unless it is told otherwise: all but biases and one-dimensional ones."""
    return not name.endswith(".bias") and len(shape) != 1


def shard_of(parameter: Any) -> TensorShard:
    """Return the `shard` of a `mindspore.Parameter`; one made elsewhere is taken as whole on every rank."""
    shard, dtype = getattr(parameter, "shard", None), str(parameter.dtype).lower()
    if shard is None or shard.dtype != dtype:  # a model may be cast after it was built
        shard = TensorShard.full(parameter.name, parameter.shape, dtype) if shard is None else shard.with_dtype(dtype)
        parameter.shard = shard
    return shard


def mark(parameter: Any, **traits: Any) -> None:
    """Set traits of a parameter's shard, such as `shared_embedding` or `weight_decay` (see `TensorShard`)."""
    parameter.shard = dataclasses.replace(shard_of(parameter), **traits)


def _cut_ranges(ranges: list[Range], cut: Cut, name: str, shape: tuple[int, ...]) -> list[Range]:
    """Return what one rank keeps of the ranges of a dim."""
    if cut.size == 1:
        return ranges
    if cut.parts > 1 and len(ranges) == 1:
        (start, stop), parts = ranges[0], cut.parts
        width = (stop - start) // parts if (stop - start) % parts == 0 else 0
        ranges = [(start + i * width, start + (i + 1) * width) for i in range(parts)] if width else ranges
    kept = []
    for start, stop in ranges:
        if (stop - start) % cut.size or len(ranges) % cut.parts:
            raise ConfigError(
                f"{name}: dim {cut.dim} of {list(shape)} cannot be cut into {cut.parts} x {cut.size} equal parts; "
                f"choose a size that {cut.parts * cut.size} divides"
            )
        width = (stop - start) // cut.size
        kept.append((start + cut.rank * width, start + (cut.rank + 1) * width))
    return kept


def _stacked(ranges: Sequence[Range]) -> list[Range]:
    """Return where ranges lie when they are put one behind the other."""
    ends = list(itertools.accumulate(stop - start for start, stop in ranges))
    return list(zip([0, *ends], ends))


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
