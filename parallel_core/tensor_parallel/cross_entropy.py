"""Softmax cross entropy over logits whose vocabulary is cut over the tensor parallel group.

Source: Megatron-LM, arXiv:1909.08053, section 3. Label smoothing uses the whole vocabulary's size and mean, so it is
the same at every tensor parallel size; Megatron-LM's uses each rank's part and is not.
"""

from __future__ import annotations

from typing import Any

from mindspore import Tensor, nn

from parallel_core import ops
from parallel_core.autograd import Function
from parallel_core.comm.interface import Group
from parallel_core.tensor_parallel.checks import check_targets


def vocab_parallel_cross_entropy(
    vocab_parallel_logits: Tensor,
    target: Tensor,
    tp_group: Group,
    label_smoothing: float = 0.0,
    reuse_logits: bool = False,
) -> Tensor:
    """Return the loss of every token, float32, in the shape of `target`.

    With smoothing e over V classes, s = e * V / (V - 1): loss = logsumexp - (1 - s) * logit[target] - s * mean(logits).

    Args:
        vocab_parallel_logits: [.., V / tp] float32, or float16 (the softmax is computed in float32 all the same).
        target: int32, the shape of the logits without their last dim; a negative one gives loss 0 and no gradient.
        tp_group: the tensor parallel group.
        label_smoothing: e, in [0, 1).
        reuse_logits: nobody reads the logits after this, so backward may put their gradient in their place.

    Backward:
        dloss * (softmax - (1 - s) * onehot - s / V), no communication.

    Communication:
        forward 2 all-reduces: of one float32 a token (max), and of three (sums).
    """
    check_targets(vocab_parallel_logits, target, label_smoothing)
    return _CrossEntropy.apply(vocab_parallel_logits, target, tp_group, label_smoothing, reuse_logits)


class VocabParallelCrossEntropy(nn.Cell):
    """`vocab_parallel_cross_entropy` as a Cell, with the group and the smoothing kept."""

    def __init__(self, tp_group: Group, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.tp_group, self.label_smoothing = tp_group, label_smoothing

    def construct(self, vocab_parallel_logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss of every token; see `vocab_parallel_cross_entropy`."""
        return vocab_parallel_cross_entropy(vocab_parallel_logits, target, self.tp_group, self.label_smoothing)


class _CrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, group: Group, label_smoothing: float, reuse_logits: bool
    ) -> Tensor:
        tokens, V = target.size, logits.shape[-1]
        logits_TV, target_T = ops.shaped(logits.contiguous(), (tokens, V)), ops.shaped(target.contiguous(), (tokens,))
        ctx.first_row, ctx.reuse_logits = group.rank * V, reuse_logits
        vocabulary = group.size * V
        smoothing = label_smoothing * vocabulary / (vocabulary - 1) if label_smoothing else 0.0
        ctx.target_weight, ctx.uniform_weight = 1.0 - smoothing, smoothing / vocabulary

        largest, sums = ops.vocab_statistics(logits_TV, target_T, ctx.first_row)
        if group.size > 1:
            highest = group.all_reduce(largest, "max")
            largest, sums = highest, group.all_reduce_(ops.vocab_sums_of(sums, largest, highest))
        loss, log_sum_exp = ops.vocab_losses(largest, sums, target_T, ctx.target_weight, ctx.uniform_weight)
        ctx.save_for_backward(logits_TV, log_sum_exp, target_T)
        ctx.shape = logits.shape
        return ops.shaped(loss, target.shape)

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        logits_TV, log_sum_exp, target_T = ctx.saved_tensors
        grad = ops.vocab_grad_logits(
            logits_TV,
            log_sum_exp,
            target_T,
            ctx.first_row,
            ops.shaped(dloss.contiguous(), target_T.shape),
            ctx.target_weight,
            ctx.uniform_weight,
            ctx.reuse_logits,
        )
        return ops.shaped(grad, ctx.shape), None, None, None, None
