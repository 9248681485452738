"""The kernels' specification, in plain MindSpore operators that exist on CPU and on Ascend.

A function marked `@kernel` can be replaced, by one of the same signature that is tested against it, forward and
backward (`registry`). Two kinds of functions stand here: differentiable ones, which MindSpore's autograd goes through,
and raw ones (marked "no autograd"), which the functions of `tensor_parallel` call in their own forward and backward.

Shapes: S sequence, B microbatch, H hidden, N query heads, G key/value heads, D head size, F feed-forward,
V local vocabulary, T tokens (S * B).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint, ops

from parallel_core.autograd import Function
from parallel_core.ops.ascend_random import seeded_dropout
from parallel_core.ops.registry import kernel
from parallel_core.ops.shared import local_rows, put

_MASKED_SCORE = -10000.0
"""What Megatron writes over the scores of masked positions; exp of it is exactly 0 in float32."""

_matmul_nn = ops.MatMul()
_matmul_nt = ops.MatMul(transpose_b=True)
_matmul_tn = ops.MatMul(transpose_a=True)
_bmm_nn = ops.BatchMatMul()
_bmm_nt = ops.BatchMatMul(transpose_b=True)
_bmm_tn = ops.BatchMatMul(transpose_a=True)


@kernel
def convert(x: Tensor, dtype: Any) -> Tensor:
    """Return `x` as `dtype`, another one than its own."""
    return x.astype(dtype)


def cast(x: Tensor, dtype: Any) -> Tensor:
    """Return `x` as `dtype`; `x` itself when it has that dtype, which MindSpore's astype takes 20 us to find out."""
    return x if x.dtype == dtype else x.astype(dtype)


# ---- linear (no autograd) -------------------------------------------------------------------------------------------
# Leading dims are free: x_TI stands for [.., I], and T for their product.
@kernel
def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """Return x @ weight^T + bias in x's dtype, [.., O]; no autograd."""
    y = _matmul_nt(_rows(x_TI), cast(weight_OI, x_TI.dtype))
    y = y if bias_O is None else y + cast(bias_O, x_TI.dtype)
    return y.reshape(*x_TI.shape[:-1], weight_OI.shape[0])


@kernel
def linear_and_operand(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return `linear`, and what to keep of x for the weight's gradient: x, or a rounded copy that was multiplied."""
    return linear(x_TI, weight_OI, bias_O), x_TI


@kernel
def linear_grad_input(dy_TO: Tensor, weight_OI: Tensor) -> Tensor:
    """Return the gradient of `linear` for x, [.., I]; no autograd."""
    dx = _matmul_nn(_rows(dy_TO), cast(weight_OI, dy_TO.dtype))
    return dx.reshape(*dy_TO.shape[:-1], weight_OI.shape[1])


@kernel
def linear_grad_input_and_operand(dy_TO: Tensor, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Return `linear_grad_input`, and what the weight's gradient takes for dy: dy, or a rounded copy of it."""
    return linear_grad_input(dy_TO, weight_OI), dy_TO


@kernel
def linear_grad_weight(dy_TO: Tensor, x_TI: Tensor) -> Tensor:
    """Return the gradient of `linear` for the weight, [O, I]; no autograd."""
    return _matmul_tn(_rows(dy_TO), _rows(x_TI))


@kernel
def linear_grad_weight_(into_OI: np.ndarray, dy_TO: Tensor, x_TI: Tensor, add: bool) -> None:
    """Write the gradient of `linear` for the weight to `into_OI`, or add it."""
    put(into_OI, linear_grad_weight(dy_TO, x_TI), add)


@kernel
def linear_grad_bias(dy_TO: Tensor) -> Tensor:
    """Return the gradient of `linear` for the bias, [O]; no autograd."""
    return _rows(dy_TO).sum(0)


@kernel
def linear_grad_bias_(into_O: np.ndarray, dy_TO: Tensor, add: bool) -> None:
    """Write the gradient of `linear` for the bias to `into_O`, or add it."""
    put(into_O, linear_grad_bias(dy_TO), add)


def _rows(x: Tensor) -> Tensor:
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


# ---- embedding (no autograd) ----------------------------------------------------------------------------------------
@kernel
def embedding(ids_T: Tensor, table_VH: Tensor, first_row: int, dtype: Any = None) -> Tensor:
    """Return rows `ids - first_row` of the table, and zeros for ids outside it, [T, H]; no autograd.

    They have the type `dtype`; None: the table's.
    """
    rows, inside = local_rows(ids_T, first_row, table_VH.shape[0])
    # The CPU has no gather for bfloat16; the way over float32 is exact.
    wide = table_VH.astype(ms.float32) if table_VH.dtype == ms.bfloat16 else table_VH
    out = ops.gather(wide, rows, 0)
    return cast(out * inside.astype(out.dtype).reshape(-1, 1), dtype or table_VH.dtype)


@kernel
def embedding_grad_table(dy_TH: Tensor, ids_T: Tensor, num_rows: int, first_row: int) -> Tensor:
    """Return the gradient of `embedding` for the table, [num_rows, H]; no autograd."""
    rows, inside = local_rows(ids_T, first_row, num_rows)
    return ops.unsorted_segment_sum(dy_TH * inside.astype(dy_TH.dtype).reshape(-1, 1), rows, num_rows)


@kernel
def embedding_grad_table_(into_VH: np.ndarray, dy_TH: Tensor, ids_T: Tensor, first_row: int, add: bool) -> None:
    """Write the gradient of `embedding` for the table to `into_VH`, or add it."""
    put(into_VH, embedding_grad_table(dy_TH, ids_T, into_VH.shape[0], first_row), add)


# ---- cross entropy over a part of the vocabulary (no autograd) ------------------------------------------------------
@kernel
def vocab_statistics(logits_TV: Tensor, target_T: Tensor, first_row: int) -> tuple[Tensor, Tensor]:
    """Return what the loss needs of this rank's logits, in float32; no autograd.

    Returns:
        The largest logit m, [T]; and [3, T]: the sum of exp(logit - m), the target's logit, or 0 where another rank has
        it, and the sum of the logits.
    """
    logits = logits_TV.astype(ms.float32)
    largest = mint.max(logits, -1)[0]  # Tensor.max asks for the truth of a tensor, on the host
    sum_exp = mint.exp(logits - largest.reshape(-1, 1)).sum(-1)
    rows, inside = local_rows(target_T, first_row, logits.shape[1])
    picked = mint.gather(logits, 1, rows.reshape(-1, 1).astype(ms.int64)).reshape(-1)
    return largest, mint.cat((sum_exp, picked * inside.astype(ms.float32), logits.sum(-1))).reshape(3, -1)


@kernel
def vocab_sums_of(sums_3T: Tensor, largest_T: Tensor, highest_T: Tensor) -> Tensor:
    """Return the sums of `vocab_statistics` with exp(logit - highest) in place of exp(logit - largest); no autograd."""
    return mint.cat((sums_3T[:1] * mint.exp(largest_T - highest_T), sums_3T[1:]))


@kernel
def vocab_losses(
    largest_T: Tensor, sums_3T: Tensor, target_T: Tensor, target_weight: float, uniform_weight: float
) -> tuple[Tensor, Tensor]:
    """Return (loss, logarithm of the sum of exponentials) of every token, float32 [T]; no autograd.

    The statistics are those of the whole vocabulary. A negative target has loss 0.
    """
    log_sum_exp = mint.log(sums_3T[0]) + largest_T
    loss = log_sum_exp - target_weight * sums_3T[1]
    if uniform_weight:
        loss = loss - uniform_weight * sums_3T[2]
    return loss * (target_T >= 0).astype(ms.float32), log_sum_exp


@kernel
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
    """Return dloss * (softmax - target_weight * onehot(target) - uniform_weight), [T, V]; no autograd.

    A negative target has no gradient. With `reuse_logits` the result may stand where the logits stood.
    """
    dloss_T = dloss_T * (target_T >= 0).astype(ms.float32)
    logits = logits_TV.astype(ms.float32)
    softmax = mint.exp(logits - log_sum_exp_T.reshape(-1, 1))
    rows, inside = local_rows(target_T, first_row, logits.shape[1])
    onehot = ops.one_hot(rows, logits.shape[1], Tensor(1.0, ms.float32), Tensor(0.0, ms.float32))
    onehot = onehot * (inside.astype(ms.float32) * target_weight).reshape(-1, 1)
    grad = softmax - onehot
    if uniform_weight:
        grad = grad - uniform_weight
    return (grad * dloss_T.reshape(-1, 1)).astype(logits_TV.dtype)


# ---- norms ----------------------------------------------------------------------------------------------------------
@kernel
def layer_norm(x: Tensor, weight_H: Tensor, bias_H: Tensor, eps: float) -> Tensor:
    """Return (x - mean) / sqrt(var + eps) * weight + bias over the last dim, computed in float32, in x's dtype."""
    norm = ops.LayerNorm(begin_norm_axis=-1, begin_params_axis=-1, epsilon=eps)
    y, _, _ = norm(x.astype(ms.float32), weight_H.astype(ms.float32), bias_H.astype(ms.float32))
    return y.astype(x.dtype)


@kernel
def rms_norm(x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last dim, computed in float32, in x's dtype."""
    wide = x.astype(ms.float32)
    scale = mint.rsqrt(mint.mean(wide * wide, dim=-1, keepdim=True) + eps)
    return (wide * scale * weight_H.astype(ms.float32)).astype(x.dtype)


@kernel
def add_rms_norm(x: Tensor, residual: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (`rms_norm` of residual + x, that sum), both of one type, in which the sum is made."""
    total = residual + x
    return rms_norm(total, weight_H, eps), total


# ---- activations ----------------------------------------------------------------------------------------------------
@kernel
def activation(x: Tensor, bias: Tensor | None, name: str) -> Tensor:
    """Return the activation `name` of x + bias over the last dim; a gated one halves that dim: act(first) * second."""
    if bias is not None:
        x = x + bias.astype(x.dtype)
    return ACTIVATIONS[name](x)


def _gelu_erf(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + mint.erf(x * math.sqrt(0.5)))


def _gelu_tanh(x: Tensor) -> Tensor:
    # 0.5 (1 + tanh u) = sigmoid(2 u); MindSpore's tanh is off by up to 1e-4 on CPU, its sigmoid by 1e-6.
    return x * mint.sigmoid(2.0 * math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x))


def _openai_gelu(x: Tensor) -> Tensor:
    return x * mint.sigmoid(2.0 * 0.7978845608028654 * x * (1.0 + 0.044715 * x * x))


def _fast_gelu(x: Tensor) -> Tensor:
    return x * mint.sigmoid(1.702 * x)


def _gated(act: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def gated(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return act(x[..., :half]) * x[..., half:]

    return gated


def _silu(x: Tensor) -> Tensor:
    return x * mint.sigmoid(x)


def _squared_relu(x: Tensor) -> Tensor:
    positive = ops.relu(x)
    return positive * positive


ACTIVATIONS = {
    "gelu": _gelu_erf,
    "gelu_tanh": _gelu_tanh,
    "openai_gelu": _openai_gelu,
    "fast_gelu": _fast_gelu,
    "swiglu": _gated(_silu),
    "geglu": _gated(_gelu_erf),
    "geglu_tanh": _gated(_gelu_tanh),
    "squared_relu": _squared_relu,
    "silu": _silu,
    "relu": ops.relu,
}


# ---- positions ------------------------------------------------------------------------------------------------------
@kernel
def rotary(x_SBND: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Return x with its first R head dims rotated by the positions' angles.

    Args:
        x_SBND: queries or keys.
        cos: float32 [S, 1 or B, 1, R] cosines, each angle standing twice (halves, or pairs when interleaved).
        sin: the sines, likewise.
        interleaved: whether dims 2i and 2i+1 form a pair (else i and i + R/2).
    """
    width, full = cos.shape[-1], x_SBND.shape[-1]
    x = x_SBND[..., :width] if width < full else x_SBND
    wide = x.astype(ms.float32)
    if interleaved:
        pairs = wide.reshape(*wide.shape[:-1], width // 2, 2)
        turned = ops.stack((-pairs[..., 1], pairs[..., 0]), axis=-1).reshape(wide.shape)
    else:
        turned = mint.cat((-wide[..., width // 2 :], wide[..., : width // 2]), -1)
    y = (wide * cos + turned * sin).astype(x_SBND.dtype)
    return mint.cat((y, x_SBND[..., width:]), -1) if width < full else y


@kernel
def rotary_packed(mixed_SBGX: Tensor, head_size: int, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Return the packed queries, keys and values (see `causal_attention_packed`), queries and keys rotated."""
    S, B, G, X = mixed_SBGX.shape
    turning, value = split_last_dim(mixed_SBGX, (X - head_size, head_size))
    turned = rotary(turning.reshape(S, B, -1, head_size), cos, sin, interleaved)
    return mint.cat((turned.reshape(S, B, G, X - head_size), value), -1)


@kernel
def latent_heads(
    query_SBNX: Tensor, latent_SBNY: Tensor, k_pos_SBR: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the queries [S, B, N, X], keys [S, B, N, X] and values [S, B, N, Y - X + R] of multi-latent attention.

    Args:
        query_SBNX: of each query head the channels that do not turn, then the R that do, neighbours in pairs.
        latent_SBNY: of each head its key's channels that do not turn, X - R, then its value.
        k_pos_SBR: the channels that turn, which all key heads share.
        cos: float32 [S, 1 or B, 1, R] cosines, each angle standing twice, side by side.
        sin: the sines, likewise.
    """
    return _latent_heads(lambda x: rotary(x, cos, sin, True), query_SBNX, latent_SBNY, k_pos_SBR)


def _latent_heads(
    turn: Callable[[Tensor], Tensor], query_SBNX: Tensor, latent_SBNY: Tensor, k_pos_SBR: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    S, B, N, X = query_SBNX.shape
    R = k_pos_SBR.shape[-1]
    q_plain, q_pos = split_last_dim(query_SBNX, (X - R, R))
    k_plain, value = split_last_dim(latent_SBNY, (X - R, latent_SBNY.shape[-1] - X + R))
    k_pos = turn(k_pos_SBR.reshape(S, B, 1, R))
    query = mint.cat((q_plain, turn(q_pos)), -1)
    return query, mint.cat((k_plain, ops.tile(k_pos, (1, 1, N, 1))), -1), value


# ---- attention ------------------------------------------------------------------------------------------------------
@kernel
def causal_attention(
    query_SBND: Tensor,
    key_SBGD: Tensor,
    value_SBGE: Tensor,
    *,
    scale: float,
    softmax_coefficient: float = 1.0,
    softmax_in_fp32: bool = True,
    document_start_BS: Tensor | None = None,
    dropout_rate: float = 0.0,
    dropout_seed: tuple[int, int] = (0, 0),
    heads: tuple[int, int] | None = None,  # noqa: ARG001 - compiled kernels draw by it
) -> Tensor:
    """Return softmax(scale * Q K^T, masked) V, heads joined: [S, B, N * E].

    Position s sees positions t with document_start[s] <= t <= s. Query head n uses key/value head n // (N / G).

    Args:
        query_SBND: queries.
        key_SBGD: keys.
        value_SBGE: values; their head size E may differ from D.
        scale: factor of the scores, applied in the queries' dtype.
        softmax_coefficient: further factor, applied in the softmax's dtype (query-key layer scaling).
        softmax_in_fp32: compute the softmax in float32 whatever the scores' dtype.
        document_start_BS: int32, first position that each position may see; None: 0 everywhere.
        dropout_rate: share of the attention weights set to zero.
        dropout_seed: equal seeds give equal masks.
        heads: see `attention_block`.
    """
    S, B, N, D = query_SBND.shape
    G, E = value_SBGE.shape[2:]
    # Query heads that share a key head are stacked along the query positions, so keys are never repeated.
    query = query_SBND.reshape(S, B * G, N // G, D).transpose(1, 2, 0, 3).reshape(B * G, N // G * S, D)
    key = key_SBGD.reshape(S, B * G, D).transpose(1, 0, 2)
    value = value_SBGE.reshape(S, B * G, E).transpose(1, 0, 2)
    if softmax_coefficient != 1.0:
        # Query-key layer scaling is there so that float16 scores stay finite: scale before they are rounded.
        scores = _bmm_nt(query * scale, key)
    else:
        scores = _bmm_nt(query, key) * scale
    scores = scores.reshape(B, G * (N // G), S, S)
    if softmax_in_fp32:
        scores = scores.astype(ms.float32)
    if softmax_coefficient != 1.0:
        scores = scores * softmax_coefficient
    scores = ops.masked_fill(scores, attention_mask(S, document_start_BS), Tensor(_MASKED_SCORE, scores.dtype))
    weights = ops.Softmax(-1)(scores).astype(query_SBND.dtype)
    weights = dropout(weights, dropout_rate, dropout_seed)
    context = _bmm_nn(weights.reshape(B * G, N // G * S, S), value)
    return context.reshape(B * G, N // G, S, E).transpose(2, 0, 1, 3).reshape(S, B, N * E)


@kernel
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
    """Return softmax(scale * Q K^T, masked) V, every position seeing every other, heads joined: [S, B, N * D].

    The softmax is computed in float32.

    Args:
        query_SBND: queries.
        key_SBND: keys.
        value_SBND: values.
        seen_BS: int32, 0 where nobody may look (padding); None: nowhere.
        scale: factor of the scores.
        dropout_rate: share of the attention weights set to zero.
        dropout_seed: equal seeds give equal masks.
    """
    S, B, N, D = query_SBND.shape
    query, key, value = (x.reshape(S, B * N, D).transpose(1, 0, 2) for x in (query_SBND, key_SBND, value_SBND))
    scores = (_bmm_nt(query, key) * scale).astype(ms.float32).reshape(B, N, S, S)
    if seen_BS is not None:
        hidden = (seen_BS == 0).reshape(B, 1, 1, S)
        scores = ops.masked_fill(scores, hidden, Tensor(_MASKED_SCORE, ms.float32))
    weights = dropout(ops.Softmax(-1)(scores).astype(query_SBND.dtype), dropout_rate, dropout_seed)
    context = _bmm_nn(weights.reshape(B * N, S, S), value)
    return context.transpose(1, 0, 2).reshape(S, B, N * D)


@kernel
def causal_attention_packed(mixed_SBGX: Tensor, head_size: int, **options: Any) -> Tensor:
    """Return `causal_attention` of queries, keys and values that stand together as a projection leaves them.

    Args:
        mixed_SBGX: for each key/value head its query heads, its key, its value: X = (N / G + 2) * D.
        head_size: D.
        options: those of `causal_attention`.
    """
    S, B, G, X = mixed_SBGX.shape
    query, key, value = split_last_dim(mixed_SBGX, (X - 2 * head_size, head_size, head_size))
    return causal_attention(query.reshape(S, B, -1, head_size), key, value, **options)


@kernel
def split_last_dim(x: Tensor, widths: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Return contiguous parts of `x` with the given widths of the last dim, which they fill."""
    return _SplitLastDim.apply(x, widths)


class _SplitLastDim(Function):
    """MindSpore's own split has a wrong gradient when a part's gradient is a transposed view."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, widths: tuple[int, ...]) -> tuple[Tensor, ...]:
        ends = (0, *accumulate(widths))
        return tuple(x[..., a:b].contiguous() for a, b in zip(ends, ends[1:]))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return mint.cat(tuple(g.contiguous() for g in gradients), -1), None


@functools.lru_cache(2)
def _causal_mask(S: int) -> Tensor:
    return Tensor(np.triu(np.ones((S, S), bool), 1)[None, None])


def attention_mask(S: int, document_start_BS: Tensor | None) -> Tensor:
    """Return the bool mask, True where a position may not look: [1, 1, S, S], or [B, 1, S, S] with documents."""
    causal = _causal_mask(S)
    if document_start_BS is None:
        return causal
    B = document_start_BS.shape[0]
    before = Tensor(np.arange(S, dtype=np.int32)).reshape(1, 1, 1, S) < document_start_BS.reshape(B, 1, S, 1)
    return ops.logical_or(causal, before)


# ---- attention of one block of queries and one of keys (no autograd) ------------------------------------------------
@kernel
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
    """Return what queries at a run of positions see of keys at another, and how much that weighs; no autograd.

    The query at position p sees the keys at positions start <= k <= p. Blocks of keys are joined by their weights: with
    L = log(exp(l1) + exp(l2)) the attention over both is exp(l1 - L) out1 + exp(l2 - L) out2.

    Args:
        query_SBND: queries at positions q_first, q_first + 1, ...
        key_TBGD: keys at positions k_first, k_first + 1, ...
        value_TBGE: their values.
        start_BS: int32, the first position that each query may see; None: 0.
        q_first: position of the first query.
        k_first: position of the first key.
        scale: factor of the scores.
        dropout_rate: share of the attention weights set to zero.
        dropout_seed: equal seeds give equal masks. Compiled kernels draw by position and head, so blocks draw what the
            whole sequence draws; these operators draw by block.
        heads: (number of the first of these query heads, query heads of the layer), for dropout; None: all of them.

    Returns:
        The context [S, B, N * E], and float32 [B, N, S] logarithms of the sums of exponentials. A query that sees no
        key has 0 and -infinity.
    """
    S, B, N, _ = query_SBND.shape
    weights, log_sum_exp = _block_weights(query_SBND, key_TBGD, start_BS, q_first, k_first, scale, None)
    keep = _block_mask(weights, dropout_rate, dropout_seed, (q_first, k_first))
    value = _rows_of_groups(value_TBGE)
    context = _bmm_nn((weights if keep is None else weights * keep).astype(value.dtype), value)
    return _apart(context, S, B, N).reshape(S, B, -1), log_sum_exp


@kernel
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
    heads: tuple[int, int] | None = None,  # noqa: ARG001 - compiled kernels draw by it
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients (dq, dk, dv) that one block contributes; no autograd.

    Args:
        query_SBND: as for `attention_block`.
        key_TBGD: as for `attention_block`.
        value_TBGE: as for `attention_block`.
        start_BS: as for `attention_block`.
        out_SBX: the context over all blocks, [S, B, N * E].
        dout_SBX: its gradient.
        log_sum_exp_BNS: over all blocks.
        q_first: as for `attention_block`.
        k_first: as for `attention_block`.
        scale: as for `attention_block`.
        dropout_rate: as for `attention_block`.
        dropout_seed: as for `attention_block`.
        heads: as for `attention_block`.
    """
    (S, B, N, _), (_, _, G, E) = query_SBND.shape, value_TBGE.shape
    weights, _ = _block_weights(query_SBND, key_TBGD, start_BS, q_first, k_first, scale, log_sum_exp_BNS)
    keep = _block_mask(weights, dropout_rate, dropout_seed, (q_first, k_first))
    query, key, value = _stacked_heads(query_SBND, G), _rows_of_groups(key_TBGD), _rows_of_groups(value_TBGE)
    out, dout = (_stacked_heads(x.reshape(S, B, N, E), G) for x in (out_SBX, dout_SBX))
    kept = weights if keep is None else weights * keep
    dv = _bmm_tn(kept.astype(dout.dtype), dout)
    dweights = _bmm_nt(dout, value).astype(ms.float32)
    dweights = dweights if keep is None else dweights * keep
    through_out = (out.astype(ms.float32) * dout.astype(ms.float32)).sum(-1, keepdims=True)
    dscores = (weights * (dweights - through_out) * scale).astype(key.dtype)
    dq, dk = _bmm_nn(dscores, key), _bmm_tn(dscores, query)
    T = key_TBGD.shape[0]
    return _apart(dq, S, B, N), dk.transpose(1, 0, 2).reshape(T, B, G, -1), dv.transpose(1, 0, 2).reshape(T, B, G, E)


@kernel
def join_blocks(
    out_SBX: Tensor, log_sum_exp_BNS: Tensor, other_SBX: Tensor, other_log_sum_exp_BNS: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the attention over two sets of keys from the attention over each; no autograd.

    Args:
        out_SBX: float32 context over the one, [S, B, N * E].
        log_sum_exp_BNS: float32, see `attention_block`.
        other_SBX: of other keys, in any type.
        other_log_sum_exp_BNS: of other keys.

    Returns:
        Both in float32: rounded to a narrower type at every block, errors would add up.
    """
    top = mint.maximum(log_sum_exp_BNS, other_log_sum_exp_BNS)
    finite = mint.where(top > -1e30, top, Tensor(np.float32(0.0)))  # rows that have seen nothing yet
    weight, other_weight = mint.exp(log_sum_exp_BNS - finite), mint.exp(other_log_sum_exp_BNS - finite)
    total = weight + other_weight
    some = total > 0
    safe = mint.where(some, total, Tensor(np.float32(1.0)))
    joined = _weighed(out_SBX, weight / safe) + _weighed(cast(other_SBX, ms.float32), other_weight / safe)
    return joined, mint.where(some, finite + mint.log(safe), Tensor(np.float32(-np.inf)))


def _weighed(x_SBX: Tensor, weight_BNS: Tensor) -> Tensor:
    S, B, _ = x_SBX.shape
    N = weight_BNS.shape[1]
    return (x_SBX.reshape(S, B, N, -1) * weight_BNS.transpose(2, 0, 1).reshape(S, B, N, 1)).reshape(S, B, -1)


def _block_weights(
    query: Tensor, key: Tensor, start: Tensor | None, q_first: int, k_first: int, scale: float, lse: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the softmax's weights [B * G, N / G * S, T], normed by `lse` or by their own, and that [B, N, S]."""
    (S, B, N, _), (T, _, G, _) = query.shape, key.shape
    scores = _bmm_nt(_stacked_heads(query, G), _rows_of_groups(key)).astype(ms.float32) * scale
    q_at, k_at = q_first + np.arange(S)[:, None], k_first + np.arange(T)[None]
    visible = Tensor((k_at <= q_at)[None])
    if start is not None:
        visible = ops.logical_and(visible, Tensor(k_at[None].astype(np.int32)) >= start.reshape(B, S, 1))
    seen = visible.astype(ms.float32).reshape(-1, 1, 1, S, T)
    scores = scores.reshape(B, G, N // G, S, T)
    if lse is None:
        top = mint.max(scores * seen + (1.0 - seen) * -1e30, -1)[0]
        top = mint.where(top > -1e29, top, mint.zeros(top.shape))
        total = (mint.exp(mint.where(seen > 0, scores - top.reshape(B, G, N // G, S, 1), Tensor(-1e30))) * seen).sum(-1)
        some = total > 0
        lse = mint.where(some, top + mint.log(mint.where(some, total, Tensor(1.0))), Tensor(-np.inf, ms.float32))
    lse = lse.reshape(B, G, N // G, S, 1)
    finite = mint.where(lse > -1e30, lse, Tensor(0.0))
    weights = mint.exp(mint.where(seen > 0, scores - finite, Tensor(-1e30))) * seen
    return weights.reshape(B * G, N // G * S, T), lse.reshape(B, N, S)


def _block_mask(weights: Tensor, rate: float, seed: tuple[int, int], place: tuple[int, int]) -> Tensor | None:
    """Return the factors of dropout, 0 or 1 / (1 - rate), or None without any."""
    if not rate:
        return None
    return dropout(ops.ones_like(weights), rate, (seed[0] ^ place[0] << 20 ^ place[1], seed[1]))


def _stacked_heads(x_SBNX: Tensor, G: int) -> Tensor:
    """Return [B * G, N / G * S, X]: the query heads that share a key head, along the positions."""
    S, B, N, X = x_SBNX.shape
    return x_SBNX.reshape(S, B * G, N // G, X).transpose(1, 2, 0, 3).reshape(B * G, N // G * S, X)


def _apart(x: Tensor, S: int, B: int, N: int) -> Tensor:
    """Return what `_stacked_heads` stacked as [S, B, N, X]."""
    G = x.shape[0] // B
    return x.reshape(B * G, N // G, S, -1).transpose(2, 0, 1, 3).reshape(S, B, N, -1)


def _rows_of_groups(x_TBGX: Tensor) -> Tensor:
    """Return [B * G, T, X]."""
    T, B, G, X = x_TBGX.shape
    return x_TBGX.reshape(T, B * G, X).transpose(1, 0, 2)


# ---- attention of new tokens to cached ones (no autograd) -----------------------------------------------------------
@kernel
def cached_attention(
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
    """Keep the keys and values of S new tokens of B sequences, and return what these see, [S, B, N * E]; no autograd.

    Token s of sequence b stands at position firsts[b] + s, and sees the positions of its sequence from `window` before
    it up to its own. What a sequence gets does not depend on the others that are computed with it.

    Args:
        query_SBND: queries of the new tokens.
        key_SBGD: their keys.
        value_SBGE: their values.
        keys_RGTD: float32 keys of R sequences of up to T positions; those of the new tokens are written.
        values_RGTE: their values, likewise.
        rows: int32 [B], which of the R sequences each one is.
        firsts: int32 [B], how many tokens of each are kept already.
        scale: factor of the scores.
        window: how far back a token sees.
    """
    key, value = (cast(x, ms.float32).asnumpy() for x in (key_SBGD, value_SBGE))
    S, contexts = query_SBND.shape[0], []
    for b, (row, first) in enumerate(zip(rows.tolist(), firsts.tolist())):
        keys_RGTD[row, :, first : first + S] = key[:, b].transpose(1, 0, 2)
        values_RGTE[row, :, first : first + S] = value[:, b].transpose(1, 0, 2)
        start = np.maximum(first + np.arange(S, dtype=np.int32) - window, 0)[None].astype(np.int32)
        known, kept = (
            Tensor(np.ascontiguousarray(cache[row, :, : first + S].transpose(1, 0, 2)[:, None]))
            for cache in (keys_RGTD, values_RGTE)
        )
        query = cast(query_SBND[:, b : b + 1], ms.float32)
        contexts.append(attention_block(query, known, kept, Tensor(start), q_first=first, k_first=0, scale=scale)[0])
    return cast(contexts[0] if len(contexts) == 1 else mint.cat(contexts, 1), query_SBND.dtype)


@kernel
def cached_attention_packed(
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
    """Return `cached_attention` of queries, keys and values that stand together as in `causal_attention_packed`."""
    S, B, _, X = mixed_SBGX.shape
    query, key, value = split_last_dim(mixed_SBGX, (X - 2 * head_size, head_size, head_size))
    query = query.reshape(S, B, -1, head_size)
    return cached_attention(query, key, value, keys_RGTD, values_RGTE, rows, firsts, scale=scale, window=window)


# ---- dropout --------------------------------------------------------------------------------------------------------
@kernel
def dropout(x: Tensor, rate: float, seed: tuple[int, int]) -> Tensor:
    """Return x with a share `rate` of its elements zeroed and the rest divided by 1 - rate; the mask follows `seed`."""
    if rate == 0.0:
        return x
    if ms.get_context("device_target") == "Ascend":
        return seeded_dropout(x, rate, seed)
    return ops.Dropout(keep_prob=1.0 - rate, Seed0=seed[0], Seed1=seed[1])(x)[0]


@kernel
def bias_dropout_add(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, rate: float, seed: tuple[int, int]
) -> Tensor:
    """Return residual + dropout(x + bias), in the residual's dtype; without one, the rest in that of `x`."""
    if bias is not None:
        x = x + bias.astype(x.dtype)
    x = dropout(x, rate, seed)
    return x if residual is None else residual + x.astype(residual.dtype)


@kernel
def packed_heads(query_SBGX: Tensor, key_SBGD: Tensor, value_SBGD: Tensor) -> Tensor:
    """Return queries, keys and values of each group next to each other, as the projection leaves them."""
    return mint.cat((query_SBGX, key_SBGD, value_SBGD), -1)


@kernel
def side_by_side(x: Tensor, y: Tensor) -> Tensor:
    """Return the last dims of both, one behind the other."""
    return mint.cat((x, y), -1)


@kernel
def reordered(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """Return the rows, cut into `len(order)` equal runs, in another order; no autograd."""
    length = x.shape[0] // len(order)
    return mint.cat([x[i * length : (i + 1) * length] for i in order], 0)


@kernel
def shifted(x: Tensor, offset: float) -> Tensor:
    """Return x + offset."""
    return x + offset


@kernel
def multiplied(x: Tensor, factor: float) -> Tensor:
    """Return x * factor."""
    return x * factor


@kernel
def multiplied_by(x: Tensor, factors: Tensor) -> Tensor:
    """Return x * factors, tensors of one shape; the factors have no gradient."""
    return x * factors


@kernel
def plus_multiple(x: Tensor, y: Tensor, factor: float) -> Tensor:
    """Return x + factor * y, tensors of one shape."""
    return x + factor * y


@kernel
def gated(x: Tensor, scores: Tensor) -> Tensor:
    """Return x * sigmoid(scores), one score for each row: [.., H] and [.., 1]."""
    return x * mint.sigmoid(scores)


@kernel
def transposed(x: Tensor) -> Tensor:
    """Return the transpose of a matrix."""
    return x.transpose(1, 0)


@kernel
def masked_sum(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of values * mask, float32 tensors of one shape, and the sum of the mask, which has no gradient."""
    return (values * mask).sum(), mask.sum()


@kernel
def mean_loss(total: Tensor, number: Tensor, factor: float) -> Tensor:
    """Return total * factor / number, float32 scalars; of no tokens, the total. `number` has no gradient."""
    counted = mint.clamp(number, min=1.0)
    return total / counted if factor == 1.0 else total * (factor / counted)


@kernel
def shaped(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a contiguous `x` in another shape, on the same memory; no autograd."""
    return x.reshape(shape)


@kernel
def total(x: Tensor, y: Tensor) -> Tensor:
    """Return x + y of one shape and dtype, without autograd."""
    return x + y


# ---- flat buffers (NumPy views of CPU memory; no autograd) ----------------------------------------------------------
@kernel
def sum_of_squares(flat: np.ndarray) -> float:
    """Return the sum of squares of a 1-D array of 32 or 16 bits, accumulated blockwise in float64."""
    block = 1 << 16
    return float(
        sum(float(np.dot(p, p)) for p in (_wide(flat[i : i + block]) for i in range(0, flat.size, block)))
    )


@kernel
def add_(into: np.ndarray, values: Tensor) -> None:
    """Add a tensor's elements to 1-D `into` of as many, in place."""
    np.add(into, values.asnumpy().reshape(-1), out=into, casting="unsafe")


@kernel
def write_(into: np.ndarray, values: Tensor) -> None:
    """Overwrite 1-D `into` with a tensor's elements."""
    into[:] = values.asnumpy().reshape(-1)


@kernel
def copy_(into: np.ndarray, values: np.ndarray) -> None:
    """Overwrite 1-D `into` with as many numbers, rounded to its dtype."""
    into[:] = values


@kernel
def scale_(into: np.ndarray, factor: float) -> None:
    """Multiply 1-D `into` by a number, in place."""
    np.multiply(into, into.dtype.type(factor), out=into)


@kernel
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
    rounded: np.ndarray | None = None,
) -> None:
    """Do one AdamW update (decoupled weight decay, bias correction) on 1-D float32 arrays, in place.

    Args:
        param: master weights, overwritten.
        grad: gradient, float32 or of 16 bits; grad_scale * grad is what the update uses.
        exp_avg: first moment, overwritten.
        exp_avg_sq: second moment, overwritten.
        step: number of this update, from 1.
        lr: learning rate.
        betas: decay rates of the moments.
        eps: added to the root of the second moment.
        weight_decay: multiplied by lr and the weight.
        grad_scale: factor of the gradient (clipping and unscaling).
        rounded: overwritten with the new weights, rounded to its dtype.
    """
    beta1, beta2 = betas
    correction1, correction2 = 1 - beta1**step, math.sqrt(1 - beta2**step)
    block = 1 << 15  # temporaries stay in cache
    for i in range(0, param.size, block):
        p, m, v = param[i : i + block], exp_avg[i : i + block], exp_avg_sq[i : i + block]
        g = _wide(grad[i : i + block]) * np.float32(grad_scale)
        if weight_decay:
            p *= np.float32(1 - lr * weight_decay)
        m *= np.float32(beta1)
        m += np.float32(1 - beta1) * g
        v *= np.float32(beta2)
        v += np.float32(1 - beta2) * g * g
        p -= np.float32(lr / correction1) * m / (np.sqrt(v) / np.float32(correction2) + np.float32(eps))
        if rounded is not None:
            rounded[i : i + block] = p


def _wide(numbers: np.ndarray) -> np.ndarray:
    return numbers.astype(np.float32, copy=False)
