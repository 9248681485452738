"""Norms, activations and rotary positions by Ascend's fused operators, with the signatures of `reference`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mindspore as ms
from mindspore import Tensor, mint, ops
from mindspore.ops.auto_generate import RmsNormGrad

from parallel_core.autograd import Function
from parallel_core.ops import reference
from parallel_core.ops.registry import on_ascend
from parallel_core.ops.shared import local_rows

_FLOATS = ms.float32, ms.float16, ms.bfloat16


def _not_by_rms_norm(x: Tensor, weight_H: Tensor, eps: float) -> str:
    if not 0 < eps <= 1:
        return "eps is not above 0 and up to 1"
    if weight_H.dtype not in (x.dtype, *(_FLOATS[1:] if x.dtype == ms.float32 else ())):
        return f"x is {x.dtype} and the weight {weight_H.dtype}"  # the operator takes one type; x's would round it
    return ""


@on_ascend(reference.rms_norm, dtypes=_FLOATS, refuses=_not_by_rms_norm)
def rms_norm(x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """Return `reference.rms_norm` by `mindspore.ops.rms_norm`. Not verified: never run on an NPU."""
    return ops.rms_norm(x, reference.cast(weight_H, x.dtype), eps)[0]


class _AddRMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y, rstd, total = ops.add_rms_norm(x, residual, weight, eps)
        ctx.save_for_backward(total, rstd, weight)
        return y, total

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        total, rstd, weight = ctx.saved_tensors
        dx, dweight = RmsNormGrad()(dy, total, rstd, weight)
        dx = dx + dtotal
        return dx, dx, reference.cast(dweight, weight.dtype), None


def _not_by_add_rms_norm(x: Tensor, residual: Tensor, weight_H: Tensor, eps: float) -> str:
    if x.shape != residual.shape or x.dtype != residual.dtype:
        return "the residual has another shape or type"
    return _not_by_rms_norm(x, weight_H, eps)


@on_ascend(reference.add_rms_norm, dtypes=_FLOATS, refuses=_not_by_add_rms_norm)
def add_rms_norm(x: Tensor, residual: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return `reference.add_rms_norm` by `mindspore.ops.add_rms_norm`. Not verified: never run on an NPU."""
    return _AddRMSNorm.apply(x, residual, reference.cast(weight_H, x.dtype), eps)


def _swiglu(x: Tensor) -> Tensor:
    return ops.swiglu(x, -1)


def _gelu(x: Tensor) -> Tensor:
    return mint.nn.functional.gelu(x)


def _gelu_tanh(x: Tensor) -> Tensor:
    return mint.nn.functional.gelu(x, approximate="tanh")


def _silu(x: Tensor) -> Tensor:
    return mint.nn.functional.silu(x)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": _swiglu, "gelu": _gelu, "gelu_tanh": _gelu_tanh, "silu": _silu, "relu": ops.relu
}  # fmt: skip


def not_by_activation(x: Tensor, bias: Tensor | None, name: str) -> str:  # noqa: ARG001
    """Return why `activation` does not take these, or ""."""
    return "" if name in _ACTIVATIONS else f"the activation is {name}"


@on_ascend(reference.activation, dtypes=_FLOATS, refuses=not_by_activation)
def activation(x: Tensor, bias: Tensor | None, name: str) -> Tensor:
    """Return `reference.activation` by one operator. Not verified: never run on an NPU."""
    return _ACTIVATIONS[name](x if bias is None else x + reference.cast(bias, x.dtype))


@on_ascend(reference.embedding, dtypes=_FLOATS, integers=["ids_T"])
def embedding(ids_T: Tensor, table_VH: Tensor, first_row: int, dtype: Any = None) -> Tensor:
    """Return `reference.embedding` by a gather in the table's type. Not verified: never run on an NPU."""
    rows, inside = local_rows(ids_T, first_row, table_VH.shape[0])
    out = ops.gather(table_VH, rows, 0)
    return reference.cast(out * inside.astype(out.dtype).reshape(-1, 1), dtype or table_VH.dtype)


@on_ascend(reference.embedding_grad_table_, dtypes=(ms.float32,), integers=["ids_T"])
def embedding_grad_table_(into_VH: Any, dy_TH: Tensor, ids_T: Tensor, first_row: int, add: bool) -> None:
    """Do `reference.embedding_grad_table_` by `index_add_`. Not verified: never run on an NPU."""
    if not add:
        into_VH.zero_()
    rows, inside = local_rows(ids_T, first_row, into_VH.shape[0])
    into_VH.index_add_(0, rows.astype(ms.int32), dy_TH * inside.astype(ms.float32).reshape(-1, 1))


@on_ascend(reference.vocab_grad_logits, dtypes=_FLOATS, integers=["target_T"])
def vocab_grad_logits(
    logits_TV: Tensor,
    log_sum_exp_T: Tensor,
    target_T: Tensor,
    first_row: int,
    dloss_T: Tensor,
    target_weight: float,
    uniform_weight: float,
    reuse_logits: bool = False,  # noqa: ARG001 - compiled kernels do
) -> Tensor:
    """Return `reference.vocab_grad_logits`, adding at the targets alone. Not verified: never run on an NPU."""
    grad = mint.exp(reference.cast(logits_TV, ms.float32) - log_sum_exp_T.reshape(-1, 1))
    if uniform_weight:
        grad = grad - uniform_weight
    dloss_T = dloss_T * (target_T >= 0).astype(ms.float32)
    grad = grad * dloss_T.reshape(-1, 1)
    rows, inside = local_rows(target_T, first_row, logits_TV.shape[1])
    at_target = inside.astype(ms.float32) * dloss_T * -target_weight
    grad = mint.scatter_add(grad, 1, rows.reshape(-1, 1).astype(ms.int64), at_target.reshape(-1, 1))
    return reference.cast(grad, logits_TV.dtype)


_WIDEST, _MOST_HEADS = 896, 1000


def _not_by_rotary(shape: tuple[int, ...], cos: Tensor, interleaved: bool) -> str:
    if cos.shape[-1] >= _WIDEST or max(shape[1:3]) >= _MOST_HEADS:
        return "there are 896 channels or more to turn, or 1000 samples or heads"
    return "samples have positions of their own, and pairs are neighbours" if interleaved and cos.shape[1] > 1 else ""


def _not_by_rotary_apart(x_SBND: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> str:  # noqa: ARG001
    return _not_by_rotary(x_SBND.shape, cos, interleaved)


def _not_by_rotary_packed(
    mixed_SBGX: Tensor, head_size: int, cos: Tensor, sin: Tensor, interleaved: bool  # noqa: ARG001
) -> str:
    S, B, G, X = mixed_SBGX.shape
    return _not_by_rotary((S, B, G * (X // head_size - 1)), cos, interleaved)


@on_ascend(reference.rotary, dtypes=_FLOATS, refuses=_not_by_rotary_apart)
def rotary(x_SBND: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Return `reference.rotary` by `rotary_position_embedding`. Not verified: never run on an NPU.

    The operator takes tables of x's type, to which they are rounded, as in Megatron-LM.
    """
    width, tables = cos.shape[-1], (reference.cast(cos, x_SBND.dtype), reference.cast(sin, x_SBND.dtype))
    if width == x_SBND.shape[-1]:
        return ops.rotary_position_embedding(x_SBND, *tables, int(interleaved))
    turned = ops.rotary_position_embedding(x_SBND[..., :width].contiguous(), *tables, int(interleaved))
    return mint.cat((turned, x_SBND[..., width:]), -1)


@on_ascend(reference.rotary_packed, dtypes=_FLOATS, refuses=_not_by_rotary_packed)
def rotary_packed(mixed_SBGX: Tensor, head_size: int, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Return `reference.rotary_packed` by `rotary_position_embedding`. Not verified: never run on an NPU."""
    S, B, G, X = mixed_SBGX.shape
    turning, value = reference.split_last_dim(mixed_SBGX, (X - head_size, head_size))
    turned = rotary(turning.reshape(S, B, -1, head_size), cos, sin, interleaved)
    return mint.cat((turned.reshape(S, B, G, X - head_size), value), -1)


def _not_by_latent_rotary(
    query_SBNX: Tensor, latent_SBNY: Tensor, k_pos_SBR: Tensor, cos: Tensor, sin: Tensor  # noqa: ARG001
) -> str:
    return _not_by_rotary(query_SBNX.shape, cos, True)


@on_ascend(reference.latent_heads, dtypes=_FLOATS, refuses=_not_by_latent_rotary)
def latent_heads(
    query_SBNX: Tensor, latent_SBNY: Tensor, k_pos_SBR: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `reference.latent_heads` by `rotary_position_embedding`. Not verified: never run on an NPU."""
    turn = lambda x: rotary(x.contiguous(), cos, sin, True)  # noqa: E731
    return reference._latent_heads(turn, query_SBNX, latent_SBNY, k_pos_SBR)
