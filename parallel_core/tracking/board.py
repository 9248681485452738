"""Which number is told under which of Megatron-LM's tags, and when."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from parallel_core.config.schema import TrackingConfig
from parallel_core.tracking.writers import TensorBoardWriter, Writer

logger = logging.getLogger(__name__)


class Board:
    """Tells the writers of iterations and evaluations. One that fails is told no more, and the run goes on.

    Args:
        config: which numbers are asked for.
        writers: who is told.
        world_size: ranks of the run.
    """

    def __init__(self, config: TrackingConfig, writers: Sequence[Writer], world_size: int) -> None:
        self._config, self._writers, self._world_size = config, list(writers), world_size

    @property
    def events(self) -> Any:
        """TensorBoard's SummaryWriter, or None."""
        return next((writer.events for writer in self._writers if isinstance(writer, TensorBoardWriter)), None)

    def iteration(
        self,
        iteration: int,
        samples: int,
        values: Mapping[str, float | None],
        *,
        batch_size: int,
        memory: Mapping[str, float],
        times: Mapping[str, Sequence[float]],
    ) -> None:
        """Tell of an iteration, if it is the turn of one.

        Args:
            iteration: its number.
            samples: samples consumed so far.
            values: losses by name, and of `lr`, `decoupled_lr`, `loss_scale`, `grad_norm`, `num_zeros_in_grad` and
                `params_norm` those that there are.
            batch_size: its samples.
            memory: memory by tag.
            times: milliseconds per iteration on every rank, by timer.
        """
        config = self._config
        if not self._writers or iteration % config.tensorboard_log_interval:
            return
        told = {_TAGS.get(name, name): value for name, value in values.items()}
        told["batch-size"] = float(batch_size)
        if config.log_world_size_to_tensorboard:
            told["world-size"] = float(self._world_size)
        if not config.log_loss_scale_to_tensorboard:
            told.pop("loss-scale", None)
        if not config.log_learning_rate_to_tensorboard:
            told.pop("learning-rate", None)
        self._tell(told, iteration, samples)
        alone = {"samples vs steps": float(samples)}
        if config.log_memory_to_tensorboard:
            alone.update(memory)
        if config.log_timers_to_tensorboard:
            alone.update({f"{name}-time": max(of_ranks) / 1e3 for name, of_ranks in times.items()})
        self._tell(alone, iteration, None)

    def interval(self, iteration: int, seconds: float, tflops_per_device: float | None) -> None:
        """Tell, at a line of the log, how long an iteration took on average since the last one."""
        if self._config.log_timers_to_tensorboard:
            self._tell({"iteration-time": seconds, "throughput": tflops_per_device}, iteration, None)

    def evaluation(
        self, split: str, iteration: int, samples: int, losses: Mapping[str, float | None], ppl: Mapping[str, float]
    ) -> None:
        """Tell of an evaluation: losses and perplexities by the losses' names."""
        told: dict[str, float | None] = {f"{name} {split}": loss for name, loss in losses.items()}
        if self._config.log_validation_ppl_to_tensorboard:
            told.update({f"{name} {split} ppl": value for name, value in ppl.items()})
        self._tell(told, iteration, samples)

    def close(self) -> None:
        """Close the writers."""
        for writer in list(self._writers):
            self._ask(writer, writer.close)

    def _tell(self, values: Mapping[str, float | None], iteration: int, samples: int | None) -> None:
        for tag, value in values.items():
            if value is None or not math.isfinite(value):
                continue
            for writer in list(self._writers):
                self._ask(writer, writer.scalar, tag, value, iteration)
                if samples is not None and writer in self._writers:
                    self._ask(writer, writer.scalar_over_samples, tag, value, samples)

    def _ask(self, writer: Writer, method: Callable[..., None], *args: Any) -> None:
        try:
            method(*args)
        except Exception as error:  # a disk's, a network's, or its own errors
            self._writers.remove(writer)
            logger.warning("%s failed and is told nothing more: %s", type(writer).__name__, error)


_TAGS = {
    "lr": "learning-rate",
    "decoupled_lr": "decoupled-learning-rate",
    "loss_scale": "loss-scale",
    "grad_norm": "grad-norm",
    "num_zeros_in_grad": "num-zeros",
    "params_norm": "params-norm",
}
