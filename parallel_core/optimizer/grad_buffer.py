"""Parameters of one dtype and their gradients, each in one flat buffer, reduced bucket by bucket."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from mindspore import Parameter, Tensor

from parallel_core.comm.interface import Group, Handle
from parallel_core.errors import ParallelCoreError, bullet_list
from parallel_core.layout.buckets import MEMORY_ALIGNMENT_BYTES, BucketRange, BufferLayout, ParameterSlot, layout_buffer
from parallel_core.layout.shard import shard_of
from parallel_core.optimizer import flat
from parallel_core.optimizer.flat import Flat
from parallel_core.optimizer.main_grad import MainGrad

logger = logging.getLogger(__name__)


class ParamAndGradBuffer:
    """Holds the values and the gradients of `parameters`.

    Args:
        parameters: all of one dtype, in module order; their values move into this buffer.
        names: their global names, for messages.
        dtype: their dtype.
        grad_dtype: dtype in which gradients are accumulated and reduced.
        group: the data parallel group.
        bucket_size: see `layout_buffer`.
        sharded: reduce-scatter gradients, so that rank r keeps only its part of every bucket (distributed optimizer).
        alone: see `layout_buffer`.
        average_after: sum first and divide then (Megatron's average_in_collective), not the other way round.
        gradient_scale: factor of the summed gradients (1 / dp, or 1 for per-token losses).
        memory_aligned: with `sharded`, parameters, gradients and shards start at 512-byte boundaries.
        divisible: every bucket is a multiple of the group's size, as with `sharded`.
    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        names: Sequence[str],
        dtype: str,
        grad_dtype: str,
        group: Group,
        *,
        bucket_size: int | None,
        sharded: bool,
        alone: Sequence[int],
        average_after: bool,
        gradient_scale: float,
        memory_aligned: bool = False,
        divisible: bool = False,
    ) -> None:
        self.parameters, self.names, self.dtype = list(parameters), list(names), dtype
        self.group, self.sharded = group, sharded
        narrowest = min(flat.zeros(1, kind).tensor().itemsize for kind in (dtype, grad_dtype))
        self.layout: BufferLayout = layout_buffer(
            [p.size for p in parameters],
            bucket_size=bucket_size,
            shards=group.size,
            align=sharded or divisible,
            alone=alone,
            memory_alignment=MEMORY_ALIGNMENT_BYTES // narrowest if memory_aligned else 0,
        )
        self._scale_before = 1.0 if average_after else gradient_scale
        self._scale_after = gradient_scale if average_after else 1.0
        self.params: Flat = flat.zeros(self.layout.numel, dtype)
        self.grads: Flat = flat.zeros(self.layout.numel, grad_dtype)
        self.slots: dict[int, ParameterSlot] = {slot.index: slot for slot in self.layout.slots}
        for slot in self.layout.slots:
            self.params.part(slot.start, slot.end).bind(self.parameters[slot.index])
        self.main_grads = {
            i: MainGrad(self.grads.part(slot.start, slot.end), self.parameters[i]) for i, slot in self.slots.items()
        }
        self._members = [
            {slot.index for slot in self.layout.slots if slot.bucket == b} for b in range(len(self.layout.buckets))
        ]
        self._looked_for_zeros = False
        self._ready: set[int] = set()
        self.running: dict[int, Handle] = {}
        self._gathering: dict[int, Handle] = {}

    def accumulate(self, index: int, gradient: Tensor) -> None:
        """Add to the gradient of parameter `index`; the first one of an iteration replaces what was there."""
        self.main_grads[index].receive(gradient)

    def mark_ready(self, index: int) -> None:
        """Say that the gradient of parameter `index` is complete; the bucket's last one starts its reduction."""
        self._ready.add(index)
        bucket = self.slots[index].bucket
        if self._members[bucket] <= self._ready:
            self.start_reduction(bucket)

    def on_late_gradient(self, index: int, completed: Callable[[], None]) -> None:
        """Call `completed` whenever the gradient of parameter `index` has got all that was deferred."""
        self.main_grads[index].completed = completed

    def is_pending(self, index: int) -> bool:
        """Return whether contributions to the gradient of parameter `index` are deferred."""
        return self.main_grads[index].pending > 0

    def start_reduction(self, bucket: int) -> None:
        """Start summing a bucket over the data parallel group."""
        if bucket in self.running:
            raise ParallelCoreError(f"the gradients of bucket {bucket} were reduced twice in one iteration")
        where = self.layout.buckets[bucket]
        part = self.grads.part(where.start, where.end)
        part.scale_(self._scale_before)
        if self.sharded:
            own = self.grads.part(*where.shard(self.group.rank, self.group.size))
            self.running[bucket] = self.group.reduce_scatter_start(part.tensor(), own.tensor())
        else:
            self.running[bucket] = self.group.all_reduce_start_(part.tensor())

    def finish_reduction(self) -> None:
        """Wait until every bucket is reduced, starting those that were not.

        Raises:
            ParallelCoreError: if a parameter got no gradient in this iteration; it is named.
        """
        missing = sorted(i for i, main_grad in self.main_grads.items() if not main_grad.begun)
        if missing:
            raise ParallelCoreError(
                f"{len(missing)} parameters got no gradient in this iteration, so the model's output does not depend "
                f"on them; set requires_grad=False or use them:\n" + bullet_list(self.names[i] for i in missing)
            )
        for bucket, where in enumerate(self.layout.buckets):
            if bucket not in self.running:
                self.start_reduction(bucket)
            result = self.running[bucket].wait()
            start, end = where.shard(self.group.rank, self.group.size) if self.sharded else (where.start, where.end)
            if self.sharded and self.group.size > 1 and result is not None:
                self.grads.part(start, end).write_(result)
            self.grads.part(start, end).scale_(self._scale_after)
        if not self._looked_for_zeros:
            self._looked_for_zeros = True
            self._name_zeros()

    def _name_zeros(self) -> None:
        """Warn of parameters that the output does not depend on: MindSpore gives them gradients of zeros."""
        known = [i for i in sorted(self.slots) if not shard_of(self.parameters[i]).zero_gradient_at_first]
        squares = flat.on_host([self.main_grad(i).sum_of_squares() for i in known])
        if zeros := [self.names[i] for i, value in zip(known, squares) if value == 0.0]:
            logger.warning(
                "the gradient of %d parameters is exactly zero in the first iteration; if the model's output does not "
                "depend on them, set requires_grad=False or use them:\n%s",
                len(zeros),
                bullet_list(zeros),
            )

    def start_iteration(self) -> None:
        """Forget the gradients; nothing is written, the next accumulation overwrites."""
        for main_grad in self.main_grads.values():
            main_grad.begun = False
        self._ready.clear()
        self.running.clear()

    def main_grad(self, index: int) -> Flat:
        """Return the accumulated gradient of parameter `index`."""
        return self.main_grads[index].flat

    def owned(self, where: BucketRange) -> tuple[int, int]:
        """Return the part of a bucket whose optimizer state this rank keeps."""
        return where.shard(self.group.rank, self.group.size) if self.sharded else (where.start, where.end)

    def start_gather(self, bucket: int) -> None:
        """Start gathering the updated parameters of a bucket from the ranks that own its parts."""
        where = self.layout.buckets[bucket]
        own, whole = self.params.part(*self.owned(where)), self.params.part(where.start, where.end)
        self._gathering[bucket] = self.group.all_gather_start(own.tensor(), whole.tensor())

    def finish_gather(self, bucket: int) -> None:
        """Put the gathered parameters in place; returns at once if there is nothing under way."""
        handle = self._gathering.pop(bucket, None)
        if handle is not None and self.group.size > 1:
            where, gathered = self.layout.buckets[bucket], handle.wait()
            if gathered is not None:
                self.params.part(where.start, where.end).write_(gathered)

    def broadcast_parameters(self) -> None:
        """Give every data parallel rank the parameters of the first."""
        if self.group.size > 1:
            self.params.write_(self.group.broadcast_(self.params.tensor()))
