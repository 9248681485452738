"""What gradients need after their data parallel reduction: sums over tensor parallel ranks and over tied stages."""

from __future__ import annotations

from collections.abc import Callable

import mindspore as ms
from mindspore import mint

from parallel_core.comm.interface import Group
from parallel_core.layout.shard import TensorShard, shard_of
from parallel_core.optimizer.data_parallel import DistributedDataParallel
from parallel_core.optimizer.flat import Flat


def finalize_model_grads(
    ddp: DistributedDataParallel,
    tp_group: Group,
    embedding_group: Group,
) -> None:
    """Complete the gradients of one iteration, in Megatron-LM's order.

    Communication: the data parallel reductions; one all-reduce of all partial gradients (norms and row-parallel biases
    under sequence parallelism) over the tensor parallel group; one of the tied embedding over the first and last stage.

    Args:
        ddp: buffers of this rank.
        tp_group: the tensor parallel group.
        embedding_group: first and last pipeline stage, or a group of one.
    """
    ddp.finish_grad_sync()
    if tp_group.size > 1:
        _sum_together(_gradients(ddp, lambda shard: shard.partial_gradient), tp_group)
    if embedding_group.size > 1:
        _sum_together(_gradients(ddp, lambda shard: shard.shared_embedding), embedding_group)


def _gradients(ddp: DistributedDataParallel, wanted: Callable[[TensorShard], bool]) -> list[Flat]:
    return [
        buffer.main_grad(index)
        for buffer in ddp.buffers
        for index, parameter in enumerate(buffer.parameters)
        if wanted(shard_of(parameter))
    ]


def _sum_together(gradients: list[Flat], group: Group) -> None:
    """Sum gradients over the group in one all-reduce."""
    if not gradients:
        return
    tensors = [gradient.tensor() for gradient in gradients]
    if len(tensors) == 1 and tensors[0].dtype == ms.float32:  # Where it is: a tied embedding is too large to copy.
        group.all_reduce_(tensors[0])
        return
    joined = group.all_reduce_(mint.cat([tensor.astype(ms.float32) for tensor in tensors]))
    start = 0
    for gradient, tensor in zip(gradients, tensors):
        gradient.write_(joined[start : start + tensor.size])
        start += tensor.size
