"""Kernels of Ascend NPUs, thin over MindSpore's operators, with the signatures of `reference`.

They need an NPU to run. Tests elsewhere check what is handed to an operator, and compute what it is documented to.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint, ops
from mindspore.ops.auto_generate import (
    FlashAttentionScore,
    FlashAttentionScoreGrad,
    grouped_matmul_add_,
    grouped_matmul_v4,
)

from parallel_core.ops import reference, reference_experts
from parallel_core.ops.ascend_random import drop_mask
from parallel_core.ops.registry import KERNELS, on_ascend

_FULL_MASK, _CAUSAL = 1, 2
"""`sparse_mode` of a mask that is given whole, and of one that hides what is after a query's own position."""
_CORNER = 2048
"""Rows and columns of the mask that stands for a causal one of any size."""
_ANY = 2**31 - 1
"""Tokens before and after a query that it may see, for the mask to say which."""


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
    if document_start_BS is not None:
        options = {"attn_mask": _document_mask(S, document_start_BS), "sparse_mode": _FULL_MASK}
    if dropout_rate:
        seed = (dropout_seed[0] + (heads[0] if heads else 0)) % 2**31, dropout_seed[1]
        options |= {"keep_prob": 1.0 - dropout_rate, "drop_mask": drop_mask((B, N, S, S), dropout_rate, seed)}
    inputs = [_laid_out(x, input_layout) for x in (query_SBND, key_SBGD, value_SBGE)]
    context = ops.flash_attention_score(*inputs, N, scalar_value=scale, input_layout=input_layout, **options)
    if input_layout != "SBH":
        context = context.transpose(2, 0, 1, 3)
    return context.reshape(S, B, N, D)[..., :E].reshape(S, B, N * E) if E < D else context.reshape(S, B, N * D)


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
    return x_SBND.reshape(S, B, N * D) if input_layout == "SBH" else x_SBND.transpose(1, 2, 0, 3)


# ---- blocks (no autograd) -------------------------------------------------------------------------------------------
def _not_by_block(query_SBND: Tensor, key_TBGD: Tensor, value_TBGE: Tensor, *_: Any, **options: Any) -> str:
    if value_TBGE.shape[-1] != query_SBND.shape[-1]:
        return "the values' head size is not the queries'"
    if options.get("dropout_rate"):
        return "weights of blocks are dropped by a seed"
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
    dropout_rate: float = 0.0,  # noqa: ARG001 - only 0 comes here
    dropout_seed: tuple[int, int] = (0, 0),  # noqa: ARG001
    heads: tuple[int, int] | None = None,  # noqa: ARG001 - for dropout, which goes to the reference
) -> tuple[Tensor, Tensor]:
    """Return `reference.attention_block` by FlashAttentionScore. Not verified: never run on an NPU.

    The operator returns the scores' maximum and the sum of exponentials less it, each eight times, [B, N, S, 8].
    """
    forbidden, sees = _block_mask(query_SBND.shape, key_TBGD.shape[0], start_BS, q_first, k_first)
    operator = FlashAttentionScore(
        query_SBND.shape[2], scale_value=scale, input_layout="SBH", sparse_mode=0 if forbidden is None else _FULL_MASK
    )
    top, total, _, context = operator(*map(_rows, (query_SBND, key_TBGD, value_TBGE)), attn_mask=forbidden)
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
    dropout_rate: float = 0.0,  # noqa: ARG001 - only 0 comes here
    dropout_seed: tuple[int, int] = (0, 0),  # noqa: ARG001
    heads: tuple[int, int] | None = None,  # noqa: ARG001 - for dropout, which goes to the reference
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `reference.attention_block_grad` by FlashAttentionScoreGrad. Not verified: never run on an NPU.

    The operator weighs a score s by exp(s - maximum) / sum: with the logarithm over all blocks for the maximum, and 1
    for the sum, these are the weights of the whole softmax.
    """
    forbidden, _ = _block_mask(query_SBND.shape, key_TBGD.shape[0], start_BS, q_first, k_first)
    operator = FlashAttentionScoreGrad(
        query_SBND.shape[2], scale_value=scale, pre_tokens=_ANY, next_tokens=_ANY, inner_precise=0,
        input_layout="SBH", sparse_mode=0 if forbidden is None else _FULL_MASK,
    )  # fmt: skip
    top = ops.tile(log_sum_exp_BNS.expand_dims(-1), (1, 1, 1, 8))
    dq, dk, dv, *_ = operator(
        *map(_rows, (query_SBND, key_TBGD, value_TBGE)),
        dout_SBX,
        atten_mask=forbidden,
        softmax_max=top,
        softmax_sum=ops.ones_like(top),
        attention_in=out_SBX,
    )
    return dq.reshape(query_SBND.shape), dk.reshape(key_TBGD.shape), dv.reshape(value_TBGE.shape)


def _rows(x_SBND: Tensor) -> Tensor:
    return _laid_out(x_SBND, "SBH")


def _block_mask(
    shape: tuple[int, ...], T: int, start_BS: Tensor | None, q_first: int, k_first: int
) -> tuple[Tensor | None, Tensor | None]:
    """Return what queries of `shape` (S, B, ..) do not see of T keys, and which see any, bool [B, 1, S].

    The first is True where a key is hidden, [S, T] or [B, 1, S, T]; None where all is seen, as the second where every
    query sees a key.
    """
    S, B = shape[:2]
    q_at, k_at = q_first + np.arange(S)[:, None], k_first + np.arange(T)[None]
    hidden = k_at > q_at
    if start_BS is None:
        sees = Tensor(np.broadcast_to(~hidden.all(-1), (B, 1, S)).copy()) if k_first > q_first else None
        return (Tensor(hidden) if hidden.any() else None), sees
    before = Tensor(k_at[None].astype(np.int32)) < start_BS.reshape(B, S, 1)
    forbidden = ops.logical_or(Tensor(hidden[None]), before).reshape(B, 1, S, T)
    return forbidden, ops.logical_not(forbidden).any(-1)


# ---- experts' products (no autograd) --------------------------------------------------------------------------------
_SINGLE, _BY_ROWS = 3, 0
"""`split_item` of one tensor in and out, and `group_type` of groups of rows."""


def _without_rows(x: Tensor, *_: Any, **__: Any) -> str:
    return "" if x.shape[0] else "there are no rows"


_HALF = (ms.float16, ms.bfloat16)
_GROUPS: dict[str, Any] = {"integers": ["counts"], "refuses": _without_rows}


@on_ascend(reference_experts.grouped_linear, dtypes=(*_HALF, ms.float32), **_GROUPS)
def grouped_linear(x_NI: Tensor, weight_EOI: Tensor, counts: np.ndarray) -> Tensor:
    """Return `reference_experts.grouped_linear` by grouped_matmul. Not verified: never run on an NPU."""
    return _grouped_matmul(x_NI, weight_EOI.transpose(0, 2, 1).contiguous(), counts)


@on_ascend(reference_experts.grouped_linear_grad_input, dtypes=(*_HALF, ms.float32), **_GROUPS)
def grouped_linear_grad_input(dy_NO: Tensor, weight_EOI: Tensor, counts: np.ndarray) -> Tensor:
    """Return `reference_experts.grouped_linear_grad_input` by grouped_matmul. Not verified: never run on an NPU."""
    return _grouped_matmul(dy_NO, weight_EOI, counts)


@on_ascend(reference_experts.grouped_linear_grad_weight, dtypes=_HALF, **_GROUPS)
def grouped_linear_grad_weight(dy_NO: Tensor, x_NI: Tensor, counts: np.ndarray) -> Tensor:
    """Return `reference_experts.grouped_linear_grad_weight` by grouped_matmul_add_. Not verified: never run on an NPU.

    Sums are of float32.
    """
    there, ends = _groups(counts)
    shape = dy_NO.shape[1], x_NI.shape[1]
    dw = grouped_matmul_add_(dy_NO, x_NI, ends, ops.zeros((len(there), *shape), ms.float32))
    if len(there) < len(counts):
        every = ops.zeros((len(counts), *shape), ms.float32)
        dw = ops.tensor_scatter_update(every, Tensor(there.reshape(-1, 1).astype(np.int32)), dw)
    return dw.astype(x_NI.dtype)


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
