"""A progress bar of bytes, and jobs in several processes that all advance it."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from typing import Any, TextIO, TypeVar

Result = TypeVar("Result")
_counter: Any = None  # in a worker process: the shared number of bytes done


class ProgressBar:
    """One line on a terminal that shows bytes done, or a line every few seconds where there is no terminal."""

    def __init__(self, total: int, out: TextIO = sys.stderr, quiet: bool = False) -> None:
        """Start at zero.

        Args:
            total: bytes of the whole work.
            out: where to print.
            quiet: print nothing.
        """
        self._total, self._out, self._quiet = max(total, 1), out, quiet
        self._done, self._start, self._shown = 0, time.monotonic(), float("-inf")

    def add(self, count: int) -> None:
        """Advance by `count` bytes."""
        self.set(self._done + count)

    def set(self, done: int) -> None:
        """Show `done` bytes, at most a few times a second."""
        self._done = done
        now = time.monotonic()
        if now - self._shown >= (0.2 if self._out.isatty() else 5.0):
            self._shown = now
            self._print("\r" if self._out.isatty() else "\n")

    def finish(self) -> None:
        """Show the final state."""
        self._print("\n")

    def _print(self, end: str) -> None:
        if self._quiet:
            return
        share = min(1.0, self._done / self._total)
        rate = self._done / 1e6 / max(time.monotonic() - self._start, 1e-9)
        bar = "#" * round(share * 30)
        # What several files hold, such as norms of tensor parallel ranks, is written more often than it is read.
        whole = f" of {_size(self._total)}" if self._done <= self._total else ""
        self._out.write(f"[{bar:<30}] {share:6.1%}  {_size(self._done)}{whole}  {rate:.0f} MB/s{end}")
        self._out.flush()


def _size(count: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count / 1e3:.1f} kB"


def run_jobs(
    function: Callable[..., Result], jobs: Sequence[tuple[Any, ...]], processes: int, bar: ProgressBar
) -> list[Result]:
    """Return `function(*job, progress)` of every job, in order, run in up to `processes` processes.

    Args:
        function: a module-level function; its last argument is told the bytes done since it was last called.
        jobs: arguments of each call; picklable when there are several processes.
        processes: how many run at once; 1 runs them here, one after another.
        bar: is advanced.

    Raises:
        CheckpointError: a job raised it; the others are stopped.
    """
    if processes <= 1 or len(jobs) <= 1:
        return [function(*job, bar.add) for job in jobs]
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    workers = min(processes, len(jobs))
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_set_counter, initargs=(counter,)) as pool:
        futures = [pool.submit(_run, function, job) for job in jobs]
        pending = set(futures)
        while pending:
            done, pending = wait(pending, timeout=0.2)
            bar.set(counter.value)
            if any(future.exception() for future in done):
                pool.shutdown(wait=True, cancel_futures=True)
                break
        return [future.result() for future in futures if not future.cancelled()]


def _set_counter(counter: Any) -> None:
    global _counter
    _counter = counter


def _run(function: Callable[..., Result], job: tuple[Any, ...]) -> Result:
    return function(*job, _advance)


def _advance(count: int) -> None:
    with _counter.get_lock():
        _counter.value += count
