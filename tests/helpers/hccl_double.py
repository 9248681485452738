"""HCCL on a machine without an NPU: `mint.distributed` as MindSpore documents it, over groups of CPU ranks.

Every call has to fit the signature of MindSpore's own function and what its page says of types and shapes. Results are
written where the caller wants them; those of an asynchronous call are not there before `wait`, and NaN is.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import mindspore as ms
import mindspore.mint.distributed as real
import numpy as np
from mindspore import Tensor

from parallel_core.comm import mindspore_comm
from parallel_core.comm.interface import Group
from tests.helpers.ascend_double import DeviceMemory, memory_of

TYPES = ms.int8, ms.int32, ms.int64, ms.float16, ms.bfloat16, ms.float32


class Work:
    """A CommHandle: `wait` makes the result visible."""

    def __init__(self, finish: Callable[[], None]) -> None:
        self._finish: Callable[[], None] | None = finish

    def wait(self) -> None:
        if self._finish is not None:
            self._finish()
            self._finish = None


class Hccl:
    """Stands for `mindspore.mint.distributed`, and for `communication.create_group`.

    Args:
        make: gives this rank's CPU group of some ranks; collective over them.
        world: name and ranks of the group that is always there.
    """

    def __init__(self, make: Callable[[Sequence[int]], Group], world: tuple[str, Sequence[int]]) -> None:
        self._make, self._groups, self.calls = make, {world[0]: make(world[1])}, Counter[str]()
        self.kept: list[Work] = []
        """Asynchronous work, so that a test may ask whether all was waited for."""

    def create_group(self, name: str, ranks: list[int]) -> None:
        """`communication.create_group`: HCCL takes names of fewer than 128 bytes, and each once."""
        assert len(name.encode()) < 128 and name not in self._groups and ranks == sorted(set(ranks))
        self._groups[name] = self._make(ranks)

    @property
    def unfinished(self) -> int:
        """Asynchronous calls that nobody has waited for."""
        return sum(work._finish is not None for work in self.kept)

    def _group(self, name: str, *args: Any, **kwargs: Any) -> Group:
        inspect.signature(getattr(real, name)).bind(*args, **kwargs)
        self.calls[name] += 1
        group = self._groups[kwargs["group"]]
        assert group.size > 1
        return group

    def _later(self, into: Any, values: Callable[[], np.ndarray], async_op: bool) -> Work | None:
        memory = memory_of(into)
        if not async_op:
            memory[...] = values()
            return None
        found = values  # a receive waits for its sender at the end
        if memory.dtype.kind == "f":
            memory[...] = np.nan

        def finish(tensor: Any = into) -> None:  # which keeps the memory
            memory[...] = found()

        self.kept.append(Work(finish))
        return self.kept[-1]

    def all_reduce(self, tensor: Any, op: str = "sum", group: Any = None, async_op: bool = False) -> Work | None:
        g = self._group("all_reduce", tensor, op=op, group=group, async_op=async_op)
        assert op in ("sum", "max", "min", "prod") and tensor.dtype in TYPES
        result = g.all_reduce(_copy(tensor), op).asnumpy()
        return self._later(tensor, lambda: result, async_op)

    def broadcast(self, tensor: Any, src: int, group: Any = None, async_op: bool = False) -> Work | None:
        g = self._group("broadcast", tensor, src, group=group, async_op=async_op)
        result = g.broadcast_(_copy(tensor), g.ranks.index(src)).asnumpy()
        return self._later(tensor, lambda: result, async_op)

    def barrier(self, group: Any = None) -> None:
        self._group("barrier", group=group).barrier()

    def all_gather_into_tensor(
        self, output_tensor: Any, input_tensor: Any, group: Any = None, async_op: bool = False
    ) -> Work | None:
        g = self._group("all_gather_into_tensor", output_tensor, input_tensor, group=group, async_op=async_op)
        assert output_tensor.dtype == input_tensor.dtype and input_tensor.dtype in TYPES
        assert output_tensor.shape == (g.size * input_tensor.shape[0], *input_tensor.shape[1:])
        result = g.all_gather(_copy(input_tensor), 0).asnumpy()
        return self._later(output_tensor, lambda: result, async_op)

    def reduce_scatter_tensor(
        self, output: Any, input: Any, op: str = "sum", group: Any = None, async_op: bool = False
    ) -> Work | None:
        g = self._group("reduce_scatter_tensor", output, input, op=op, group=group, async_op=async_op)
        assert output.dtype == input.dtype and input.dtype in TYPES and op == "sum"
        assert input.shape == (g.size * output.shape[0], *output.shape[1:])
        result = g.reduce_scatter(_copy(input), 0).asnumpy()
        return self._later(output, lambda: result, async_op)

    def all_to_all(
        self, output_tensor_list: list[Any], input_tensor_list: list[Any], group: Any = None, async_op: bool = False
    ) -> Work | None:
        g = self._group("all_to_all", output_tensor_list, input_tensor_list, group=group, async_op=async_op)
        assert len(output_tensor_list) == len(input_tensor_list) == g.size and not async_op
        every = [*output_tensor_list, *input_tensor_list]
        assert len({str(x.dtype) for x in every}) == len({x.shape for x in every}) == 1
        sent = Tensor(np.stack([memory_of(x) for x in input_tensor_list]))
        for into, part in zip(output_tensor_list, g.all_to_all(sent, 0, 0).asnumpy()):
            memory_of(into)[...] = part
        return None

    def all_to_all_single(
        self, output: Any, input: Any, output_split_sizes: Any = None, input_split_sizes: Any = None,
        group: Any = None, async_op: bool = False,
    ) -> Work | None:  # fmt: skip
        g = self._group("all_to_all_single", output, input, output_split_sizes, input_split_sizes, group=group,
                        async_op=async_op)  # fmt: skip
        given, got = list(input_split_sizes), list(output_split_sizes)
        assert all(type(n) is int for n in (*given, *got)) and output.dtype == input.dtype
        assert (sum(given), sum(got)) == (input.shape[0], output.shape[0]) and output.shape[1:] == input.shape[1:]
        counts = g.all_gather(Tensor(np.array([given], np.int32)), 0).asnumpy().astype(np.int64)
        assert counts[:, g.rank].tolist() == got
        result = g.all_to_all_rows(_copy(input), counts).asnumpy()
        return self._later(output, lambda: result, async_op)

    def isend(self, tensor: Any, dst: int = 0, group: Any = None) -> Work:
        """To a global rank."""
        g = self._group("isend", tensor, dst, group=group)
        assert dst in g.ranks and dst != g.ranks[g.rank]
        handle = g.send(_copy(tensor), g.ranks.index(dst))
        self.kept.append(Work(lambda: handle.wait() and None))
        return self.kept[-1]

    def irecv(self, tensor: Any, src: int = 0, group: Any = None) -> Work:
        """From a global rank."""
        g = self._group("irecv", tensor, src, group=group)
        handle = g.receive(tensor.shape, tensor.dtype, g.ranks.index(src))
        return self._later(tensor, lambda: handle.wait().asnumpy(), True)  # type: ignore[return-value,union-attr]


def _copy(x: Tensor | DeviceMemory) -> Tensor:
    return Tensor(memory_of(x).copy())


@contextmanager
def over_hccl(make: Callable[[Sequence[int]], Group], world_size: int) -> Iterator[Hccl]:
    """Let groups that are made as on Ascend use the double; gives it."""
    hccl = Hccl(make, (mindspore_comm.WORLD, range(world_size)))
    with (
        mock.patch.object(mindspore_comm, "dist", hccl),
        mock.patch.object(mindspore_comm.communication, "create_group", hccl.create_group),
    ):
        yield hccl
