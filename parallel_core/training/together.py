"""Work with files that all ranks wait for, however long it takes one of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from parallel_core.comm.interface import Group
from parallel_core.errors import CheckpointError, ParallelCoreError

MAX_ROUND_S = 30.0


def together(world: Group, action: Callable[[], Any], timeout_s: float) -> Any:
    """Run `action` on every rank, return this rank's result, and raise one rank's error on all of them; collective.

    A collective that waits for a slow rank ends the run after the communication's limit, though a rank that writes a
    large file is healthy. So the work is done in a thread, and the ranks meet every fraction of the limit until all
    are through.

    Args:
        world: all ranks.
        action: must not communicate.
        timeout_s: the limit of one communication.

    Raises:
        CheckpointError: with the first failing rank's message.
    """
    if world.size == 1:
        return action()
    work = _Work(action)
    work.start()
    while True:
        work.join(min(timeout_s / 4, MAX_ROUND_S))
        if work.bug is not None:
            raise work.bug  # this rank ends the job; the launcher shows where
        states = world.all_gather_object((work.is_alive(), work.failure))
        failures = [text for _, text in states if text]
        if failures:
            raise CheckpointError(failures[0])
        if not any(alive for alive, _ in states):
            return work.result


class _Work(threading.Thread):
    """An action in a thread, and what became of it: `result`, `failure` (an error of this package) or `bug`."""

    def __init__(self, action: Callable[[], Any]) -> None:
        super().__init__(name="files", daemon=True)
        self._action = action
        self.result: Any = None
        self.failure: str | None = None
        self.bug: BaseException | None = None

    def run(self) -> None:
        """Run the action."""
        try:
            self.result = self._action()
        except ParallelCoreError as error:
            self.failure = str(error)
        except BaseException as error:  # noqa: BLE001 - carried to the main thread, which raises it
            self.bug = error
