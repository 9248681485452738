"""Named stretches of a rank's time, told to whoever listens: timers, the timeline, what explains a hang.

`with span("forward-compute", microbatch=3):` costs a fraction of a microsecond while nobody listens. Names are those of
Megatron-LM's timers, and so are the levels: 1 for the parts of an iteration, 2 for what happens within them. Parts of a
layer have level 3.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Protocol


class Listener(Protocol):
    """Is told of every span, on the thread that it is on."""

    def begin(self, name: str, level: int, details: dict[str, Any]) -> None:
        """Take note that a span is about to begin; its clock has not started."""

    def end(self, name: str, level: int, start_ns: int, end_ns: int, details: dict[str, Any]) -> None:
        """Take note of a span that has ended, on the clock of `time.perf_counter_ns`."""


_listeners: tuple[Listener, ...] = ()


def listen(listener: Listener) -> None:
    """Tell `listener` of all spans that begin from now on."""
    global _listeners
    _listeners = (*_listeners, listener)


def ignore(listener: Listener) -> None:
    """Tell `listener` nothing any more; one that does not listen is no error."""
    global _listeners
    _listeners = tuple(one for one in _listeners if one is not listener)


class _Nothing:
    def __enter__(self) -> None:
        return

    def __exit__(self, *error: object) -> None:
        return


_NOTHING = _Nothing()


class _Span:
    __slots__ = ("_details", "_level", "_listeners", "_name", "_start")

    def __init__(self, name: str, level: int, details: dict[str, Any]) -> None:
        self._name, self._level, self._details, self._listeners = name, level, details, _listeners

    def __enter__(self) -> None:
        for listener in self._listeners:
            listener.begin(self._name, self._level, self._details)
        self._start = time.perf_counter_ns()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        end = time.perf_counter_ns()
        for listener in self._listeners:
            listener.end(self._name, self._level, self._start, end, self._details)


def tell(name: str, start_ns: int, end_ns: int, level: int = 2, **details: Any) -> None:
    """Tell the listeners of a span whose details are known only when it has ended."""
    for listener in _listeners:
        listener.end(name, level, start_ns, end_ns, details)


def span(name: str, level: int = 2, **details: Any) -> _Span | _Nothing:
    """Return a context whose time is told to the listeners.

    Args:
        name: what happens.
        level: 1 or 2, as Megatron-LM's timers have it, or 3.
        details: what tells this span from others of its name (microbatch, chunk, group).
    """
    return _Span(name, level, details) if _listeners else _NOTHING
