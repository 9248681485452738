"""Keys and values of the tokens that have been seen, for the layers of one pipeline stage."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Step:
    """The tokens that run through the layers together.

    Attributes:
        rows: int32 [B], the row of the cache that each sequence is kept in.
        firsts: int32 [B], how many tokens of each are kept already.
        length: new tokens of each, S.
    """

    rows: np.ndarray
    firsts: np.ndarray
    length: int
    positions: np.ndarray = field(init=False)
    """int [S, B], or [S] of one sequence: where the new tokens stand."""

    def __post_init__(self) -> None:
        positions = np.arange(self.length, dtype=np.int64)[:, None] + self.firsts
        self.positions = positions[:, 0] if len(self.firsts) == 1 else positions


class KeyValueCache:
    """float32 keys [R, G, T, D] and values [R, G, T, E] of each layer, or latents that stand for both.

    Memory is taken as it is written to.

    Attributes:
        rows: sequences R that can be kept at a time.
        capacity: tokens T of each.
        step: what runs through the layers now.
    """

    def __init__(self, rows: int, capacity: int) -> None:
        self.rows, self.capacity = rows, capacity
        self.step = Step(np.zeros(1, np.int32), np.zeros(1, np.int32), 1)
        self._layers: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._latents: dict[int, np.ndarray] = {}

    def layer(self, number: int, groups: int, key_size: int, value_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the keys and values of a layer, made at its first call."""
        if number not in self._layers:
            shape = (self.rows, groups, self.capacity)
            self._layers[number] = _pages((*shape, key_size)), _pages((*shape, value_size))
        return self._layers[number]

    def latents(self, number: int, width: int) -> np.ndarray:
        """Return the latents of a layer [R, 1, T, width], which all heads share, made at the first call."""
        if number not in self._latents:
            self._latents[number] = _pages((self.rows, 1, self.capacity, width))
        return self._latents[number]

    def begin(self, rows: Sequence[int], firsts: Sequence[int], length: int) -> Step:
        """Say which tokens run through the layers next."""
        self.step = Step(np.array(rows, np.int32), np.array(firsts, np.int32), length)
        return self.step


def _pages(shape: tuple[int, ...]) -> np.ndarray:
    """Return float32 zeros whose pages the system gives at the first write, and none for what is never used.

    Asked for directly: the allocator, which keeps freed memory for steps of training, would clear some of that.
    """
    return np.frombuffer(mmap.mmap(-1, 4 * math.prod(shape)), np.float32).reshape(shape)
