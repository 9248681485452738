"""One model chunk as the pipeline sees it: forward and backward passes of microbatches, several in flight."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from mindspore import Tensor, nn

from parallel_core.autograd import no_grad
from parallel_core.comm.interface import Group
from parallel_core.deferral import deferring
from parallel_core.errors import ParallelCoreError
from parallel_core.ops import raw
from parallel_core.pipeline.recorded import RecordedCalls, TakeBack
from parallel_core.pipeline.stage_cell import ForwardStep, StageCell


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
        after_backward: called after each backward pass.
        before_last_weight_grad: called in its place before the last one's part for the weights, if it is split.
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
        before_last_weight_grad: Callable[[], None] = lambda: None,
        after_backward: Callable[[], None] = lambda: None,
    ) -> None:
        self._cell = StageCell(model, forward_step_func, is_first, is_last, per_token_loss, tokens_group)
        self._calls = RecordedCalls(self._cell, list(model.trainable_params()))
        self._before_forward, self._before_last_backward = before_forward, before_last_backward
        self._before_last_weight_grad, self._after_backward = before_last_weight_grad, after_backward
        self._per_token_loss, self._is_first, self._is_last = per_token_loss, is_first, is_last
        self._in_flight, self._late = dict[int, TakeBack](), dict[int, deque[Callable[[], None]]]()
        self._forward_only, self._loss_gradient = False, Tensor(np.float32(1.0))

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

        Raises:
            ParallelCoreError: if it has left gradients of weights that nobody computed.

        Args:
            data: this chunk's microbatches.
            num_microbatches: how many of them this rank has in the iteration.
            loss_scale: factor of the gradients.
            forward_only: keep nothing for backward.
            non_loss_data: call `loss_func(output, non_loss_data=True)` and keep what it returns as reports; of a
                loss_func without such an argument, the output.
        """
        if self._late:
            raise ParallelCoreError(
                f"pipeline: the gradients of the weights of microbatches {sorted(self._late)} were never computed"
            )
        self._in_flight.clear()
        self._cell.start(data, non_loss_data)
        self._forward_only = forward_only
        if self._cell.training == forward_only or self._cell.model.training == forward_only:
            self._cell.set_train(not forward_only)  # it walks through all cells
        self._calls.start_iteration(records=not forward_only)
        gradient = loss_scale if self._per_token_loss else loss_scale / num_microbatches
        self._loss_gradient = raw.on(np.array(gradient, np.float32))

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
        entry = raw.zeros((1,)) if activation is None else activation
        if self._forward_only:
            with no_grad():
                return self._cell(entry)
        self._cell.mark()
        start_again = (self._cell.go_back, partial(self._before_forward, microbatch))
        output, self._in_flight[microbatch] = self._calls.call(entry, start_again)
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
        grad_input = self._in_flight.pop(microbatch)(self._loss_gradient if self._is_last else grad_output)
        self._after_backward()
        return grad_input

    def input_grad(self, microbatch: int, grad_output: Tensor | None) -> Tensor:
        """Return the gradient for the activation; what the weights get of it waits for `weight_grad`."""
        with deferring() as late:
            gradient = self.backward(microbatch, grad_output, False)
        self._late[microbatch] = deque(late)
        return gradient

    def weight_grad(self, microbatch: int, is_last: bool) -> None:
        """Add to the gradients of the weights what `input_grad` left of `microbatch`."""
        if microbatch not in self._late:
            raise ParallelCoreError(f"pipeline: microbatch {microbatch} has left no gradients of weights")
        if is_last:
            self._before_last_weight_grad()
        late = self._late.pop(microbatch)
        with no_grad():
            while late:  # each call gives back the activations that it has kept
                late.popleft()()
