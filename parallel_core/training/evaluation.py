"""Evaluations: how many batches, who is told of them, and what ends one early."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from parallel_core.config.schema import AllConfig
from parallel_core.layout.derived import BatchSizes
from parallel_core.training.batches import BatchSource
from parallel_core.training.log import RunLog
from parallel_core.training.step import TrainingStep

NonLossDataFunction = Callable[[list[Any], int, Any], None]
"""`process_non_loss_data_func(collected, iteration, writer)`, as in Megatron-LM; the writer is TensorBoard's
on the rank that has it, else None."""


class Evaluator:
    """Evaluates the model as it stands.

    Args:
        config: the run.
        step: the model.
        sizes: batch sizes; an evaluation takes batches of the full size.
        log: is told the losses.
        stop: asked after every batch whether this rank wants the run to end.
        process_non_loss_data: called on the last stage after each validation.
    """

    def __init__(
        self,
        config: AllConfig,
        step: TrainingStep,
        sizes: BatchSizes,
        log: RunLog,
        stop: Callable[[], bool],
        process_non_loss_data: NonLossDataFunction | None,
    ) -> None:
        self.batches = config.training_config.eval_iters
        self.samples = (self.batches + (process_non_loss_data is not None)) * sizes.global_batch_size
        self._microbatches = sizes.global_batch_size // (sizes.micro_batch_size * sizes.data_parallel_size)
        self._step, self._log, self._stop = step, log, stop
        self._process_non_loss_data = process_non_loss_data

    def run(self, split: str, data: BatchSource | None, iteration: int) -> bool:
        """Evaluate one split, if it has data; return False if a rank asked the run to end meanwhile.

        Args:
            split: `validation` or `test`.
            data: its microbatches.
            iteration: iterations completed.
        """
        if data is None or not self.batches:
            return True
        losses = self._step.evaluate(data, iteration, self._microbatches, self.batches, self._stop)
        if losses is None:
            self._log.info(f"The {split} evaluation at iteration {iteration} is broken off, its losses not reported")
            return False
        self._log.evaluation(split, iteration, losses)
        if self._process_non_loss_data is not None and split == "validation":
            collected = self._step.collect_non_loss_data(data, iteration, self._microbatches)
            if self._step.context.is_last_stage:
                self._process_non_loss_data(collected, iteration, self._log.events)
        return True
