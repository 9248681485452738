"""Random streams for dropout whose draws depend on what is dropped, not on which rank or in which order it runs.

Every draw has a key: run seed, iteration, microbatch, site (the global name of the place in the model) and how often
that site has drawn in this microbatch. Replicas therefore draw alike; a site whose tensor is cut over the tensor
parallel group adds the rank, and where sequences are cut every site adds that rank, unless its masks are drawn by
position. The masks of whole tensors are the same in every layout, and a recomputed forward draws what the first one
drew.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class RandomState(NamedTuple):
    """Everything that determines the next draws; compare or keep it, do not change it."""

    iteration: int
    microbatch: int
    draws: tuple[tuple[str, int], ...]
    training: bool


class RandomStreams:
    """Gives dropout its seeds.

    Args:
        seed: the run's seed.
        tp_rank: position in the tensor parallel group, part of the key of sharded sites.
        cp_rank: position in the context parallel group.
    """

    def __init__(self, seed: int, tp_rank: int = 0, cp_rank: int = 0) -> None:
        self._seed, self._tp_rank, self._cp_rank = seed, tp_rank, cp_rank
        self._iteration = self._microbatch = 0
        self._draws: Counter[str] = Counter()
        self.training = True

    def set_seed(self, seed: int) -> None:
        """Take another run's seed, when its checkpoint is loaded."""
        self._seed = seed

    def start_microbatch(self, iteration: int, microbatch: int) -> None:
        """Enter the forward pass of a microbatch, counted over all data parallel ranks of the iteration."""
        self._iteration, self._microbatch = iteration, microbatch
        self._draws.clear()

    def seeds(self, site: str, sharded: bool = False, by_position: bool = False) -> tuple[int, int]:
        """Return two non-negative 31-bit seeds for the next draw of `site`.

        Args:
            site: global name of the place that draws.
            sharded: the tensor is cut over the tensor parallel group, so each rank draws differently.
            by_position: the mask is a function of the positions in the sequence, so its parts on several ranks are cut
                from one mask.
        """
        number = self._draws[site]
        self._draws[site] += 1
        key: tuple[object, ...] = (self._seed, self._iteration, self._microbatch, site, number)
        key += (self._tp_rank if sharded else -1,)
        if self._cp_rank and not by_position:
            key += (self._cp_rank,)
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
        return int.from_bytes(digest[:4], "little") >> 1, int.from_bytes(digest[4:], "little") >> 1

    def get_state(self) -> RandomState:
        """Return the position of every stream."""
        return RandomState(self._iteration, self._microbatch, tuple(self._draws.items()), self.training)

    @contextmanager
    def replay(self, state: RandomState) -> Iterator[None]:
        """Draw from `state` on inside the block, and go back to the present position after it."""
        present = self.get_state()
        self.set_state(state)
        try:
            yield
        finally:
            self.set_state(present)

    def set_state(self, state: RandomState) -> None:
        """Go to a position; the next draws are those that followed when `get_state` returned it."""
        self._iteration, self._microbatch, draws, self.training = state
        self._draws = Counter(dict(draws))
