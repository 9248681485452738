"""A model chunk and its loss as one recorded call of a microbatch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mindspore as ms
from mindspore import Tensor, nn

from parallel_core import ops
from parallel_core.comm.interface import Group
from parallel_core.pipeline.loss_contract import checked_loss, collects_non_loss_data
from parallel_core.pipeline.recorded import RereadableIterator
from parallel_core.tape import constant

ForwardStep = Callable[[Iterator[Any], nn.Cell], tuple[Tensor, Callable[..., Any]]]
"""`forward_step_func(data_iterator, model) -> (output, loss_func)`, as in Megatron-LM."""


class StageCell(nn.Cell):
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
        self.reports, self._marked = list[Any](), [0]
        self.start(iter(()), False)

    def start(self, data: Iterator[Any], non_loss_data: bool) -> None:
        """Forget the reports; read microbatches from `data`; see `PipelineStage.start_iteration`."""
        self.data, self.non_loss_data = RereadableIterator(data), non_loss_data
        self.reports.clear()

    def mark(self) -> None:
        """Remember what was read and reported."""
        self.data.mark()
        self._marked[:] = [len(self.reports)]  # in a list, because an attribute of a Cell takes a kernel's time to set

    def go_back(self) -> None:
        """Forget what was reported since `mark`, and read once more what was read."""
        self.data.go_back()
        del self.reports[self._marked[0] :]

    def construct(self, entry: Tensor) -> Tensor:
        """Return hidden states; on the last stage the scalar loss, or the output where non-loss data is collected."""
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
        num_tokens = constant(num_tokens)
        loss = self._objective(loss_sum, num_tokens)
        for name, total, number, weight in getattr(self.model, "take_auxiliary_losses", list)():
            number = constant(number)
            part = self._objective(total, number)
            loss = ops.plus_multiple(loss, part, weight)
            report = {**report, name: (total, number) if self._per_token_loss else (part, 1.0)}
        self.reports.append((num_tokens, report))
        return loss

    def _objective(self, loss_sum: Tensor, num_tokens: Tensor) -> Tensor:
        """Return the mean over the microbatch's tokens on all ranks that hold it, or the sum of this rank's."""
        if self._per_token_loss:
            return loss_sum
        if self._tokens_group is None:
            return ops.mean_loss(loss_sum, num_tokens, 1.0)
        # A rank whose part of the sequence counts no token still divides by the whole sequence's number.
        counted = constant(self._tokens_group.all_reduce(ms.ops.stop_gradient(num_tokens)))
        return ops.mean_loss(loss_sum, counted, float(self._tokens_group.size))
