"""A time limit on blocking communication that says what was waited for, whoever holds the interpreter."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from parallel_core.spans import span

EXIT_CODE = 75
"""Exit status of a rank that gave up waiting (EX_TEMPFAIL)."""


class Watchdog:
    """Ends the process when one watched operation takes longer than `timeout_s` seconds.

    A collective whose peer is gone blocks inside the backend and cannot be interrupted from Python, so the only way
    to fail fast is to name the operation and exit; the launcher then ends the other ranks.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._current: tuple[str, float] | None = None
        self._thread: threading.Thread | None = None

    @contextmanager
    def watch(self, what: str) -> Iterator[None]:
        """Watch the block; `what` names group, ranks, operation, shape and dtype."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="comm-watchdog", daemon=True)
            self._thread.start()
        self._current = (what, time.monotonic())
        try:
            with span("communication", what=what):
                yield
        finally:
            self._current = None

    def _run(self) -> None:
        interval = min(1.0, self.timeout_s / 4)
        while True:
            time.sleep(interval)
            current = self._current
            if current is not None and time.monotonic() - current[1] > self.timeout_s:
                sys.stdout.flush()
                message = (
                    f"ERROR - {current[0]} did not complete within {self.timeout_s:g} s "
                    "(--distributed-timeout-minutes); another rank has failed or is stuck\n"
                )
                os.write(2, message.encode())
                faulthandler.dump_traceback(all_threads=True)
                os._exit(EXIT_CODE)
