"""Groups over MindSpore's own collectives: MCCL on CPU, HCCL on Ascend, and every workaround either needs.

MCCL (MindSpore 2.10) has all-reduce, list all-gather, broadcast, barrier, send and recv; the rest is composed from
them here. Its `send` returns before the peer has received, its `recv` blocks, and messages between two ranks arrive
in the order they were sent: so a receive is only performed when its result is asked for.
"""

from __future__ import annotations

import functools
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mindspore as ms
import mindspore.mint.distributed as dist
import numpy as np
from mindspore import Tensor, communication, mint

from parallel_core.comm.interface import Done, Group, Handle
from parallel_core.comm.objects import gather_objects
from parallel_core.comm.watchdog import Watchdog
from parallel_core.errors import CommError
from parallel_core.ops.library import default_threads
from parallel_core.ops.thread_pool import limit_threads

WORLD = "hccl_world_group"
"""The name under which MindSpore's point-to-point operations look the world up, on every backend."""


@functools.cache
def start_communication() -> tuple[int, int]:
    """Join the cluster that msrun describes in the environment, and return (rank, world size).

    A process joins once; later calls return the same.

    On CPU the world group does not exist under the name that `send` and `recv` use, and without it a receive returns
    zeros and no error; so it is created here. MindSpore's own threads are limited first, see `ops.thread_pool`.
    """
    on_cpu = ms.get_context("device_target") == "CPU"
    if on_cpu:
        limit_threads(default_threads())
    communication.init()
    rank, size = communication.get_rank(), communication.get_group_size()
    if on_cpu:
        communication.create_group(WORLD, list(range(size)))
    return rank, size


class MindSporeGroup(Group):
    """What MCCL and HCCL share. Creating one is collective over its members."""

    def __init__(self, name: str, ranks: Sequence[int], global_rank: int, watchdog: Watchdog) -> None:
        super().__init__(name, ranks, global_rank)
        self._watchdog = watchdog
        if name != WORLD:
            communication.create_group(name, list(ranks))

    def all_reduce_(self, x: Tensor, op: str = "sum") -> Tensor:
        """Overwrite `x` with its reduction; one collective of x.size elements."""
        with self._guard(f"all_reduce({op})", x):
            dist.all_reduce(x, op=op, group=self.name)
        return x

    def all_reduce(self, x: Tensor, op: str = "sum") -> Tensor:
        """Return the reduction of `x`; one collective of x.size elements."""
        return self.all_reduce_(x.contiguous().copy(), op)

    def all_gather(self, x: Tensor, dim: int = 0) -> Tensor:
        """Return the members' tensors joined along `dim`."""
        return mint.cat(self._gather_list(x), dim)

    def broadcast_(self, x: Tensor, src: int = 0) -> Tensor:
        """Overwrite `x` with that of member `src`."""
        with self._guard(f"broadcast(src={self.ranks[src]})", x):
            dist.broadcast(x, self.ranks[src], group=self.name)
        return x

    def barrier(self) -> None:
        """Wait for every member."""
        with self._guard("barrier"):
            dist.barrier(group=self.name)

    def all_gather_object(self, value: Any) -> list[Any]:
        """Gather values as JSON."""
        return gather_objects(self, value)

    def _gather_list(self, x: Tensor) -> list[Tensor]:
        parts = [mint.empty(x.shape, dtype=x.dtype) for _ in range(self.size)]
        with self._guard("all_gather", x):
            dist.all_gather(parts, x.contiguous(), group=self.name)
        return parts

    @contextmanager
    def _guard(self, operation: str, x: Tensor | None = None) -> Iterator[None]:
        """Put a time limit on the block, and turn a backend's error into one that says what was being done."""
        what = f"{operation} in group {self.name} (global ranks {list(self.ranks)})"
        if x is not None:
            what += f" of {tuple(x.shape)} {x.dtype}"
        with self._watchdog.watch(what):
            try:
                yield
            except CommError:
                raise
            except (RuntimeError, ValueError, TypeError) as error:
                raise CommError(f"{what} failed on global rank {self.ranks[self.rank]}: {error}") from error


class _Deferred(Handle):
    """A receive that happens when it is waited for, after the earlier ones from the same peer."""

    def __init__(self, queue: deque[_Deferred], receive: Callable[[], Tensor]) -> None:
        self._queue, self._receive = queue, receive
        self._result: Tensor | None = None
        queue.append(self)

    def wait(self) -> Tensor | None:
        """Receive everything up to and including this message."""
        while self._result is None:
            first = self._queue.popleft()
            first._result = first._receive()
        return self._result


class McclGroup(MindSporeGroup):
    """A group of CPU ranks."""

    def __init__(self, name: str, ranks: Sequence[int], global_rank: int, watchdog: Watchdog) -> None:
        super().__init__(name, ranks, global_rank, watchdog)
        self._inboxes: dict[int, deque[_Deferred]] = defaultdict(deque)

    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        """All-reduce and keep this rank's part: MCCL has no reduce-scatter kernel."""
        n = _part(x, dim, self.size)
        return mint.narrow(self.all_reduce(x), dim, self.rank * n, n).contiguous()

    def all_to_all(self, x: Tensor, split_dim: int, concat_dim: int) -> Tensor:
        """All-gather and keep the parts meant for this rank: MCCL has no all-to-all kernel."""
        n = _part(x, split_dim, self.size)
        parts = [mint.narrow(part, split_dim, self.rank * n, n) for part in self._gather_list(x)]
        return mint.cat(parts, concat_dim)

    def all_to_all_rows(self, x: Tensor, counts: np.ndarray) -> Tensor:
        """Exchange parts that are padded to one length."""
        most = max(1, int(counts.max()))
        ends = [0, *np.cumsum(counts[self.rank]).tolist()]
        filler = mint.zeros((most, *x.shape[1:]), dtype=x.dtype)
        parts = [mint.cat((x[a:b], filler[: most - (b - a)]), 0) if b > a else filler for a, b in zip(ends, ends[1:])]
        padded = self.all_to_all(mint.cat(parts, 0), 0, 0)
        arrived = [padded[r * most : r * most + int(n)] for r, n in enumerate(counts[:, self.rank]) if n]
        return mint.cat(arrived, 0) if arrived else mint.zeros((0, *x.shape[1:]), dtype=x.dtype)

    def send(self, x: Tensor, dst: int) -> Handle:
        """Hand `x` to the transport, which keeps its own copy."""
        with self._guard(f"send(to={self.ranks[dst]})", x):
            dist.send(x.contiguous(), self.ranks[dst], group=self.name)
        return Done(None)

    def receive(self, shape: Sequence[int], dtype: Any, src: int) -> Handle:
        """Announce a message; the transfer happens at `wait()`."""

        def receive_now() -> Tensor:
            x = mint.empty(tuple(shape), dtype=dtype)
            with self._guard(f"recv(from={self.ranks[src]})", x):
                dist.recv(x, self.ranks[src], group=self.name)
            return x

        return _Deferred(self._inboxes[src], receive_now)


class _Running(Handle):
    """An asynchronous HCCL operation."""

    def __init__(self, work: Any, result: Tensor | None) -> None:
        self._work, self._result = work, result

    def wait(self) -> Tensor | None:
        """Make the compute stream wait for the operation."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._result


class HcclGroup(MindSporeGroup):
    """A group of Ascend ranks. Not verified: written against the MindSpore 2.10 documentation, never run."""

    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        """Reduce-scatter along `dim`, moved to the front for the collective."""
        _part(x, dim, self.size)
        front = x.swapaxes(0, dim).contiguous() if dim else x.contiguous()
        out = mint.empty((front.shape[0] // self.size, *front.shape[1:]), dtype=x.dtype)
        with self._guard("reduce_scatter", x):
            dist.reduce_scatter_tensor(out, front, group=self.name)
        return out.swapaxes(0, dim).contiguous() if dim else out

    def all_gather(self, x: Tensor, dim: int = 0) -> Tensor:
        """Gather into one tensor, whose parts are joined anew for another dim than the first."""
        out = mint.empty((x.shape[0] * self.size, *x.shape[1:]), dtype=x.dtype)
        with self._guard("all_gather", x):
            dist.all_gather_into_tensor(out, x.contiguous(), group=self.name)
        return mint.cat(mint.chunk(out, self.size, 0), dim) if dim else out

    def all_to_all(self, x: Tensor, split_dim: int, concat_dim: int) -> Tensor:
        """Exchange equal parts."""
        n = _part(x, split_dim, self.size)
        inputs = [mint.narrow(x, split_dim, i * n, n).contiguous() for i in range(self.size)]
        outputs = [mint.empty(inputs[0].shape, dtype=x.dtype) for _ in inputs]
        with self._guard("all_to_all", x):
            dist.all_to_all(outputs, inputs, group=self.name)
        return mint.cat(outputs, concat_dim)

    def all_to_all_rows(self, x: Tensor, counts: np.ndarray) -> Tensor:
        """Exchange parts of different lengths."""
        given, got = counts[self.rank].tolist(), counts[:, self.rank].tolist()
        out = mint.empty((sum(got), *x.shape[1:]), dtype=x.dtype)
        with self._guard("all_to_all_rows", x):
            dist.all_to_all_single(out, x.contiguous(), got, given, group=self.name)
        return out

    def send(self, x: Tensor, dst: int) -> Handle:
        """Start an asynchronous send."""
        with self._guard(f"send(to={self.ranks[dst]})", x):
            # The handle does not keep the tensor: MindSpore does, until the stream that sends it is done with it.
            return _Running(dist.isend(x.contiguous(), self.ranks[dst], group=self.name), None)

    def receive(self, shape: Sequence[int], dtype: Any, src: int) -> Handle:
        """Post an asynchronous receive."""
        x = mint.empty(tuple(shape), dtype=dtype)
        with self._guard(f"recv(from={self.ranks[src]})", x):
            return _Running(dist.irecv(x, self.ranks[src], group=self.name), x)

    def all_reduce_start_(self, x: Tensor) -> Handle:
        """Start an asynchronous all-reduce."""
        with self._guard("all_reduce(sum)", x):
            return _Running(dist.all_reduce(x, group=self.name, async_op=True), x)

    def reduce_scatter_start(self, x: Tensor, into: Tensor | None = None) -> Handle:
        """Start an asynchronous reduce-scatter along dim 0."""
        out = mint.empty((_part(x, 0, self.size), *x.shape[1:]), dtype=x.dtype) if into is None else into
        with self._guard("reduce_scatter", x):
            work = dist.reduce_scatter_tensor(out, x.contiguous(), group=self.name, async_op=True)
        return _Running(work, out if into is None else None)

    def all_gather_start(self, x: Tensor, into: Tensor | None = None) -> Handle:
        """Start an asynchronous all-gather along dim 0."""
        out = mint.empty((x.shape[0] * self.size, *x.shape[1:]), dtype=x.dtype) if into is None else into
        with self._guard("all_gather", x):
            work = dist.all_gather_into_tensor(out, x.contiguous(), group=self.name, async_op=True)
        return _Running(work, out if into is None else None)


def _part(x: Tensor, dim: int, size: int) -> int:
    """Return the length of one of `size` equal parts of `x` along `dim`."""
    length = x.shape[dim]
    if length % size:
        raise CommError(f"dim {dim} of a {tuple(x.shape)} tensor cannot be cut into {size} equal parts")
    return length // size


