"""What the ranks of a job tell each other outside of a run: rows of data, scores, that a folder has been written."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor

from parallel_core.comm import objects
from parallel_core.comm.factory import group_factory
from parallel_core.comm.interface import Group, SoloGroup
from parallel_core.errors import ParallelCoreError
from parallel_core.training.runtime import start_runtime

_TIMEOUT_S = 600.0


@functools.cache
def world() -> Group:
    """Return the group of all ranks; alone of one."""
    rank, size = start_runtime()
    if size == 1:
        return SoloGroup()
    backend = "auto" if ms.get_context("device_target") == "Ascend" else "mccl"
    return group_factory(backend, _TIMEOUT_S, rank, size)("world", list(range(size)))


def rows_of_rank_0(read: Callable[[], list[np.ndarray]]) -> list[np.ndarray]:
    """Return what rank 0 reads on every rank: a source of one's own may draw at random, and each rank other rows.

    Args:
        read: gives integer rows of any lengths.
    """
    group = world()
    if group.size == 1:
        return read()
    found = read() if group.rank == 0 else []
    lengths = group.broadcast_object([len(row) for row in found])
    flat = np.concatenate(found) if found else np.zeros(sum(lengths), np.int32)
    sent = group.broadcast_(Tensor(np.ascontiguousarray(flat, np.int32))).asnumpy() if len(flat) else flat
    return np.split(sent, np.cumsum(lengths)[:-1]) if lengths else []


def shared_out(work: Sequence[Any], do: Callable[[list[Any]], list[Any]]) -> list[Any]:
    """Return what `do` makes of each piece of work, each rank doing its part; in the order of the work.

    Args:
        work: the same on every rank.
        do: takes several pieces and returns as many results, which are what JSON can hold.
    """
    return objects.shared_out(world(), work, lambda part: do(list(part)))


def on_rank_0(do: Callable[[], None]) -> None:
    """Do something on rank 0 that the others wait for.

    Raises:
        ParallelCoreError: what it raises there; on the other ranks that it has failed.
    """
    group, problem, error = world(), "", None
    if group.rank == 0:
        try:
            do()
        except Exception as raised:  # the others must not wait in vain
            problem, error = f"{type(raised).__name__}: {raised}", raised
    if group.size > 1:
        problem = group.broadcast_object(problem)
    if error is not None:
        raise error
    if problem:
        raise ParallelCoreError(f"rank 0 has failed: {problem}")


def tell(text: str) -> None:
    """Print on rank 0."""
    if world().rank == 0:
        print(text, flush=True)
