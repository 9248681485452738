"""Differentiable functions over rows: the permutation and its inverse, and the product with each expert's weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from mindspore import Tensor, mint

from parallel_core import ops
from parallel_core.autograd import Function, inner_backward, no_grad
from parallel_core.comm.interface import Done, Group, Handle
from parallel_core.deferral import late_gradient
from parallel_core.expert_parallel.permutation import Permutation
from parallel_core.main_grad import main_grad_of, needs_gradient


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


def activated_grouped_linear(
    x_NF: Tensor, scale_N: Tensor, weight_EOI: Tensor, counts: np.ndarray, activation: str
) -> Tensor:
    """Return `grouped_linear` of `ops.scaled_activation`, keeping what goes into the activation and not its output.

    Backward applies the activation again.
    """
    return _ActivatedGroupedLinear.apply(x_NF, scale_N, weight_EOI, counts, activation)


def add_expert_bias(y_NO: Tensor, bias_EO: Tensor, scale_N: Tensor | None, counts: np.ndarray) -> Tensor:
    """Return each row plus its expert's bias, times the row's scale if there is one, [N, O]."""
    return _AddExpertBias.apply(y_NO, bias_EO, scale_N, counts)


def exchange_rows(rows: Tensor, traffic: np.ndarray, group: Group) -> Tensor:
    """Return the rows that arrive from all ranks, see `Group.all_to_all_rows`. Backward: the inverse exchange."""
    return rows if group.size == 1 else _Exchange.apply(rows, traffic, group)


def exchange_rows_start(rows: Tensor, traffic: np.ndarray, group: Group) -> Callable[[], Tensor]:
    """Start `exchange_rows`, and return the function that gives what arrives, to be called once.

    What is computed before it is called can overlap with the exchange, and in backward what comes between the two.
    """
    if group.size == 1:
        return lambda: rows
    exchange = _OnTheWay(traffic, group)
    ticket = _Begin.apply(rows, exchange)
    return lambda: _End.apply(ticket, exchange)


def reorder_rows(rows: Tensor, index: np.ndarray) -> Tensor:
    """Return rows[index] for a permutation, int32 [N]. Backward: the inverse permutation."""
    return _Reorder.apply(rows, index)


class _TakeRows(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, permutation: Permutation) -> tuple[Tensor, Tensor]:
        ctx.permutation, ctx.shape = permutation, weights.shape
        taken = ops.gather_rows(weights.reshape(-1, 1), permutation.slots)
        return ops.gather_rows(x, permutation.tokens), taken.reshape(-1)

    @staticmethod
    def backward(ctx: Any, drows: Tensor, dtaken: Tensor) -> tuple[Tensor | None, ...]:
        rows, (T, K) = ctx.permutation.rows, ctx.shape
        # Every rank of an expert has its own copy of a row, so several rows can be of one assignment.
        dweights = ops.sum_rows(dtaken.reshape(-1, 1), rows.reshape(T * K, -1))
        return ops.sum_rows(drows, rows), dweights.reshape(T, K), None


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
        dx = ops.grouped_linear_grad_input(dy, weight, ctx.counts)
        return dx, _weight_gradient(weight, dy, x, ctx.counts), None


class _ActivatedGroupedLinear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, weight: Tensor, counts: np.ndarray, activation: str) -> Tensor:
        ctx.save_for_backward(x, scale, weight)
        ctx.counts, ctx.activation = counts, activation
        with no_grad():
            return ops.grouped_linear(ops.scaled_activation(x, scale, activation), weight, counts)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, weight = ctx.saved_tensors
        with no_grad():
            activated = ops.scaled_activation(x, scale, ctx.activation)
        dactivated = ops.grouped_linear_grad_input(dy, weight, ctx.counts)
        dw = _weight_gradient(weight, dy, activated, ctx.counts)
        again = lambda x, scale: ops.scaled_activation(x, scale, ctx.activation)  # noqa: E731
        (dx, dscale), _ = inner_backward(again, (x, scale), (), dactivated)
        return dx, dscale, dw, None, None


def _weight_gradient(weight: Tensor, dy: Tensor, x: Tensor, counts: np.ndarray) -> Tensor | None:
    """Return the gradient of experts' weights, or the placeholder for one that is summed where it belongs."""
    if not needs_gradient(weight):
        return None
    main_grad = main_grad_of(weight, dy)
    if main_grad is None:
        compute = lambda: ops.cast(ops.grouped_linear_grad_weight(dy, x, counts), weight.dtype)  # noqa: E731
        return late_gradient(weight, compute)
    return main_grad.accumulate(lambda into, add: ops.grouped_linear_grad_weight_(into, dy, x, counts, add))


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


@dataclass
class _OnTheWay:
    """Rows under way, and their gradients."""

    traffic: np.ndarray
    group: Group
    rows: Handle = field(default_factory=lambda: Done(None))
    gradients: Handle = field(default_factory=lambda: Done(None))


class _Begin(Function):
    """Send rows; the ticket that it returns stands for those that arrive, so that `_End`'s gradient comes back here."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: _OnTheWay) -> Tensor:
        ctx.exchange = exchange
        exchange.rows = all_to_all_rows_start(exchange.group, rows, exchange.traffic)
        return Tensor(np.zeros(1, np.float32))

    @staticmethod
    def backward(ctx: Any, dticket: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ARG004 - nothing but an order
        return ctx.exchange.gradients.wait(), None


class _End(Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, exchange: _OnTheWay) -> Tensor:  # noqa: ARG004 - nothing but an order
        ctx.exchange = exchange
        return exchange.rows.wait()  # type: ignore[return-value]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        exchange = ctx.exchange
        back = np.ascontiguousarray(exchange.traffic.T)
        exchange.gradients = all_to_all_rows_start(exchange.group, dy, back)
        return Tensor(np.zeros(1, np.float32)), None


def all_to_all_rows_start(group: Group, x: Tensor, counts: np.ndarray) -> Handle:
    """Start `Group.all_to_all_rows` by messages; the handle gives what arrives, rank 0's rows first.

    Where messages are copied when they are sent, as in shared memory, no rank waits for another here.
    """
    ends = np.concatenate(([0], np.cumsum(counts[group.rank]))).tolist()
    others = [(group.rank + step) % group.size for step in range(1, group.size)]
    sent = [group.send(x[ends[to] : ends[to + 1]], to) for to in others if counts[group.rank, to]]
    arriving = counts[:, group.rank]
    coming = {s: group.receive((int(arriving[s]), *x.shape[1:]), x.dtype, s) for s in others if arriving[s]}
    coming[group.rank] = Done(x[ends[group.rank] : ends[group.rank + 1]])
    return _Rows(sent, [coming[source] for source in sorted(coming)])


class _Rows(Handle):
    """Rows from several ranks."""

    def __init__(self, sent: list[Handle], coming: list[Handle]) -> None:
        self._sent, self._coming = sent, coming

    def wait(self) -> Tensor | None:
        for handle in self._sent:
            handle.wait()
        return mint.cat([handle.wait() for handle in self._coming], 0)


class _Reorder(Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: np.ndarray) -> Tensor:
        ctx.index = index
        return ops.gather_rows(rows, index)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return ops.gather_rows(dy, np.argsort(ctx.index).astype(np.int32)), None
