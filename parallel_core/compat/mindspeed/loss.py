"""Token losses over cut vocabularies, and their masked mean."""

from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import Tensor, nn

from parallel_core import tensor_parallel
from parallel_core.compat import parallel_state
from parallel_core.compat.mindspeed.config import current_config


class VocabParallelCrossEntropy(tensor_parallel.VocabParallelCrossEntropy):
    """`tensor_parallel.VocabParallelCrossEntropy` over the tensor parallel group of `parallel_state`.

    Args:
        label_smoothing: share of the target spread over all classes; None: the current configuration's.
    """

    def __init__(self, label_smoothing: float | None = None) -> None:
        if label_smoothing is None:
            label_smoothing = current_config().model_config.label_smoothing
        super().__init__(parallel_state.get_tensor_model_parallel_group(), label_smoothing)


class LossWithMask(nn.Cell):
    """The mean of a loss over the positions that count.

    Args:
        loss_func: `(logits, label) -> loss of every token`, in the shape of `label`.
    """

    def __init__(self, loss_func: Any) -> None:
        super().__init__()
        self.loss_func = loss_func

    def construct(self, logits: Tensor, label: Tensor, loss_mask: Tensor) -> Tensor:
        """Return sum(loss * loss_mask) / sum(loss_mask), a float32 scalar; 0 where nothing counts.

        Args:
            logits: [B, S, V / tp].
            label: int32 [B, S].
            loss_mask: [B, S].
        """
        weights = loss_mask.astype(ms.float32)
        total = (self.loss_func(logits, label).astype(ms.float32) * weights).sum()
        number = weights.sum()
        return total / ms.ops.maximum(number, (number == 0).astype(ms.float32))
