"""Groups over shared memory, for ranks of one host: C++ collectives on anonymous memory that every member maps.

The memory is a memfd: it has no name, so a crash leaves nothing behind, and it is not limited by the size of /dev/shm.
Its creator tells the others (process, descriptor), and they open it through /proc.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
import os
import weakref
from collections import deque
from collections.abc import Sequence
from ctypes import c_double, c_int, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint

from parallel_core.comm.interface import Done, Group, Handle
from parallel_core.comm.meeting import Meeting
from parallel_core.comm.objects import gather_objects
from parallel_core.comm.passing import Passing
from parallel_core.errors import CommError
from parallel_core.ops import build

logger = logging.getLogger(__name__)

P, L, I = c_void_p, c_int64, c_int

_SIGNATURES: dict[str, tuple[list[Any], Any]] = {
    "pcs_segment_bytes": ([I], c_int64),
    "pcs_open": ([I, I, I, P, c_double], c_void_p),
    "pcs_close": ([P], None),
    "pcs_failure": ([P, P], None),
    "pcs_waited": ([P], c_double),
    "pcs_barrier": ([P, c_double], c_int),
    "pcs_all_reduce": ([P, P, L, I, I, I, c_double], c_int),
    "pcs_reduce_scatter": ([P, P, P, L, L, I, I, c_double], c_int),
    "pcs_all_gather": ([P, P, P, L, L, I, c_double], c_int),
    "pcs_all_to_all": ([P, P, P, L, L, L, L, I, c_double], c_int),
    "pcs_all_to_all_rows": ([P, P, P, P, P, L, I, c_double], c_int),
    "pcs_broadcast": ([P, P, L, I, I, c_double], c_int),
    "pcs_send": ([P, P, L, I, I, c_double], c_int),
    "pcs_receive": ([P, P, L, I, I, c_double], c_int),
}

_TIMEOUT, _DEAD, _MISMATCH = 1, 2, 3

# MindSpore dtype -> (code in shm_reduce.h, bytes of an element, NumPy dtype or None)
_DTYPES: dict[Any, tuple[int, int, Any]] = {
    ms.float32: (0, 4, np.float32),
    ms.float16: (1, 2, np.float16),
    ms.bfloat16: (2, 2, None),
    ms.int32: (3, 4, np.int32),
    ms.int64: (4, 8, np.int64),
    ms.uint8: (5, 1, np.uint8),
    ms.bool_: (5, 1, np.bool_),
    ms.float64: (6, 8, np.float64),
}
_DTYPE_NAMES = ("float32", "float16", "bfloat16", "int32", "int64", "uint8 or bool", "float64")
_OPS = {"sum": 0, "max": 1, "min": 2}
_KINDS = (
    "barrier",
    *(f"all_reduce({op})" for op in _OPS),
    "reduce_scatter",
    "all_gather",
    "all_to_all",
)

SPIN_S = 2e-4
"""How long a waiting rank keeps its core before it sleeps, when every rank has a core of its own."""
CROWDED_SPIN_S = 2e-5
"""The same when ranks share cores."""

_library: ctypes.CDLL | None = None


def library() -> ctypes.CDLL:
    """Return the compiled collectives.

    Raises:
        build.BuildError: if they cannot be built here.
    """
    global _library
    if _library is None:
        loaded = build.load()
        for name, (arguments, result) in _SIGNATURES.items():
            function = getattr(loaded, name)
            function.argtypes, function.restype = arguments, result
        _library = loaded
    return _library


@functools.cache
def _message_functions() -> tuple[int, int]:
    """Return the addresses of the functions that send and receive."""
    addresses = (ctypes.cast(getattr(build.load(), name), c_void_p).value for name in ("pcs_send", "pcs_receive"))
    send, receive = (address or 0 for address in addresses)
    return send, receive


class ShmGroup(Group):
    """A group of ranks of one host. Creating one (`share_memory`, `subgroup`) is collective over it."""

    def __init__(
        self,
        name: str,
        ranks: Sequence[int],
        global_rank: int,
        *,
        descriptor: int,
        pids: Sequence[int],
        timeout_s: float,
    ) -> None:
        super().__init__(name, ranks, global_rank)
        self.timeout_s = timeout_s
        self._pids = tuple(pids)
        self.library: Any = library()
        cores = len(os.sched_getaffinity(0))
        spin_s = SPIN_S if len(pids) <= cores else CROWDED_SPIN_S
        self.handle = self.library.pcs_open(
            descriptor, self.rank, self.size, (c_int32 * self.size)(*self._pids), spin_s
        )
        if not self.handle:
            raise CommError(f"group {name}: the shared memory cannot be mapped")
        # Also for a group that nobody closes: its mappings and process descriptors go with the last reference to it.
        self._release = weakref.finalize(self, self.library.pcs_close, self.handle)
        self._release.atexit = False
        self._inboxes: dict[int, deque[_Receive]] = {}

    @property
    def waited_s(self) -> float:
        """Seconds that this rank has spent waiting for the others in this group's operations."""
        return float(self.library.pcs_waited(self.handle))

    def close(self) -> None:
        """Unmap the memory and close the descriptors; every later operation raises a CommError.

        What this rank has sent and nobody has received yet is lost: end with a collective.
        """
        self._release()
        self.library = _Closed(self.name)

    # ---- creation ---------------------------------------------------------------------------------------------------
    def subgroup(self, name: str, ranks: Sequence[int]) -> ShmGroup:
        """Return a group of some of this group's ranks; collective over those only.

        Args:
            name: what messages call it.
            ranks: global ranks; this rank is among them.
        """
        places = [self.ranks.index(rank) for rank in ranks]
        first = places[0]
        if self.rank == first:
            descriptor = new_segment(len(ranks))
            for place in places[1:]:
                self._send_numbers(np.array([os.getpid(), descriptor], np.int64), place)
        else:
            pid, number = self._receive_numbers(2, first).tolist()
            descriptor = open_segment(pid, number)
        pids = [self._pids[place] for place in places]
        own = self.ranks[self.rank]
        group = ShmGroup(name, ranks, own, descriptor=descriptor, pids=pids, timeout_s=self.timeout_s)
        group.barrier()  # all have opened it: the creator's descriptor may go
        os.close(descriptor)
        return group

    def _send_numbers(self, numbers: np.ndarray, dst: int) -> None:
        status = self.library.pcs_send(self.handle, numbers.ctypes.data, numbers.nbytes, 4, dst, self.timeout_s)
        self._check(status, "send of numbers", "")

    def _receive_numbers(self, count: int, src: int) -> np.ndarray:
        numbers = np.empty(count, np.int64)
        status = self.library.pcs_receive(self.handle, numbers.ctypes.data, numbers.nbytes, 4, src, self.timeout_s)
        self._check(status, "receive of numbers", "")
        return numbers

    # ---- collectives ------------------------------------------------------------------------------------------------
    def all_reduce_(self, x: Tensor, op: str = "sum") -> Tensor:
        """Overwrite the contiguous `x` with its reduction."""
        code, item, _ = _dtype(x)
        if op not in _OPS:
            raise CommError(f"all_reduce({op}) does not exist; use one of {', '.join(_OPS)}")
        if not x.is_contiguous():
            raise CommError(f"all_reduce_ of a non-contiguous {tuple(x.shape)} view; use all_reduce")
        status = self.library.pcs_all_reduce(
            self.handle, x.data_ptr(), x.size * item, code, item, _OPS[op], self.timeout_s
        )
        if status:
            self._check(status, f"all_reduce({op})", x)
        return x

    def all_reduce(self, x: Tensor, op: str = "sum") -> Tensor:
        """Return the reduction of `x`."""
        return self.all_reduce_(_copy(x), op)

    def all_gather(self, x: Tensor, dim: int = 0) -> Tensor:
        """Return the members' tensors joined along `dim`."""
        x = x.contiguous()
        code, item, _ = _dtype(x)
        shape = list(x.shape)
        outer, length = math.prod(shape[:dim]), math.prod(shape[dim:]) * item
        shape[dim] *= self.size
        out = _empty(shape, x.dtype)
        status = self.library.pcs_all_gather(
            self.handle, x.data_ptr(), out.data_ptr(), outer, length, code, self.timeout_s
        )
        if status:
            self._check(status, "all_gather", x)
        return out

    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        """Return this rank's part of the sum."""
        x = x.contiguous()
        code, item, _ = _dtype(x)
        shape = self._cut(x, dim)
        outer, length = math.prod(shape[:dim]), math.prod(shape[dim:]) * item
        out = _empty(shape, x.dtype)
        status = self.library.pcs_reduce_scatter(
            self.handle, x.data_ptr(), out.data_ptr(), outer, length, code, item, self.timeout_s
        )
        if status:
            self._check(status, "reduce_scatter", x)
        return out

    def all_to_all(self, x: Tensor, split_dim: int, concat_dim: int) -> Tensor:
        """Exchange equal parts."""
        x = x.contiguous()
        code, item, _ = _dtype(x)
        part = self._cut(x, split_dim)
        shape = list(part)
        shape[concat_dim] *= self.size
        out = _empty(shape, x.dtype)
        status = self.library.pcs_all_to_all(
            self.handle,
            x.data_ptr(),
            out.data_ptr(),
            math.prod(part[:split_dim]),
            math.prod(part[split_dim:]) * item,
            math.prod(part[:concat_dim]),
            math.prod(part[concat_dim:]) * item,
            code,
            self.timeout_s,
        )
        if status:
            self._check(status, "all_to_all", x)
        return out

    def all_to_all_rows(self, x: Tensor, counts: np.ndarray) -> Tensor:
        """Exchange parts of different lengths."""
        x = x.contiguous()
        code, item, _ = _dtype(x)
        row = math.prod(x.shape[1:]) * item
        given, got = (np.ascontiguousarray(part * row, np.int64) for part in (counts[self.rank], counts[:, self.rank]))
        if given.sum() != x.size * item:
            raise CommError(f"all_to_all_rows of {tuple(x.shape)}: the counts name {int(counts[self.rank].sum())} rows")
        out = _empty((int(counts[:, self.rank].sum()), *x.shape[1:]), x.dtype)
        status = self.library.pcs_all_to_all_rows(
            self.handle,
            x.data_ptr(),
            out.data_ptr(),
            given.ctypes.data,
            got.ctypes.data,
            int(counts.max()) * row,
            code,
            self.timeout_s,
        )
        if status:
            self._check(status, "all_to_all_rows", x)
        return out

    def broadcast_(self, x: Tensor, src: int = 0) -> Tensor:
        """Overwrite the contiguous `x` with that of member `src`."""
        code, item, _ = _dtype(x)
        if not x.is_contiguous():
            raise CommError(f"broadcast_ of a non-contiguous {tuple(x.shape)} view; pass x.contiguous()")
        status = self.library.pcs_broadcast(self.handle, x.data_ptr(), x.size * item, code, src, self.timeout_s)
        if status:
            self._check(status, f"broadcast(src={self.ranks[src]})", x)
        return x

    def barrier(self) -> None:
        """Wait for every member."""
        status = self.library.pcs_barrier(self.handle, self.timeout_s)
        if status:
            self._check(status, "barrier", "")

    def all_gather_object(self, value: Any) -> list[Any]:
        """Gather values as JSON."""
        return gather_objects(self, value)

    # ---- messages ---------------------------------------------------------------------------------------------------
    def send(self, x: Tensor, dst: int) -> Handle:
        """Copy `x` into memory that rank `dst` reads, and return."""
        x = x.contiguous()
        code, item, _ = _dtype(x)
        status = self.library.pcs_send(self.handle, x.data_ptr(), x.size * item, code, dst, self.timeout_s)
        if status:
            self._check(status, f"send(to={self.ranks[dst]})", x)
        return Done(None)

    def receive(self, shape: Sequence[int], dtype: Any, src: int) -> Handle:
        """Announce a message; it is copied at `wait()`, after the earlier ones from the same rank."""
        return _Receive(self, tuple(shape), dtype, src, self._inboxes.setdefault(src, deque()))

    def receive_now(self, shape: Sequence[int], dtype: Any, src: int) -> Tensor:
        """Return the next message from `src`."""
        out = _empty(shape, dtype)
        code, item, _ = _dtype(out)
        status = self.library.pcs_receive(self.handle, out.data_ptr(), out.size * item, code, src, self.timeout_s)
        if status:
            self._check(status, f"receive(from={self.ranks[src]})", out)
        return out

    def passing(self) -> Passing | None:
        """Return the functions of messages, unless somebody watches them."""
        if getattr(self.library, "watches", False):
            return None
        return Passing(self.handle, *_message_functions(), _DTYPES[ms.float32][0], self.timeout_s, self._check_passing)

    def _check_passing(self, status: int, x: Tensor) -> None:
        self._check(status, "receive in a ring", x)

    # ---- errors -----------------------------------------------------------------------------------------------------
    def _cut(self, x: Tensor, dim: int) -> list[int]:
        shape = list(x.shape)
        if shape[dim] % self.size:
            raise CommError(f"dim {dim} of a {tuple(shape)} tensor cannot be cut into {self.size} equal parts")
        shape[dim] //= self.size
        return shape

    def _check(self, status: int, operation: str, x: Tensor | str) -> None:
        """Raise what a call that returned `status` means."""
        if not status:
            return
        details = (c_int64 * 3)()
        self.library.pcs_failure(self.handle, details)
        what = f"{operation} in group {self.name} (global ranks {list(self.ranks)})"
        if isinstance(x, Tensor):
            what += f" of {tuple(x.shape)} {x.dtype}"
        me, peer = self.ranks[self.rank], self.ranks[details[0]] if details[0] >= 0 else "?"
        if status == _TIMEOUT:
            limit = f"{self.timeout_s:g} s (--distributed-timeout-minutes)"
            why = f"did not complete within {limit}, waiting for rank {peer}"
        elif status == _DEAD:
            why = f"failed: global rank {peer} has ended"
        elif status == _MISMATCH:
            why = f"does not fit what global rank {peer} does: {_describe(operation, details[1], details[2])}"
        else:
            why = f"failed: {os.strerror(details[1]) if details[1] else 'system error'}"
        raise CommError(f"{what} {why} (seen on global rank {me})")


def _describe(operation: str, first: int, second: int) -> str:
    """Return the other side's operation, from its tag or from a message's size and dtype."""
    if operation.startswith("receive"):
        return f"a message of {first} bytes of {_DTYPE_NAMES[second]}"
    kind = first >> 56
    name = _KINDS[kind] if kind < len(_KINDS) else f"broadcast(src={kind - len(_KINDS)} in the group)"
    return f"{name} of {first & ((1 << 48) - 1)} bytes of {_DTYPE_NAMES[first >> 48 & 255]}"


class _Closed:
    """Stands in for the library of a closed group: its memory is gone, and to touch it would end the process."""

    watches = True

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, operation: str) -> Any:
        raise CommError(f"group {self._name} has been closed: {operation.removeprefix('pcs_')} is not possible")


class _Receive(Handle):
    """An announced message."""

    def __init__(
        self, group: ShmGroup, shape: tuple[int, ...], dtype: Any, src: int, queue: deque[_Receive]
    ) -> None:
        self._group, self._shape, self._dtype, self._src, self._queue = group, shape, dtype, src, queue
        self._result: Tensor | None = None
        queue.append(self)

    def wait(self) -> Tensor | None:
        """Receive everything up to and including this message."""
        while self._result is None:
            first = self._queue.popleft()
            first._result = self._group.receive_now(first._shape, first._dtype, first._src)
        return self._result


def _dtype(x: Tensor) -> tuple[int, int, Any]:
    known = _DTYPES.get(x.dtype)
    if known is None:
        raise CommError(f"shared memory does not carry {x.dtype}; cast to one of {', '.join(_DTYPE_NAMES)}")
    return known


def _empty(shape: Sequence[int], dtype: Any) -> Tensor:
    kind = _DTYPES[dtype][2] if dtype in _DTYPES else None
    return mint.empty(tuple(shape), dtype=dtype) if kind is None else Tensor.from_numpy(np.empty(shape, kind))


def _copy(x: Tensor) -> Tensor:
    x = x.contiguous()
    _, item, _ = _dtype(x)
    out = _empty(x.shape, x.dtype)
    ctypes.memmove(out.data_ptr(), x.data_ptr(), x.size * item)
    return out


def new_segment(size: int) -> int:
    """Return the descriptor of fresh memory for a group of `size` ranks."""
    descriptor = os.memfd_create("parallel_core-group", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, library().pcs_segment_bytes(size))
    return descriptor


def open_segment(pid: int, descriptor: int) -> int:
    """Return a descriptor of the memory that process `pid` holds as `descriptor`."""
    return os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)


@dataclass(frozen=True)
class SharedMemory:
    """Where ranks share memory; all but `group` is the same on every rank.

    Attributes:
        group: the ranks of this host, where there are several and it works.
        sizes: ranks of each host, or of each container on one.
        problem: why it does not work on some host; empty.
    """

    group: ShmGroup | None
    sizes: tuple[int, ...]
    problem: str


def share_memory(world: Group | Meeting, timeout_s: float) -> SharedMemory:
    """Find out which ranks share a host, and join those of this one over shared memory.

    Args:
        world: all ranks, over a backend that works already, or as they meet; collective over it.
        timeout_s: time limit of every operation.
    """
    facts = world.all_gather_object(_facts())
    hosts: dict[str, list[int]] = {}
    for place, fact in enumerate(facts):
        hosts.setdefault(fact["host"], []).append(place)
    places = hosts[facts[world.rank]["host"]]
    leader, problem = places[0], next(filter(None, (facts[place]["problem"] for place in places)), "")
    works, group = not problem and len(places) > 1, None
    descriptor = new_segment(len(places)) if works and world.rank == leader else -1
    descriptors = world.all_gather_object(descriptor)
    if works:
        try:
            if world.rank != leader:
                descriptor = open_segment(facts[leader]["pid"], descriptors[leader])
            name, pids = "world" if len(hosts) == 1 else "host", [facts[place]["pid"] for place in places]
            ranks, own = [world.ranks[place] for place in places], world.ranks[world.rank]
            group = ShmGroup(name, ranks, own, descriptor=descriptor, pids=pids, timeout_s=timeout_s)
        except (OSError, CommError) as error:
            problem = f"rank {world.ranks[world.rank]} cannot map the memory of rank {world.ranks[leader]}: {error}"
    problems = world.all_gather_object(problem)
    if descriptor >= 0:
        os.close(descriptor)
    if group is not None and any(problems[place] for place in places):
        group.close()
        group = None
    return SharedMemory(group, tuple(map(len, hosts.values())), next(filter(None, problems), ""))


def _facts() -> dict[str, Any]:
    """Return what must agree between ranks that share memory, and why this one could not."""
    problem = ""
    try:
        library()
    except build.BuildError as error:
        problem = str(error)
    if not hasattr(os, "memfd_create"):
        problem = "this system has no memfd_create"
    if not problem and not ms.get_context("pynative_synchronize"):
        problem = "shared memory needs set_context(pynative_synchronize=True)"
    host = []
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        try:
            host.append(os.readlink(path) if path.endswith("pid") else Path(path).read_text().strip())
        except OSError as error:
            problem = problem or f"{path} cannot be read: {error}"
    return {"host": " ".join(host), "pid": os.getpid(), "problem": problem}
