"""The compiled kernels that are functions of tensors and arrays, without autograd."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor

from parallel_core.ops import library, memory, reference
from parallel_core.ops.library import declare, lib
from parallel_core.ops.registry import compiled


def new(shape: Sequence[int]) -> Tensor:
    """Return an uninitialised float32 tensor."""
    return on(memory.empty(shape))


def on(array: np.ndarray) -> Tensor:
    """Return a tensor on the memory of a C-contiguous array, which `array_of` gives back."""
    x = Tensor.from_numpy(array)
    x.memory = array, x.data_ptr()
    return x


def array_of(x: Tensor) -> np.ndarray:
    """Return a contiguous tensor's memory as an array. MindSpore's own `asnumpy` takes as long as a small kernel."""
    array, address = getattr(x, "memory", (None, 0))
    return x.asnumpy() if array is None or x.data_ptr() != address else array


KINDS = {getattr(ms, name): kind for name, kind in library.KINDS.items()}
"""As `library.KINDS`, by the types of tensors."""

declare("pc_convert", "PIPIL")
declare("pc_widen_each", "PLP")
declare("pc_add_halves", "PIPIL")
declare("pc_scale", "PIFL")


def new_as(shape: Sequence[int], dtype: Any) -> Tensor:
    """Return an uninitialised tensor of a type in `KINDS`."""
    return new(shape) if dtype == ms.float32 else on(memory.empty(shape, numpy_dtype(dtype)))


def zeros(shape: Sequence[int], dtype: Any = ms.float32) -> Tensor:
    """Return a tensor of zeros of a type in `KINDS`. MindSpore's own way takes as long as a small kernel."""
    kind = np.float32 if dtype == ms.float32 else numpy_dtype(dtype)
    return on(np.zeros(shape, kind))


@functools.cache
def numpy_dtype(dtype: Any) -> np.dtype:
    """Return NumPy's type for one of MindSpore's."""
    return Tensor([0.0], dtype).asnumpy().dtype


def converted(x: Tensor, dtype: Any) -> Tensor:
    """Return `x` as `dtype`, both in `KINDS`, without autograd; `x` itself where it has that type."""
    if x.dtype == dtype:
        return x
    x = x.contiguous()
    y = new_as(x.shape, dtype)
    lib.pc_convert(x.data_ptr(), KINDS[x.dtype], y.data_ptr(), KINDS[dtype], x.size)
    return y


def wide(x: Tensor) -> Tensor:
    """Return a tensor of a type in `KINDS` as float32, without autograd."""
    return x if x.dtype == ms.float32 else converted(x, ms.float32)


def wide_addresses(tensors: Sequence[Tensor | None]) -> tuple[list[int], Any]:
    """Return where each tensor's numbers stand as float32, 0 for None, and what the caller keeps alive until then.

    Small tensors of 16 bits are widened by one call, which takes as long as one tensor would.
    """
    given = [x for x in tensors if x is not None]
    if all(x.dtype == ms.float32 for x in given):
        return [0 if x is None else x.data_ptr() for x in tensors], given
    words = [word for x in given for word in (x.data_ptr(), KINDS[x.dtype], x.size)]
    memory = np.empty(sum(words[2::3]), np.float32)
    address = memory.ctypes.data
    lib.pc_widen_each((ctypes.c_int64 * len(words))(*words), len(given), address)
    found = []
    for x in tensors:
        found.append(0 if x is None else address)
        address += 0 if x is None else 4 * x.size
    return found, memory


def pointer(x: Tensor | None) -> int | None:
    """Return the address of a contiguous tensor's elements; the caller keeps the tensor alive."""
    return None if x is None else x.data_ptr()


def int32(x: Tensor) -> Tensor:
    """Return `x` as a contiguous int32 tensor."""
    return (x if x.dtype == ms.int32 else x.astype(ms.int32)).contiguous()


@compiled(reference.shaped, integers=["x"])
def _shaped(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    # An operator that only gives the same memory another shape takes longer than a small kernel.
    return on(array_of(x).reshape(shape)) if x.dtype in _IN_NUMPY else x.reshape(shape)


@compiled(reference.reordered)
def _reordered(x: Tensor, order: tuple[int, ...]) -> Tensor:
    runs = array_of(x.contiguous()).reshape(len(order), -1)
    return on(runs.take(order, 0).reshape(x.shape))


_IN_NUMPY = (ms.float32, ms.int32)


# ---- linear ---------------------------------------------------------------------------------------------------------
declare("pc_rounds_operand", "L", returns=ctypes.c_int)
declare("pc_linear", "PPIPPPLLL")
declare("pc_linear_grad_input", "PPIPPLLL")
declare("pc_linear_grad_weight", "PIPIPILLLI")
declare("pc_sum_rows", "PPILLI")


@compiled(reference.linear, halves=["weight_OI", "bias_O"], needs_gemm=True)
def _linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    return _product(x_TI.contiguous(), weight_OI, bias_O, None)


@compiled(reference.linear_and_operand, halves=["weight_OI", "bias_O"], needs_gemm=True)
def _linear_and_operand(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor]:
    x = x_TI.contiguous()
    rounded = _room_to_round(x)
    return _product(x, weight_OI, bias_O, rounded), x if rounded is None else rounded


def _product(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, rounded: Tensor | None) -> Tensor:
    weight = weight_OI.contiguous()
    *tokens, I = x.shape
    O = weight.shape[0]
    y = new((*tokens, O))
    bias = None if bias_O is None else wide(bias_O)
    operands = x.data_ptr(), weight.data_ptr(), KINDS[weight.dtype], pointer(bias)
    lib.pc_linear(*operands, y.data_ptr(), pointer(rounded), math.prod(tokens), I, O)
    return y


@compiled(reference.linear_grad_input, halves=["weight_OI"], needs_gemm=True)
def _linear_grad_input(dy_TO: Tensor, weight_OI: Tensor) -> Tensor:
    return _input_gradient(dy_TO.contiguous(), weight_OI, None)


@compiled(reference.linear_grad_input_and_operand, halves=["weight_OI"], needs_gemm=True)
def _linear_grad_input_and_operand(dy_TO: Tensor, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    dy = dy_TO.contiguous()
    rounded = _room_to_round(dy)
    return _input_gradient(dy, weight_OI, rounded), dy if rounded is None else rounded


def _input_gradient(dy: Tensor, weight_OI: Tensor, rounded: Tensor | None) -> Tensor:
    weight = weight_OI.contiguous()
    *tokens, O = dy.shape
    I = weight.shape[1]
    dx = new((*tokens, I))
    operands = dy.data_ptr(), weight.data_ptr(), KINDS[weight.dtype]
    lib.pc_linear_grad_input(*operands, dx.data_ptr(), pointer(rounded), math.prod(tokens), I, O)
    return dx


def _room_to_round(x: Tensor) -> Tensor | None:
    """Return memory for the copy that a product makes of `x`, or None where it multiplies `x` itself."""
    return new_as(x.shape, ms.bfloat16) if lib.pc_rounds_operand(x.size // x.shape[-1]) else None


def _foreign(*operands: Tensor) -> str:
    """Say of an operand of 16 bits that it is none of these copies."""
    for x in operands:
        if x.dtype != ms.float32 and (x.dtype != ms.bfloat16 or not lib.pc_rounds_operand(x.size // x.shape[-1])):
            return f"x or dy is {x.dtype}"
    return ""


@compiled(
    reference.linear_grad_weight, halves=["dy_TO", "x_TI"], needs_gemm=True,
    refuses=lambda dy_TO, x_TI: _foreign(dy_TO, x_TI),
)  # fmt: skip
def _linear_grad_weight(dy_TO: Tensor, x_TI: Tensor) -> Tensor:
    dw = new((dy_TO.shape[-1], x_TI.shape[-1]))
    _put_weight_gradient(dw.data_ptr(), 0, dy_TO, x_TI, add=False)
    return dw


@compiled(
    reference.linear_grad_weight_, halves=["into_OI", "dy_TO", "x_TI"], needs_gemm=True,
    refuses=lambda into_OI, dy_TO, x_TI, add: _foreign(dy_TO, x_TI),
)  # fmt: skip
def _linear_grad_weight_(into_OI: np.ndarray, dy_TO: Tensor, x_TI: Tensor, add: bool) -> None:
    """Nothing of the weight's size is allocated."""
    _put_weight_gradient(into_OI.ctypes.data, library.kind_of(into_OI.dtype), dy_TO, x_TI, add=add)


def _put_weight_gradient(address: int, kind: int, dy: Tensor, x: Tensor, *, add: bool) -> None:
    dy, x = dy.contiguous(), x.contiguous()
    O, I = dy.shape[-1], x.shape[-1]
    operands = dy.data_ptr(), KINDS[dy.dtype], x.data_ptr(), KINDS[x.dtype]
    lib.pc_linear_grad_weight(*operands, address, kind, dy.size // O, I, O, add)


@compiled(reference.linear_grad_bias)
def _linear_grad_bias(dy_TO: Tensor) -> Tensor:
    return sum_rows(dy_TO, dy_TO.shape[-1])


@compiled(reference.linear_grad_bias_, halves=["into_O"])
def _linear_grad_bias_(into_O: np.ndarray, dy_TO: Tensor, add: bool) -> None:
    dy = dy_TO.contiguous()
    O, kind = into_O.size, library.kind_of(into_O.dtype)
    lib.pc_sum_rows(dy.data_ptr(), into_O.ctypes.data, kind, dy.size // O, O, add)


def sum_rows(x: Tensor, width: int) -> Tensor:
    """Return the sum over all dims but the last, [width], of a float32 tensor."""
    x = x.contiguous()
    total = new((width,))
    lib.pc_sum_rows(x.data_ptr(), total.data_ptr(), 0, x.size // width, width, 0)
    return total


# ---- embedding ------------------------------------------------------------------------------------------------------
declare("pc_embedding", "PPIPILLLL")
declare("pc_embedding_grad", "PPPILLLLI")


def _narrower(ids_T: Tensor, table_VH: Tensor, first_row: int, dtype: Any = None) -> str:
    return "" if dtype in (None, table_VH.dtype, ms.float32) else f"{table_VH.dtype} becomes {dtype}"


@compiled(reference.embedding, integers=["ids_T"], halves=["table_VH"], refuses=_narrower)
def _embedding(ids_T: Tensor, table_VH: Tensor, first_row: int, dtype: Any = None) -> Tensor:
    ids, table = int32(ids_T), table_VH.contiguous()
    T, (V, H), dtype = ids.shape[0], table.shape, dtype or table.dtype
    out = new_as((T, H), dtype)
    kinds = KINDS[table.dtype], KINDS[dtype]
    lib.pc_embedding(ids.data_ptr(), table.data_ptr(), kinds[0], out.data_ptr(), kinds[1], T, V, H, first_row)
    return out


@compiled(reference.embedding_grad_table, integers=["ids_T"])
def _embedding_grad_table(dy_TH: Tensor, ids_T: Tensor, num_rows: int, first_row: int) -> Tensor:
    dy, ids = dy_TH.contiguous(), int32(ids_T)
    T, H = dy.shape
    grad = new((num_rows, H))
    lib.pc_embedding_grad(dy.data_ptr(), ids.data_ptr(), grad.data_ptr(), 0, T, num_rows, H, first_row, 0)
    return grad


@compiled(reference.embedding_grad_table_, integers=["ids_T"], halves=["into_VH"])
def _embedding_grad_table_(into_VH: np.ndarray, dy_TH: Tensor, ids_T: Tensor, first_row: int, add: bool) -> None:
    """Nothing of the table's size is allocated."""
    dy, ids = dy_TH.contiguous(), int32(ids_T)
    V, H = into_VH.shape
    into = into_VH.ctypes.data, library.kind_of(into_VH.dtype)
    lib.pc_embedding_grad(dy.data_ptr(), ids.data_ptr(), *into, ids.size, V, H, first_row, add)


# ---- cross entropy --------------------------------------------------------------------------------------------------
declare("pc_vocab_statistics", "PPPPLLL")
declare("pc_vocab_sums_of", "PPPPL")
declare("pc_vocab_losses", "PPPPPLFF")
declare("pc_vocab_grad_logits", "PPPPPLLLFF")


@compiled(reference.vocab_statistics, integers=["target_T"])
def _vocab_statistics(logits_TV: Tensor, target_T: Tensor, first_row: int) -> tuple[Tensor, Tensor]:
    logits, target = logits_TV.contiguous(), int32(target_T)
    T, V = logits.shape
    largest, sums = new((T,)), new((3, T))
    addresses = logits.data_ptr(), target.data_ptr(), largest.data_ptr(), sums.data_ptr()
    lib.pc_vocab_statistics(*addresses, T, V, first_row)
    return largest, sums


@compiled(reference.vocab_sums_of)
def _vocab_sums_of(sums_3T: Tensor, largest_T: Tensor, highest_T: Tensor) -> Tensor:
    given = sums_3T.contiguous(), largest_T.contiguous(), highest_T.contiguous()
    sums = new(sums_3T.shape)
    lib.pc_vocab_sums_of(*(x.data_ptr() for x in (*given, sums)), sums.shape[1])
    return sums


@compiled(reference.vocab_losses, integers=["target_T"])
def _vocab_losses(
    largest_T: Tensor, sums_3T: Tensor, target_T: Tensor, target_weight: float, uniform_weight: float
) -> tuple[Tensor, Tensor]:
    given = largest_T.contiguous(), sums_3T.contiguous(), int32(target_T)
    loss, log_sum_exp = new(largest_T.shape), new(largest_T.shape)
    addresses = (x.data_ptr() for x in (*given, loss, log_sum_exp))
    lib.pc_vocab_losses(*addresses, loss.size, target_weight, uniform_weight)
    return loss, log_sum_exp


@compiled(reference.vocab_grad_logits, integers=["target_T"])
def _vocab_grad_logits(
    logits_TV: Tensor,
    log_sum_exp_T: Tensor,
    target_T: Tensor,
    first_row: int,
    dloss_T: Tensor,
    target_weight: float,
    uniform_weight: float,
    reuse_logits: bool = False,
) -> Tensor:
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
declare("pc_sum_of_squares", "PIL", returns=ctypes.c_double)
declare("pc_add", "PPL")
declare("pc_adam", "PPIPPPILFFFFFFFFF")


@compiled(reference.sum_of_squares, halves=["flat"])
def _sum_of_squares(flat: np.ndarray) -> float:
    return lib.pc_sum_of_squares(flat.ctypes.data, library.kind_of(flat.dtype), flat.size)


@compiled(reference.add_, halves=["into", "values"])
def _add_(into: np.ndarray, values: Tensor) -> None:
    values = values.contiguous()
    kinds = library.kind_of(into.dtype), KINDS[values.dtype]
    if kinds == (0, 0):
        lib.pc_add(into.ctypes.data, values.data_ptr(), into.size)
    else:
        lib.pc_add_halves(into.ctypes.data, kinds[0], values.data_ptr(), kinds[1], into.size)


@compiled(reference.write_, halves=["into", "values"])
def _write_(into: np.ndarray, values: Tensor) -> None:
    values = values.contiguous()
    kinds = library.kind_of(into.dtype), KINDS[values.dtype]
    if kinds[0] == kinds[1]:
        ctypes.memmove(into.ctypes.data, values.data_ptr(), into.nbytes)
    else:
        lib.pc_convert(values.data_ptr(), kinds[1], into.ctypes.data, kinds[0], into.size)


@compiled(reference.copy_, halves=["into", "values"])
def _copy_(into: np.ndarray, values: np.ndarray) -> None:
    kinds = library.kind_of(values.dtype), library.kind_of(into.dtype)
    if kinds[0] == kinds[1]:
        ctypes.memmove(into.ctypes.data, values.ctypes.data, into.nbytes)
    else:
        lib.pc_convert(values.ctypes.data, kinds[0], into.ctypes.data, kinds[1], into.size)


@compiled(reference.scale_, halves=["into"])
def _scale_(into: np.ndarray, factor: float) -> None:
    lib.pc_scale(into.ctypes.data, library.kind_of(into.dtype), factor, into.size)


@compiled(reference.adam_, halves=["grad", "rounded"])
def _adam_(
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
    rounded: np.ndarray | None = None,
) -> None:
    beta1, beta2 = betas
    copy = (None, 0) if rounded is None else (rounded.ctypes.data, library.kind_of(rounded.dtype))
    lib.pc_adam(
        param.ctypes.data,
        grad.ctypes.data,
        library.kind_of(grad.dtype),
        exp_avg.ctypes.data,
        exp_avg_sq.ctypes.data,
        *copy,
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
