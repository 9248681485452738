"""Kernels of Ascend NPUs, thin over MindSpore's operators, with the signatures of `reference`.

They need an NPU to run. Tests here check what is handed to the operator; its results are checked by the tests that are
marked `ascend`.
"""

from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import Tensor, ops

from parallel_core.ops import reference
from parallel_core.ops.registry import on_ascend

_FULL_MASK = 1
"""`sparse_mode` of a mask that is given whole."""


def has_flash_attention() -> bool:
    """Return whether this device has `flash_attention_score`."""
    return str(ms.get_context("device_target")) == "Ascend"


def _not_by_flash_attention(
    query_SBND: Tensor,
    key_SBGD: Tensor,
    value_SBGE: Tensor,
    *,
    softmax_coefficient: float = 1.0,
    dropout_rate: float = 0.0,
    **_: Any,
) -> str:
    if value_SBGE.shape[-1] != query_SBND.shape[-1]:
        return "the values' head size is not the queries'"
    if softmax_coefficient != 1.0:
        return "the softmax has a coefficient"
    return "attention weights are dropped by a seed" if dropout_rate else ""


@on_ascend(
    reference.causal_attention,
    dtypes=(ms.float16, ms.bfloat16),
    integers=["document_start_BS"],
    refuses=_not_by_flash_attention,
    selected=False,
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
    dropout_rate: float = 0.0,  # noqa: ARG001 - only 0 comes here
    dropout_seed: tuple[int, int] = (0, 0),  # noqa: ARG001
    heads: tuple[int, int] | None = None,  # noqa: ARG001 - for dropout, which goes to the reference
    input_layout: str = "SBH",
) -> Tensor:
    """Return `reference.causal_attention`, [S, B, N * D], computed by `flash_attention_score`.

    The model asks for it by `use_flash_attention`. What the operator does not take (other types than float16 and
    bfloat16, values of another head size, a softmax coefficient, dropout from a seed) the reference computes.

    Args:
        query_SBND: queries.
        key_SBGD: keys.
        value_SBGE: values.
        scale: factor of the scores.
        softmax_coefficient: see the reference.
        softmax_in_fp32: see the reference.
        document_start_BS: int32, first position that each position may see; None: 0 everywhere.
        dropout_rate: see the reference.
        dropout_seed: see the reference.
        heads: see the reference.
        input_layout: SBH or BNSD, the axes in which the operator gets its inputs.
    """
    S, B, N, D = query_SBND.shape
    mask = reference.attention_mask(S, document_start_BS)
    if document_start_BS is None:
        mask = mask.reshape(S, S)
    inputs = [_laid_out(x, input_layout) for x in (query_SBND, key_SBGD, value_SBGE)]
    context = ops.flash_attention_score(
        *inputs, N, attn_mask=mask, scalar_value=scale, input_layout=input_layout, sparse_mode=_FULL_MASK
    )
    return context if input_layout == "SBH" else context.transpose(2, 0, 1, 3).reshape(S, B, N * D)


def _laid_out(x_SBND: Tensor, input_layout: str) -> Tensor:
    S, B, N, D = x_SBND.shape
    return x_SBND.reshape(S, B, N * D) if input_layout == "SBH" else x_SBND.transpose(1, 2, 0, 3)
