"""Causal attention by the compiled kernels: queries, keys and values apart, or packed as the projection leaves them."""

from __future__ import annotations

from ctypes import c_int64
from typing import Any, NamedTuple

import numpy as np
from mindspore import Tensor

from parallel_core.autograd import Function
from parallel_core.ops import raw, reference
from parallel_core.ops.library import declare, lib
from parallel_core.ops.registry import compiled

_WORD = (1 << 64) - 1

_Addresses = tuple[int, int, int]
"""Where queries, keys and values begin."""


declare("pc_attention", "PPPPPPPFFUU")
declare("pc_attention_grad", "PPPPPPPPPPPFFUU")


class _Problem(NamedTuple):
    """What does not change between forward and backward."""

    sizes: tuple[int, int, int, int, int]
    """S, B, N, G, D."""
    strides: tuple[int, ...]
    """(s, b, group) strides of queries, keys and values, in elements."""
    start: Tensor | None
    scale: float
    rate: float
    seed: tuple[int, int]

    def numbers(self) -> tuple[Any, ...]:
        shape = (c_int64 * 23)(*self.sizes, *self.strides, *self.strides)
        return shape, self.scale, self.rate, self.seed[0] & _WORD, self.seed[1] & _WORD


def _forward(ctx: Any, addresses: _Addresses, problem: _Problem) -> Tensor:
    S, B, N, _, D = problem.sizes
    out, log_sum_exp = raw.new((S, B, N * D)), np.empty((B, N, S), np.float32)
    lib.pc_attention(
        *addresses, raw.pointer(problem.start), out.data_ptr(), log_sum_exp.ctypes.data, *problem.numbers()
    )
    ctx.problem, ctx.log_sum_exp = problem, log_sum_exp
    return out


def _backward(ctx: Any, addresses: _Addresses, out: Tensor, dout: Tensor, gradients: _Addresses) -> None:
    problem: _Problem = ctx.problem
    dout = dout.contiguous()
    lib.pc_attention_grad(
        *addresses,
        raw.pointer(problem.start),
        out.data_ptr(),
        dout.data_ptr(),
        ctx.log_sum_exp.ctypes.data,
        *gradients,
        *problem.numbers(),
    )


class _Attention(Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        start: Tensor | None,
        scale: float,
        rate: float,
        seed: tuple[int, int],
    ) -> Tensor:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        S, B, N, D = query.shape
        G = key.shape[2]
        q_strides, k_strides = (B * N * D, N * D, N // G * D), (B * G * D, G * D, D)
        problem = _Problem((S, B, N, G, D), (*q_strides, *k_strides, *k_strides), start, scale, rate, seed)
        out = _forward(ctx, (query.data_ptr(), key.data_ptr(), value.data_ptr()), problem)
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out = ctx.saved_tensors
        dq, dk, dv = raw.new(query.shape), raw.new(key.shape), raw.new(value.shape)
        addresses = query.data_ptr(), key.data_ptr(), value.data_ptr()
        _backward(ctx, addresses, out, dout, (dq.data_ptr(), dk.data_ptr(), dv.data_ptr()))
        return dq, dk, dv, None, None, None, None


class _PackedAttention(Function):
    @staticmethod
    def forward(
        ctx: Any,
        mixed: Tensor,
        head_size: int,
        start: Tensor | None,
        scale: float,
        rate: float,
        seed: tuple[int, int],
    ) -> Tensor:
        mixed = mixed.contiguous()
        S, B, G, X = mixed.shape
        sizes = S, B, (X // head_size - 2) * G, G, head_size
        problem = _Problem(sizes, (B * G * X, G * X, X) * 3, start, scale, rate, seed)
        out = _forward(ctx, _parts(mixed, head_size), problem)
        ctx.save_for_backward(mixed, out)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        mixed, out = ctx.saved_tensors
        head_size = ctx.problem.sizes[-1]
        dmixed = raw.new(mixed.shape)
        _backward(ctx, _parts(mixed, head_size), out, dout, _parts(dmixed, head_size))
        return dmixed, None, None, None, None, None


def _parts(mixed: Tensor, head_size: int) -> _Addresses:
    """Return where the first query, key and value of packed [S, B, G, (N / G + 2) * D] stand."""
    start, X = mixed.data_ptr(), mixed.shape[-1]
    return start, start + 4 * (X - 2 * head_size), start + 4 * (X - head_size)


def _other_value_size(query_SBND: Tensor, key_SBGD: Tensor, value_SBGE: Tensor, **_: Any) -> str:
    return "" if value_SBGE.shape[-1] == query_SBND.shape[-1] else "the values' head size is not the queries'"


@compiled(reference.causal_attention, integers=["document_start_BS"], refuses=_other_value_size)
def _causal_attention(
    query_SBND: Tensor,
    key_SBGD: Tensor,
    value_SBGE: Tensor,
    *,
    scale: float,
    softmax_coefficient: float = 1.0,
    softmax_in_fp32: bool = True,  # noqa: ARG001 - these kernels compute in float32 anyway
    document_start_BS: Tensor | None = None,
    dropout_rate: float = 0.0,
    dropout_seed: tuple[int, int] = (0, 0),
) -> Tensor:
    """Nothing of S x S elements is stored, forward or backward."""
    start = None if document_start_BS is None else raw.int32(document_start_BS)
    factor = scale * softmax_coefficient
    return _Attention.apply(query_SBND, key_SBGD, value_SBGE, start, factor, dropout_rate, dropout_seed)


@compiled(reference.causal_attention_packed, integers=["document_start_BS"])
def _causal_attention_packed(
    mixed_SBGX: Tensor,
    head_size: int,
    *,
    scale: float,
    softmax_coefficient: float = 1.0,
    softmax_in_fp32: bool = True,  # noqa: ARG001 - these kernels compute in float32 anyway
    document_start_BS: Tensor | None = None,
    dropout_rate: float = 0.0,
    dropout_seed: tuple[int, int] = (0, 0),
) -> Tensor:
    """Queries, keys, values and their gradients are never copied."""
    start = None if document_start_BS is None else raw.int32(document_start_BS)
    factor = scale * softmax_coefficient
    return _PackedAttention.apply(mixed_SBGX, head_size, start, factor, dropout_rate, dropout_seed)
