"""What the rest of the program needs from communication: a `Group` of ranks, and handles of transfers under way.

A name that ends in `_` overwrites its argument; all others leave their arguments alone. Ranks in arguments are
positions in the group (0..size-1), never global ranks. All members call the same operations in the same order.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from parallel_core.errors import CommError

if TYPE_CHECKING:
    from mindspore import Tensor

    from parallel_core.comm.passing import Passing


class Handle(abc.ABC):
    """A transfer under way."""

    @abc.abstractmethod
    def wait(self) -> Tensor | None:
        """Return the received or reduced tensor once it is complete; the same one at every call."""


class Done(Handle):
    """A transfer that was complete when it was issued."""

    def __init__(self, result: Tensor | None) -> None:
        self._result = result

    def wait(self) -> Tensor | None:
        """Return the result."""
        return self._result


class _Shift(Handle):
    """A tensor on its way to the next rank, and one on its way here."""

    def __init__(self, sent: Handle, received: Handle) -> None:
        self._sent, self._received = sent, received

    def wait(self) -> Tensor | None:
        """Return what arrived, once what was sent may be changed."""
        self._sent.wait()
        return self._received.wait()


class Group(abc.ABC):
    """Ranks that communicate with one another."""

    def __init__(self, name: str, ranks: Sequence[int], global_rank: int) -> None:
        self.name = name
        self.ranks = tuple(ranks)
        self.size = len(self.ranks)
        self.rank = self.ranks.index(global_rank)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name}, ranks={list(self.ranks)}, rank={self.rank})"

    @abc.abstractmethod
    def all_reduce_(self, x: Tensor, op: str = "sum") -> Tensor:
        """Overwrite `x` with the reduction (sum, max or min) over the group, and return it."""

    @abc.abstractmethod
    def all_reduce(self, x: Tensor, op: str = "sum") -> Tensor:
        """Return the reduction (sum, max or min) of `x` over the group."""

    @abc.abstractmethod
    def all_gather(self, x: Tensor, dim: int = 0) -> Tensor:
        """Return the members' tensors joined along `dim` in rank order: [.., n, ..] -> [.., n * size, ..]."""

    @abc.abstractmethod
    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        """Return this rank's part of the sum, cut along `dim`: [.., n, ..] -> [.., n / size, ..]."""

    @abc.abstractmethod
    def all_to_all(self, x: Tensor, split_dim: int, concat_dim: int) -> Tensor:
        """Cut `x` along `split_dim`, send part i to rank i, and join what arrives along `concat_dim`."""

    @abc.abstractmethod
    def all_to_all_rows(self, x: Tensor, counts: np.ndarray) -> Tensor:
        """Send the rows of `x` [N, ..] to rank 0, 1, ..., and return those that arrive, rank 0's first.

        `counts`, int64 [size, size] and the same on every member: counts[r, s] rows go from rank r to rank s.
        """

    @abc.abstractmethod
    def broadcast_(self, x: Tensor, src: int = 0) -> Tensor:
        """Overwrite `x` with the tensor of rank `src`, and return it."""

    @abc.abstractmethod
    def send(self, x: Tensor, dst: int) -> Handle:
        """Start sending `x` to rank `dst`; it arrives there in the order of the sends from this rank."""

    @abc.abstractmethod
    def receive(self, shape: Sequence[int], dtype: Any, src: int) -> Handle:
        """Announce the next tensor from rank `src`; `wait()` returns it."""

    def shift_start(self, x: Tensor) -> Handle:
        """Start sending `x` to the next rank of the group, the first after the last; the handle gives what arrives.

        Every member calls it, with tensors of one shape and dtype.
        """
        sent = self.send(x, (self.rank + 1) % self.size)
        return _Shift(sent, self.receive(x.shape, x.dtype, (self.rank - 1) % self.size))

    def passing(self) -> Passing | None:
        """Return what compiled code does `shift_start` with; None: it cannot, or somebody watches what is sent."""
        return None

    @abc.abstractmethod
    def barrier(self) -> None:
        """Return once every member has called it."""

    @abc.abstractmethod
    def all_gather_object(self, value: Any) -> list[Any]:
        """Return the members' values in rank order; they are what JSON can hold, and tuples arrive as lists."""

    def broadcast_object(self, value: Any, src: int = 0) -> Any:
        """Return rank `src`'s value; it is what JSON can hold."""
        return self.all_gather_object(value if self.rank == src else None)[src]

    def close(self) -> None:
        """Give back what the group holds of the system; no operation works afterwards."""
        return

    # Issued early, waited for late: flat buckets, and sums of layers. Backends without overlap run them at once.
    # `into` is memory where the result belongs, of which the argument may be a part: a device's backend puts it there,
    # and the handle gives None.
    def all_reduce_start_(self, x: Tensor) -> Handle:
        """Start overwriting the contiguous `x` with its sum over the group."""
        return Done(self.all_reduce_(x))

    def reduce_scatter_start(self, x: Tensor, into: Tensor | None = None) -> Handle:  # noqa: ARG002 - of the host
        """Start reducing `x`; the handle gives this rank's part of the sum, cut along dim 0."""
        return Done(self.reduce_scatter(x))

    def all_gather_start(self, x: Tensor, into: Tensor | None = None) -> Handle:  # noqa: ARG002 - of the host
        """Start gathering; the handle gives the members' tensors joined along dim 0 in rank order."""
        return Done(self.all_gather(x))


class SoloGroup(Group):
    """A group of one: every operation is the identity and costs nothing."""

    def __init__(self, name: str = "solo", global_rank: int = 0) -> None:
        super().__init__(name, [global_rank], global_rank)

    def all_reduce_(self, x: Tensor, op: str = "sum") -> Tensor:
        """Return `x`."""
        return x

    def all_reduce(self, x: Tensor, op: str = "sum") -> Tensor:
        """Return `x`."""
        return x

    def all_gather(self, x: Tensor, dim: int = 0) -> Tensor:
        """Return `x`."""
        return x

    def reduce_scatter(self, x: Tensor, dim: int = 0) -> Tensor:
        """Return `x`."""
        return x

    def all_to_all(self, x: Tensor, split_dim: int, concat_dim: int) -> Tensor:
        """Return `x`."""
        return x

    def all_to_all_rows(self, x: Tensor, counts: np.ndarray) -> Tensor:
        """Return `x`."""
        return x

    def broadcast_(self, x: Tensor, src: int = 0) -> Tensor:
        """Return `x`."""
        return x

    def send(self, x: Tensor, dst: int) -> Handle:
        """Raise: a group of one has nobody to send to."""
        raise CommError(f"group {self.name} has one rank; there is no rank {dst} to send to")

    def receive(self, shape: Sequence[int], dtype: Any, src: int) -> Handle:
        """Raise: a group of one has nobody to receive from."""
        raise CommError(f"group {self.name} has one rank; there is no rank {src} to receive from")

    def barrier(self) -> None:
        """Return at once."""

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return [value]."""
        return [value]
