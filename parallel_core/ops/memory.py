"""Memory of large arrays, which one microbatch leaves to the next.

A C library that is told to keep what is freed cuts it up for what is smaller, so that the next large array needs new
memory, and a process grows to a fourth more than it uses; one that gives it back has the system write zeros to every
page of the next array. Here an array gets the memory of a former one of its very size. In training the sizes are the
same from one microbatch to the next, so nothing is ever cut up; where they are not, memory that waits is given back.
`tracemalloc` counts an array while it is in use, as it counts NumPy's own.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import threading
import tracemalloc
from collections import deque
from collections.abc import Sequence
from ctypes import c_size_t, c_uint
from typing import Any

import numpy as np

LARGE_BYTES = 1 << 20
"""From this size on. Below, the C library is quicker, and the pages are few."""

_HUGE_PAGE_BYTES = 1 << 21
_FLAGS = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)
_DOMAIN = 0x7063  # of what `tracemalloc` counts; any number of one's own
_track, _untrack = ctypes.pythonapi.PyTraceMalloc_Track, ctypes.pythonapi.PyTraceMalloc_Untrack
_track.argtypes, _untrack.argtypes = (c_uint, c_size_t, c_size_t), (c_uint, c_size_t)
_SLACK = 8
"""More than has been in use at once there may be by one part of so many."""


class _Waiting:
    """Memory that nothing uses, by its size, and how much is in use."""

    def __init__(self) -> None:
        self._by_size: dict[int, list[mmap.mmap]] = {}
        self._waiting = self._used = self._most_used = 0
        self._returned: deque[mmap.mmap] = deque()
        self._lock = threading.Lock()

    def take(self, size: int) -> mmap.mmap:
        """Return memory of a size.

        Where new memory is needed, so much is given back of the size whose memory came last longest ago that all
        together is little more than has been in use at once. Arrays that follow one another thus do not drive each
        other out.
        """
        with self._lock:
            self._sort()
            self._used += size
            self._most_used = max(self._most_used, self._used)
            found = self._by_size.get(size)
            if found:
                self._waiting -= size
                return found.pop()
            while self._waiting and self._used + self._waiting > self._most_used + self._most_used // _SLACK:
                oldest = next(iter(self._by_size))
                self._waiting -= oldest * len(self._by_size.pop(oldest))
        return _new(size)

    def put(self, memory: mmap.mmap) -> None:
        """Let memory wait that nothing uses any more; called by any thread, and by Python in the midst of `take`."""
        self._returned.append(memory)

    def _sort(self) -> None:
        while self._returned:
            memory = self._returned.popleft()
            size = len(memory)
            self._used -= size
            self._waiting += size
            self._by_size[size] = [*self._by_size.pop(size, ()), memory]

    def bytes(self) -> int:
        """Return how much waits."""
        with self._lock:
            self._sort()
            return self._waiting

    def clear(self) -> None:
        """Give back all that waits, and forget how much has been in use."""
        with self._lock:
            self._sort()
            self._by_size.clear()
            self._waiting, self._most_used = 0, self._used


_waiting = _Waiting()


class _Lease:
    """The memory of one array and of its views: it waits again once the last of them is gone."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self.__array_interface__ = np.frombuffer(memory, np.uint8).__array_interface__
        self._is_traced = tracemalloc.is_tracing() and not _track(_DOMAIN, self._address(), len(memory))

    def _address(self) -> int:
        address: int = self.__array_interface__["data"][0]
        return address

    def __del__(self, waiting: _Waiting = _waiting) -> None:  # also when Python ends
        if self._is_traced:
            _untrack(_DOMAIN, self._address())
        waiting.put(self._memory)


def empty(shape: Sequence[int], kind: Any = np.float32) -> np.ndarray:
    """Return an uninitialised array, as `numpy.empty` does."""
    kind = np.dtype(kind)
    size = math.prod(shape) * kind.itemsize
    if size < LARGE_BYTES or not _FLAGS:
        return np.empty(shape, kind)
    return np.asarray(_Lease(_waiting.take(size))).view(kind).reshape(shape)


def _new(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=_FLAGS)
    if size >= _HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # of a kernel without such pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def waiting_bytes() -> int:
    """Return how much memory waits for an array of its size."""
    return _waiting.bytes()
