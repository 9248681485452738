"""Products that Ascend NPUs group, and experts' rows, with the signatures of the references; see `ascend`."""

from __future__ import annotations

import functools
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops
from mindspore.ops.auto_generate import grouped_matmul_add_, grouped_matmul_v4

from parallel_core.ops import ascend_kernels, reference, reference_experts
from parallel_core.ops.registry import on_ascend
from parallel_core.ops.shared import put

_SINGLE, _BY_ROWS = 3, 0
"""`split_item` of one tensor in and out, and `group_type` of groups of rows."""
_HALF = ms.float16, ms.bfloat16
_FLOATS = *_HALF, ms.float32


# ---- products (no autograd) -----------------------------------------------------------------------------------------
def _without_rows(x: Tensor, *_: Any, **__: Any) -> str:
    return "" if x.shape[0] else "there are no rows"


_GROUPS: dict[str, Any] = {"integers": ["counts"], "refuses": _without_rows}


@on_ascend(reference_experts.grouped_linear, dtypes=_FLOATS, **_GROUPS)
def grouped_linear(x_NI: Tensor, weight_EOI: Tensor, counts: np.ndarray) -> Tensor:
    """Return `reference_experts.grouped_linear` by grouped_matmul. Not verified: never run on an NPU."""
    return _grouped_matmul(x_NI, weight_EOI.transpose(0, 2, 1).contiguous(), counts)


@on_ascend(reference_experts.grouped_linear_grad_input, dtypes=_FLOATS, **_GROUPS)
def grouped_linear_grad_input(dy_NO: Tensor, weight_EOI: Tensor, counts: np.ndarray) -> Tensor:
    """Return `reference_experts.grouped_linear_grad_input` by grouped_matmul. Not verified: never run on an NPU."""
    return _grouped_matmul(dy_NO, weight_EOI, counts)


@on_ascend(reference_experts.grouped_linear_grad_weight, dtypes=_HALF, **_GROUPS)
def grouped_linear_grad_weight(dy_NO: Tensor, x_NI: Tensor, counts: np.ndarray) -> Tensor:
    """Return `reference_experts.grouped_linear_grad_weight` by grouped_matmul_add_. Not verified: never run on an NPU.

    Sums are of float32.
    """
    return _summed(dy_NO, x_NI, counts).astype(x_NI.dtype)


def _summed(dy_NO: Tensor, x_NI: Tensor, counts: np.ndarray) -> Tensor:
    """Return the gradient of the weights, float32 [E, O, I]."""
    there, ends = _groups(counts)
    shape = dy_NO.shape[1], x_NI.shape[1]
    dw = grouped_matmul_add_(dy_NO, x_NI, ends, ops.zeros((len(there), *shape), ms.float32))
    if len(there) < len(counts):
        every = ops.zeros((len(counts), *shape), ms.float32)
        dw = ops.tensor_scatter_update(every, Tensor(there.reshape(-1, 1).astype(np.int32)), dw)
    return dw


def _not_into(into: Any, dy: Tensor, x: Tensor, *_: Any, **__: Any) -> str:  # noqa: ARG001
    if dy.dtype != x.dtype:
        return f"dy is {dy.dtype} and x {x.dtype}"
    return _without_rows(dy)


@on_ascend(reference_experts.grouped_linear_grad_weight_, dtypes=_HALF, integers=["counts"], refuses=_not_into)
def grouped_linear_grad_weight_(into_EOI: Any, dy_NO: Tensor, x_NI: Tensor, counts: np.ndarray, add: bool) -> None:
    """Do `reference_experts.grouped_linear_grad_weight_` by grouped_matmul_add_. Not verified: never run on an NPU.

    Nothing of the weights' size is made where every expert has rows.
    """
    if not counts.all():
        put(into_EOI, _summed(dy_NO, x_NI, counts), add)
        return
    if not add:
        into_EOI.zero_()
    grouped_matmul_add_(dy_NO, x_NI, _groups(counts)[1], into_EOI)


@on_ascend(reference.linear_grad_weight_, dtypes=_HALF, refuses=_not_into)
def linear_grad_weight_(into_OI: Any, dy_TO: Tensor, x_TI: Tensor, add: bool) -> None:
    """Do `reference.linear_grad_weight_` by grouped_matmul_add_, of one group. Not verified: never run on an NPU."""
    if not add:
        into_OI.zero_()
    dy, x = (t if t.ndim == 2 else t.reshape(-1, t.shape[-1]) for t in (dy_TO, x_TI))
    grouped_matmul_add_(dy, x, _end(dy.shape[0]), into_OI)


@functools.lru_cache(8)  # the same in every layer and microbatch
def _end(rows: int) -> Tensor:
    return Tensor([rows], ms.int64)


def _grouped_matmul(x_NA: Tensor, weight_EAB: Tensor, counts: np.ndarray) -> Tensor:
    there, ends = _groups(counts)
    if len(there) < len(counts):
        weight_EAB = ops.gather(weight_EAB, Tensor(there.astype(np.int32)), 0)
    (y,) = grouped_matmul_v4([x_NA], [weight_EAB], group_list=ends, split_item=_SINGLE, group_type=_BY_ROWS)
    return y


def _groups(counts: np.ndarray) -> tuple[np.ndarray, Tensor]:
    """Return which experts have rows, and where those of each end: the operators take groups that have some."""
    there = np.flatnonzero(counts)
    return there, Tensor(np.cumsum(counts[there]).astype(np.int64))


# ---- rows by number (no autograd) -----------------------------------------------------------------------------------
def _has_empty(x_TH: Tensor, index_N: np.ndarray) -> str:
    if not index_N.size or not x_TH.shape[0]:
        return "there are no rows"
    return "some rows are empty or dropped" if int(index_N.min()) < 0 else ""


@on_ascend(reference_experts.gather_rows, dtypes=_FLOATS, integers=["index_N"], refuses=_has_empty)
def gather_rows(x_TH: Tensor, index_N: np.ndarray) -> Tensor:
    """Return `reference_experts.gather_rows` by one gather: the host knows the order, so nothing is sorted there.

    Not verified: never run on an NPU.
    """
    return ops.gather(x_TH, Tensor(index_N), 0)


def _not_by_unpermute(x_NH: Tensor, index_TK: np.ndarray) -> str:
    if index_TK.size != x_NH.shape[0]:
        return "rows are no permutation of assignments"
    return _has_empty(x_NH, index_TK)


@on_ascend(reference_experts.sum_rows, dtypes=_FLOATS, integers=["index_TK"], refuses=_not_by_unpermute)
def sum_rows(x_NH: Tensor, index_TK: np.ndarray) -> Tensor:
    """Return `reference_experts.sum_rows` by moe_token_unpermute. Not verified: never run on an NPU.

    The operator takes the number of rows of a token from the weights that it is given, so it is given ones.
    """
    return ops.moe_token_unpermute(x_NH, Tensor(index_TK.reshape(-1)), ops.ones(index_TK.shape, x_NH.dtype))


# ---- activation of weighted rows ------------------------------------------------------------------------------------
def _not_by_activation(x_NF: Tensor, scale_N: Tensor, name: str) -> str:  # noqa: ARG001
    return _without_rows(x_NF) or ascend_kernels.not_by_activation(x_NF, None, name)


@on_ascend(reference_experts.scaled_activation, dtypes=_FLOATS, refuses=_not_by_activation)
def scaled_activation(x_NF: Tensor, scale_N: Tensor, name: str) -> Tensor:
    """Return `reference_experts.scaled_activation`, the activation by one operator. Not verified: never run."""
    y = ascend_kernels.activation(x_NF, None, name)
    return reference.cast(reference.cast(y, ms.float32) * scale_N.reshape(-1, 1), x_NF.dtype)
