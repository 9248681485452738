"""Makes a span of every operation of groups over shared memory, while somebody wants to see them.

MCCL's and HCCL's operations are spans already, through their watchdog.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from parallel_core import spans
from parallel_core.comm.background import foreground
from parallel_core.comm.interface import Group
from parallel_core.comm.shm import ShmGroup

_OPERATIONS = {
    f"pcs_{name.replace('-', '_')}": name
    for name in ("barrier", "all-reduce", "reduce-scatter", "all-gather", "all-to-all", "broadcast", "send", "receive")
} | {"pcs_all_to_all_rows": "all-to-all"}


class _Observed:
    """The compiled functions of one group, of which each operation is a span, and the waiting in it another."""

    watches = True

    def __init__(self, library: Any, group: ShmGroup, handle: Any) -> None:
        self._library = library
        for symbol, name in _OPERATIONS.items():
            setattr(self, symbol, self._observed(getattr(library, symbol), name, group.name, handle))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)

    def _observed(self, function: Callable[..., int], name: str, group: str, handle: Any) -> Callable[..., int]:
        waited = self._library.pcs_waited

        def call(*arguments: Any) -> int:
            before, start = waited(handle), time.perf_counter_ns()
            status = function(*arguments)
            end = time.perf_counter_ns()
            spans.tell(name, start, end, group=group, waited_ns=int((waited(handle) - before) * 1e9))
            return status

        return call


@contextmanager
def observed(groups: Iterable[Group]) -> Iterator[None]:
    """Tell the listeners of spans of every operation of `groups` while the block runs."""
    changed = []
    for group in {id(group): group for group in map(foreground, groups)}.values():
        if isinstance(group, ShmGroup):
            changed.append((group, group.library))
            group.library = _Observed(group.library, group, group.handle)
    try:
        yield
    finally:
        for group, library in changed:
            if isinstance(group.library, _Observed):  # else it was closed meanwhile
                group.library = library
