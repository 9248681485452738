"""The chunks of a cut sequence as blocks of attention: which meet, and how their results are joined."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mindspore as ms
from mindspore import Tensor

from parallel_core import ops
from parallel_core.layout.sequence import chunk_ids, chunk_length
from parallel_core.ops.documents import starts_of


@dataclass(frozen=True)
class Block:
    """One of a rank's chunks.

    Attributes:
        place: which of the rank's chunks it is, from 0.
        first: position of its first row.
        length: its rows.
        start: int32 [B, length], the first position that each row may see; None: 0.
        kernel: options of the attention kernel.
    """

    place: int
    first: int
    length: int
    start: Tensor | None
    kernel: dict[str, Any]

    def rows(self, x: Tensor) -> Tensor:
        """Return the chunk's rows of a rank's tensor."""
        return x[self.place * self.length : (self.place + 1) * self.length]

    def options(self, k_first: int) -> dict[str, Any]:
        """Return the kernel's options for these queries and keys from position `k_first` on."""
        return {**self.kernel, "q_first": self.first, "k_first": k_first}


class Blocks:
    """The chunks of all ranks.

    Args:
        local_length: positions of each rank.
        size: ranks that share the sequence.
        rank: this one.
        start: int32 [B, S] of the whole sequence, the first position that each may see; None: 0.
        options: options of the attention kernel.
    """

    def __init__(self, local_length: int, size: int, rank: int, start: Tensor | None, options: dict[str, Any]) -> None:
        self._size, self._rank, self._start, self._options = size, rank, start, options
        self.length, self.total = chunk_length(local_length, size), local_length * size

    def of(self, rank: int, *, with_start: bool = False) -> list[Block]:
        """Return a rank's chunks."""
        blocks = []
        for place, chunk in enumerate(chunk_ids(self._size, rank)):
            first, start = chunk * self.length, self._start
            if start is not None:
                start = start[:, first : first + self.length].contiguous() if with_start else None
            blocks.append(Block(place, first, self.length, start, self._options))
        return blocks

    @cached_property
    def own(self) -> list[Block]:
        """This rank's chunks."""
        return self.of(self._rank, with_start=True)

    @cached_property
    def _lowest(self) -> list[int]:
        """The first position that any row of each own chunk may see."""
        if self._start is None:
            return [0] * len(self.own)
        starts = starts_of(self._start)
        return [int(starts[:, block.first : block.first + self.length].min()) for block in self.own]

    def pairs(self, rank: int) -> Iterator[tuple[int, Block, Block]]:
        """Yield (place, own chunk, chunk of `rank`) where some of the own rows see some of the other's."""
        for block, lowest in zip(self.own, self._lowest):
            for other in self.of(rank):
                if other.first <= block.first + self.length - 1 and lowest < other.first + self.length:
                    yield block.place, block, other


def merged(found: tuple[Tensor, Tensor] | None, part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the attention over two sets of keys from the attention over each.

    Args:
        found: context [S, B, X] and float32 [B, N, S] logarithm of the sum of exponentials; None: of no keys.
        part: the same of other keys. The result is kept in float32 whatever the parts' dtype: errors would add up.
    """
    if found is None:
        return ops.cast(part[0], ms.float32), part[1]
    return ops.join_blocks(*found, *part)
