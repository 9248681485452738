"""Data parallelism: gradients of every model chunk in flat buffers, reduced while backward still runs.

Source: Megatron-LM's DistributedDataParallel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from mindspore import Parameter, Tensor, nn

from parallel_core.comm.interface import Group
from parallel_core.layout.buckets import default_bucket_size
from parallel_core.layout.shard import shard_of
from parallel_core.main_grad import on_gradient
from parallel_core.optimizer import flat
from parallel_core.optimizer.flat import Flat
from parallel_core.optimizer.grad_buffer import ParamAndGradBuffer
from parallel_core.optimizer.in_order import order_of

if TYPE_CHECKING:
    from parallel_core.config.schema import TrainingConfig

class DistributedDataParallel:
    """Accumulates and reduces the gradients of this rank's model chunks.

    Args:
        chunks: the model chunks of this pipeline rank.
        config: bucket size, overlap, precision of gradients, distributed optimizer.
        groups: by name, the groups whose ranks hold the same parameters and see other data (see
            `TensorShard.replicas`); `dp_cp`, over which gradients are averaged, among them.
        is_first_stage: whether this is the first pipeline rank (later ones use one bucket, and `delay_grad_reduce`).
    """

    def __init__(
        self,
        chunks: Sequence[nn.Cell],
        config: TrainingConfig,
        groups: Mapping[str, Group],
        *,
        is_first_stage: bool = True,
    ) -> None:
        self.groups, self.group, self.config = groups, groups["dp_cp"], config
        self.chunks = list(chunks)
        self._overlap = config.overlap_grad_reduce and config.wrap_with_ddp and self.group.size > 1
        self._delayed = config.delay_grad_reduce and not is_first_stage
        self._sync = [False] * len(self.chunks)
        self.buffers: list[ParamAndGradBuffer] = []
        self._buffers_of_chunk: list[list[ParamAndGradBuffer]] = []
        for number, chunk in enumerate(self.chunks):
            one_bucket = number > 0 or not is_first_stage
            buffers = self._make_buffers(chunk, one_bucket)
            for buffer in buffers:
                self._register_hooks(number, buffer)
            self._buffers_of_chunk.append(buffers)
            self.buffers.extend(buffers)
        self.order = order_of(self._buffers_of_chunk, config, self.group)
        self.frozen = [_bound(p) for chunk in self.chunks for p in chunk.get_parameters() if not p.requires_grad]
        self.broadcast_parameters()

    def _make_buffers(self, chunk: nn.Cell, one_bucket: bool) -> list[ParamAndGradBuffer]:
        kinds: dict[tuple[str, str], list[Parameter]] = {}
        for parameter in chunk.trainable_params():
            shard = shard_of(parameter)
            kinds.setdefault((shard.dtype, shard.replicas), []).append(parameter)
        size: int | None = None
        if not self.config.wrap_with_ddp:
            size = 1  # every parameter is a bucket of its own
        elif self.config.bucket_size:
            size = self.config.bucket_size
        elif self._overlap and not one_bucket:
            size = default_bucket_size(self.group.size)
        out = []
        for (dtype, replicas), parameters in kinds.items():
            alone = [i for i, p in enumerate(parameters) if shard_of(p).shared_embedding]
            out.append(
                ParamAndGradBuffer(
                    parameters,
                    [shard_of(p).name for p in parameters],
                    dtype,
                    "float32" if self.config.accumulate_allreduce_grads_in_fp32 else dtype,
                    self.groups[replicas],
                    bucket_size=size,
                    sharded=self.config.use_distributed_optimizer,
                    divisible=self.config.deterministic_mode,
                    alone=alone,
                    average_after=self.config.average_in_collective and not self.config.deterministic_mode,
                    gradient_scale=1.0 if self.config.calculate_per_token_loss else 1.0 / self.group.size,
                    memory_aligned=self.config.enable_mem_align,
                )
            )
        return out

    def _register_hooks(self, chunk: int, buffer: ParamAndGradBuffer) -> None:
        for index, parameter in enumerate(buffer.parameters):
            mark = self._marker(chunk, buffer, index)
            on_gradient(parameter, self._receiver(chunk, buffer, index), mark)
            buffer.on_late_gradient(index, mark)

    def _receiver(self, chunk: int, buffer: ParamAndGradBuffer, index: int) -> Callable[[Tensor], None]:
        mark = self._marker(chunk, buffer, index)

        def receive(gradient: Tensor) -> None:
            buffer.accumulate(index, gradient)
            mark()

        return receive

    def _marker(self, chunk: int, buffer: ParamAndGradBuffer, index: int) -> Callable[[], None]:
        def mark() -> None:
            if self._sync[chunk] and self._overlap and self.order.overlaps and not self._delayed:
                buffer.mark_ready(index)

        return mark

    def enable_sync(self, chunk: int) -> None:
        """Say that the next backward pass of `chunk` is its last in this iteration."""
        self._sync[chunk] = True

    def enable_late_sync(self, chunk: int) -> None:
        """Say that `chunk` has got all its gradients but those of weights that the next deferred calls compute."""
        self.enable_sync(chunk)
        for buffer in self._buffers_of_chunk[chunk]:
            for index in range(len(buffer.parameters)):
                if not buffer.is_pending(index):
                    self._marker(chunk, buffer, index)()

    def start_iteration(self) -> None:
        """Forget the last iteration's gradients (Megatron: zero_grad_buffer)."""
        self._sync = [False] * len(self.chunks)
        for buffer in self.buffers:
            buffer.start_iteration()
        self.order.start_iteration()

    def finish_grad_sync(self) -> None:
        """Wait until all gradients are reduced over the data parallel group.

        Raises:
            ParallelCoreError: if a parameter got no gradient; it is named.
        """
        for buffer in self.buffers:
            buffer.finish_reduction()

    def finish_param_gather(self, chunk: int | None = None) -> None:
        """Wait until gathered parameters are in place: of one chunk, before its forward pass, or of all."""
        buffers = self.buffers if chunk is None else self._buffers_of_chunk[chunk]
        for buffer in buffers:
            for bucket in range(len(buffer.layout.buckets)):
                buffer.finish_gather(bucket)

    def parameters(self) -> Iterator[tuple[Parameter, Flat]]:
        """Yield every parameter of this rank with the storage it lives in, frozen ones too."""
        for buffer in self.buffers:
            for slot in buffer.layout.slots:
                yield buffer.parameters[slot.index], buffer.params.part(slot.start, slot.end)
        yield from self.frozen

    def broadcast_parameters(self) -> None:
        """Make all replicas equal to the first."""
        for buffer in self.buffers:
            buffer.broadcast_parameters()
        for parameter, values in self.frozen:
            group = self.groups[shard_of(parameter).replicas]
            if group.size > 1:
                values.write_(group.broadcast_(values.tensor()))

    def memory_bytes(self) -> dict[str, int]:
        """Return the bytes of this rank's parameters and gradients."""
        width = {"float32": 4, "float16": 2, "bfloat16": 2}
        grad = 4 if self.config.accumulate_allreduce_grads_in_fp32 else 0
        return {
            "parameters": sum(b.layout.numel * width[b.dtype] for b in self.buffers)
            + sum(values.tensor().nbytes for _, values in self.frozen),
            "gradients": sum(b.layout.numel * (grad or width[b.dtype]) for b in self.buffers),
        }


def _bound(parameter: Parameter) -> tuple[Parameter, Flat]:
    """Return a frozen parameter with storage of its own: values are loaded and sent like the others', nothing else."""
    values = flat.zeros(parameter.size, shard_of(parameter).dtype)
    values.bind(parameter)
    return parameter, values
