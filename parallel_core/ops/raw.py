"""The compiled kernels as functions of tensors, without autograd. Anything but float32 goes to the reference."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor

from parallel_core.ops import reference

_FLOAT32 = ms.float32
lib: Any = None
"""The loaded library; set by `select.use_kernels`."""


def native(*tensors: Tensor | None) -> bool:
    """Return whether the kernels take these tensors: all of them float32 (None counts as absent)."""
    return all(x is None or x.dtype == _FLOAT32 for x in tensors)


def new(shape: Sequence[int]) -> Tensor:
    """Return an uninitialised float32 tensor."""
    return Tensor.from_numpy(np.empty(shape, np.float32))


def pointer(x: Tensor | None) -> int | None:
    """Return the address of a contiguous tensor's elements; the caller keeps the tensor alive."""
    return None if x is None else x.data_ptr()


def int32(x: Tensor) -> Tensor:
    """Return `x` as a contiguous int32 tensor."""
    return (x if x.dtype == ms.int32 else x.astype(ms.int32)).contiguous()


# ---- linear ---------------------------------------------------------------------------------------------------------
def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """See `reference.linear`."""
    if not native(x_TI, weight_OI, bias_O):
        return reference.linear(x_TI, weight_OI, bias_O)
    x, weight = x_TI.contiguous(), weight_OI.contiguous()
    *tokens, I = x.shape
    O = weight.shape[0]
    y = new((*tokens, O))
    lib.pc_linear(x.data_ptr(), weight.data_ptr(), pointer(bias_O), y.data_ptr(), math.prod(tokens), I, O)
    return y


def linear_grad_input(dy_TO: Tensor, weight_OI: Tensor) -> Tensor:
    """See `reference.linear_grad_input`."""
    if not native(dy_TO, weight_OI):
        return reference.linear_grad_input(dy_TO, weight_OI)
    dy, weight = dy_TO.contiguous(), weight_OI.contiguous()
    *tokens, O = dy.shape
    I = weight.shape[1]
    dx = new((*tokens, I))
    lib.pc_linear_grad_input(dy.data_ptr(), weight.data_ptr(), dx.data_ptr(), math.prod(tokens), I, O)
    return dx


def linear_grad_weight(dy_TO: Tensor, x_TI: Tensor) -> Tensor:
    """See `reference.linear_grad_weight`."""
    if not native(dy_TO, x_TI):
        return reference.linear_grad_weight(dy_TO, x_TI)
    dy, x = dy_TO.contiguous(), x_TI.contiguous()
    *tokens, O = dy.shape
    I = x.shape[-1]
    dw = new((O, I))
    lib.pc_linear_grad_weight(dy.data_ptr(), x.data_ptr(), dw.data_ptr(), math.prod(tokens), I, O, 0)
    return dw


def linear_grad_weight_(into_OI: np.ndarray, dy_TO: Tensor, x_TI: Tensor, add: bool) -> None:
    """See `reference.linear_grad_weight_`; nothing of the weight's size is allocated."""
    if not (native(dy_TO, x_TI) and _flat(into_OI)):
        reference.linear_grad_weight_(into_OI, dy_TO, x_TI, add)
        return
    dy, x = dy_TO.contiguous(), x_TI.contiguous()
    O, I = into_OI.shape
    lib.pc_linear_grad_weight(dy.data_ptr(), x.data_ptr(), into_OI.ctypes.data, dy.size // O, I, O, add)


def linear_grad_bias(dy_TO: Tensor) -> Tensor:
    """See `reference.linear_grad_bias`."""
    return sum_rows(dy_TO, dy_TO.shape[-1]) if native(dy_TO) else reference.linear_grad_bias(dy_TO)


def sum_rows(x: Tensor, width: int) -> Tensor:
    """Return the sum over all dims but the last, [width], of a float32 tensor."""
    x = x.contiguous()
    total = new((width,))
    lib.pc_sum_rows(x.data_ptr(), total.data_ptr(), x.size // width, width, 0)
    return total


# ---- embedding ------------------------------------------------------------------------------------------------------
def embedding(ids_T: Tensor, table_VH: Tensor, first_row: int) -> Tensor:
    """See `reference.embedding`."""
    if not native(table_VH):
        return reference.embedding(ids_T, table_VH, first_row)
    ids, table = int32(ids_T), table_VH.contiguous()
    T, (V, H) = ids.shape[0], table.shape
    out = new((T, H))
    lib.pc_embedding(ids.data_ptr(), table.data_ptr(), out.data_ptr(), T, V, H, first_row)
    return out


def embedding_grad_table(dy_TH: Tensor, ids_T: Tensor, num_rows: int, first_row: int) -> Tensor:
    """See `reference.embedding_grad_table`."""
    if not native(dy_TH):
        return reference.embedding_grad_table(dy_TH, ids_T, num_rows, first_row)
    dy, ids = dy_TH.contiguous(), int32(ids_T)
    T, H = dy.shape
    grad = new((num_rows, H))
    lib.pc_embedding_grad(dy.data_ptr(), ids.data_ptr(), grad.data_ptr(), T, num_rows, H, first_row, 0)
    return grad


def embedding_grad_table_(into_VH: np.ndarray, dy_TH: Tensor, ids_T: Tensor, first_row: int, add: bool) -> None:
    """See `reference.embedding_grad_table_`; nothing of the table's size is allocated."""
    if not (native(dy_TH) and _flat(into_VH)):
        reference.embedding_grad_table_(into_VH, dy_TH, ids_T, first_row, add)
        return
    dy, ids = dy_TH.contiguous(), int32(ids_T)
    V, H = into_VH.shape
    lib.pc_embedding_grad(dy.data_ptr(), ids.data_ptr(), into_VH.ctypes.data, ids.size, V, H, first_row, add)


# ---- cross entropy --------------------------------------------------------------------------------------------------
def vocab_statistics(logits_TV: Tensor, target_T: Tensor, first_row: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `reference.vocab_statistics`."""
    if not native(logits_TV):
        return reference.vocab_statistics(logits_TV, target_T, first_row)
    logits, target = logits_TV.contiguous(), int32(target_T)
    T, V = logits.shape
    out = (new((T,)), new((T,)), new((T,)), new((T,)))
    lib.pc_vocab_statistics(logits.data_ptr(), target.data_ptr(), *(x.data_ptr() for x in out), T, V, first_row)
    return out


def vocab_grad_logits(
    logits_TV: Tensor,
    log_sum_exp_T: Tensor,
    target_T: Tensor,
    first_row: int,
    dloss_T: Tensor,
    target_weight: float,
    uniform_weight: float,
    reuse_logits: bool = False,
) -> Tensor:
    """See `reference.vocab_grad_logits`."""
    if not native(logits_TV, log_sum_exp_T, dloss_T):
        return reference.vocab_grad_logits(
            logits_TV, log_sum_exp_T, target_T, first_row, dloss_T, target_weight, uniform_weight
        )
    logits, target = logits_TV.contiguous(), int32(target_T)
    log_sum_exp, dloss = log_sum_exp_T.contiguous(), dloss_T.contiguous()
    T, V = logits.shape
    grad = logits if reuse_logits else new((T, V))
    lib.pc_vocab_grad_logits(
        logits.data_ptr(),
        log_sum_exp.data_ptr(),
        target.data_ptr(),
        dloss.data_ptr(),
        grad.data_ptr(),
        T,
        V,
        first_row,
        target_weight,
        uniform_weight,
    )
    return grad


# ---- flat buffers ---------------------------------------------------------------------------------------------------
def _flat(*arrays: np.ndarray) -> bool:
    return all(a.dtype == np.float32 and a.flags.c_contiguous for a in arrays)


def sum_of_squares(flat: np.ndarray) -> float:
    """See `reference.sum_of_squares`."""
    if not _flat(flat):
        return reference.sum_of_squares(flat)
    return lib.pc_sum_of_squares(flat.ctypes.data, flat.size)


def add_(into: np.ndarray, values: Tensor) -> None:
    """See `reference.add_`."""
    if not (_flat(into) and native(values)):
        reference.add_(into, values)
        return
    values = values.contiguous()
    lib.pc_add(into.ctypes.data, values.data_ptr(), into.size)


def write_(into: np.ndarray, values: Tensor) -> None:
    """See `reference.write_`."""
    if not (_flat(into) and native(values)):
        reference.write_(into, values)
        return
    values = values.contiguous()
    ctypes.memmove(into.ctypes.data, values.data_ptr(), into.nbytes)


def adam_(
    param: np.ndarray,
    grad: np.ndarray,
    exp_avg: np.ndarray,
    exp_avg_sq: np.ndarray,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: float = 1.0,
) -> None:
    """See `reference.adam_`."""
    beta1, beta2 = betas
    if not _flat(param, grad, exp_avg, exp_avg_sq):
        reference.adam_(
            param,
            grad,
            exp_avg,
            exp_avg_sq,
            step=step,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            grad_scale=grad_scale,
        )
        return
    lib.pc_adam(
        param.ctypes.data,
        grad.ctypes.data,
        exp_avg.ctypes.data,
        exp_avg_sq.ctypes.data,
        param.size,
        grad_scale,
        beta1,
        beta2,
        1 - beta1,
        1 - beta2,
        1 - lr * weight_decay,
        lr / (1 - beta1**step),
        1 / math.sqrt(1 - beta2**step),
        eps,
    )
