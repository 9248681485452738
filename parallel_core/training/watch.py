"""What is observed around an iteration: profile, timers, and numbers about the whole model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from parallel_core import startup
from parallel_core.config.schema import TrainingConfig
from parallel_core.context import ParallelContext
from parallel_core.spans import span
from parallel_core.training.profiler import StepProfiler
from parallel_core.training.statistics import memory_values, model_statistics
from parallel_core.training.step import StepReport, TrainingStep
from parallel_core.training.timers import Timers, Times


@dataclass(frozen=True)
class Observed:
    """What was observed of an iteration; the same on every rank, but for the memory.

    Attributes:
        numbers: `params_norm` and `num_zeros_in_grad`, where they are asked for.
        times: timers, on iterations that show or write them.
        memory: bytes by Megatron-LM's tags, where they are asked for.
    """

    numbers: dict[str, float] = field(default_factory=dict)
    times: Times = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)


class StepWatch:
    """Observes iterations as the configuration asks; every rank has one and calls it alike.

    Args:
        training: what is asked for.
        context: this rank's groups.
        step: what runs the iterations.
    """

    def __init__(self, training: TrainingConfig, context: ParallelContext, step: TrainingStep) -> None:
        self._tracking, self._context, self._step = training.tracking, context, step
        self._profiler = StepProfiler(training, context)
        self._timers = Timers(
            self._tracking.timing_log_level, context.world, barrier=self._tracking.barrier_with_L1_time
        )

    @contextmanager
    def iteration(self, iteration: int) -> Iterator[None]:
        """Observe the iteration that the block runs."""
        startup.note("data")
        self._profiler.before_step(iteration)
        with self._timers, span("iteration", 0, iteration=iteration):
            yield
        self._profiler.after_step(iteration)

    def after(self, report: StepReport, iteration: int, shown: bool) -> Observed:
        """Return what was observed of an iteration; collective over the world where numbers or timers are asked for.

        Args:
            report: what the iteration did.
            iteration: its number.
            shown: the log has a line about it.
        """
        ask = self._tracking
        numbers: dict[str, float] = {}
        if ask.log_params_norm or ask.log_num_zeros_in_grad:
            numbers = model_statistics(
                self._step.optimizer,
                self._context,
                params_norm=ask.log_params_norm,
                num_zeros=ask.log_num_zeros_in_grad and not report.skipped,
            )
        written = ask.log_timers_to_tensorboard and iteration % ask.tensorboard_log_interval == 0
        times = self._timers.collect(reset=shown) if shown or written else {}
        return Observed(numbers, times, memory_values() if ask.log_memory_to_tensorboard else {})

    def stop(self) -> None:
        """End a profile under way."""
        self._profiler.stop()
