"""The compiled kernels of a mixture of experts."""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor

from parallel_core.autograd import Function
from parallel_core.ops import raw, reference_experts
from parallel_core.ops.fused import KINDS
from parallel_core.ops.library import declare, kind_of, lib
from parallel_core.ops.registry import compiled

declare("pc_grouped_linear", "PPIPPLLL")
declare("pc_grouped_linear_grad_input", "PPIPPLLL")
declare("pc_grouped_linear_grad_weight", "PPPIPLLLI")
declare("pc_gather_rows", "PPPLL")
declare("pc_sum_rows_at", "PPPLLL")
declare("pc_scale_rows", "PPPLL")
declare("pc_row_products", "PPPLL")


@compiled(reference_experts.grouped_linear, integers=["counts"], halves=["weight_EOI"], needs_gemm=True)
def _grouped_linear(x_NI: Tensor, weight_EOI: Tensor, counts: np.ndarray) -> Tensor:
    x, weight = x_NI.contiguous(), weight_EOI.contiguous()
    E, O, I = weight.shape
    y = raw.new((x.shape[0], O))
    operands = x.data_ptr(), weight.data_ptr(), raw.KINDS[weight.dtype]
    lib.pc_grouped_linear(*operands, y.data_ptr(), counts.ctypes.data, E, I, O)
    return y


@compiled(reference_experts.grouped_linear_grad_input, integers=["counts"], halves=["weight_EOI"], needs_gemm=True)
def _grouped_linear_grad_input(dy_NO: Tensor, weight_EOI: Tensor, counts: np.ndarray) -> Tensor:
    dy, weight = dy_NO.contiguous(), weight_EOI.contiguous()
    E, O, I = weight.shape
    dx = raw.new((dy.shape[0], I))
    operands = dy.data_ptr(), weight.data_ptr(), raw.KINDS[weight.dtype]
    lib.pc_grouped_linear_grad_input(*operands, dx.data_ptr(), counts.ctypes.data, E, I, O)
    return dx


@compiled(reference_experts.grouped_linear_grad_weight, integers=["counts"], needs_gemm=True)
def _grouped_linear_grad_weight(dy_NO: Tensor, x_NI: Tensor, counts: np.ndarray) -> Tensor:
    dw = raw.new((len(counts), dy_NO.shape[1], x_NI.shape[1]))
    _put_weight_gradient(dw.data_ptr(), raw.KINDS[ms.float32], dy_NO, x_NI, counts, add=False)
    return dw


@compiled(reference_experts.grouped_linear_grad_weight_, integers=["counts"], halves=["into_EOI"], needs_gemm=True)
def _grouped_linear_grad_weight_(
    into_EOI: np.ndarray, dy_NO: Tensor, x_NI: Tensor, counts: np.ndarray, add: bool
) -> None:
    """Nothing of the weights' size is allocated."""
    _put_weight_gradient(into_EOI.ctypes.data, kind_of(into_EOI.dtype), dy_NO, x_NI, counts, add=add)


def _put_weight_gradient(address: int, kind: int, dy: Tensor, x: Tensor, counts: np.ndarray, *, add: bool) -> None:
    dy, x = dy.contiguous(), x.contiguous()
    lib.pc_grouped_linear_grad_weight(
        dy.data_ptr(), x.data_ptr(), address, kind, counts.ctypes.data, len(counts), x.shape[1], dy.shape[1], add
    )


@compiled(reference_experts.gather_rows, integers=["index_N"])
def _gather_rows(x_TH: Tensor, index_N: np.ndarray) -> Tensor:
    x = x_TH.contiguous()
    H = x.shape[1]
    y = raw.new((index_N.size, H))
    lib.pc_gather_rows(x.data_ptr(), index_N.ctypes.data, y.data_ptr(), index_N.size, H)
    return y


@compiled(reference_experts.sum_rows, integers=["index_TK"])
def _sum_rows(x_NH: Tensor, index_TK: np.ndarray) -> Tensor:
    x = x_NH.contiguous()
    (T, K), H = index_TK.shape, x.shape[1]
    y = raw.new((T, H))
    lib.pc_sum_rows_at(x.data_ptr(), index_TK.ctypes.data, y.data_ptr(), T, K, H)
    return y


class _ScaledActivation(Function):
    """Only the input and the scale are kept: the activation is computed again for the scale's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, name: str) -> Tensor:
        x, scale = x.contiguous(), scale.contiguous()
        ctx.save_for_backward(x, scale)
        ctx.name = name
        y = _activated(x, name)
        lib.pc_scale_rows(y.data_ptr(), scale.data_ptr(), y.data_ptr(), *y.shape)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, scale = ctx.saved_tensors
        dy, y = dy.contiguous(), _activated(x, ctx.name)
        N, F = y.shape
        dscale, dx = raw.new((N,)), raw.new(x.shape)
        lib.pc_row_products(dy.data_ptr(), y.data_ptr(), dscale.data_ptr(), N, F)
        lib.pc_scale_rows(dy.data_ptr(), scale.data_ptr(), y.data_ptr(), N, F)
        if ctx.name == "swiglu":
            lib.pc_swiglu_grad(y.data_ptr(), x.data_ptr(), None, dx.data_ptr(), N, F)
        else:
            lib.pc_activation_grad(y.data_ptr(), x.data_ptr(), None, dx.data_ptr(), N, F, KINDS[ctx.name])
        return dx, dscale, None


def _activated(x: Tensor, name: str) -> Tensor:
    N, F = x.shape
    if name == "swiglu":
        y = raw.new((N, F // 2))
        lib.pc_swiglu(x.data_ptr(), None, y.data_ptr(), N, F // 2)
    else:
        y = raw.new((N, F))
        lib.pc_activation(x.data_ptr(), None, y.data_ptr(), N, F, KINDS[name])
    return y


def _no_such_activation(x_NF: Tensor, scale_N: Tensor, name: str) -> str:
    return "" if name == "swiglu" or name in KINDS else f"the activation is {name}"


@compiled(reference_experts.scaled_activation, refuses=_no_such_activation)
def _scaled_activation(x_NF: Tensor, scale_N: Tensor, name: str) -> Tensor:
    return _ScaledActivation.apply(x_NF, scale_N, name)
