"""Where each parameter sits in a flat buffer, and where the buffer is cut into buckets. Pure Python.

Source: Megatron-LM's DDP buffers: parameters in reverse order, because the last layers' gradients come first. With the
distributed optimizer every parameter starts at a multiple of 64 elements and every bucket's length is a multiple of
lcm(dp, 128), so that each data parallel rank owns an equal, aligned part of each bucket. With memory alignment, as in
MindSpeed, parameters and those parts start at 512-byte boundaries instead, which Ascend's collectives like.

The same layout says where parameters are in Megatron's `distrib_optim.pt`: there the buckets follow one another without
the padding at their ends, so a file depends on where buckets are cut and not on the data parallel size.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

PARAMETER_ALIGNMENT = 64
BUCKET_ALIGNMENT = 128
MEMORY_ALIGNMENT_BYTES = 512


def default_bucket_size(data_parallel_size: int) -> int:
    """Return the elements of a bucket when reductions overlap with backward and nobody gave a size, as in Megatron."""
    return max(40_000_000, 1_000_000 * data_parallel_size)


@dataclass(frozen=True)
class ParameterSlot:
    """Elements [start, end) of the buffer hold parameter number `index`."""

    index: int
    start: int
    end: int
    bucket: int


@dataclass(frozen=True)
class BucketRange:
    """Elements [start, end) of the buffer, padding included.

    `used` counts those before the padding at the end, Megatron's `numel_unpadded`: up to the last parameter's end, or
    in front of a parameter with a bucket of its own up to where that would start without the cut.
    """

    start: int
    end: int
    used: int

    def shard(self, rank: int, size: int) -> tuple[int, int]:
        """Return the part of the bucket that rank `rank` of `size` owns in the distributed optimizer."""
        length = (self.end - self.start) // size
        return self.start + rank * length, self.start + (rank + 1) * length


@dataclass(frozen=True)
class BufferLayout:
    """A flat buffer: its length in elements, its parameters in buffer order, its buckets."""

    numel: int
    slots: tuple[ParameterSlot, ...]
    buckets: tuple[BucketRange, ...]

    @cached_property
    def file_starts(self) -> tuple[int, ...]:
        """Where each bucket starts in `distrib_optim.pt`, and behind them the file's length."""
        return (0, *accumulate(bucket.used for bucket in self.buckets))

    def in_bucket(self, slot: ParameterSlot) -> int:
        """Return a parameter's first element, counted from the start of its bucket."""
        return slot.start - self.buckets[slot.bucket].start

    def in_file(self, slot: ParameterSlot) -> int:
        """Return a parameter's first element in `distrib_optim.pt`."""
        return self.file_starts[slot.bucket] + self.in_bucket(slot)


def layout_buffer(
    numels: Sequence[int],
    *,
    bucket_size: int | None = None,
    shards: int = 1,
    align: bool = False,
    alone: Collection[int] = (),
    memory_alignment: int = 0,
) -> BufferLayout:
    """Lay parameters out in reverse order.

    Worked example, aligned, one bucket: lengths 64, 100, 30 -> the last one at 0..30, then 64..164, then 192..256.

    Args:
        numels: elements of every parameter, in module order.
        bucket_size: close a bucket after the parameter that makes it at least this long; None: one bucket.
        shards: data parallel size.
        align: pad for the distributed optimizer (see the module's docstring).
        alone: indices of parameters that get a bucket of their own (with `align`): shared embeddings, so that the
            stages that hold one shard it alike.
        memory_alignment: with `align`, elements that parameters and shards start at a multiple of; 0: Megatron's
            alignment.
    """
    slots: list[ParameterSlot] = []
    buckets: list[BucketRange] = []
    step = (memory_alignment or PARAMETER_ALIGNMENT) if align else 1
    multiple = math.lcm(shards, BUCKET_ALIGNMENT) if align else 1
    if align and memory_alignment:
        multiple = shards * memory_alignment
    start = position = 0

    def close(used_end: int) -> None:
        nonlocal start, position
        position = _round_up(used_end, multiple)
        buckets.append(BucketRange(start, position, used_end - start))
        start = position

    for index in reversed(range(len(numels))):
        position = _round_up(position, step)
        single = align and index in alone
        if single and position > start:
            close(position)
        slots.append(ParameterSlot(index, position, position + numels[index], len(buckets)))
        position += numels[index]
        if single or (bucket_size is not None and position - start >= bucket_size):
            close(position)
    if position > start:
        close(position)
    return BufferLayout(position, tuple(slots), tuple(buckets))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
