"""Forward steps of encoders: the words behind masks with the order of segments, and the span of an answer."""

from __future__ import annotations

from functools import partial
from typing import Any

import mindspore as ms
from mindspore import Tensor, ops

from parallel_core.comm.interface import SoloGroup
from parallel_core.spans import span
from parallel_core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from parallel_core.training.forward_step import LossParts

MeanLoss = tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]
"""Mean of a microbatch's loss, and (sum, number) of every value to report, by name."""
_ALONE = SoloGroup()


def encoder_forward_step(data_iterator: Any, model: Any) -> tuple[Any, Any]:
    """Return the output for the next microbatch and its loss function, of the task of the model's head."""
    answers = model.config.bert.bert_head == "question_answering"
    return (question_answering_forward_step if answers else bert_forward_step)(data_iterator, model)


def bert_forward_step(data_iterator: Any, model: Any) -> tuple[Any, Any]:
    """Return the output for the next microbatch and its loss function: Megatron-LM's forward step for BERT.

    Batches have `tokens`, `attention_mask`, `tokentype_ids`, `labels`, all int32 [B, S], `loss_mask`, float32 [B, S],
    and `is_random`, int32 [B]: 1 where the second segment does not follow the first.
    """
    with span("batch-generator"):
        batch = next(data_iterator)
    output = model(batch["tokens"], batch["attention_mask"], batch["tokentype_ids"], batch["labels"])
    return output, partial(masked_words_loss, batch["loss_mask"], batch.get("is_random"))


def masked_words_loss(
    loss_mask: Tensor, is_random: Tensor | None, output: tuple[Tensor, Tensor | None], non_loss_data: bool = False
) -> MeanLoss | tuple[Tensor, Tensor | None]:
    """Return the mean loss of the words that `loss_mask` marks, plus that of the order of segments.

    Args:
        loss_mask: float32 [B, S], 1 where a word counts.
        is_random: int32 [B]; see `bert_forward_step`.
        output: what the last stage returns: losses [B, S], and logits [B, 2] or None.
        non_loss_data: return `output` as it is, for `process_non_loss_data_func`.
    """
    if non_loss_data:
        return output
    losses, follows = output
    total, number = (losses * loss_mask).sum(), loss_mask.sum()
    loss, report = total / ops.maximum(number, Tensor(1.0, ms.float32)), {"lm loss": (total, number)}
    if follows is not None and is_random is not None:
        order = vocab_parallel_cross_entropy(follows, is_random, _ALONE)
        loss, report["sop loss"] = loss + order.mean(), (order.sum(), Tensor(float(order.size), ms.float32))
    return loss, report


def question_answering_forward_step(data_iterator: Any, model: Any) -> tuple[Any, Any]:
    """Return begin and end logits [B, S, 2] of the next microbatch, and the function that makes a loss of them.

    Batches have `tokens`, `attention_mask`, `tokentype_ids`, int32 [B, S], and `start_positions`, `end_positions`,
    int32 [B]: the answer's first and last token, 0 (the first position) where the window has none of it.
    """
    with span("batch-generator"):
        batch = next(data_iterator)
    output = model(batch["tokens"], batch["attention_mask"], batch["tokentype_ids"])
    return output, partial(span_loss, batch["start_positions"], batch["end_positions"])


def span_loss(
    start_positions: Tensor, end_positions: Tensor, logits_BS2: Tensor, non_loss_data: bool = False
) -> LossParts | MeanLoss | Tensor:
    """Return the mean of the begin's and the end's cross entropy over positions; beyond the sequence is none.

    Args:
        start_positions: int32 [B].
        end_positions: int32 [B].
        logits_BS2: what the last stage returns.
        non_loss_data: return the logits as they are, for `process_non_loss_data_func`.
    """
    if non_loss_data:
        return logits_BS2
    means, length = [], logits_BS2.shape[1]
    for which, positions in enumerate((start_positions, end_positions)):
        inside = ops.logical_and(positions >= 0, positions < length)
        target = ops.select(inside, positions, ops.full_like(positions, -1))
        losses = vocab_parallel_cross_entropy(logits_BS2[:, :, which].contiguous(), target, _ALONE)
        means.append(losses.sum() / ops.maximum(inside.astype(ms.float32).sum(), Tensor(1.0, ms.float32)))
    loss = (means[0] + means[1]) / 2
    return loss, {"qa loss": (loss, Tensor(1.0, ms.float32))}
