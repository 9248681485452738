"""Where each parameter is inside the flat buffers of Megatron's distributed optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_ALIGN = 64  # every parameter starts at a multiple of this many elements


@dataclass(frozen=True)
class FlatParameter:
    """One parameter's place.

    Attributes:
        name: the parameter.
        numel: its elements on this rank.
        bucket: the bucket it is in.
        start: its first element, counted from the start of that bucket.
        file_start: its first element in `distrib_optim.pt`, where buckets follow one another without end padding.
    """

    name: str
    numel: int
    bucket: int
    start: int
    file_start: int


@dataclass(frozen=True)
class FlatLayout:
    """The places of all parameters of one buffer, and each bucket's length without the padding at its end."""

    parameters: tuple[FlatParameter, ...]
    bucket_numel: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements in `distrib_optim.pt`."""
        return sum(self.bucket_numel)


def flat_layout(
    parameters: Sequence[tuple[str, int]],
    bucket_size: int | None,
    end_multiple: int = 128,
    alone: frozenset[str] = frozenset(),
) -> FlatLayout:
    """Lay out one model chunk's buffer as Megatron does.

    Parameters go in reverse registration order. A bucket ends with the parameter that makes it reach `bucket_size`.
    Worked example, no buckets: lengths (registered order) 64, 100, 30 -> the last one at 0..30, then 64..164, then
    192..256; the buffer has 256 elements, gaps included.

    Args:
        parameters: (name, elements on this rank) in registration order.
        bucket_size: elements that fill a bucket; None for a single bucket.
        end_multiple: buckets are padded to this multiple in memory; a power of two times 64 leaves no trace in files.
        alone: parameters that get a bucket of their own (embeddings shared between pipeline stages).
    """
    placed: list[FlatParameter] = []
    numels: list[int] = []
    bucket_start, position, members, file_base = 0, 0, 0, 0

    def close(end: int) -> int:
        nonlocal bucket_start, members, file_base
        numels.append(end - bucket_start)
        file_base += end - bucket_start
        bucket_start, members = -(-end // end_multiple) * end_multiple, 0
        return bucket_start

    for name, numel in reversed(parameters):
        start = -(-position // _ALIGN) * _ALIGN
        if name in alone and members:
            start = close(start)
        inside = start - bucket_start
        placed.append(FlatParameter(name, numel, len(numels), inside, file_base + inside))
        members += 1
        position = start + numel
        if name in alone or (bucket_size is not None and position - bucket_start >= bucket_size):
            position = close(position)
    if members:
        close(position)
    return FlatLayout(tuple(placed), tuple(numels))


def bucket_size_of(args: Mapping[str, Any], pp_rank: int, chunk: int, num_parameters: int) -> int | None:
    """Return the bucket size Megatron used for a model chunk, in elements; None when it made a single bucket."""
    if not args.get("overlap_grad_reduce") or pp_rank > 0 or chunk > 0:
        return None
    if args.get("overlap_param_gather_with_optimizer_step"):
        return None
    if args.get("ddp_num_buckets"):
        return num_parameters // int(args["ddp_num_buckets"])
    if args.get("ddp_bucket_size"):
        return int(args["ddp_bucket_size"])
    return max(40_000_000, 1_000_000 * _dp_cp(args))


def end_multiple_of(args: Mapping[str, Any]) -> int:
    """Return the multiple that Megatron padded buckets to."""
    multiples = [_dp_cp(args), 128]
    if args.get("ddp_pad_buckets_for_high_nccl_busbw"):
        multiples.append(1 << 16)
    return math.lcm(*multiples)


def _dp_cp(args: Mapping[str, Any]) -> int:
    return int(args.get("data_parallel_size") or 1) * int(args.get("context_parallel_size") or 1)
