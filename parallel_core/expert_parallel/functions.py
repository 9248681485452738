"""Differentiable functions over rows: the permutation and its inverse, and the product with each expert's weight."""

from __future__ import annotations

from typing import Any

import numpy as np
from mindspore import Tensor

from parallel_core import ops
from parallel_core.autograd import Function, main_grad_of, needs_gradient
from parallel_core.comm.interface import Group
from parallel_core.deferral import late_gradient
from parallel_core.expert_parallel.permutation import Permutation


def take_rows(x_TH: Tensor, weights_TK: Tensor, permutation: Permutation) -> tuple[Tensor, Tensor]:
    """Return the tokens and their weights in the order of experts, [N, H] and [N]; empty rows are zeros."""
    return _TakeRows.apply(x_TH, weights_TK, permutation)


def put_back(rows_NH: Tensor, permutation: Permutation) -> Tensor:
    """Return the sum of each token's rows, [T, H]; zeros for a token without any."""
    return _PutBack.apply(rows_NH, permutation)


def grouped_linear(x_NI: Tensor, weight_EOI: Tensor, counts: np.ndarray) -> Tensor:
    """Return each row times its expert's weight, [N, O]; see `ops.grouped_linear`.

    Backward writes the weights' gradients where they are summed; an expert without rows gets zeros.
    """
    return _GroupedLinear.apply(x_NI, weight_EOI, counts)


def add_expert_bias(y_NO: Tensor, bias_EO: Tensor, scale_N: Tensor | None, counts: np.ndarray) -> Tensor:
    """Return each row plus its expert's bias, times the row's scale if there is one, [N, O]."""
    return _AddExpertBias.apply(y_NO, bias_EO, scale_N, counts)


def exchange_rows(rows: Tensor, traffic: np.ndarray, group: Group) -> Tensor:
    """Return the rows that arrive from all ranks, see `Group.all_to_all_rows`. Backward: the inverse exchange."""
    return rows if group.size == 1 else _Exchange.apply(rows, traffic, group)


def reorder_rows(rows: Tensor, index: np.ndarray) -> Tensor:
    """Return rows[index] for a permutation, int32 [N]. Backward: the inverse permutation."""
    return _Reorder.apply(rows, index)


class _TakeRows(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, permutation: Permutation) -> tuple[Tensor, Tensor]:
        ctx.permutation, ctx.shape = permutation, weights.shape
        slots = permutation.slots
        taken = weights.asnumpy().reshape(-1)[np.maximum(slots, 0)] if slots.size else np.zeros(0, np.float32)
        taken = np.where(slots < 0, np.float32(0), taken)
        return ops.gather_rows(x, permutation.tokens), Tensor.from_numpy(np.ascontiguousarray(taken))

    @staticmethod
    def backward(ctx: Any, drows: Tensor, dtaken: Tensor) -> tuple[Tensor | None, ...]:
        permutation = ctx.permutation
        dweights = np.zeros(ctx.shape, np.float32)
        there = permutation.slots >= 0
        # Every rank of an expert has its own copy of a row, so several rows can be of one assignment.
        summed = np.bincount(permutation.slots[there], dtaken.asnumpy()[there], dweights.size)
        dweights.reshape(-1)[:] = summed
        return ops.sum_rows(drows, permutation.rows), Tensor.from_numpy(dweights), None


class _PutBack(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, permutation: Permutation) -> Tensor:
        ctx.permutation = permutation
        return ops.sum_rows(rows, permutation.rows)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return ops.gather_rows(dy, ctx.permutation.tokens), None


class _GroupedLinear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: np.ndarray) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.counts = counts
        return ops.grouped_linear(x, weight, counts)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        counts = ctx.counts
        dx = ops.grouped_linear_grad_input(dy, weight, counts)
        if not needs_gradient(weight):
            return dx, None, None
        main_grad = main_grad_of(weight, dy)
        if main_grad is None:
            compute = lambda: ops.cast(ops.grouped_linear_grad_weight(dy, x, counts), weight.dtype)  # noqa: E731
            return dx, late_gradient(weight, compute), None
        dw = main_grad.accumulate(lambda into, add: ops.grouped_linear_grad_weight_(into, dy, x, counts, add))
        return dx, dw, None


class _AddExpertBias(Function):
    """Biases of experts are rare: NumPy does."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, bias: Tensor, scale: Tensor | None, counts: np.ndarray) -> Tensor:
        ctx.save_for_backward(bias)
        ctx.scale, ctx.counts = None if scale is None else scale.asnumpy(), counts
        added = np.repeat(bias.asnumpy(), counts, axis=0)
        if scale is not None:
            added = added * ctx.scale[:, None]
        return y + Tensor(np.ascontiguousarray(added)).astype(y.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (bias,) = ctx.saved_tensors
        grad = dy.asnumpy().astype(np.float32, copy=False)
        ends = np.concatenate(([0], np.cumsum(ctx.counts)))
        weighted = grad if ctx.scale is None else grad * ctx.scale[:, None]
        dbias = np.stack([weighted[a:b].sum(0) for a, b in zip(ends, ends[1:])]).astype(np.float32)
        dscale = None
        if ctx.scale is not None:
            dscale = Tensor((grad * np.repeat(bias.asnumpy(), ctx.counts, axis=0)).sum(1).astype(np.float32))
        return dy, Tensor(dbias).astype(bias.dtype), dscale, None


class _Exchange(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, traffic: np.ndarray, group: Group) -> Tensor:
        ctx.traffic, ctx.group = traffic, group
        return group.all_to_all_rows(rows, traffic)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.group.all_to_all_rows(dy, np.ascontiguousarray(ctx.traffic.T)), None, None


class _Reorder(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: np.ndarray) -> Tensor:
        ctx.index = index
        return ops.gather_rows(rows, index)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return ops.gather_rows(dy, np.argsort(ctx.index).astype(np.int32)), None
