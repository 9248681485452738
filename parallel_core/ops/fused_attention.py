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
declare("pc_cached_attention", "PPPPPPPPPF")


class _Problem(NamedTuple):
    """What does not change between forward and backward."""

    sizes: tuple[int, ...]
    """S, T, B, N, G, D, E, position of the first query and of the first key, first head, heads of the layer."""
    strides: tuple[int, ...]
    """(s, b, group) strides of queries, keys and values, in elements."""
    start: Tensor | None
    scale: float
    rate: float
    seed: tuple[int, int]

    def numbers(self) -> tuple[Any, ...]:
        shape = (c_int64 * 29)(*self.sizes, *self.strides, *self.strides)
        return shape, self.scale, self.rate, self.seed[0] & _WORD, self.seed[1] & _WORD


def _forward(addresses: _Addresses, problem: _Problem) -> tuple[Tensor, Tensor]:
    S, _, B, N, _, _, E = problem.sizes[:7]
    out, log_sum_exp = raw.new((S, B, N * E)), raw.new((B, N, S))
    lib.pc_attention(
        *addresses, raw.pointer(problem.start), out.data_ptr(), log_sum_exp.data_ptr(), *problem.numbers()
    )
    return out, log_sum_exp


def _backward(
    addresses: _Addresses, problem: _Problem, out: Tensor, dout: Tensor, log_sum_exp: Tensor, gradients: _Addresses
) -> None:
    dout = dout.contiguous()
    lib.pc_attention_grad(
        *addresses,
        raw.pointer(problem.start),
        out.data_ptr(),
        dout.data_ptr(),
        log_sum_exp.data_ptr(),
        *gradients,
        *problem.numbers(),
    )


# ---- blocks (no autograd) -------------------------------------------------------------------------------------------
@compiled(reference.attention_block, integers=["start_BS"])
def _attention_block(
    query_SBND: Tensor,
    key_TBGD: Tensor,
    value_TBGE: Tensor,
    start_BS: Tensor | None,
    *,
    q_first: int,
    k_first: int,
    scale: float,
    dropout_rate: float = 0.0,
    dropout_seed: tuple[int, int] = (0, 0),
    heads: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Positions are numbers of the kernel, so a block of a sequence costs its share of the whole."""
    query, key, value = query_SBND.contiguous(), key_TBGD.contiguous(), value_TBGE.contiguous()
    places, start = (q_first, k_first), None if start_BS is None else raw.int32(start_BS)
    problem = _problem(query, key, value, places, heads, start, scale, dropout_rate, dropout_seed)
    return _forward((query.data_ptr(), key.data_ptr(), value.data_ptr()), problem)


@compiled(reference.attention_block_grad, integers=["start_BS"])
def _attention_block_grad(
    query_SBND: Tensor,
    key_TBGD: Tensor,
    value_TBGE: Tensor,
    start_BS: Tensor | None,
    out_SBX: Tensor,
    dout_SBX: Tensor,
    log_sum_exp_BNS: Tensor,
    *,
    q_first: int,
    k_first: int,
    scale: float,
    dropout_rate: float = 0.0,
    dropout_seed: tuple[int, int] = (0, 0),
    heads: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The weights are computed again from the log-sum-exp over all blocks."""
    query, key, value = query_SBND.contiguous(), key_TBGD.contiguous(), value_TBGE.contiguous()
    places, start = (q_first, k_first), None if start_BS is None else raw.int32(start_BS)
    problem = _problem(query, key, value, places, heads, start, scale, dropout_rate, dropout_seed)
    dq, dk, dv = raw.new(query.shape), raw.new(key.shape), raw.new(value.shape)
    addresses = query.data_ptr(), key.data_ptr(), value.data_ptr()
    gradients = dq.data_ptr(), dk.data_ptr(), dv.data_ptr()
    _backward(addresses, problem, out_SBX.contiguous(), dout_SBX, log_sum_exp_BNS.contiguous(), gradients)
    return dq, dk, dv


declare("pc_join_blocks", "PPPPPPLLLL")


@compiled(reference.join_blocks)
def _join_blocks(
    out_SBX: Tensor, log_sum_exp_BNS: Tensor, other_SBX: Tensor, other_log_sum_exp_BNS: Tensor
) -> tuple[Tensor, Tensor]:
    """One pass over both."""
    (B, N, S), X = log_sum_exp_BNS.shape, out_SBX.shape[-1]
    inputs = [x.contiguous() for x in (out_SBX, log_sum_exp_BNS, other_SBX, other_log_sum_exp_BNS)]
    out, log_sum_exp = raw.new((S, B, X)), raw.new((B, N, S))
    lib.pc_join_blocks(*(x.data_ptr() for x in (*inputs, out, log_sum_exp)), S, B, N, X // N)
    return out, log_sum_exp


# ---- whole sequences ------------------------------------------------------------------------------------------------
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
        heads: tuple[int, int] | None,
    ) -> Tensor:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        ctx.problem = _problem(query, key, value, (0, 0), heads, start, scale, rate, seed)
        out, ctx.log_sum_exp = _forward((query.data_ptr(), key.data_ptr(), value.data_ptr()), ctx.problem)
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out = ctx.saved_tensors
        dq, dk, dv = raw.new(query.shape), raw.new(key.shape), raw.new(value.shape)
        addresses = query.data_ptr(), key.data_ptr(), value.data_ptr()
        gradients = dq.data_ptr(), dk.data_ptr(), dv.data_ptr()
        _backward(addresses, ctx.problem, out, dout, ctx.log_sum_exp, gradients)
        return dq, dk, dv, None, None, None, None, None


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
        heads: tuple[int, int] | None,
    ) -> Tensor:
        mixed = mixed.contiguous()
        S, B, G, X = mixed.shape
        N = (X // head_size - 2) * G
        sizes = S, S, B, N, G, head_size, head_size, 0, 0, *(heads or (0, N))
        ctx.problem = _Problem(sizes, (B * G * X, G * X, X) * 3, start, scale, rate, seed)
        out, ctx.log_sum_exp = _forward(_parts(mixed, head_size), ctx.problem)
        ctx.save_for_backward(mixed, out)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        mixed, out = ctx.saved_tensors
        head_size = ctx.problem.sizes[5]
        dmixed = raw.new(mixed.shape)
        _backward(_parts(mixed, head_size), ctx.problem, out, dout, ctx.log_sum_exp, _parts(dmixed, head_size))
        return dmixed, None, None, None, None, None, None


def _problem(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: tuple[int, int],
    heads: tuple[int, int] | None,
    start: Tensor | None,
    scale: float,
    rate: float,
    seed: tuple[int, int],
) -> _Problem:
    (S, B, N, D), (T, _, G, E) = query.shape, value.shape
    strides = (B * N * D, N * D, N // G * D), (B * G * D, G * D, D), (B * G * E, G * E, E)
    sizes = S, T, B, N, G, D, E, *first, *(heads or (0, N))
    return _Problem(sizes, sum(strides, ()), start, scale, rate, seed)


def _parts(mixed: Tensor, head_size: int) -> _Addresses:
    """Return where the first query, key and value of packed [S, B, G, (N / G + 2) * D] stand."""
    start, X = mixed.data_ptr(), mixed.shape[-1]
    return start, start + 4 * (X - 2 * head_size), start + 4 * (X - head_size)


@compiled(reference.causal_attention, integers=["document_start_BS"])
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
    heads: tuple[int, int] | None = None,
) -> Tensor:
    """Nothing of S x S elements is stored, forward or backward."""
    start = None if document_start_BS is None else raw.int32(document_start_BS)
    factor = scale * softmax_coefficient
    return _Attention.apply(query_SBND, key_SBGD, value_SBGE, start, factor, dropout_rate, dropout_seed, heads)


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
    heads: tuple[int, int] | None = None,
) -> Tensor:
    """Queries, keys, values and their gradients are never copied."""
    start = None if document_start_BS is None else raw.int32(document_start_BS)
    factor = scale * softmax_coefficient
    return _PackedAttention.apply(mixed_SBGX, head_size, start, factor, dropout_rate, dropout_seed, heads)


# ---- new tokens and cached ones (no autograd) -----------------------------------------------------------------------
def _over_cache(
    addresses: _Addresses,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    keys: np.ndarray,
    values: np.ndarray,
    rows: np.ndarray,
    firsts: np.ndarray,
    scale: float,
) -> Tensor:
    S, B, N, _, _, E, _, _ = sizes
    out = raw.new((S, B, N * E))
    shape = (c_int64 * 17)(*sizes, *strides)
    lib.pc_cached_attention(
        *addresses,
        keys.ctypes.data,
        values.ctypes.data,
        rows.ctypes.data,
        firsts.ctypes.data,
        out.data_ptr(),
        shape,
        scale,
    )
    return out


@compiled(reference.cached_attention, integers=["rows", "firsts"])
def _cached_attention(
    query_SBND: Tensor,
    key_SBGD: Tensor,
    value_SBGE: Tensor,
    keys_RGTD: np.ndarray,
    values_RGTE: np.ndarray,
    rows: np.ndarray,
    firsts: np.ndarray,
    *,
    scale: float,
    window: int,
) -> Tensor:
    query, key, value = query_SBND.contiguous(), key_SBGD.contiguous(), value_SBGE.contiguous()
    (S, B, N, D), (_, _, G, E) = query.shape, value.shape
    strides = (B * N * D, N * D, N // G * D, B * G * D, G * D, D, B * G * E, G * E, E)
    sizes = (S, B, N, G, D, E, keys_RGTD.shape[2], window)
    addresses = query.data_ptr(), key.data_ptr(), value.data_ptr()
    return _over_cache(addresses, sizes, strides, keys_RGTD, values_RGTE, rows, firsts, scale)


@compiled(reference.cached_attention_packed, integers=["rows", "firsts"])
def _cached_attention_packed(
    mixed_SBGX: Tensor,
    head_size: int,
    keys_RGTD: np.ndarray,
    values_RGTE: np.ndarray,
    rows: np.ndarray,
    firsts: np.ndarray,
    *,
    scale: float,
    window: int,
) -> Tensor:
    mixed = mixed_SBGX.contiguous()
    S, B, G, X = mixed.shape
    sizes = (S, B, (X // head_size - 2) * G, G, head_size, head_size, keys_RGTD.shape[2], window)
    strides = (B * G * X, G * X, X) * 3
    return _over_cache(_parts(mixed, head_size), sizes, strides, keys_RGTD, values_RGTE, rows, firsts, scale)
