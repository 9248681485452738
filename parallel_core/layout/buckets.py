"""Where each parameter sits in a flat buffer, and where the buffer is cut into buckets. Pure Python.

Source: Megatron-LM's DDP buffers: parameters in reverse order, because the last layers' gradients come first. With the
distributed optimizer every parameter starts at a multiple of 64 elements and every bucket's length is a multiple of
lcm(dp, 128), so that each data parallel rank owns an equal, aligned part of each bucket. With memory alignment, as in
MindSpeed, parameters and those parts start at 512-byte boundaries instead, which Ascend's collectives like.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

PARAMETER_ALIGNMENT = 64
BUCKET_ALIGNMENT = 128
MEMORY_ALIGNMENT_BYTES = 512


@dataclass(frozen=True)
class ParameterSlot:
    """Elements [start, end) of the buffer hold parameter number `index`."""

    index: int
    start: int
    end: int
    bucket: int


@dataclass(frozen=True)
class BucketRange:
    """Elements [start, end) of the buffer, padding included; `used` counts those before the padding at the end."""

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


def layout_buffer(
    numels: Sequence[int],
    *,
    bucket_size: int | None = None,
    shards: int = 1,
    align: bool = False,
    alone: Sequence[int] = (),
    memory_alignment: int = 0,
) -> BufferLayout:
    """Lay parameters out in reverse order.

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
    multiple = math.lcm(shards, BUCKET_ALIGNMENT) if align else 1
    if align and memory_alignment:
        multiple = shards * memory_alignment
    start = position = used = 0

    def close() -> None:
        nonlocal start, position
        position = _round_up(position, multiple)
        buckets.append(BucketRange(start, position, used - start))
        start = position

    for index in reversed(range(len(numels))):
        single = align and index in alone
        if single and position > start:
            close()
        if align:
            position = _round_up(position, memory_alignment or PARAMETER_ALIGNMENT)
        slots.append(ParameterSlot(index, position, position + numels[index], len(buckets)))
        position += numels[index]
        used = position
        if single or (bucket_size is not None and position - start >= bucket_size):
            close()
    if position > start:
        close()
    return BufferLayout(position, tuple(slots), tuple(buckets))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
