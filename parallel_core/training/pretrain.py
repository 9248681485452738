"""`pretrain()`: builds model, optimizer and data, and runs the loop."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mindspore as ms

from parallel_core import ops
from parallel_core.config.dump import resolved_yaml, sections_yaml
from parallel_core.config.load import load_config
from parallel_core.config.plan import num_floating_point_operations
from parallel_core.config.schema import AllConfig
from parallel_core.context import ParallelContext
from parallel_core.data import data_order_fingerprint, describe_data_order, explain_data_order_change
from parallel_core.data import train_valid_test_num_samples as count_samples
from parallel_core.errors import ConfigError, bullet_list
from parallel_core.files import create_file
from parallel_core.optimizer.schedules import OptimizerParamScheduler
from parallel_core.pipeline.schedule import format_steps
from parallel_core.pipeline.stage import ForwardStep
from parallel_core.training.batches import BatchSource, default_datasets_provider, make_batch_source
from parallel_core.training.checkpointing import Checkpointer, Progress
from parallel_core.training.forward_step import forward_step_with, get_batch
from parallel_core.training.log import RunLog, Stopwatch, log_folder
from parallel_core.training.model import ModelProvider, get_model
from parallel_core.training.profiler import StepProfiler
from parallel_core.training.runtime import start_context, start_runtime, supported_precision
from parallel_core.training.schedule import batch_sizes, loss_scaler, schedule_shape, train_iterations
from parallel_core.training.step import StepReport, TrainingStep
from parallel_core.training.summary import describe_run, next_commands

DatasetsProvider = Callable[[tuple[int, int, int]], tuple[Any, Any, Any]]
"""`train_valid_test_datasets_provider((train, valid, test) samples) -> (train, valid, test) datasets or None`."""


def pretrain(
    train_valid_test_datasets_provider: DatasetsProvider | None,
    model_provider_func: ModelProvider,
    model_type: Any = None,
    forward_step_func: ForwardStep | None = None,
    process_non_loss_data_func: Callable[[list[Any], int, Any], None] | None = None,
    *,
    extra_args_provider: Callable[[Any], Any] | None = None,
    args_defaults: Mapping[str, Any] | None = None,
    all_config: AllConfig | None = None,
    train_data_loader: Iterator[Any] | None = None,
    get_batch_func: Callable[[Any], Any] | None = None,
    argv: Sequence[str] | None = None,
) -> None:
    """Train a model as the configuration says.

    Args:
        train_valid_test_datasets_provider: gives the datasets for the asked numbers of samples; None: GPT datasets
            from the configured files.
        model_provider_func: builds a pipeline stage's chunk: `(pre_process, post_process[, vp_stage][, stage])`.
        model_type: None or Megatron's ModelType.encoder_or_decoder; nothing else is built here.
        forward_step_func: `(data_iterator, model) -> (output, loss_func)`; None: Megatron's for GPT.
        process_non_loss_data_func: called on the last stage after each evaluation with what
            `loss_func(output, non_loss_data=True)` gave for one batch, the iteration, and None (no writer).
        extra_args_provider: adds argument groups to the command line's parser.
        args_defaults: values of arguments that nobody gave.
        all_config: the configuration; None: from the command line.
        train_data_loader: NumPy microbatches for training, in place of the provider's dataset and its sampler.
        get_batch_func: `(data_iterator) -> (tokens, labels, loss_mask, document_start, position_ids)`, used by the
            default forward step.
        argv: the command line; None: sys.argv[1:].

    Raises:
        ConfigError: if the configuration is wrong; nothing has started then.
    """
    if model_type is not None and "encoder_or_decoder" not in str(getattr(model_type, "name", model_type)):
        raise ConfigError(f"model_type={model_type!r}: only encoder_or_decoder (GPT) is built; leave it out")
    if forward_step_func is not None and get_batch_func is not None:
        raise ConfigError("give forward_step_func or get_batch_func: a forward step gets its batches itself")
    rank, world_size = start_runtime()
    notes: list[str] = []
    resolved = ""
    if all_config is None:
        loaded = load_config(
            sys.argv[1:] if argv is None else argv,
            world_size=world_size,
            extra_args_provider=extra_args_provider,
            args_defaults=args_defaults,
        )
        all_config, notes, resolved = loaded.config, loaded.notes, resolved_yaml(loaded)
    if rank == 0:
        save_configuration(all_config, resolved or sections_yaml(all_config))
    if all_config.training_config.deterministic_mode and ms.get_context("deterministic") != "ON":
        ms.set_deterministic(True)  # MindSpore takes it once
    config, changed = supported_precision(all_config)
    context = start_context(config, rank, world_size)
    run = TrainingRun(
        config,
        context,
        model_provider_func,
        forward_step_func or forward_step_with(get_batch_func or get_batch),
        process_non_loss_data_func,
        notes + ([changed] if changed else []),
    )
    run.load_data(train_valid_test_datasets_provider or default_datasets_provider(config), train_data_loader)
    run.train()
    context.destroy()


def save_configuration(config: AllConfig, text: str) -> None:
    """Write the resolved configuration as config.yaml beside the logs and beside the checkpoints.

    Raises:
        ConfigError: if one of the directories cannot be written.
    """
    training = config.training_config
    for folder in [log_folder(training.log_dir), *([Path(training.output_dir)] if training.output_dir else [])]:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with create_file(folder / "config.yaml") as file:
                file.write(text)
        except OSError as error:
            raise ConfigError(f"the configuration cannot be written to {folder}: {error.strerror or error}") from None


class TrainingRun:
    """One training run on this rank: made, given data by `load_data`, and run to its end by `train`; see `pretrain`."""

    def __init__(
        self,
        config: AllConfig,
        context: ParallelContext,
        model_provider_func: ModelProvider,
        forward_step_func: ForwardStep,
        process_non_loss_data_func: Callable[[list[Any], int, Any], None] | None,
        notes: Sequence[str],
    ) -> None:
        self.config, self.context = config, context
        self.sizes = batch_sizes(config, context.dp.size)
        self.iterations = train_iterations(config, self.sizes)
        flops = partial(num_floating_point_operations, config) if config.training_config.log_throughput else None
        self.log = RunLog(context, config.training_config.log_dir, config.model_config.seq_length, flops)
        self.profiler = StepProfiler(config.training_config, context.rank)
        kernels = ops.use_kernels(config.model_config.transformer_impl)
        self._process_non_loss_data = process_non_loss_data_func
        scheduler = OptimizerParamScheduler(schedule_shape(config, self.sizes, self.iterations))
        model = get_model(model_provider_func, config, context)
        self.step = TrainingStep(config, context, model, forward_step_func, scheduler, loss_scaler(config))
        self.checkpointer = Checkpointer(config, context, self.step, self.log.info)
        for line in describe_run(config, context, self.step, self.sizes, self.iterations):
            self.log.info(line)
        self.log.info(f"Kernels: {kernels}")
        for note in notes:
            self.log.warn(note)
        if config.training_config.print_schedule:
            table = format_steps(self.step.schedule(self.sizes.num_microbatches(self.sizes.global_batch_size)))
            for line in table.splitlines():
                self.log.info(line)
        self.progress = Progress()
        if config.training_config.load_checkpoint:
            self.progress = self.checkpointer.load()
        self._interrupted = False
        self._saved_at = -1
        self._started = time.monotonic()

    # ---- data -------------------------------------------------------------------------------------------------------
    def load_data(self, provider: DatasetsProvider, train_data_loader: Iterator[Any] | None) -> None:
        """Build the datasets and this rank's readers."""
        training = self.config.training_config
        sizes = count_samples(
            global_batch_size=self.sizes.global_batch_size,
            train_iters=self.iterations,
            eval_interval=training.eval_interval or None,
            eval_iters=training.eval_iters + (self._process_non_loss_data is not None),
            train_samples=training.train_samples or None,
        )
        train, valid, test = provider(sizes)
        if train_data_loader is not None:
            train = train_data_loader
        self._check_data_order(train if train_data_loader is None else None)
        external = train_data_loader is not None
        done = self.progress
        self.train_data = self._source(train, done.consumed_train_samples, external)
        has_eval = training.eval_iters > 0
        self.valid_data = self._source(valid, done.consumed_valid_samples) if valid is not None and has_eval else None
        self.test_data = self._source(test, 0) if test is not None and has_eval else None
        self._train_dataset = train

    def _source(self, dataset: Any, consumed: int, external: bool = False) -> BatchSource:
        return make_batch_source(dataset, consumed, self.config, self.context, len(self.step.model.chunks), external)

    def _check_data_order(self, dataset: Any) -> None:
        """Say so when the samples come in another order than in the run that was loaded."""
        data = self.config.dataset_config
        order = describe_data_order(
            dataset,
            dataloader_type=data.dataloader_type,
            micro_batch_size=data.batch_size,
            data_parallel_size=self.context.dp.size,
        )
        before = self.progress.data_order
        if before is not None and data_order_fingerprint(before) != data_order_fingerprint(order):
            changes = bullet_list(explain_data_order_change(before, order))
            if self.config.training_config.new_dataset:
                self.log.info("Training goes on with new data (--new-dataset), from its first sample")
            else:
                self.log.warn(
                    "the samples come in another order than in the run this checkpoint is from, so some are seen twice "
                    "and some not at all (--new-dataset starts the data afresh):\n" + changes
                )
        consumed = 0 if self.config.training_config.new_dataset else self.progress.consumed_train_samples
        self.progress = _replace(self.progress, data_order=order, consumed_train_samples=consumed)

    # ---- the loop ---------------------------------------------------------------------------------------------------
    def train(self) -> None:
        """Run the iterations that are left, evaluations and checkpoints among them."""
        training = self.config.training_config
        self._listen_to_signals()
        watch = Stopwatch()
        stop = training.skip_train
        while self.progress.iteration < self.iterations and not stop:
            report = self._iteration(watch)
            iteration = self.progress.iteration
            if training.eval_interval and iteration % training.eval_interval == 0 and iteration < self.iterations:
                self._evaluate("validation", self.valid_data)
                watch.lap()
            stop = self._stop_reason(report) is not None
            if stop or (training.save_interval and iteration % training.save_interval == 0):
                self._save()
                watch.lap()
        self._finish(stopped=stop and not training.skip_train)

    def _iteration(self, watch: Stopwatch) -> StepReport:
        done = self.progress
        samples = self.sizes.current(done.consumed_train_samples)
        microbatches = self.sizes.num_microbatches(done.consumed_train_samples)
        iteration = done.iteration + 1
        self.profiler.before_step(iteration)
        report = self.step.train(self.train_data, iteration, microbatches, samples, self._wants_to_stop())
        self.profiler.after_step(iteration)
        self.progress = _replace(
            done, iteration=iteration, consumed_train_samples=done.consumed_train_samples + samples
        )
        interval = self.config.training_config.log_interval
        self.log.step(
            report,
            iteration=iteration,
            last_iteration=self.iterations,
            epoch=self._epoch(),
            consumed_samples=self.progress.consumed_train_samples,
            samples=samples,
            elapsed_s=watch.lap(),
            show=bool(interval) and (iteration % interval == 0 or iteration == self.iterations),
        )
        return report

    def _evaluate(self, split: str, data: BatchSource | None) -> None:
        training = self.config.training_config
        if data is None or not training.eval_iters:
            return
        iteration = self.progress.iteration
        microbatches = self.sizes.global_batch_size // (self.sizes.micro_batch_size * self.sizes.data_parallel_size)
        losses = self.step.evaluate(data, iteration, microbatches, training.eval_iters)
        if split == "validation":
            batches = training.eval_iters + (self._process_non_loss_data is not None)
            seen = self.progress.consumed_valid_samples + batches * self.sizes.global_batch_size
            self.progress = _replace(self.progress, consumed_valid_samples=seen)
        self.log.evaluation(split, iteration, losses)
        if self._process_non_loss_data is not None and split == "validation":
            collected = self.step.collect_non_loss_data(data, iteration, microbatches)
            if self.context.is_last_stage:
                self._process_non_loss_data(collected, iteration, None)

    def _finish(self, stopped: bool) -> None:
        training = self.config.training_config
        if not stopped:
            self._evaluate("validation", self.valid_data)
            self._evaluate("test", self.test_data)
            self._save()
        self.profiler.stop()
        self.checkpointer.finish()
        for source in (self.train_data, self.valid_data, self.test_data):
            if source is not None:
                source.close()
        if stopped:
            self.log.info(f"Stopped after iteration {self.progress.iteration} of {self.iterations}")
        for line in next_commands(self.config, self.progress.iteration, bool(training.output_dir)):
            self.log.info(line)
        self.log.close()

    def _save(self) -> None:
        if self.config.training_config.output_dir and self._saved_at != self.progress.iteration:
            self.checkpointer.save(self.progress)
            self._saved_at = self.progress.iteration

    def _epoch(self) -> int:
        per_epoch = getattr(self._train_dataset, "samples_per_epoch", 0)
        return (self.progress.consumed_train_samples - 1) // per_epoch if per_epoch else 0

    # ---- stopping early ---------------------------------------------------------------------------------------------
    def _listen_to_signals(self) -> None:
        def interrupt(*_: object) -> None:
            self._interrupted = True

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, interrupt)

    def _wants_to_stop(self) -> bool:
        minutes = self.config.training_config.exit_duration_in_mins
        return self._interrupted or bool(minutes and time.monotonic() - self._started > minutes * 60)

    def _stop_reason(self, report: StepReport) -> str | None:
        interval = self.config.training_config.exit_interval
        if report.stop:
            self.log.info("Stopping: a rank was told to end, or --exit-duration-in-mins has passed")
            return "signal"
        if interval and self.progress.iteration % interval == 0:
            self.log.info(f"Stopping at a multiple of --exit-interval {interval}")
            return "interval"
        return None


def _replace(progress: Progress, **changes: Any) -> Progress:
    return Progress(**{**vars(progress), **changes})
