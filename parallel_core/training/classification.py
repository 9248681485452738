"""Forward step of a head for whole texts, and which forward step a model's head has."""

from __future__ import annotations

from functools import partial
from typing import Any

import mindspore as ms
from mindspore import Tensor, mint

from parallel_core.comm.interface import SoloGroup
from parallel_core.spans import span
from parallel_core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from parallel_core.training.encoder_steps import MeanLoss, encoder_forward_step
from parallel_core.training.forward_step import forward_step

_ALONE = SoloGroup()


def model_forward_step(data_iterator: Any, model: Any) -> tuple[Any, Any]:
    """Return the output for the next microbatch and its loss function, of the task of the model's head."""
    if model.config.num_labels:
        return classification_forward_step(data_iterator, model)
    return (encoder_forward_step if model.config.bert.is_encoder else forward_step)(data_iterator, model)


def classification_forward_step(data_iterator: Any, model: Any) -> tuple[Any, Any]:
    """Return scores [B, num_labels] of the next microbatch, and the function that makes a loss of them.

    Batches have `tokens`, int32 [B, S], `lengths` and `label`, int32 [B].
    """
    with span("batch-generator"):
        batch = next(data_iterator)
    return model(batch["tokens"], batch["lengths"]), partial(class_loss, batch["label"])


def class_losses(scores: Tensor, label: Tensor) -> Tensor:
    """Return the cross entropy of each text's class, float32 [B].

    Args:
        scores: float32 [B, num_labels].
        label: int32 [B].
    """
    return vocab_parallel_cross_entropy(scores, label, _ALONE)


def class_loss(label: Tensor, scores: Tensor, non_loss_data: bool = False) -> MeanLoss | Tensor:
    """Return the mean loss of a microbatch's classes, and the share of right ones.

    Args:
        label: int32 [B].
        scores: what the last stage returns.
        non_loss_data: return the scores as they are, for `process_non_loss_data_func`.
    """
    if non_loss_data:
        return scores
    losses, number = class_losses(scores, label), Tensor(float(label.shape[0]), ms.float32)
    chosen = ms.ops.stop_gradient(mint.gather(scores, 1, label.astype(ms.int64).reshape(-1, 1))[:, 0])
    right = (chosen >= mint.max(ms.ops.stop_gradient(scores), 1)[0]).astype(ms.float32).sum()
    return losses.mean(), {"class loss": (losses.sum(), number), "accuracy": (right, number)}
