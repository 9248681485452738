"""Movements between the regions of tensor and sequence parallelism, each with its transpose as gradient.

Sequence-parallel tensors are cut along dim 0, tensor-parallel ones along the last dim. In a group of one, each is the
identity. Source: Megatron-LM, arXiv:1909.08053 (f, g) and arXiv:2205.05198 (g-bar).
"""

from __future__ import annotations

from typing import Any

from mindspore import Tensor, mint

from parallel_core.autograd import Function
from parallel_core.comm.interface import Group
from parallel_core.tensor_parallel.checks import equal_part


def copy_to_tensor_model_parallel_region(x: Tensor, group: Group) -> Tensor:
    """Return `x`. Backward: all-reduce. Communication: backward 1 all-reduce of x.size elements."""
    return x if group.size == 1 else _Copy.apply(x, group)


def reduce_from_tensor_model_parallel_region(x: Tensor, group: Group) -> Tensor:
    """Return the sum of `x` over the group. Backward: identity. Communication: forward 1 all-reduce of x.size."""
    return x if group.size == 1 else _Reduce.apply(x, group)


def scatter_to_tensor_model_parallel_region(x: Tensor, group: Group) -> Tensor:
    """Return this rank's part of the last dim, [.., n] -> [.., n / tp]. Backward: all-gather along it."""
    return x if group.size == 1 else _Split.apply(x, group, x.ndim - 1)


def gather_from_tensor_model_parallel_region(x: Tensor, group: Group) -> Tensor:
    """Return the parts joined along the last dim, [.., n / tp] -> [.., n]. Backward: this rank's part."""
    return x if group.size == 1 else _Gather.apply(x, group, x.ndim - 1, False)


def scatter_to_sequence_parallel_region(x: Tensor, group: Group) -> Tensor:
    """Return this rank's part of dim 0, [S, ..] -> [S / tp, ..]. Backward: all-gather along it."""
    return x if group.size == 1 else _Split.apply(x, group, 0)


def gather_from_sequence_parallel_region(
    x: Tensor, group: Group, tensor_parallel_output_grad: bool = True
) -> Tensor:
    """Return the parts joined along dim 0, [S / tp, ..] -> [S, ..].

    Backward: reduce-scatter, summed in the gradient's dtype; with `tensor_parallel_output_grad=False` (what follows
    is computed alike on every rank) this rank's part, without communication.
    """
    return x if group.size == 1 else _Gather.apply(x, group, 0, tensor_parallel_output_grad)


def reduce_scatter_to_sequence_parallel_region(x: Tensor, group: Group) -> Tensor:
    """Return this rank's part of the sum along dim 0, [S, ..] -> [S / tp, ..]. Backward: all-gather along it."""
    return x if group.size == 1 else _ReduceScatter.apply(x, group)


def all_to_all(x: Tensor, group: Group, split_dim: int, concat_dim: int) -> Tensor:
    """Return `x` cut along `split_dim`, exchanged, joined along `concat_dim`. Backward: the inverse exchange."""
    return x if group.size == 1 else _AllToAll.apply(x, group, split_dim, concat_dim)


def local_part(x: Tensor, group: Group, dim: int) -> Tensor:
    """Return a copy of this rank's equal part of `x` along `dim`; no gradient, no communication."""
    n = equal_part(x, group.size, dim)
    return mint.narrow(x, dim, group.rank * n, n).contiguous()


class _Copy(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.group.all_reduce(dy), None


class _Reduce(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return group.all_reduce(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return dy, None


class _Split(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return local_part(x, group, dim)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.group.all_gather(dy, ctx.dim), None, None


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int, sum_gradients: bool) -> Tensor:
        ctx.group, ctx.dim, ctx.sum_gradients = group, dim, sum_gradients
        return group.all_gather(x, dim)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.sum_gradients:
            return ctx.group.reduce_scatter(dy, ctx.dim), None, None, None
        return local_part(dy, ctx.group, ctx.dim), None, None, None


class _ReduceScatter(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return group.reduce_scatter(x, 0)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.group.all_gather(dy, 0), None


class _AllToAll(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, split_dim: int, concat_dim: int) -> Tensor:
        ctx.group, ctx.split_dim, ctx.concat_dim = group, split_dim, concat_dim
        return group.all_to_all(x, split_dim, concat_dim)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.group.all_to_all(dy, ctx.concat_dim, ctx.split_dim), None, None, None
