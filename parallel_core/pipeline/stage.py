"""One model chunk as the pipeline sees it: forward and backward passes of microbatches, several in flight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn

from parallel_core.autograd import backward, forget_recording, no_grad
from parallel_core.comm.interface import Group
from parallel_core.errors import ParallelCoreError
from parallel_core.pipeline.loss_contract import checked_loss, collects_non_loss_data

ForwardStep = Callable[[Iterator[Any], nn.Cell], tuple[Tensor, Callable[..., Any]]]
"""`forward_step_func(data_iterator, model) -> (output, loss_func)`, as in Megatron-LM."""


class PipelineStage:
    """Runs one chunk's microbatches.

    The objective is the mean over microbatches of each one's mean loss; with `per_token_loss` it is the sum of the
    loss, and the gradients are divided by the number of tokens afterwards (Megatron's calculate_per_token_loss).

    Args:
        model: the chunk; if it is not the first stage it has `set_input_tensor`.
        forward_step_func: Megatron's contract, see `ForwardStep`.
        is_first: this chunk reads no activation.
        is_last: this chunk's output goes to the loss function.
        per_token_loss: see above.
        tokens_group: ranks that hold parts of the same sequences. A microbatch's mean is over the tokens of all of
            them, and is multiplied by their number, because gradients are averaged over them afterwards.
        before_forward: called with the microbatch's number before each forward pass (random streams, parameters that
            are still being gathered).
        before_last_backward: called before the last backward pass of an iteration (gradient reduction).
    """

    def __init__(
        self,
        model: nn.Cell,
        forward_step_func: ForwardStep,
        *,
        is_first: bool,
        is_last: bool,
        per_token_loss: bool = False,
        tokens_group: Group | None = None,
        before_forward: Callable[[int], None] = lambda microbatch: None,
        before_last_backward: Callable[[], None] = lambda: None,
    ) -> None:
        self._cell = _StageCell(model, forward_step_func, is_first, is_last, per_token_loss, tokens_group)
        self._parameters: Sequence[Parameter] = list(model.trainable_params())
        self._before_forward, self._before_last_backward = before_forward, before_last_backward
        self._per_token_loss, self._is_first, self._is_last = per_token_loss, is_first, is_last
        self._in_flight: dict[int, Tensor] = {}
        self._forward_only = False
        self._loss_gradient = Tensor(np.float32(1.0))

    def start_iteration(
        self,
        data: Iterator[Any],
        num_microbatches: int,
        *,
        loss_scale: float = 1.0,
        forward_only: bool = False,
        non_loss_data: bool = False,
    ) -> None:
        """Forget the last iteration.

        Args:
            data: this chunk's microbatches.
            num_microbatches: how many of them this rank has in the iteration.
            loss_scale: factor of the gradients.
            forward_only: keep nothing for backward.
            non_loss_data: call `loss_func(output, non_loss_data=True)` and keep what it returns as reports; of a
                loss_func without such an argument, the output.
        """
        self._in_flight.clear()
        self._cell.reports.clear()
        self._cell.data, self._cell.non_loss_data = data, non_loss_data
        self._forward_only = forward_only
        self._cell.set_grad(not forward_only)
        self._cell.set_train(not forward_only)
        self._loss_gradient = Tensor(np.float32(loss_scale if self._per_token_loss else loss_scale / num_microbatches))

    @property
    def reports(self) -> list[Any]:
        """Of every microbatch so far on the last stage: (tokens, {name: (sum, number)}), or its non-loss data."""
        return self._cell.reports

    def forward(self, microbatch: int, activation: Tensor | None) -> Tensor:
        """Return the chunk's output: hidden states, or on the last stage the microbatch's loss."""
        if (activation is None) != self._is_first or microbatch in self._in_flight:
            raise ParallelCoreError(
                f"pipeline: the forward pass of microbatch {microbatch} "
                + ("runs twice" if microbatch in self._in_flight else "lacks its activation, or has one to spare")
            )
        self._before_forward(microbatch)
        # Autograd finds a recorded call by its input object, so a stage without an activation gets one of its own.
        entry = Tensor(np.zeros(1, np.float32)) if activation is None else activation
        if self._forward_only:
            with no_grad():
                return self._cell(entry)
        try:
            output = self._cell(entry)
        except BaseException:
            forget_recording()
            raise
        self._in_flight[microbatch] = entry
        return output

    def backward(self, microbatch: int, grad_output: Tensor | None, is_last: bool) -> Tensor:
        """Return the gradient for the activation that `forward` was given."""
        if (grad_output is None) != self._is_last or microbatch not in self._in_flight:
            raise ParallelCoreError(
                f"pipeline: the backward pass of microbatch {microbatch} "
                + ("lacks its forward pass" if microbatch not in self._in_flight else "lacks its gradient")
            )
        if is_last:
            self._before_last_backward()
        entry = self._in_flight.pop(microbatch)
        gradient = self._loss_gradient if self._is_last else grad_output
        (grad_input, *_), _ = backward(self._cell, (entry,), self._parameters, gradient)
        return grad_input


class _StageCell(nn.Cell):
    """forward_step_func and the loss as one Cell, whose only input is the previous stage's activation."""

    def __init__(
        self,
        model: nn.Cell,
        forward_step_func: ForwardStep,
        is_first: bool,
        is_last: bool,
        per_token_loss: bool,
        tokens_group: Group | None,
    ) -> None:
        super().__init__(auto_prefix=False)
        self.model = model
        self._forward_step_func = forward_step_func
        self._is_first, self._is_last, self._per_token_loss = is_first, is_last, per_token_loss
        self._tokens_group = tokens_group if tokens_group is not None and tokens_group.size > 1 else None
        self.data: Iterator[Any] = iter(())
        self.non_loss_data = False
        self.reports: list[Any] = []

    def construct(self, entry: Tensor) -> Tensor:
        if not self._is_first:
            self.model.set_input_tensor(entry)
        output, loss_func = self._forward_step_func(self.data, self.model)
        if not self._is_last:
            return output
        if self.non_loss_data:
            takes = collects_non_loss_data(loss_func)
            self.reports.append(loss_func(output, non_loss_data=True) if takes else output)
            return output
        loss_sum, num_tokens, report = checked_loss(loss_func(output))
        loss = self._objective(loss_sum, num_tokens)
        for name, total, number, weight in getattr(self.model, "take_auxiliary_losses", list)():
            part = self._objective(total, number)
            loss = loss + weight * part
            report = {**report, name: (total, number) if self._per_token_loss else (part, 1.0)}
        self.reports.append((num_tokens, report))
        return loss

    def _objective(self, loss_sum: Tensor, num_tokens: Tensor) -> Tensor:
        """Return the mean over the microbatch's tokens on all ranks that hold it, or the sum of this rank's."""
        if self._per_token_loss:
            return loss_sum
        one = Tensor(np.float32(1.0))
        if self._tokens_group is None:
            return loss_sum / ms.ops.maximum(num_tokens, one)
        # A rank whose part of the sequence counts no token still divides by the whole sequence's number.
        counted = self._tokens_group.all_reduce(ms.ops.stop_gradient(num_tokens))
        return loss_sum * (self._tokens_group.size / ms.ops.maximum(counted, one))
