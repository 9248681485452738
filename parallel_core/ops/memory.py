"""Memory of large arrays, which one microbatch leaves to the next.

A C library that is told to keep what is freed cuts it up for what is smaller, so that the next large array needs new
memory, and a process grows to a fourth more than it uses; one that gives it back has the system write zeros to every
page of the next array. Here an array gets the memory of a former one of its very size. In training the sizes are the
same from one microbatch to the next, so nothing is ever cut up; where they are not, all that waits is given back.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

LARGE_BYTES = 1 << 20
"""From this size on. Below, the C library is quicker, and the pages are few."""

_HUGE_PAGE_BYTES = 1 << 21
_FLAGS = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)
_waiting: defaultdict[int, list[mmap.mmap]] = defaultdict(list)
"""Memory that nothing uses, by its size."""


class _Lease:
    """The memory of one array and of its views: it waits again once the last of them is gone."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self.__array_interface__ = np.frombuffer(memory, np.uint8).__array_interface__

    def __del__(self, waiting: defaultdict[int, list[mmap.mmap]] = _waiting) -> None:  # also when Python ends
        waiting[len(self._memory)].append(self._memory)


def empty(shape: Sequence[int], kind: Any = np.float32) -> np.ndarray:
    """Return an uninitialised array, as `numpy.empty` does."""
    kind = np.dtype(kind)
    size = math.prod(shape) * kind.itemsize
    if size < LARGE_BYTES or not _FLAGS:
        return np.empty(shape, kind)
    waiting = _waiting.get(size)
    memory = waiting.pop() if waiting else _new(size)
    return np.asarray(_Lease(memory)).view(kind).reshape(shape)


def _new(size: int) -> mmap.mmap:
    _waiting.clear()
    memory = mmap.mmap(-1, size, flags=_FLAGS)
    if size >= _HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # of a kernel without such pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def waiting_bytes() -> int:
    """Return how much memory waits for an array of its size."""
    return sum(size * len(waiting) for size, waiting in _waiting.items())
