"""Requests to end a run early: signals, and the time that has passed."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from types import FrameType
from typing import Any

from parallel_core.environment import promise_to_stop


class StopRequests:
    """Notes requests to end while its `with` block runs; what handled the signals before does so again afterwards.

    SIGTERM and the first SIGINT are noted, a second SIGINT raises KeyboardInterrupt. A SIGINT that is ignored (a job in
    the background) stays ignored. Off the main thread no handler can be set: the signals stay the main thread's, and
    only the time counts.

    Args:
        minutes: ask to end so long after this object was made; 0: never.
    """

    def __init__(self, minutes: float = 0.0) -> None:
        self._deadline = time.monotonic() + minutes * 60 if minutes else None
        self._told = False
        self._before: dict[signal.Signals, Any] = {}
        self._promise: contextlib.AbstractContextManager[None] = contextlib.nullcontext()

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is not threading.main_thread():
            return self
        for number in (signal.SIGTERM, signal.SIGINT):
            if number != signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        self._promise = promise_to_stop()
        self._promise.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._promise.__exit__(None, None, None)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set from Python
        self._before.clear()

    def wanted(self) -> bool:
        """Tell whether this process wants the run to end."""
        return self._told or (self._deadline is not None and time.monotonic() > self._deadline)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._told:
            raise KeyboardInterrupt
        self._told = True
