"""What a run says: console lines, one JSON object per iteration and per evaluation.

The launcher shows every line that begins with INFO, WARNING or ERROR of any rank; so each is printed by one rank only.
"""

from __future__ import annotations

import math
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from parallel_core import startup
from parallel_core.config.schema import AllConfig, TrackingConfig
from parallel_core.context import ParallelContext
from parallel_core.environment import LOG_DIR_VARIABLE
from parallel_core.errors import printable_lines
from parallel_core.tracking.board import Board
from parallel_core.tracking.writers import make_writers
from parallel_core.training.metrics_file import MetricsFile, up_to
from parallel_core.training.product_speed import product_speed
from parallel_core.training.step import StepReport
from parallel_core.training.timers import times_text
from parallel_core.training.watch import Observed

NOT_OF_WORDS = ("sop loss", "qa loss", "class loss", "accuracy")
"""Losses that are no mean over words, so that a perplexity of them says nothing."""


class RunLog:
    """Prints on rank 0, which has every number: so node 0 shows the run, wherever the last pipeline stage is.

    It also writes `metrics.jsonl`. TensorBoard and the like are told by the last stage's first rank, as in Megatron-LM:
    there a user's `process_non_loss_data_func` finds the writer.

    Args:
        context: this rank's groups.
        log_dir: where `metrics.jsonl` goes without a launcher.
        seq_length: tokens of a sample.
        flops: floating point operations of a step over so many samples, to report TFLOP/s; None: do not.
        config: the run, for TensorBoard, Weights & Biases and MLflow; None: they are not told.

    Raises:
        ConfigError: if one of those cannot be told.
    """

    def __init__(
        self,
        context: ParallelContext,
        log_dir: str,
        seq_length: int,
        flops: Callable[[int], float] | None = None,
        config: AllConfig | None = None,
    ) -> None:
        self._tells = context.rank == 0
        self._tracks = context.is_last_stage and context.tp.rank == 0 and context.dp_cp.rank == 0
        self._seq_length, self._flops, self._devices = seq_length, flops, context.world.size
        self._peak = 0.0
        self._dtype = "float32" if config is None else config.model_config.compute_dtype
        self._recent: deque[float] = deque(maxlen=20)
        self._path = log_folder(log_dir) / "metrics.jsonl"
        self._metrics: MetricsFile | None = None
        self._since_shown: list[float] = []
        self._samples = 0
        self._times_startup = config is not None and config.training_config.time_startup
        tracking = config.training_config.tracking if config is not None else TrackingConfig()
        self._timing_option = tracking.timing_log_option
        writers = make_writers(tracking, config.to_dict()) if config is not None and self._tracks else []
        self._board = Board(tracking, writers, context.world.size)

    @property
    def events(self) -> Any:
        """TensorBoard's SummaryWriter on the rank that writes it, else None."""
        return self._board.events

    def begin(self, iteration: int, evaluates_only: bool = False) -> None:
        """Open `metrics.jsonl`: a resumed run continues it, what lies past the loaded iteration goes.

        Args:
            iteration: iterations completed; 0 begins the file anew.
            evaluates_only: the run adds no iteration, so every row stays.

        Raises:
            ConfigError: if it cannot be written.
        """
        startup.note("optimizer and checkpoint")
        if self._tells and self._flops is not None:
            self._peak = product_speed(self._dtype)
        if self._tells:
            keeps = up_to(iteration if iteration else -1)
            self._metrics = MetricsFile(self._path, (lambda row: True) if evaluates_only else keeps)

    def info(self, text: str) -> None:
        """Print on rank 0."""
        self._print("INFO", text, self._tells)

    def warn(self, text: str) -> None:
        """Print a warning on rank 0."""
        self._print("WARNING", text, self._tells)

    def step(
        self,
        report: StepReport,
        *,
        iteration: int,
        last_iteration: int,
        epoch: int,
        consumed_samples: int,
        samples: int,
        skipped: int,
        elapsed_s: float,
        show: bool,
        observed: Observed,
    ) -> None:
        """Write one iteration's metrics, and its line if it is to be shown."""
        for line in startup.told(self._times_startup):
            self.info(line)
        self._recent.append(elapsed_s)
        self._since_shown.append(elapsed_s)
        self._samples = consumed_samples
        if not (self._tells or self._tracks):
            return
        tokens_per_s = samples * self._seq_length / elapsed_s
        rates = {"tokens_per_s": tokens_per_s}
        rate_text = f"Tokens/s: {tokens_per_s:.0f}"
        if self._flops is not None:
            rates["tflops_per_device"] = self._flops(samples) / elapsed_s / self._devices / 1e12
            rate_text += f", TFLOP/s per device: {rates['tflops_per_device']:.4g}"
            if self._peak:
                rates["share_of_peak"] = rates["tflops_per_device"] * 1e12 / self._peak
                rate_text += f" ({100 * rates['share_of_peak']:.0f}% of a product's)"
        loss = report.losses.get("lm loss", next(iter(report.losses.values()), None))
        self._write(
            {
                "iteration": iteration,
                "consumed_samples": consumed_samples,
                "loss": loss,
                "grad_norm": report.grad_norm,
                "lr": report.lr,
                "weight_decay": report.weight_decay,
                "loss_scale": report.loss_scale,
                "skipped": report.skipped,
                "elapsed_ms": elapsed_s * 1e3,
                **rates,
                **{name: value for name, value in report.losses.items() if name != "lm loss"},
                **observed.numbers,
            }
        )
        values = {**report.losses, "lr": report.lr, "loss_scale": report.loss_scale, "grad_norm": report.grad_norm}
        self._board.iteration(
            iteration,
            consumed_samples,
            {**values, **observed.numbers},
            batch_size=samples,
            memory=observed.memory,
            times=observed.times,
        )
        if show:
            mean_s = sum(self._since_shown) / len(self._since_shown)
            self._since_shown.clear()
            self._board.interval(iteration, mean_s, rates.get("tflops_per_device"))
            more = "".join(f"{_SHOWN[name]}: {value:.6g}, " for name, value in observed.numbers.items())
            left = (last_iteration - iteration) * sum(self._recent) / len(self._recent)
            self._print(
                "INFO",
                f"Epoch: {epoch}, Step: {iteration}, Loss: {format_loss(loss)}, Time: {elapsed_s * 1e3:.2f} ms, "
                f"LR: {report.lr:.6e}, Grad norm: {report.grad_norm:.4f}, {_other_losses(report)}{more}{rate_text}, "
                f"Loss scale: {report.loss_scale:g}, Skipped: {skipped}, Memory: {peak_memory_mb():.0f} MB, "
                f"Progress: {iteration}/{last_iteration} ({100 * iteration / last_iteration:.0f}%), "
                f"Left: {format_duration(left)}",
                self._tells,
            )
            if observed.times:
                self._print("INFO", times_text(observed.times, self._timing_option), self._tells)

    def evaluation(self, split: str, iteration: int, losses: Mapping[str, float | None]) -> None:
        """Write and print one evaluation: a row and a line for each loss, with its name if it is not `lm loss`."""
        if not (self._tells or self._tracks):
            return
        perplexities: dict[str, float] = {}
        for name, loss in losses.items():
            other = {} if name == "lm loss" else {"name": name}
            row: dict[str, Any] = {"iteration": iteration, "split": split, "loss": loss}
            told = f"Loss: {format_loss(loss)}"
            if name not in NOT_OF_WORDS:
                row["ppl"] = None if loss is None else math.exp(min(loss, 20.0))  # in this order: NaN stays NaN
                told += f", PPL: {format_loss(row['ppl'], 4)}"
                if row["ppl"] is not None:
                    perplexities[name] = row["ppl"]
            self._write({**row, **other})
            text = "".join(f"{value}, " for value in other.values())
            self._print("INFO", f"Evaluation: {text}{split}, Step: {iteration}, {told}", self._tells)
        self._board.evaluation(split, iteration, self._samples, losses, perplexities)

    def learned(self, iterations: int, skipped: int) -> None:
        """Say so when every one of the iterations was skipped."""
        if iterations and iterations == skipped:
            self.warn(
                f"the model is as it was: all {iterations} iterations were skipped, because the gradients overflowed "
                "or no token of the batch counts (see --initial-loss-scale, --loss-scale and the loss mask)"
            )

    def close(self) -> None:
        """Flush and close the metrics and what else is told."""
        self._board.close()
        if self._metrics is not None:
            self._metrics.close()

    def _write(self, row: dict[str, Any]) -> None:
        if self._metrics is not None:
            self._metrics.write(row)

    @staticmethod
    def _print(level: str, text: str, visible: bool) -> None:
        if visible:
            print(printable_lines(f"{level} - {text}"), file=sys.stdout, flush=True)


_SHOWN = {"params_norm": "Params norm", "num_zeros_in_grad": "Zeros in grad"}


def _other_losses(report: StepReport) -> str:
    """Return what is reported beside the loss itself, such as the losses and loads of experts; not layer by layer."""
    others = [(name, value) for name, value in report.losses.items() if name != "lm loss" and "/" not in name]
    return "".join(f"{name}: {format_loss(value, 6)}, " for name, value in others)


def format_loss(loss: float | None, digits: int = 10) -> str:
    """Return a loss as text, `none` if no token counted."""
    return "none" if loss is None else f"{loss:.{digits}f}"


def log_folder(log_dir: str) -> Path:
    """Return where a run's files of text go: the launcher's directory, or `log_dir` without one."""
    return Path(os.environ.get(LOG_DIR_VARIABLE) or log_dir)


def peak_memory_mb() -> float:
    """Return the largest resident memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def format_duration(seconds: float) -> str:
    """Return seconds as 3:05 or 1:03:05."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Stopwatch:
    """Seconds since it was made or last asked."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Return the seconds since the last lap."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds
