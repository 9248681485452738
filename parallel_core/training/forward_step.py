"""Megatron-LM's forward step for a GPT model: batch, model, masked sum of the token losses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from mindspore import Tensor

from parallel_core import ops
from parallel_core.pipeline.stage import ForwardStep
from parallel_core.spans import span
from parallel_core.tape import constant

LossParts = tuple[Tensor, Tensor, dict[str, tuple[Tensor, Tensor]]]
"""Sum of the loss, number of tokens that count, and (sum, number) of every value to report, by name."""


def get_batch(data_iterator: Any) -> tuple[Tensor | None, ...]:
    """Return (tokens, labels, loss_mask, document_start, position_ids) of the next microbatch, None where not needed.

    Megatron-LM has an attention mask in the fourth place. `document_start`, int32 [B, S], says the same in less: the
    first position that each position may see; None is plain causal attention.
    """
    with span("batch-generator"):
        batch = next(data_iterator)
    return tuple(batch[key] for key in ("tokens", "labels", "loss_mask", "document_start", "position_ids"))


def masked_loss(loss_mask: Tensor, token_losses: Tensor, non_loss_data: bool = False) -> LossParts | Tensor:
    """Return the loss of the positions that `loss_mask` marks, float32 [B, S] like `token_losses`.

    Args:
        loss_mask: 1 where a token counts.
        token_losses: what the last stage returns.
        non_loss_data: return `token_losses` as they are, for `process_non_loss_data_func`.
    """
    if non_loss_data:
        return token_losses
    total, number = ops.masked_sum(token_losses, constant(loss_mask))
    return total, number, {"lm loss": (total, number)}


def forward_step(
    data_iterator: Any, model: Any, get_batch_func: Callable[[Any], Any] = get_batch
) -> tuple[Tensor, Callable[..., Any]]:
    """Return the model's output for the next microbatch, and the function that makes a loss of it.

    On the last stage the output is the loss of every token, float32 [B, S]; before it, hidden states.
    """
    tokens, labels, loss_mask, document_start, position_ids = get_batch_func(data_iterator)
    # A model of one's own need not take the mask; one that predicts further tokens counts with it.
    more = {"loss_mask": loss_mask} if getattr(model, "mtp", None) is not None else {}
    return model(tokens, position_ids, document_start, labels, **more), partial(masked_loss, loss_mask)


def forward_step_with(get_batch_func: Callable[[Any], Any]) -> ForwardStep:
    """Return `forward_step` with another source of batches."""
    return partial(forward_step, get_batch_func=get_batch_func)
