"""The flat buffers of Megatron's distributed optimizer: `layout.buckets` with Megatron's names and arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from parallel_core.layout.buckets import BufferLayout, default_bucket_size, layout_buffer


class FlatParameter(NamedTuple):
    """One parameter's place.

    Attributes:
        name: the parameter.
        numel: its elements on this rank.
        bucket: the bucket it is in.
        start: its first element, counted from the start of that bucket.
        file_start: its first element in `distrib_optim.pt`.
    """

    name: str
    numel: int
    bucket: int
    start: int
    file_start: int


@dataclass(frozen=True)
class FlatLayout:
    """The places of all parameters of one buffer."""

    names: tuple[str, ...]
    buffer: BufferLayout

    @property
    def parameters(self) -> tuple[FlatParameter, ...]:
        """Every parameter's place, in buffer order."""
        at = self.buffer
        return tuple(
            FlatParameter(self.names[s.index], s.end - s.start, s.bucket, at.in_bucket(s), at.in_file(s))
            for s in at.slots
        )

    @property
    def bucket_numel(self) -> tuple[int, ...]:
        """Each bucket's length without the padding at its end."""
        return tuple(bucket.used for bucket in self.buffer.buckets)

    @property
    def numel(self) -> int:
        """Elements in `distrib_optim.pt`."""
        return self.buffer.file_starts[-1]


def flat_layout(
    parameters: Sequence[tuple[str, int]], bucket_size: int | None, alone: frozenset[str] = frozenset()
) -> FlatLayout:
    """Lay out one model chunk's buffer as Megatron does.

    The data parallel size pads buckets in memory only, so it is not asked for.

    Args:
        parameters: (name, elements on this rank) in registration order.
        bucket_size: elements that fill a bucket; None for a single bucket.
        alone: parameters that get a bucket of their own (embeddings shared between pipeline stages).
    """
    names = tuple(name for name, _ in parameters)
    single = [index for index, name in enumerate(names) if name in alone]
    sizes = [numel for _, numel in parameters]
    return FlatLayout(names, layout_buffer(sizes, bucket_size=bucket_size, align=True, alone=single))


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
    return default_bucket_size(int(args.get("data_parallel_size") or 1) * int(args.get("context_parallel_size") or 1))
