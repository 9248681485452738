"""Gradients that are added in the order of the microbatches of the whole batch, whichever ranks compute them.

A sum of floating-point numbers depends on its order. Where each rank adds up its own microbatches first, the order
follows the layout; here (`--deterministic-mode`) every microbatch's gradient is computed alone and added to the sum of
all those before it, rank after rank, so that any number of data parallel ranks and of pipeline stages gives the same
bits. It costs an exchange for every microbatch in place of one for every iteration.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import mindspore as ms
from mindspore import Tensor

from parallel_core.comm.interface import Done, Group
from parallel_core.layout.shard import shard_of
from parallel_core.optimizer import flat
from parallel_core.optimizer.flat import Flat
from parallel_core.optimizer.grad_buffer import ParamAndGradBuffer

if TYPE_CHECKING:
    from parallel_core.config.schema import TrainingConfig


class AsTheyCome:
    """Gradients that every rank sums in its own order."""

    overlaps = True
    """Whether a bucket may be reduced as soon as a rank's last backward pass has given its gradients."""

    def start_iteration(self) -> None:
        """Forget the last iteration."""

    def end_microbatch(self, chunk: int) -> None:
        """Take what one microbatch has left in the buffers of `chunk`."""

    def finish(self, num_microbatches: int) -> None:
        """Complete the gradients, before what else is done to them.

        Args:
            num_microbatches: of this rank.
        """

    def loss_scale(self, scale: float, num_microbatches: int) -> float:  # noqa: ARG002
        """Return the factor of a mean over a rank's microbatches that gives gradients the loss scale."""
        return scale

    def squares(self, otherwise: Callable[[], Any], coordinates: Mapping[str, int]) -> Any:  # noqa: ARG002
        """Return this rank's share of the squared gradient norm, a number or several.

        Args:
            otherwise: returns it where no order is kept.
            coordinates: see `TensorShard.is_first_copy`.
        """
        return otherwise()

    def told(self) -> list[str]:
        """Return lines for the log at the end of a run."""
        return []


def order_of(
    buffers_of_chunk: Sequence[Sequence[ParamAndGradBuffer]], config: TrainingConfig, group: Group
) -> AsTheyCome:
    """Return how a rank's gradients are summed.

    Args:
        buffers_of_chunk: the buffers of each model chunk.
        config: whether they are summed in order, and averaged over microbatches.
        group: ranks over which they are averaged.
    """
    if not config.deterministic_mode:
        return AsTheyCome()
    return InOrder(buffers_of_chunk, 0 if config.calculate_per_token_loss else group.size)


class InOrder(AsTheyCome):
    """Sums the gradients of a rank's buffers microbatch by microbatch.

    Args:
        buffers_of_chunk: the buffers of each model chunk.
        divisor: ranks over which gradients are averaged; 0: they are only summed, as for losses per token.
    """

    overlaps = False

    def __init__(self, buffers_of_chunk: Sequence[Sequence[ParamAndGradBuffer]], divisor: int) -> None:
        self._buffers = [[_Buffer(buffer) for buffer in buffers] for buffers in buffers_of_chunk]
        self._divisor = divisor
        self._seconds, self._all_seconds, self._iterations, self._began = 0.0, 0.0, 0, 0.0

    def start_iteration(self) -> None:
        """Forget the last iteration's sums."""
        self._began = time.perf_counter()
        for buffers in self._buffers:
            for buffer in buffers:
                buffer.start_iteration()

    def end_microbatch(self, chunk: int) -> None:
        """Add these gradients of every data parallel rank, in order."""
        start = time.perf_counter()
        for buffer in self._buffers[chunk]:
            buffer.add()
        self._seconds += time.perf_counter() - start

    def finish(self, num_microbatches: int) -> None:
        """Leave the complete gradients in every buffer; those of a mean are divided by the number of microbatches."""
        # One division by a number that no layout changes.
        factor = 1.0 / (self._divisor * num_microbatches) if self._divisor else 1.0
        start = time.perf_counter()
        for buffers in self._buffers:
            for buffer in buffers:
                buffer.finish(factor)
        end = time.perf_counter()
        self._seconds += end - start
        self._all_seconds += end - self._began
        self._iterations += 1

    def loss_scale(self, scale: float, num_microbatches: int) -> float:
        """Return a factor that cancels the mean over this rank's microbatches: `finish` divides, once."""
        return scale * num_microbatches if self._divisor else scale

    def squares(self, otherwise: Callable[[], Any], coordinates: Mapping[str, int]) -> list[float]:  # noqa: ARG002
        """Return the sum of squares of each gradient that this rank counts; over all ranks, each counts once."""
        return [
            float(one.buffer.main_grads[i].flat.sum_of_squares())
            for buffers in self._buffers
            for one in buffers
            for i, parameter in enumerate(one.buffer.parameters)
            if one.buffer.group.rank == 0 and shard_of(parameter).is_first_copy(coordinates)
        ]

    def told(self) -> list[str]:
        """Return what the order has cost so far."""
        count = max(1, self._iterations)
        held = sum(one.bytes() for buffers in self._buffers for one in buffers)
        return [
            f"Deterministic mode: sums in the order of microbatches took {1e3 * self._seconds / count:.1f} ms of an "
            f"iteration's {1e3 * self._all_seconds / count:.1f} ms of gradients, waits for other ranks among them, and "
            f"hold {held / 2**20:.1f} MiB on this rank"
        ]


class _Buffer:
    """One buffer: a sum for each of its buckets, and one for each tied weight's part that stands apart."""

    def __init__(self, buffer: ParamAndGradBuffer) -> None:
        self.buffer = buffer
        self._sums = [
            _Sum(buffer.grads.part(bucket.start, bucket.end), bucket.end - bucket.start, buffer.group)
            for bucket in buffer.layout.buckets
        ]
        self._apart: dict[int, _Sum] = {}
        self._seen: set[int] = set()
        for main_grad in buffer.main_grads.values():
            main_grad.keep_apart(buffer.group.size)

    def start_iteration(self) -> None:
        self._seen.clear()
        for one in (*self._sums, *self._apart.values()):
            one.begun = False

    def add(self) -> None:
        for i, main_grad in self.buffer.main_grads.items():
            if main_grad.begun:
                self._seen.add(i)
            else:  # this microbatch says nothing of it, and the last one's is still there
                main_grad.flat.scale_(0.0)
            main_grad.begun = False
        for one in self._sums:
            one.add()
        for i, main_grad in self.buffer.main_grads.items():
            if main_grad.apart is not None and main_grad.apart_begun:
                if i not in self._apart:
                    self._apart[i] = _Sum(main_grad.apart, main_grad.apart_numel, self.buffer.group)
                self._apart[i].add()
                main_grad.apart_begun = False

    def finish(self, factor: float) -> None:
        for bucket, one in zip(self.buffer.layout.buckets, self._sums):
            if one.begun:
                self.buffer.grads.part(bucket.start, bucket.end).write_(one.whole(factor))
        for i, one in self._apart.items():
            if one.begun:  # divided and rounded first and added then, as the ends of a pipeline do
                into = self.buffer.main_grads[i].flat
                into.add_(one.whole(factor)[: self.buffer.parameters[i].size].astype(into.tensor().dtype))
        for i, main_grad in self.buffer.main_grads.items():
            main_grad.begun = i in self._seen
        for number, where in enumerate(self.buffer.layout.buckets):
            self.buffer.running[number] = Done(self.buffer.grads.part(*self.buffer.owned(where)).tensor())

    def bytes(self) -> int:
        return 4 * sum(one.length for one in (*self._sums, *self._apart.values()))


class _Sum:
    """The sum of what stands in `source` at the end of each microbatch on each rank; a rank keeps its part of it."""

    def __init__(self, source: Flat, numel: int, group: Group) -> None:
        self._source, self._group, self.length = source, group, numel // group.size
        self._total = flat.zeros(self.length, "float32")
        self.begun = False

    def add(self) -> None:
        found = self._source.tensor()
        if self._group.size > 1:
            found = self._group.all_to_all(found, 0, 0)
        if found.dtype != ms.float32:
            found = found.astype(ms.float32)
        for rank in range(self._group.size):
            part = found[rank * self.length : (rank + 1) * self.length] if self._group.size > 1 else found
            if self.begun:
                self._total.add_(part)
            else:
                self._total.write_(part)
            self.begun = True

    def whole(self, factor: float) -> Tensor:
        self._total.scale_(factor)
        total = self._total.tensor()
        return self._group.all_gather(total, 0) if self._group.size > 1 else total


def exact_sum(values: Sequence[float]) -> float:
    """Return the sum of numbers, rounded once: it does not depend on their order."""
    try:
        return math.fsum(values)
    except (ValueError, OverflowError):  # infinities of both signs; a sum beyond all numbers
        return sum(values)
