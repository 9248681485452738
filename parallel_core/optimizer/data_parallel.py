"""Data parallelism: gradients of every model chunk in flat buffers, reduced while backward still runs.

Source: Megatron-LM's DistributedDataParallel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mindspore import Parameter, Tensor, nn

from parallel_core.autograd import on_gradient
from parallel_core.comm.interface import Group
from parallel_core.optimizer.grad_buffer import ParamAndGradBuffer

if TYPE_CHECKING:
    from parallel_core.config.schema import TrainingConfig

DEFAULT_BUCKET_SIZE = 40_000_000
"""Elements of a bucket when reductions overlap with backward (at least 1e6 for each data parallel rank)."""


class DistributedDataParallel:
    """Accumulates and reduces the gradients of this rank's model chunks.

    Args:
        chunks: the model chunks of this pipeline rank.
        config: bucket size, overlap, precision of gradients, distributed optimizer.
        group: the data parallel group.
        names: global name of a parameter.
        is_shared_embedding: whether a parameter is held by two pipeline stages.
        is_first_stage: whether this is the first pipeline rank (later ones use one bucket, and `delay_grad_reduce`).
    """

    def __init__(
        self,
        chunks: Sequence[nn.Cell],
        config: TrainingConfig,
        group: Group,
        *,
        names: Callable[[Parameter], str],
        is_shared_embedding: Callable[[Parameter], bool] = lambda parameter: False,
        is_first_stage: bool = True,
    ) -> None:
        self.group, self.config = group, config
        self.chunks = list(chunks)
        self._overlap = config.overlap_grad_reduce and config.wrap_with_ddp and group.size > 1
        self._delayed = config.delay_grad_reduce and not is_first_stage
        self._sync = [False] * len(self.chunks)
        self.buffers: list[ParamAndGradBuffer] = []
        self._buffers_of_chunk: list[list[ParamAndGradBuffer]] = []
        for number, chunk in enumerate(self.chunks):
            one_bucket = number > 0 or not is_first_stage
            buffers = self._make_buffers(chunk, names, is_shared_embedding, one_bucket)
            for buffer in buffers:
                self._register_hooks(number, buffer)
            self._buffers_of_chunk.append(buffers)
            self.buffers.extend(buffers)
        self.broadcast_parameters()

    def _make_buffers(
        self,
        chunk: nn.Cell,
        names: Callable[[Parameter], str],
        is_shared_embedding: Callable[[Parameter], bool],
        one_bucket: bool,
    ) -> list[ParamAndGradBuffer]:
        by_dtype: dict[str, list[Parameter]] = {}
        for parameter in chunk.trainable_params():
            by_dtype.setdefault(str(parameter.dtype).lower(), []).append(parameter)
        size: int | None = None
        if not self.config.wrap_with_ddp:
            size = 1  # every parameter is a bucket of its own
        elif self.config.bucket_size:
            size = self.config.bucket_size
        elif self._overlap and not one_bucket:
            size = max(DEFAULT_BUCKET_SIZE, 1_000_000 * self.group.size)
        out = []
        for dtype, parameters in by_dtype.items():
            alone = [i for i, p in enumerate(parameters) if is_shared_embedding(p)]
            out.append(
                ParamAndGradBuffer(
                    parameters,
                    [names(p) for p in parameters],
                    dtype,
                    "float32" if self.config.accumulate_allreduce_grads_in_fp32 else dtype,
                    self.group,
                    bucket_size=size,
                    sharded=self.config.use_distributed_optimizer,
                    alone=alone,
                    average_after=self.config.average_in_collective,
                    gradient_scale=1.0 if self.config.calculate_per_token_loss else 1.0 / self.group.size,
                    memory_aligned=self.config.enable_mem_align,
                )
            )
        return out

    def _register_hooks(self, chunk: int, buffer: ParamAndGradBuffer) -> None:
        for index, parameter in enumerate(buffer.parameters):
            on_gradient(parameter, self._receiver(chunk, buffer, index))

    def _receiver(self, chunk: int, buffer: ParamAndGradBuffer, index: int) -> Callable[[Tensor], None]:
        def receive(gradient: Tensor) -> None:
            buffer.accumulate(index, gradient)
            if self._sync[chunk] and self._overlap and not self._delayed:
                buffer.mark_ready(index)

        return receive

    def enable_sync(self, chunk: int) -> None:
        """Say that the next backward pass of `chunk` is its last in this iteration."""
        self._sync[chunk] = True

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside the block gradients accumulate, and no reduction starts."""
        before, self._sync = self._sync, [False] * len(self.chunks)
        try:
            yield
        finally:
            self._sync = before

    def start_iteration(self) -> None:
        """Forget the last iteration's gradients (Megatron: zero_grad_buffer)."""
        self._sync = [False] * len(self.chunks)
        for buffer in self.buffers:
            buffer.start_iteration()

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

    def broadcast_parameters(self) -> None:
        """Make all replicas equal to the first."""
        for buffer in self.buffers:
            buffer.broadcast_parameters()

    def memory_bytes(self) -> dict[str, int]:
        """Return the bytes of this rank's parameters and gradients."""
        width = {"float32": 4, "float16": 2, "bfloat16": 2}
        grad = 4 if self.config.accumulate_allreduce_grads_in_fp32 else 0
        return {
            "parameters": sum(b.layout.numel * width[b.dtype] for b in self.buffers),
            "gradients": sum(b.layout.numel * (grad or width[b.dtype]) for b in self.buffers),
        }


