"""Kernels of Ascend NPUs, thin over MindSpore's operators, with the signatures of `reference`.

They need an NPU to run. Tests elsewhere check what is handed to an operator, and compute what it is documented to.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeGuard

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint, ops
from mindspore.ops.auto_generate import FlashAttentionScore, FlashAttentionScoreGrad

from parallel_core.ops import reference, reference_meetings
from parallel_core.ops.ascend_random import drop_bits
from parallel_core.ops.documents import ends_of, window_of
from parallel_core.ops.meetings import Meeting, attend_by_blocks, gradients_by_blocks
from parallel_core.ops.registry import KERNELS, on_ascend

_FULL_MASK, _CAUSAL, _CAUSAL_FROM_END, _BAND = 1, 2, 3, 4
"""`sparse_mode` of a mask that is given whole, and of those that hide what is after a query's own position: positions
counted from the first query and key, from the last ones, or with a window before it."""
_CORNER = 2048
"""Rows and columns of the mask that stands for a causal one of any size."""
_FLOATS = ms.float32, ms.float16, ms.bfloat16
_ANY = 2**31 - 1
"""Tokens before and after a query that it may see, for the mask to say which."""
_MOST_SEQUENCES = 1024
"""Sequences that the layout TND takes."""


def has_flash_attention() -> bool:
    """Return whether this device has `flash_attention_score`."""
    return str(ms.get_context("device_target")) == "Ascend"


def attention_functions(use_flash: bool, input_layout: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Return `causal_attention` and `causal_attention_packed` of a model on Ascend.

    Args:
        use_flash: whether the model wants the fused operator, which `use_kernels` has to have selected as well.
        input_layout: see `flash_attention`.
    """
    attend = partial(_selected, input_layout) if use_flash else reference.causal_attention
    return attend, partial(_packed, attend)


def _selected(input_layout: str, *inputs: Tensor, **options: Any) -> Tensor:
    if KERNELS["causal_attention"].selected is flash_attention:
        return flash_attention(*inputs, input_layout=input_layout, **options)
    return reference.causal_attention(*inputs, **options)


def _packed(attend: Callable[..., Tensor], mixed_SBGX: Tensor, head_size: int, **options: Any) -> Tensor:
    S, B, _, X = mixed_SBGX.shape
    query, key, value = reference.split_last_dim(mixed_SBGX, (X - 2 * head_size, head_size, head_size))
    return attend(query.reshape(S, B, -1, head_size), key, value, **options)


def _not_by_flash_attention(
    query_SBND: Tensor,
    key_SBGD: Tensor,
    value_SBGE: Tensor,
    *,
    softmax_coefficient: float = 1.0,
    dropout_rate: float = 0.0,
    **_: Any,
) -> str:
    S, _, _, D = query_SBND.shape
    if D % 16 or D > 512:
        return "the head size is not a multiple of 16 up to 512"
    if value_SBGE.shape[-1] > D:
        return "the values' head size is larger than the queries'"
    if dropout_rate and S % 8:
        return "the sequence length is not a multiple of 8, and attention weights are dropped"
    return "the softmax has a coefficient" if softmax_coefficient != 1.0 else ""


@on_ascend(
    reference.causal_attention,
    dtypes=(ms.float16, ms.bfloat16),
    integers=["document_start_BS"],
    refuses=_not_by_flash_attention,
)
def flash_attention(
    query_SBND: Tensor,
    key_SBGD: Tensor,
    value_SBGE: Tensor,
    *,
    scale: float,
    softmax_coefficient: float = 1.0,  # noqa: ARG001 - only 1 comes here
    softmax_in_fp32: bool = True,  # noqa: ARG001 - the operator computes its softmax in float32
    document_start_BS: Tensor | None = None,
    dropout_rate: float = 0.0,
    dropout_seed: tuple[int, int] = (0, 0),
    heads: tuple[int, int] | None = None,
    input_layout: str = "SBH",
) -> Tensor:
    """Return `reference.causal_attention`, [S, B, N * E], by the fused operator. Not verified: never run on an NPU.

    What the operator does not take (other types than float16 and bfloat16, head sizes that are no multiple of 16, a
    softmax coefficient) the reference computes. Values of a smaller head size are filled up with zeros.

    Where the host knows the documents (`documents.remember`) they are sequences of their own in the layout TND, and a
    window is a band: neither needs a mask of the sequence's size. Else the operator gets one, made on the device.

    Args:
        query_SBND: queries.
        key_SBGD: keys.
        value_SBGE: values.
        scale: factor of the scores.
        softmax_coefficient: see the reference.
        softmax_in_fp32: see the reference.
        document_start_BS: int32, first position that each position may see; None: 0 everywhere.
        dropout_rate: see the reference.
        dropout_seed: see the reference; the mask is another one than the reference's.
        heads: see the reference; ranks with other heads draw other masks.
        input_layout: SBH or BNSD, the axes in which the operator gets its inputs.
    """
    (S, B, N, D), E = query_SBND.shape, value_SBGE.shape[-1]
    if E < D:
        value_SBGE = mint.cat((value_SBGE, mint.zeros((*value_SBGE.shape[:3], D - E), dtype=value_SBGE.dtype)), -1)
    options: dict[str, Any] = {"attn_mask": _corner(), "sparse_mode": _CAUSAL}
    weights = B * N * S * S
    if document_start_BS is not None:
        ends, window = ends_of(document_start_BS), window_of(document_start_BS)
        if window is not None:
            options |= {"sparse_mode": _BAND, "pre_tokens": window, "next_tokens": 0}
        elif _are_sequences(ends, N, dropout_rate):
            input_layout, weights = "TND", N * _squares(ends)
            options |= {"pre_tokens": _ANY, "next_tokens": 0, "actual_seq_qlen": ends, "actual_seq_kvlen": ends}
        else:
            options = {"attn_mask": _document_mask(S, document_start_BS), "sparse_mode": _FULL_MASK}
    if dropout_rate:
        seed = (dropout_seed[0] + (heads[0] if heads else 0)) % 2**31, dropout_seed[1]
        bits = drop_bits(weights, dropout_rate, seed)
        kept = bits if input_layout == "TND" else bits.reshape(B, N, S, S // 8)
        options |= {"keep_prob": 1.0 - dropout_rate, "drop_mask": kept}
    inputs = [_laid_out(x, input_layout) for x in (query_SBND, key_SBGD, value_SBGE)]
    context = ops.flash_attention_score(*inputs, N, scalar_value=scale, input_layout=input_layout, **options)
    if input_layout == "BNSD":
        context = context.transpose(2, 0, 1, 3)
    elif input_layout == "TND":
        context = context.reshape(B, S, N, D).transpose(1, 0, 2, 3)
    return context.reshape(S, B, N, D)[..., :E].reshape(S, B, N * E) if E < D else context.reshape(S, B, N * D)


def _are_sequences(ends: tuple[int, ...] | None, N: int, dropout_rate: float) -> TypeGuard[tuple[int, ...]]:
    """Return whether documents that end there can be sequences of the layout TND."""
    return ends is not None and len(ends) <= _MOST_SEQUENCES and not (dropout_rate and N * _squares(ends) % 8)


def _squares(ends: tuple[int, ...]) -> int:
    """Return the sum of the squared lengths of documents that end there."""
    return sum((end - start) ** 2 for start, end in zip((0, *ends), ends))


@on_ascend(
    reference.causal_attention_packed, dtypes=(ms.float16, ms.bfloat16), integers=["document_start_BS"]
)
def causal_attention_packed(
    mixed_SBGX: Tensor,
    head_size: int,
    *,
    scale: float,
    softmax_coefficient: float = 1.0,
    softmax_in_fp32: bool = True,
    document_start_BS: Tensor | None = None,
    dropout_rate: float = 0.0,
    dropout_seed: tuple[int, int] = (0, 0),
    heads: tuple[int, int] | None = None,
) -> Tensor:
    """Return `reference.causal_attention_packed` by `flash_attention`. Not verified: never run on an NPU."""
    return _packed(
        flash_attention, mixed_SBGX, head_size, scale=scale, softmax_coefficient=softmax_coefficient,
        softmax_in_fp32=softmax_in_fp32, document_start_BS=document_start_BS, dropout_rate=dropout_rate,
        dropout_seed=dropout_seed, heads=heads,
    )  # fmt: skip


def _not_by_bidirectional(
    query_SBND: Tensor, key_SBND: Tensor, value_SBND: Tensor, seen_BS: Tensor | None, **options: Any  # noqa: ARG001
) -> str:
    return _not_by_flash_attention(query_SBND, key_SBND, value_SBND, dropout_rate=options.get("dropout_rate", 0.0))


@on_ascend(
    reference.bidirectional_attention,
    dtypes=(ms.float16, ms.bfloat16),
    integers=["seen_BS"],
    refuses=_not_by_bidirectional,
)
def bidirectional_attention(
    query_SBND: Tensor,
    key_SBND: Tensor,
    value_SBND: Tensor,
    seen_BS: Tensor | None,
    *,
    scale: float,
    dropout_rate: float = 0.0,
    dropout_seed: tuple[int, int] = (0, 0),
) -> Tensor:
    """Return `reference.bidirectional_attention` by `flash_attention_score`. Not verified: never run on an NPU."""
    S, B, N, _ = query_SBND.shape
    options: dict[str, Any] = {"attn_mask": None, "sparse_mode": 0}
    if seen_BS is not None:
        hidden = (seen_BS == 0).reshape(B, 1, 1, S).broadcast_to((B, 1, S, S))
        options = {"attn_mask": hidden, "sparse_mode": _FULL_MASK}
    if dropout_rate:
        kept = drop_bits(B * N * S * S, dropout_rate, dropout_seed).reshape(B, N, S, S // 8)
        options |= {"keep_prob": 1.0 - dropout_rate, "drop_mask": kept}
    inputs = map(_rows, (query_SBND, key_SBND, value_SBND))
    return ops.flash_attention_score(*inputs, N, scalar_value=scale, input_layout="SBH", **options)


@functools.cache
def _corner() -> Tensor:
    return Tensor(np.triu(np.ones((_CORNER, _CORNER), bool), 1))


_last_documents: tuple[Tensor, Tensor] | None = None


def _document_mask(S: int, start_BS: Tensor) -> Tensor:
    """Return `reference.attention_mask` of documents, made on the device, and once for the layers of a microbatch."""
    global _last_documents
    if _last_documents is None or _last_documents[0] is not start_BS:
        at = Tensor(np.arange(S, dtype=np.int32))
        late = at.reshape(1, 1, 1, S) > at.reshape(1, 1, S, 1)
        mask = ops.logical_or(late, at.reshape(1, 1, 1, S) < start_BS.reshape(-1, 1, S, 1))
        _last_documents = start_BS, mask
    return _last_documents[1]


def _laid_out(x_SBND: Tensor, input_layout: str) -> Tensor:
    S, B, N, D = x_SBND.shape
    if input_layout == "TND":
        return x_SBND.transpose(1, 0, 2, 3).reshape(S * B, N, D)
    return x_SBND.reshape(S, B, N * D) if input_layout == "SBH" else x_SBND.transpose(1, 2, 0, 3)


# ---- blocks (no autograd) -------------------------------------------------------------------------------------------
def _not_by_block(query_SBND: Tensor, key_TBGD: Tensor, value_TBGE: Tensor, *_: Any, **options: Any) -> str:
    if value_TBGE.shape[-1] != query_SBND.shape[-1]:
        return "the values' head size is not the queries'"
    if options.get("dropout_rate") and key_TBGD.shape[0] % 8:
        return "the number of keys is not a multiple of 8, and attention weights are dropped"
    return _not_by_flash_attention(query_SBND, key_TBGD, value_TBGE)


@on_ascend(
    reference.attention_block, dtypes=(ms.float16, ms.bfloat16), integers=["start_BS"], refuses=_not_by_block
)
def attention_block(
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
    """Return `reference.attention_block` by FlashAttentionScore. Not verified: never run on an NPU.

    The operator returns the scores' maximum and the sum of exponentials less it, each eight times, [B, N, S, 8].
    Weights are dropped by the seed, the heads and the block's place in the sequence.
    """
    mode, hidden, sees = _block_mask(query_SBND.shape, key_TBGD.shape[0], start_BS, q_first, k_first)
    place = q_first, k_first
    kept = _kept_of_block(query_SBND.shape, key_TBGD.shape[0], dropout_rate, dropout_seed, heads, place)
    operator = FlashAttentionScore(
        query_SBND.shape[2], keep_prob=1.0 - dropout_rate, scale_value=scale, input_layout="SBH", sparse_mode=mode
    )
    inputs = map(_rows, (query_SBND, key_TBGD, value_TBGE))
    top, total, _, context = operator(*inputs, drop_mask=kept, attn_mask=hidden)
    log_sum_exp = top[..., 0] + ops.log(total[..., 0])
    if sees is not None:  # what the operator returns for queries that see no key is not documented
        log_sum_exp = ops.select(sees.expand_as(log_sum_exp), log_sum_exp, ops.full_like(log_sum_exp, -np.inf))
        context = ops.select(sees.transpose(2, 0, 1).expand_as(context), context, ops.zeros_like(context))
    return context, log_sum_exp


@on_ascend(
    reference.attention_block_grad,
    dtypes=(ms.float16, ms.bfloat16),
    integers=["start_BS", "log_sum_exp_BNS"],
    refuses=_not_by_block,
)
def attention_block_grad(
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
    """Return `reference.attention_block_grad` by FlashAttentionScoreGrad. Not verified: never run on an NPU.

    The operator weighs a score s by exp(s - maximum) / sum: with the logarithm over all blocks for the maximum, and 1
    for the sum, these are the weights of the whole softmax.
    """
    mode, hidden, _ = _block_mask(query_SBND.shape, key_TBGD.shape[0], start_BS, q_first, k_first)
    operator = FlashAttentionScoreGrad(
        query_SBND.shape[2], keep_prob=1.0 - dropout_rate, scale_value=scale, pre_tokens=_ANY, next_tokens=_ANY,
        inner_precise=0, input_layout="SBH", sparse_mode=mode,
    )  # fmt: skip
    place = q_first, k_first
    top = _eight_times(log_sum_exp_BNS)
    dq, dk, dv, *_ = operator(
        *map(_rows, (query_SBND, key_TBGD, value_TBGE)),
        dout_SBX,
        drop_mask=_kept_of_block(query_SBND.shape, key_TBGD.shape[0], dropout_rate, dropout_seed, heads, place),
        atten_mask=hidden,
        softmax_max=top,
        softmax_sum=ops.ones_like(top),
        attention_in=out_SBX,
    )
    return dq.reshape(query_SBND.shape), dk.reshape(key_TBGD.shape), dv.reshape(value_TBGE.shape)


def _rows(x_SBND: Tensor) -> Tensor:
    return _laid_out(x_SBND, "SBH")


class _Mask(NamedTuple):
    """What queries do not see.

    Attributes:
        mode: the operator's `sparse_mode`.
        hidden: True where a key is hidden, [S, T] or [B, 1, S, T], or the corner that stands for it; None: nothing is.
        sees: which queries see any key, bool [B, 1, S]; None: all of them.
    """

    mode: int
    hidden: Tensor | None
    sees: Tensor | None


def _block_mask(shape: tuple[int, ...], T: int, start_BS: Tensor | None, q_first: int, k_first: int) -> _Mask:
    """Return what queries of `shape` (S, B, ..) from position `q_first` on do not see of T keys from `k_first` on."""
    S, B = shape[:2]
    if start_BS is None and k_first + T - 1 <= q_first:
        return _Mask(0, None, None)
    if start_BS is None and k_first + T == q_first + S and S <= T:
        return _Mask(_CAUSAL_FROM_END, _corner(), None)
    late = _positions(k_first, T).reshape(1, T) > _positions(q_first, S).reshape(S, 1)
    if start_BS is None:
        sees = Tensor(np.broadcast_to(q_first + np.arange(S) >= k_first, (B, 1, S)).copy())
        return _Mask(_FULL_MASK, late, sees if k_first > q_first else None)
    before = _positions(k_first, T).reshape(1, 1, T) < start_BS.reshape(B, S, 1)
    forbidden = ops.logical_or(late.reshape(1, S, T), before).reshape(B, 1, S, T)
    return _Mask(_FULL_MASK, forbidden, ops.logical_not(forbidden).any(-1))


def _kept_of_block(
    shape: tuple[int, ...],
    T: int,
    rate: float,
    seed: tuple[int, int],
    heads: tuple[int, int] | None,
    place: tuple[int, int],
) -> Tensor | None:
    """Return the mask of a block's weights, another one for every place in the sequence and for other heads."""
    if not rate:
        return None
    S, B, N = shape[:3]
    first = (seed[0] + (heads[0] if heads else 0)) ^ place[0] << 20 ^ place[1]
    return drop_bits(B * N * S * T, rate, (first % 2**31, seed[1])).reshape(B, N, S, T // 8)


def _positions(first: int, count: int) -> Tensor:
    return Tensor(np.arange(first, first + count, dtype=np.int32))


@on_ascend(reference.join_blocks, dtypes=(ms.float32,), integers=["other_SBX"])
def join_blocks(
    out_SBX: Tensor, log_sum_exp_BNS: Tensor, other_SBX: Tensor, other_log_sum_exp_BNS: Tensor
) -> tuple[Tensor, Tensor]:
    """Return `reference.join_blocks` by ring_attention_update. Not verified: never run on an NPU.

    The operator takes a maximum and a sum of exponentials less it, each eight times, and weighs by what they make
    together: with one maximum for both, which it wants to be positive, the sums are the weights. Queries that have
    seen no key have a context of zeros in both, so that any weight will do.
    """
    top = mint.maximum(log_sum_exp_BNS, other_log_sum_exp_BNS)
    some = top > -1e30
    finite = mint.where(some, top, ops.zeros_like(top))
    one = ops.ones_like(top)
    weights = [mint.where(some, mint.exp(x - finite), one) for x in (log_sum_exp_BNS, other_log_sum_exp_BNS)]
    largest = _eight_times(one)
    joined, _, total = ops.ring_attention_update(
        out_SBX, largest, _eight_times(weights[0]),
        reference.cast(other_SBX, ms.float32), largest, _eight_times(weights[1]),
    )  # fmt: skip
    log_sum_exp = finite + mint.log(total[..., 0])
    return joined, mint.where(some, log_sum_exp, ops.full_like(top, -np.inf))


@on_ascend(reference_meetings.attention_of_meetings, dtypes=_FLOATS, integers=["start_BP"])
def attention_of_meetings(
    query_SBGW: Tensor,
    keys_TBGY: Tensor,
    out_SBX: Tensor | None,
    log_sum_exp_CBNL: Tensor | None,
    start_BP: Tensor | None,
    *,
    meetings: tuple[Meeting, ...],
    length: int,
    head_size: int,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Return `reference_meetings.attention_of_meetings` by what is selected for its blocks."""
    functions = KERNELS["attention_block"].door, KERNELS["join_blocks"].door
    return attend_by_blocks(
        *functions, query_SBGW, keys_TBGY, out_SBX, log_sum_exp_CBNL, start_BP, meetings, length, head_size, options
    )


@on_ascend(reference_meetings.attention_of_meetings_grad, dtypes=_FLOATS, integers=["start_BP"])
def attention_of_meetings_grad(
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
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Return `reference_meetings.attention_of_meetings_grad` by what is selected for its blocks."""
    return gradients_by_blocks(
        KERNELS["attention_block_grad"].door, query_SBGW, keys_TBGY, out_SBX, dout_SBX, log_sum_exp_CBNL, dquery_SBGW,
        start_BP, meetings, length, head_size, options,
    )  # fmt: skip


def _eight_times(x_BNS: Tensor) -> Tensor:
    return ops.tile(x_BNS.expand_dims(-1), (1, 1, 1, 8))
