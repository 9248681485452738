"""The two generators of C++'s standard library that Megatron's sample mapping of sentences draws from."""

from __future__ import annotations

import numpy as np

_N, _M = 312, 156
_MASK = (1 << 64) - 1


class Mersenne32:
    """`std::mt19937`: NumPy's generator of the name, seeded as C++ seeds it; numbers come in their order."""

    def __init__(self, seed: int) -> None:
        self._state = np.random.RandomState(seed)
        self._block: list[int] = []

    def next(self) -> int:
        """Return the next 32-bit number."""
        if not self._block:
            self._block = self._state.randint(0, 1 << 32, 4096, dtype=np.uint32).tolist()[::-1]
        return self._block.pop()


class Mersenne64:
    """`std::mt19937_64` (Nishimura 2000), a block of 312 numbers at a time."""

    def __init__(self, seed: int) -> None:
        state = [seed & _MASK]
        for i in range(1, _N):
            state.append((6364136223846793005 * (state[-1] ^ (state[-1] >> 62)) + i) & _MASK)
        self._state = np.array(state, np.uint64)
        self._block: list[int] = []

    def next(self) -> int:
        """Return the next 64-bit number."""
        if not self._block:
            self._block = self._next_block().tolist()[::-1]
        return self._block.pop()

    def _next_block(self) -> np.ndarray:
        state, one = self._state, np.uint64(1)
        upper, lower = np.uint64(_MASK ^ 0x7FFFFFFF), np.uint64(0x7FFFFFFF)

        def twist(first: slice, following: np.ndarray, other: np.ndarray) -> None:
            x = (state[first] & upper) | (following & lower)
            state[first] = other ^ (x >> one) ^ np.where(x & one, np.uint64(0xB5026F5AA96619E9), np.uint64(0))

        # Each number is made of the two that follow it and of the one half a block on: in three runs none is both.
        twist(slice(0, _N - _M), state[1 : _N - _M + 1].copy(), state[_M:].copy())
        twist(slice(_N - _M, _N - 1), state[_N - _M + 1 :].copy(), state[: _M - 1].copy())
        twist(slice(_N - 1, _N), state[:1].copy(), state[_M - 1 : _M].copy())
        x = state ^ ((state >> np.uint64(29)) & np.uint64(0x5555555555555555))
        x ^= (x << np.uint64(17)) & np.uint64(0x71D67FFFEDA60000)
        x ^= (x << np.uint64(37)) & np.uint64(0xFFF7EEE000000000)
        return x ^ (x >> np.uint64(43))
