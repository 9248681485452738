"""Parameters from the slices that each rank of a static-graph run saved."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel_core.checkpoint.huggingface.tensors import Part
from parallel_core.checkpoint.mindspore.files import Layout, StoredTensor, swapped
from parallel_core.checkpoint.source import Piece, TensorInfo
from parallel_core.errors import CheckpointError
from parallel_core.layout.shard import intersect

Files = Mapping[int, Mapping[str, StoredTensor]]
"""Rank -> what its file holds."""


@dataclass(frozen=True)
class Whole:
    """A parameter as its system had it, in pieces.

    Attributes:
        shape: global shape.
        dtype: dtype tag.
        pieces: stored rectangles, in any order.
    """

    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[Piece, ...]


def whole_parameters(files: Files, strategy: Mapping[str, Layout], where: str) -> dict[str, Whole]:
    """Return every parameter of the files by name.

    A parameter that the strategy does not name is replicated: any rank's is taken. Pipeline stages follow one another,
    each with as many ranks as the device matrices have elements.

    Args:
        files: what each rank's file holds; a single file is rank 0's.
        strategy: how parameters are cut; empty for files that are whole.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: a slice that is needed is in no file, or slices do not fit one another.
    """
    holders: dict[str, list[int]] = {}
    for rank in sorted(files):
        for name in files[rank]:
            holders.setdefault(name, []).append(rank)
    found = {}
    for name, ranks in holders.items():
        if name in strategy:
            found[name] = _merged(name, strategy[name], files, ranks, where)
        else:
            found[name] = _replicated(files[ranks[0]][name])
    return found


def stored_shapes(
    shapes: Mapping[str, tuple[int, ...]], sources: Mapping[str, Sequence[Part]]
) -> dict[str, tuple[int, ...]]:
    """Return the shape of each of their tensors, as it is stored.

    Args:
        shapes: of our tensors.
        sources: which rows of theirs each of ours consists of; matrices [in, out] are transposed first.
    """
    rows: dict[str, int] = {}
    found: dict[str, tuple[int, ...]] = {}
    for name, parts in sources.items():
        for part in parts:
            rows[part.name] = rows.get(part.name, 0) + part.rows
            whole = (rows[part.name], *shapes[name][1:])
            found[part.name] = swapped(whole) if part.transpose else whole
    return found


def placed(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    sources: Mapping[str, Sequence[Part]],
    found: Mapping[str, Whole],
    spelled: Callable[[str], str] = str,
) -> dict[str, tuple[TensorInfo, list[Piece]]]:
    """Return our tensors as pieces of theirs.

    Args:
        path: the checkpoint, for messages.
        shapes: of our tensors.
        sources: which rows of theirs each of ours consists of.
        found: their tensors.
        spelled: from a name of `found`, what its reader knows it by.

    Raises:
        CheckpointError: one of theirs is missing, or of another shape, or its parts are of several types.
    """
    needed = stored_shapes(shapes, sources)
    for theirs, shape in needed.items():
        if theirs not in found:
            raise CheckpointError(f"{path}: {spelled(theirs)} is in no file")
        if found[theirs].shape != shape:
            told = f"{spelled(theirs)} has shape {list(found[theirs].shape)} instead of {list(shape)}"
            raise CheckpointError(f"{path}: {told}")
    tensors = {}
    for name, parts in sources.items():
        pieces: list[Piece] = []
        for part in parts:
            pieces += _pieces_of(part, found[part.name], shapes[name])
        dtypes = sorted({found[part.name].dtype for part in parts})
        if len(dtypes) > 1:
            raise CheckpointError(f"{path}: the parts of {name} are of types {', '.join(dtypes)}")
        tensors[name] = TensorInfo(shapes[name], dtypes[0]), pieces
    return tensors


def _pieces_of(part: Part, whole: Whole, shape: tuple[int, ...]) -> list[Piece]:
    pieces = []
    for piece in whole.pieces:
        turned = part.transpose
        start, extent = (swapped(piece.start), swapped(piece.shape)) if turned else (piece.start, piece.shape)
        wanted = [(part.theirs, part.theirs + part.rows), *((0, n) for n in shape[1:])]
        common = intersect(wanted, [(a, a + n) for a, n in zip(start, extent)])
        if common is None:
            continue
        blob: Any = piece.blob.transposed() if turned else piece.blob  # type: ignore[attr-defined]
        inside = tuple((a - s, b - s) for (a, b), s in zip(common, start))
        at = (common[0][0] - part.theirs + part.ours, *(a for a, _ in common[1:]))
        pieces.append(Piece(at, tuple(b - a for a, b in common), blob.crop(inside)))
    return pieces


def _replicated(tensor: StoredTensor) -> Whole:
    start = tuple(0 for _ in tensor.shape)
    return Whole(tensor.shape, tensor.dtype, (Piece(start, tensor.shape, tensor.blob()),))


def _merged(name: str, layout: Layout, files: Files, ranks: list[int], where: str) -> Whole:
    matrix, cuts = layout.device_matrix, layout.tensor_map
    count = math.prod(matrix)
    first_rank = ranks[0] // count * count  # of the first stage that has it; a tied table is on two
    some = files[ranks[0]][name]
    if len(cuts) != len(some.shape):
        raise CheckpointError(f"{where}: the strategy cuts {len(cuts)} dims of {name}, which has {len(some.shape)}")
    parts = tuple(1 if cut < 0 else matrix[len(matrix) - 1 - cut] for cut in cuts)
    pieces, extent = [], some.shape
    shards = shard_ranks(0, layout, count)
    for place in itertools.product(*map(range, parts)):
        representative = _rank_of(place, layout)
        for order, rank in enumerate(shard_ranks(representative, layout, count)):
            if _place_of(rank, layout) != place:
                raise CheckpointError(f"{where}: optimizer shards of {name} are on ranks that hold other slices of it")
            tensor = files.get(first_rank + rank, {}).get(name)
            if tensor is None:
                raise CheckpointError(
                    f"{where}: {name} needs the slice of rank {first_rank + rank}, which is in no file; "
                    f"files of ranks {_few(sorted(files))} are there"
                )
            if tensor.shape != extent or tensor.dtype != some.dtype:
                raise CheckpointError(
                    f"{where}: {name} has a slice of shape {list(tensor.shape)} ({tensor.dtype}) at rank "
                    f"{first_rank + rank} and of {list(extent)} ({some.dtype}) at rank {ranks[0]}"
                )
            start = [at * n for at, n in zip(place, extent)]
            if extent:
                start[0] = (place[0] * len(shards) + order) * extent[0]
            pieces.append(Piece(tuple(start), extent, tensor.blob()))
    shape = [n * p for n, p in zip(extent, parts)]
    if shape:
        shape[0] *= len(shards)
    return Whole(tuple(shape), some.dtype, tuple(pieces))


def _rank_of(place: tuple[int, ...], layout: Layout) -> int:
    """Return the rank that has the slice at `place`, with coordinate 0 in every device dim that cuts nothing."""
    coordinates = [0] * len(layout.device_matrix)
    for at, cut in zip(place, layout.tensor_map):
        if cut >= 0:
            coordinates[len(coordinates) - 1 - cut] = at
    rank = 0
    for size, coordinate in zip(layout.device_matrix, coordinates):
        rank = rank * size + coordinate
    return rank


def _place_of(rank: int, layout: Layout) -> tuple[int, ...]:
    """Return which slice a rank has, along each dim of the tensor."""
    sizes = layout.device_matrix
    coordinates = []
    for size in reversed(sizes):
        rank, coordinate = divmod(rank, size)
        coordinates.append(coordinate)  # counted from the right, as tensor maps count
    return tuple(0 if cut < 0 else coordinates[cut] for cut in layout.tensor_map)


def shard_ranks(rank: int, layout: Layout, count: int) -> list[int]:
    """Return the ranks whose optimizer shards follow one another along dim 0 of this rank's slice.

    They are `shard_step` apart within a block of `shard_step` x `shard_size` consecutive ranks. (MindSpore up to 1.3
    computed the block as count / step / size, which does not fit the files it wrote.)
    """
    step = layout.shard_step
    if not step:
        return [rank]
    block = step * layout.shard_size if layout.shard_size > 0 else count
    begin = rank // block * block
    return [r for r in range(begin, min(begin + block, count)) if r % step == rank % step]


def _few(ranks: list[int]) -> str:
    return f"{ranks[0]} to {ranks[-1]}" if ranks == list(range(ranks[0], ranks[-1] + 1)) else str(ranks)[:200]
