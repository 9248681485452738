"""Causal attention by the compiled kernels: queries, keys and values apart, or packed as the projection leaves them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from ctypes import c_int, c_int64
from typing import Any, NamedTuple

import numpy as np
from mindspore import Tensor

from parallel_core.autograd import Function
from parallel_core.ops import memory, raw, reference, reference_meetings
from parallel_core.ops.library import bits_of, declare, lib
from parallel_core.ops.meetings import Meeting
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


# ---- runs of positions that meet (no autograd) -----------------------------------------------------------------------
declare("pc_attention_meetings", "PPPPLPPPPLFFUU")
declare("pc_attention_meetings_grad", "PPPPLPPPPPPPPLFFUU")


@functools.lru_cache(maxsize=512)
def _numbers(rows: tuple[tuple[int, ...], ...]) -> Any:
    """Return integers as a C array, the same one for the layers and microbatches of a model."""
    flat = [number for row in rows for number in row]
    return (c_int64 * len(flat))(*flat)


@functools.lru_cache(maxsize=64)
def _of_meetings(
    query: tuple[int, ...], keys: tuple[int, ...], length: int, head_size: int, heads: tuple[int, int] | None
) -> tuple[int, int, Any]:
    """Return the number of heads, the size of a value, and what the kernels are told of shapes."""
    (_, B, G, W), Y = query, keys[-1]
    N, E = W // head_size * G, Y - head_size
    sizes = length, 0, B, N, G, head_size, E, 0, 0, *(heads or (0, N))
    return N, E, _numbers((sizes, (B * G * W, G * W, W), *((B * G * Y, G * Y, Y),) * 2))


def _places(query: Tensor, keys: Tensor, head_size: int) -> _Addresses:
    at = keys.data_ptr()
    return query.data_ptr(), at, at + 4 * head_size


def _starts(start: Tensor | None) -> tuple[Tensor | None, int]:
    """Return the first visible positions as the kernels read them, and how many there are of a sample."""
    return (None, 0) if start is None else (raw.int32(start), start.shape[1])


def _nothing(query: tuple[int, ...], length: int, N: int, E: int) -> tuple[Tensor, Tensor]:
    """Return the attention to no keys of queries of a shape."""
    S, B = query[:2]
    log_sum_exp = np.full((S // length, B, N, length), -np.inf, np.float32)
    return raw.zeros((S, B, N * E)), raw.on(log_sum_exp)


@compiled(reference_meetings.attention_of_meetings, integers=["start_BP"])
def _attention_of_meetings(
    query_SBGW: Tensor,
    keys_TBGY: Tensor,
    out_SBX: Tensor | None,
    log_sum_exp_CBNL: Tensor | None,
    start_BP: Tensor | None,
    *,
    meetings: tuple[Meeting, ...],
    length: int,
    head_size: int,
    scale: float,
    dropout_rate: float = 0.0,
    dropout_seed: tuple[int, int] = (0, 0),
    heads: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """One call for all meetings; each goes on with the softmax of the one before, in its memory."""
    query, keys = query_SBGW.contiguous(), keys_TBGY.contiguous()
    N, E, shape = _of_meetings(query.shape, keys.shape, length, head_size, heads)
    if out_SBX is None or log_sum_exp_CBNL is None:
        out, log_sum_exp = _nothing(query.shape, length, N, E)
    else:
        out, log_sum_exp = out_SBX.contiguous(), log_sum_exp_CBNL.contiguous()
    start, positions = _starts(start_BP)
    lib.pc_attention_meetings(
        *_places(query, keys, head_size), raw.pointer(start), positions, out.data_ptr(), log_sum_exp.data_ptr(), shape,
        _numbers(meetings), len(meetings), scale, dropout_rate, dropout_seed[0] & _WORD, dropout_seed[1] & _WORD,
    )  # fmt: skip
    return out, log_sum_exp


@compiled(reference_meetings.attention_of_meetings_grad, integers=["start_BP"])
def _attention_of_meetings_grad(
    query_SBGW: Tensor,
    keys_TBGY: Tensor,
    out_SBX: Tensor,
    dout_SBX: Tensor,
    log_sum_exp_CBNL: Tensor,
    dquery_SBGW: Tensor | None,
    start_BP: Tensor | None,
    *,
    meetings: tuple[Meeting, ...],
    length: int,
    head_size: int,
    scale: float,
    dropout_rate: float = 0.0,
    dropout_seed: tuple[int, int] = (0, 0),
    heads: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The weights are computed again from the log-sum-exp over all keys."""
    query, keys = query_SBGW.contiguous(), keys_TBGY.contiguous()
    _, _, shape = _of_meetings(query.shape, keys.shape, length, head_size, heads)
    out, dout, log_sum_exp = out_SBX.contiguous(), dout_SBX.contiguous(), log_sum_exp_CBNL.contiguous()
    dquery = raw.zeros(query.shape) if dquery_SBGW is None else dquery_SBGW.contiguous()
    dkeys = raw.zeros(keys.shape)
    start, positions = _starts(start_BP)
    lib.pc_attention_meetings_grad(
        *_places(query, keys, head_size), raw.pointer(start), positions,
        out.data_ptr(), dout.data_ptr(), log_sum_exp.data_ptr(), *_places(dquery, dkeys, head_size), shape,
        _numbers(meetings), len(meetings), scale, dropout_rate, dropout_seed[0] & _WORD, dropout_seed[1] & _WORD,
    )  # fmt: skip
    return dquery, dkeys


# ---- a ring of ranks, whose keys visit each other in one call --------------------------------------------------------
declare("pc_ring_attention", "PPPPLPLPPPPPLFFUU", returns=c_int)
declare("pc_ring_attention_grad", "PPPPLPLPPPPPPPPLFFUU", returns=c_int)


class Ring:
    """What one rank's queries meet on a ring, and how keys get round it.

    Args:
        fields: addresses of the collectives' group and of its functions that send and receive; the number of the type
            float32; places of the next rank and of the one before.
        limit_s: time limit of a message.
        check: raises what the status of messages means, of the tensor that was passed on.
        visits: what is met of this rank's keys, of those of the rank before it, ...
        options: those of `attention_of_meetings` but the meetings.
    """

    def __init__(
        self,
        fields: tuple[int, ...],
        limit_s: float,
        check: Callable[[int, Tensor], None],
        visits: tuple[tuple[Meeting, ...], ...],
        options: dict[str, Any],
    ) -> None:
        self._fields, self._check = _fields(fields, limit_s), check
        counts = tuple(map(len, visits))
        self._met, self._counts, self._ranks = _numbers(sum(visits, ())), _numbers((counts,)), len(visits)
        self._length, self._head_size, self._heads = options["length"], options["head_size"], options["heads"]
        seed = options["dropout_seed"]
        self._factors = options["scale"], options["dropout_rate"], seed[0] & _WORD, seed[1] & _WORD

    def attend(self, query_SBGW: Tensor, keys_SBGY: Tensor, start_BP: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return what `attention_of_meetings` gives over the keys of all ranks."""
        N, E, shape = _of_meetings(query_SBGW.shape, keys_SBGY.shape, self._length, self._head_size, self._heads)
        out, log_sum_exp = _nothing(query_SBGW.shape, self._length, N, E)
        start, positions = _starts(start_BP)
        room, n = memory.empty((keys_SBGY.size,)), keys_SBGY.size
        status = lib.pc_ring_attention(
            self._fields, query_SBGW.data_ptr(), keys_SBGY.data_ptr(), room.ctypes.data, n,
            raw.pointer(start), positions,
            out.data_ptr(), log_sum_exp.data_ptr(), shape, self._met, self._counts, self._ranks, *self._factors,
        )  # fmt: skip
        self._check(status, keys_SBGY)
        return out, log_sum_exp

    def take_back(
        self,
        query_SBGW: Tensor,
        keys_SBGY: Tensor,
        out_SBX: Tensor,
        dout_SBX: Tensor,
        log_sum_exp_CBNL: Tensor,
        start_BP: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of this rank's queries, and of its keys from the queries of all ranks."""
        _, _, shape = _of_meetings(query_SBGW.shape, keys_SBGY.shape, self._length, self._head_size, self._heads)
        dquery, dkeys = raw.zeros(query_SBGW.shape), raw.new(keys_SBGY.shape)
        start, positions = _starts(start_BP)
        room, n = memory.empty((2 * dkeys.size,)), dkeys.size
        addresses = [x.data_ptr() for x in (out_SBX, dout_SBX.contiguous(), log_sum_exp_CBNL, dquery, dkeys)]
        status = lib.pc_ring_attention_grad(
            self._fields, query_SBGW.data_ptr(), keys_SBGY.data_ptr(), room.ctypes.data, n,
            raw.pointer(start), positions,
            *addresses, shape, self._met, self._counts, self._ranks, *self._factors,
        )  # fmt: skip
        self._check(status, keys_SBGY)
        return dquery, dkeys


@functools.lru_cache(maxsize=16)
def _fields(fields: tuple[int, ...], limit_s: float) -> Any:
    return (c_int64 * (len(fields) + 1))(*fields, bits_of(limit_s))


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
        ctx.problem = _problem(query, key, value, heads, start, scale, rate, seed)
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
    heads: tuple[int, int] | None,
    start: Tensor | None,
    scale: float,
    rate: float,
    seed: tuple[int, int],
) -> _Problem:
    (S, B, N, D), (T, _, G, E) = query.shape, value.shape
    strides = (B * N * D, N * D, N // G * D), (B * G * D, G * D, D), (B * G * E, G * E, E)
    sizes = S, T, B, N, G, D, E, 0, 0, *(heads or (0, N))
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
