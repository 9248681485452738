"""The specification of a mixture of experts' kernels, in plain MindSpore operators; see `reference`.

Rows of one expert stand together: with `counts` [E] the first counts[0] rows are expert 0's, the next counts[1] expert
1's. Shapes: N rows, E experts, T tokens, K copies of a token, H hidden, F feed-forward, I and O features.
"""

from __future__ import annotations

from itertools import accumulate

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint, ops

from parallel_core.ops import reference
from parallel_core.ops.registry import kernel
from parallel_core.ops.shared import put


def _segments(counts: np.ndarray) -> list[tuple[int, int]]:
    """Return where each expert's rows begin and end."""
    ends = [0, *accumulate(int(n) for n in counts)]
    return list(zip(ends, ends[1:]))


# ---- grouped products (no autograd) ---------------------------------------------------------------------------------
@kernel
def grouped_linear(x_NI: Tensor, weight_EOI: Tensor, counts: np.ndarray) -> Tensor:
    """Return each row times its expert's weight, x @ weight[e]^T, [N, O]; no autograd.

    Args:
        x_NI: rows, those of one expert together.
        weight_EOI: a matrix for each expert.
        counts: int64 [E], rows of each expert; they add up to N.
    """
    O = weight_EOI.shape[1]
    parts = [reference.linear(x_NI[a:b], weight_EOI[e], None) for e, (a, b) in enumerate(_segments(counts)) if b > a]
    return mint.cat(parts, 0) if parts else mint.zeros((0, O), dtype=x_NI.dtype)


@kernel
def grouped_linear_grad_input(dy_NO: Tensor, weight_EOI: Tensor, counts: np.ndarray) -> Tensor:
    """Return the gradient of `grouped_linear` for x, [N, I]; no autograd."""
    I = weight_EOI.shape[2]
    parts = [
        reference.linear_grad_input(dy_NO[a:b], weight_EOI[e]) for e, (a, b) in enumerate(_segments(counts)) if b > a
    ]
    return mint.cat(parts, 0) if parts else mint.zeros((0, I), dtype=dy_NO.dtype)


@kernel
def grouped_linear_grad_weight(dy_NO: Tensor, x_NI: Tensor, counts: np.ndarray) -> Tensor:
    """Return the gradient of `grouped_linear` for the weights, [E, O, I], zeros without rows; no autograd."""
    shape = dy_NO.shape[1], x_NI.shape[1]
    parts = [
        reference.linear_grad_weight(dy_NO[a:b], x_NI[a:b]) if b > a else mint.zeros(shape, dtype=x_NI.dtype)
        for a, b in _segments(counts)
    ]
    return ops.stack(parts, 0)


@kernel
def grouped_linear_grad_weight_(
    into_EOI: np.ndarray, dy_NO: Tensor, x_NI: Tensor, counts: np.ndarray, add: bool
) -> None:
    """Write the gradient of `grouped_linear` for the weights to `into_EOI`, or add it."""
    put(into_EOI, grouped_linear_grad_weight(dy_NO, x_NI, counts), add)


# ---- rows by number (no autograd) -----------------------------------------------------------------------------------
@kernel
def gather_rows(x_TH: Tensor, index_N: np.ndarray) -> Tensor:
    """Return rows `index` of x, [N, H], zeros where it is -1; int32 `index_N`; no autograd."""
    if not index_N.size or not x_TH.shape[0]:
        return mint.zeros((index_N.size, x_TH.shape[1]), dtype=x_TH.dtype)
    rows = ops.gather(x_TH, Tensor(np.maximum(index_N, 0)), 0)
    return rows * Tensor((index_N >= 0).astype(np.float32)).astype(x_TH.dtype).reshape(-1, 1)


@kernel
def sum_rows(x_NH: Tensor, index_TK: np.ndarray) -> Tensor:
    """Return for every t the sum of the rows index[t] of x, without those of -1, [T, H]; no autograd.

    Where no row is named twice it is the transpose of `gather_rows`, and each the other's gradient.
    """
    T, K = index_TK.shape
    rows = gather_rows(x_NH, np.ascontiguousarray(index_TK.reshape(-1)))
    return rows.reshape(T, K, -1).sum(1)


# ---- activation of weighted rows ------------------------------------------------------------------------------------
@kernel
def scaled_activation(x_NF: Tensor, scale_N: Tensor, name: str) -> Tensor:
    """Return the activation `name` of every row, see `reference.activation`, times the row's float32 scale, [N, F]."""
    y = reference.activation(x_NF, None, name)
    return (y.astype(ms.float32) * scale_N.reshape(-1, 1)).astype(x_NF.dtype)
