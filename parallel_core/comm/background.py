"""Collectives that a thread of their own runs, for backends of the CPU, which run each operation where it is called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from mindspore import Tensor

from parallel_core.comm.interface import Group, Handle
from parallel_core.comm.shm import ShmGroup


class _Running(Handle):
    """An operation that the thread has or will have."""

    def __init__(self, work: Future[Tensor], *kept: Tensor) -> None:
        self._work, self._kept = work, kept  # what is reduced must live until it is

    def wait(self) -> Tensor | None:
        """Return the result, or raise what the operation did."""
        return self._work.result()


class BackgroundGroup(Group):
    """A group whose `..._start` operations go on while this rank computes.

    They are made one after the other, in the order in which they are issued. Every other operation waits for those
    under way, so the members see one order of all of them.

    Args:
        under: what carries them out.
    """

    def __init__(self, under: Group) -> None:
        super().__init__(under.name, under.ranks, under.ranks[under.rank])
        self.under = under
        self._thread = ThreadPoolExecutor(1, f"collectives of {under.name}")
        self._last: Future[Tensor] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["under"], name)

    def _start(self, operation: Callable[[Tensor], Tensor], x: Tensor) -> Handle:
        self._last = self._thread.submit(operation, x)
        return _Running(self._last, x)

    def _settled(self) -> Group:
        last, self._last = self._last, None
        if last is not None:
            last.exception()  # whoever waits for it is told
        return self.under

    def all_reduce_start_(self, x: Tensor) -> Handle:
        """Start overwriting `x` with its sum."""
        return self._start(self.under.all_reduce_, x)

    def reduce_scatter_start(self, x: Tensor, into: Tensor | None = None) -> Handle:  # noqa: ARG002 - of the host
        """Start reducing `x`."""
        return self._start(self.under.reduce_scatter, x)

    def all_gather_start(self, x: Tensor, into: Tensor | None = None) -> Handle:  # noqa: ARG002 - of the host
        """Start gathering."""
        return self._start(self.under.all_gather, x)

    def all_reduce_(self, x: Tensor, op: str = "sum") -> Tensor:
        """Overwrite `x` with its reduction."""
        return self._settled().all_reduce_(x, op)

    def all_reduce(self, x: Tensor, op: str = "sum") -> Tensor:
        """Return the reduction of `x`."""
        return self._settled().all_reduce(x, op)

    def all_gather(self, x: Tensor, dim: int = 0) -> Tensor:
        """Return the members' tensors joined along `dim`."""
        return self._settled().all_gather(x, dim)

    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        """Return this rank's part of the sum."""
        return self._settled().reduce_scatter(x, dim)

    def all_to_all(self, x: Tensor, split_dim: int, concat_dim: int) -> Tensor:
        """Exchange equal parts."""
        return self._settled().all_to_all(x, split_dim, concat_dim)

    def all_to_all_rows(self, x: Tensor, counts: np.ndarray) -> Tensor:
        """Exchange parts of different lengths."""
        return self._settled().all_to_all_rows(x, counts)

    def broadcast_(self, x: Tensor, src: int = 0) -> Tensor:
        """Overwrite `x` with that of member `src`."""
        return self._settled().broadcast_(x, src)

    def send(self, x: Tensor, dst: int) -> Handle:
        """Send `x`."""
        return self._settled().send(x, dst)

    def receive(self, shape: Sequence[int], dtype: Any, src: int) -> Handle:
        """Announce a message."""
        return self._settled().receive(shape, dtype, src)

    def barrier(self) -> None:
        """Wait for every member."""
        self._settled().barrier()

    def all_gather_object(self, value: Any) -> list[Any]:
        """Gather values as JSON."""
        return self._settled().all_gather_object(value)

    def close(self) -> None:
        """End the thread and close the group."""
        self._settled()
        self._thread.shutdown()
        self.under.close()


def in_background(group: Group) -> Group:
    """Return a group over shared memory with operations that go on beside computation; others as they are.

    HCCL's do that by themselves. MindSpore runs MCCL's in the order of all operators, so a thread gains nothing there.
    """
    return BackgroundGroup(group) if isinstance(group, ShmGroup) else group


def foreground(group: Group) -> Group:
    """Return what carries out a group's operations."""
    return group.under if isinstance(group, BackgroundGroup) else group
