"""The specification of attention where queries meet keys a few runs at a time; see `reference`."""

from __future__ import annotations

from typing import Any

from mindspore import Tensor

from parallel_core.ops import reference
from parallel_core.ops.meetings import Meeting, attend_by_blocks, gradients_by_blocks
from parallel_core.ops.registry import kernel


@kernel
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
    """Return the attention of queries to the keys that they meet, joined with what they have met; no autograd.

    The queries are S / L runs of L positions, each in the place of its rows; C = S / L.

    Args:
        query_SBGW: queries of each group, W = N / G * D.
        keys_TBGY: keys and values of each group next to each other, Y = D + E.
        out_SBX: float32 context [S, B, N * E] over other keys, which may be overwritten; None: there were none.
        log_sum_exp_CBNL: float32, of these; see `attention_block`. It may be overwritten.
        start_BP: int32, the first position that each of the whole sequence's may see; None: 0.
        meetings: what meets what; every run of queries begins at a multiple of L.
        length: L.
        head_size: D.
        options: scale, dropout_rate, dropout_seed and heads of `attention_block`.

    Returns:
        Context and logarithms over all keys, float32. Queries that have met none have 0 and -infinity.
    """
    functions = reference.attention_block, reference.join_blocks
    return attend_by_blocks(
        *functions, query_SBGW, keys_TBGY, out_SBX, log_sum_exp_CBNL, start_BP, meetings, length, head_size, options
    )


@kernel
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
    """Return the gradients of queries, added to those from other keys, and of these keys; no autograd.

    Args:
        query_SBGW: as for `attention_of_meetings`.
        keys_TBGY: as for `attention_of_meetings`.
        out_SBX: the context over all keys.
        dout_SBX: its gradient.
        log_sum_exp_CBNL: over all keys.
        dquery_SBGW: float32 gradient from other keys, which may be overwritten; None: 0.
        start_BP: as for `attention_of_meetings`.
        meetings: as for `attention_of_meetings`.
        length: as for `attention_of_meetings`.
        head_size: as for `attention_of_meetings`.
        options: as for `attention_of_meetings`.

    Returns:
        Both in float32, in a narrower type every addition would round; 0 where nothing is met.
    """
    return gradients_by_blocks(
        reference.attention_block_grad, query_SBGW, keys_TBGY, out_SBX, dout_SBX, log_sum_exp_CBNL, dquery_SBGW,
        start_BP, meetings, length, head_size, options,
    )  # fmt: skip
