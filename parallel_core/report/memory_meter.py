"""How much memory a piece of a program needs at its peak, beside what it was given.

MindSpore counts its pool on Ascend only. On CPU tensors live in two places. MindSpore's pool takes memory from the
kernel in blocks of 1 GiB and reuses what is freed, so the pages that a piece of a program touches are what it needs:
Linux is asked to forget which pages were accessed, and afterwards how many have been. The fused kernels return NumPy
arrays, whose allocations `tracemalloc` counts.
"""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import mindspore as ms

from parallel_core.errors import ParallelCoreError

_POOL_BLOCK_BYTES = 2**30
_CLEAR_REFS, _SMAPS = Path("/proc/self/clear_refs"), Path("/proc/self/smaps")


class MemoryMeter:
    """Measures from `start()` to `stop()`.

    On CPU the result is the peak of MindSpore's pool, exact to the page (4 KiB) for what its allocator uses, plus the
    peak of the NumPy arrays and Python objects allocated since the start. Long-lived tensors in the pool count where
    they are read; parameters, gradients and optimizer state are not in the pool and do not count. On Ascend it is the
    rise over what was allocated at the start.
    """

    def __init__(self) -> None:
        self._on_cpu = ms.get_context("device_target") == "CPU"
        self._before = 0

    def start(self) -> None:
        """Forget what came before.

        Raises:
            ParallelCoreError: if this system does not tell which pages a process accesses.
        """
        if not self._on_cpu:
            ms.runtime.synchronize()
            ms.runtime.reset_max_memory_allocated()
            self._before = ms.runtime.memory_allocated()
            return
        try:
            _CLEAR_REFS.write_text("1", encoding="ascii")
        except OSError as error:
            raise ParallelCoreError(
                f"the memory of a step cannot be measured here: {_CLEAR_REFS} cannot be written ({error})"
            ) from error
        tracemalloc.start()

    def stop(self) -> int:
        """Return the bytes that were in use at the peak since `start()`."""
        if not self._on_cpu:
            ms.runtime.synchronize()
            return ms.runtime.max_memory_allocated() - self._before
        in_arrays = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return in_arrays + _accessed_pool_bytes(_SMAPS.read_text(encoding="ascii"))


def _accessed_pool_bytes(smaps: str) -> int:
    """Return the accessed bytes of the anonymous mappings of at least one pool block, from smaps' text."""
    total, in_pool = 0, False
    for line in smaps.splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            start, end = (int(word, 16) for word in words[0].split("-"))
            anonymous = len(words) == 5 and words[1].startswith("rw")
            in_pool = anonymous and end - start >= _POOL_BLOCK_BYTES
        elif in_pool and words[0] == "Referenced:":
            total += int(words[1]) * 1024
    return total
