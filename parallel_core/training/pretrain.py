"""`pretrain()`: builds model, optimizer and data, and runs the loop."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import mindspore as ms

from parallel_core.config.dump import resolved_yaml, sections_yaml
from parallel_core.config.handover import load_run_config
from parallel_core.config.plan import num_floating_point_operations
from parallel_core.config.schema import AllConfig
from parallel_core.context import ParallelContext
from parallel_core.data import train_valid_test_num_samples as count_samples
from parallel_core.errors import ConfigError, ResultError
from parallel_core.ops.library import give_back_freed_memory
from parallel_core.ops.selection import PLAIN
from parallel_core.optimizer.schedules import OptimizerParamScheduler
from parallel_core.pipeline.figures import format_steps
from parallel_core.pipeline.stage import ForwardStep
from parallel_core.tracking.writers import require_packages
from parallel_core.training.batches import BatchSource, make_batch_source
from parallel_core.training.checkpointing import Checkpointer, Progress
from parallel_core.training.data_order import check_data_order
from parallel_core.training.datasets import default_datasets_provider
from parallel_core.training.directories import own_directories
from parallel_core.training.evaluation import Evaluator, NonLossDataFunction
from parallel_core.training.forward_step import forward_step_with, get_batch
from parallel_core.training.log import RunLog, Stopwatch
from parallel_core.training.model import ModelProvider, get_model
from parallel_core.training.names import check_parameter_names
from parallel_core.training.next_commands import Invocation, next_commands
from parallel_core.training.replay import explained, replay, until_replay
from parallel_core.training.results import make_attempts
from parallel_core.training.runtime import (
    limit_device_memory,
    select_kernels,
    start_context,
    start_runtime,
    supported_precision,
)
from parallel_core.training.schedule import batch_sizes, loss_scaler, schedule_shape, train_iterations
from parallel_core.training.signals import StopRequests
from parallel_core.training.step import StepReport, TrainingStep
from parallel_core.training.summary import describe_run
from parallel_core.training.watch import StepWatch

DatasetsProvider = Callable[[tuple[int, int, int]], tuple[Any, Any, Any]]
"""`train_valid_test_datasets_provider((train, valid, test) samples) -> (train, valid, test) datasets or None`."""


def pretrain(
    train_valid_test_datasets_provider: DatasetsProvider | None,
    model_provider_func: ModelProvider,
    model_type: Any = None,
    forward_step_func: ForwardStep | None = None,
    process_non_loss_data_func: NonLossDataFunction | None = None,
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
        process_non_loss_data_func: called on the last stage after each validation with what
            `loss_func(output, non_loss_data=True)` gave for each microbatch of one batch (of a loss_func without such
            an argument: the outputs), the iteration, and TensorBoard's
            writer on the rank that has it (else None).
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
    rank, world_size = start_runtime(limit=False)
    notes: list[str] = []
    resolved, invocation = "", None
    if all_config is None:
        options: dict[str, Any] = {"extra_args_provider": extra_args_provider, "args_defaults": args_defaults}
        words = sys.argv[1:] if argv is None else argv
        loaded = load_run_config(words, world_size=world_size, **options)
        if argv is None:
            invocation = Invocation(sys.argv[0], tuple(words), loaded.given, options)
        all_config, notes, resolved = loaded.config, loaded.notes, resolved_yaml(loaded)
    require_packages(all_config.training_config.tracking)
    all_config = until_replay(all_config)
    with own_directories(all_config, resolved or sections_yaml(all_config), rank):
        if all_config.training_config.deterministic_mode and ms.get_context("deterministic") != "ON":
            ms.set_deterministic(True)  # MindSpore takes it once
        unlimited = limit_device_memory(all_config.training_config.max_device_memory)
        config, changed = supported_precision(all_config)
        context = start_context(config, rank, world_size)
        run = TrainingRun(
            config,
            context,
            model_provider_func,
            forward_step_func or forward_step_with(get_batch_func or get_batch),
            process_non_loss_data_func,
            notes + [note for note in (unlimited, changed) if note],
            invocation,
        )
        run.load_data(train_valid_test_datasets_provider or default_datasets_provider(config), train_data_loader)
        run.train()
        context.destroy()


class TrainingRun:
    """One training run on this rank: made, given data by `load_data`, and run to its end by `train`; see `pretrain`."""

    def __init__(
        self,
        config: AllConfig,
        context: ParallelContext,
        model_provider_func: ModelProvider,
        forward_step_func: ForwardStep,
        process_non_loss_data_func: NonLossDataFunction | None,
        notes: Sequence[str],
        invocation: Invocation | None = None,
    ) -> None:
        self.config, self.context, self.invocation = config, context, invocation
        self.sizes = batch_sizes(config, context.dp.size)
        self.iterations = train_iterations(config, self.sizes)
        flops = partial(num_floating_point_operations, config) if config.training_config.log_throughput else None
        self.log = RunLog(context, config.training_config.log_dir, config.model_config.seq_length, flops, config)
        kernels = select_kernels(config)
        scheduler = OptimizerParamScheduler(schedule_shape(config, self.sizes, self.iterations))
        model = get_model(model_provider_func, config, context)
        check_parameter_names(model.chunks, context)
        self.step = step = TrainingStep(config, context, model, forward_step_func, scheduler, loss_scaler(config))
        self.watch = StepWatch(config.training_config, context, self.step)
        self.stops = StopRequests(config.training_config.exit_duration_in_mins)
        self.evaluator = Evaluator(config, step, self.sizes, self.log, self.stops.wanted, process_non_loss_data_func)
        self.checkpointer = Checkpointer(config, context, self.step, self.log.info, self.log.warn)
        for line in describe_run(config, context, self.step, self.sizes, self.iterations):
            self.log.info(line)
        (self.log.warn if kernels.startswith(PLAIN) else self.log.info)(f"Kernels: {kernels}")
        for note in notes:
            self.log.warn(note)
        if config.training_config.print_schedule:
            table = format_steps(self.step.schedule(self.sizes.microbatches_of(self.sizes.global_batch_size)))
            for line in table.splitlines():
                self.log.info(line)
        self.progress = Progress()
        if config.training_config.load_checkpoint:
            self.progress = self.checkpointer.load()
        give_back_freed_memory()
        self.step.attempts = make_attempts(config, context, self.step, self.log, self.progress.rerun)
        self.progress = replace(self.progress, rerun=None)
        if not config.training_config.diagnosis.replay:
            self.log.begin(self.progress.iteration, evaluates_only=config.training_config.skip_train)
        self._saved_at = -1
        self.train_data: BatchSource | None = None
        self.valid_data: BatchSource | None = None
        self.test_data: BatchSource | None = None

    # ---- data -------------------------------------------------------------------------------------------------------
    def load_data(self, provider: DatasetsProvider, train_data_loader: Iterator[Any] | None) -> None:
        """Build the datasets and this rank's readers."""
        training = self.config.training_config
        evaluates_only, batch = training.skip_train, self.sizes.global_batch_size
        wanted = count_samples(
            global_batch_size=batch,
            train_iters=0 if evaluates_only else self.iterations,
            eval_interval=training.eval_interval or None,
            eval_iters=self.evaluator.samples // batch,
            train_samples=self._samples_to_train(),
        )
        train, valid, test = provider(wanted)
        if train_data_loader is not None:
            train = train_data_loader
        external = train_data_loader is not None
        self._train_dataset = train
        if not evaluates_only:
            order_of = None if external else train
            self.progress = check_data_order(order_of, self.progress, self.config, self.context, self.log)
            self.train_data = self._source(train, self.progress.consumed_train_samples, external)
        if training.eval_iters:
            # Without training every checkpoint is judged by the same samples, the first ones.
            seen = 0 if evaluates_only else self.progress.consumed_valid_samples
            self.valid_data = self._source(valid, seen, wraps=True) if valid is not None else None
            self.test_data = self._source(test, 0, wraps=True) if test is not None else None

    def _samples_to_train(self) -> int | None:
        """Return the samples that training asks the dataset for; None: iterations times the global batch size."""
        training = self.config.training_config
        if training.skip_train:
            return self.sizes.global_batch_size
        if not training.train_samples:
            return None
        # the last iteration of a ramp-up may go beyond train_samples
        return max(training.train_samples, self.sizes.samples_of(self.iterations))

    def _source(self, dataset: Any, consumed: int, external: bool = False, wraps: bool = False) -> BatchSource:
        chunks = len(self.step.model.chunks)
        return make_batch_source(dataset, consumed, self.config, self.context, chunks, external, wraps)

    # ---- the loop ---------------------------------------------------------------------------------------------------
    def train(self) -> None:
        """Run the iterations that are left, evaluations and checkpoints among them."""
        with self.stops:
            try:
                if self.config.training_config.diagnosis.replay:
                    replay(self)
                    return
                stopped = not self.config.training_config.skip_train and self._train_iterations()
                self._finish(stopped)
            except Exception:
                self.checkpointer.settle()  # what ends the run must not cost the checkpoint that is being written
                raise

    def _train_iterations(self) -> bool:
        """Run iterations; return whether something ended them before the last one's evaluation."""
        training, watch, before = self.config.training_config, Stopwatch(), self.progress
        leave = False
        while self.progress.iteration < self.iterations:
            told = self.run_iteration(watch).stop
            iteration = self.progress.iteration
            if training.eval_interval and iteration % training.eval_interval == 0 and iteration < self.iterations:
                told = told or not self.evaluator.run("validation", self.valid_data, iteration)
                self._count_validation()
                watch.lap()
            if told:
                self.log.info("Stopping: a rank was told to end, or --exit-duration-in-mins has passed")
            leave = told or self._is_exit_interval()
            if leave or (training.save_interval and iteration % training.save_interval == 0):
                self._save()
                leave = leave or any(self.context.world.all_gather_object(self.stops.wanted()))
                watch.lap()
            if leave:
                break
        skipped = self.progress.skipped_iterations - before.skipped_iterations
        self.log.learned(self.progress.iteration - before.iteration, skipped)
        return leave

    def run_iteration(self, watch: Stopwatch) -> StepReport:
        """Run the next iteration, and tell of it; a `ResultError` says what shows where it comes from."""
        done = self.progress
        samples = self.sizes.current(done.trained_samples)
        microbatches = self.sizes.num_microbatches(done.trained_samples)
        iteration = done.iteration + 1
        if self.train_data is None:
            raise ConfigError("there is no training data: call load_data before train")
        try:
            with self.watch.iteration(iteration):
                report = self.step.train(self.train_data, iteration, microbatches, samples, self.stops.wanted)
        except ResultError as error:
            raise explained(self, error) from None
        self.progress = replace(
            done,
            iteration=iteration,
            consumed_train_samples=done.consumed_train_samples + samples,
            skipped_iterations=done.skipped_iterations + report.skipped,
        )
        interval = self.config.training_config.log_interval
        show = bool(interval) and (iteration % interval == 0 or iteration == self.iterations)
        self.log.step(
            report,
            iteration=iteration,
            last_iteration=self.iterations,
            epoch=self._epoch(),
            consumed_samples=self.progress.consumed_train_samples,
            samples=samples,
            skipped=self.progress.skipped_iterations,
            elapsed_s=watch.lap(),
            show=show,
            observed=self.watch.after(report, iteration, show),
        )
        return report

    def _count_validation(self) -> None:
        """Count an evaluation's samples, also of one that was broken off, so that a resumed run goes on as if not."""
        if self.valid_data is not None:
            seen = self.progress.consumed_valid_samples + self.evaluator.samples
            self.progress = replace(self.progress, consumed_valid_samples=seen)

    def _finish(self, stopped: bool) -> None:
        iteration = self.progress.iteration
        if not stopped:
            self._save()  # first, so that nothing that happens in the evaluation costs the training
            ends = (("validation", self.valid_data), ("test", self.test_data))
            stopped = not all(self.evaluator.run(split, data, iteration) for split, data in ends)
        self.close()
        if stopped:
            self.log.info(f"Stopped after iteration {iteration} of {self.iterations}")
        for line in next_commands(self.config, iteration, self.context.mesh.world_size, self.invocation):
            self.log.info(line)

    def close(self) -> None:
        """End what goes on beside the loop: profiles, saves, readers, metrics."""
        self.watch.stop()
        for line in self.step.ddp.order.told():
            self.log.info(line)
        self.checkpointer.finish()
        for source in (self.train_data, self.valid_data, self.test_data):
            if source is not None:
                source.close()
        self.log.close()

    def _save(self) -> None:
        training = self.config.training_config
        if training.output_dir and not training.skip_train and self._saved_at != self.progress.iteration:
            self.checkpointer.save(self.progress)
            self._saved_at = self.progress.iteration

    def _is_exit_interval(self) -> bool:
        interval = self.config.training_config.exit_interval
        if not interval or self.progress.iteration % interval:
            return False
        self.log.info(f"Stopping at a multiple of --exit-interval {interval}")
        return True

    def _epoch(self) -> int:
        per_epoch = getattr(self._train_dataset, "samples_per_epoch", 0)
        return (self.progress.consumed_train_samples - 1) // per_epoch if per_epoch else 0
