"""Which chunks of a cut sequence meet: a rank's queries and the keys that visit it, or those of all ranks."""

from __future__ import annotations

import functools

from mindspore import Tensor

from parallel_core.layout.sequence import chunk_ids, chunk_length
from parallel_core.ops.documents import starts_of
from parallel_core.ops.meetings import Meeting

Meetings = tuple[Meeting, ...]


class Chunks:
    """A rank's chunks.

    Args:
        local_length: positions of each rank.
        size: ranks that share the sequence.
        rank: this one.
        start: int32 [B, S] of the whole sequence, the first position that each may see; None: 0.
    """

    def __init__(self, local_length: int, size: int, rank: int, start: Tensor | None) -> None:
        self.length = chunk_length(local_length, size)
        self._size, self._rank = size, rank
        self._lowest = (0,) * len(chunk_ids(size, rank))
        if start is not None:  # the first position that any row of each chunk may see
            starts = starts_of(start)
            firsts = [chunk * self.length for chunk in chunk_ids(size, rank)]
            self._lowest = tuple(int(starts[:, first : first + self.length].min()) for first in firsts)

    def with_rank(self, other: int) -> Meetings:
        """Return where this rank's queries see some of another rank's keys, which stand as it holds them."""
        return _of_ranks(self.length, self._size, self._rank, other, self._lowest)

    def visits(self) -> tuple[Meetings, ...]:
        """Return the same for this rank, the one before it, and so on round the ring."""
        return tuple(self.with_rank((self._rank - step) % self._size) for step in range(self._size))

    def with_all(self) -> Meetings:
        """Return what this rank's queries see of all keys, which stand in the order of the sequence."""
        return _of_sequence(self.length, self._size, self._rank)


@functools.lru_cache(maxsize=256)
def _of_ranks(length: int, size: int, rank: int, other: int, lowest: tuple[int, ...]) -> Meetings:
    found = []
    for own, (chunk, low) in enumerate(zip(chunk_ids(size, rank), lowest)):
        for place, theirs in enumerate(chunk_ids(size, other)):
            if theirs <= chunk and low < (theirs + 1) * length:
                found.append(Meeting(own * length, chunk * length, place * length, theirs * length, length))
    return tuple(found)


@functools.lru_cache(maxsize=64)
def _of_sequence(length: int, size: int, rank: int) -> Meetings:
    chunks = enumerate(chunk_ids(size, rank))
    return tuple(Meeting(own * length, chunk * length, 0, 0, (chunk + 1) * length) for own, chunk in chunks)
