"""Saving beside the training: the step waits for a copy of the arrays, the rest happens in a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from parallel_core.layout.shard import TensorShard


class AsyncSaver:
    """Runs one save at a time in the background; a failed one is raised by the next `start` or by `wait`."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(
        self,
        shards: Mapping[str, tuple[TensorShard, np.ndarray]],
        save: Callable[[dict[str, tuple[TensorShard, np.ndarray]]], Any],
    ) -> None:
        """Copy the arrays and return; `save(copies)` runs in a thread.

        `save` must not communicate with other ranks: it writes the rank file and, on rank 0, commits with
        `CheckpointWriter.collect_manifests`.

        Args:
            shards: what to save. The arrays may change as soon as this returns.
            save: writes the copies.

        Raises:
            CheckpointError: the previous save failed (whatever it raised is raised again).
        """
        self.wait()
        copies = {key: (shard, np.array(array, copy=True, order="C")) for key, (shard, array) in shards.items()}

        def run() -> None:
            try:
                save(copies)
            except BaseException as error:  # noqa: BLE001 - carried to the training thread, which raises it
                self._error = error

        self._thread = threading.Thread(target=run, name="checkpoint-save")
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a save is still being written."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Wait for the save in progress, if there is one; call it before the process ends.

        Raises:
            CheckpointError: it failed (whatever it raised is raised again, once).
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
