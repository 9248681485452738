"""One iteration: all microbatches through the pipeline, gradients completed, one update."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mindspore as ms

from parallel_core.config.schema import AllConfig
from parallel_core.context import ParallelContext
from parallel_core.expert_parallel.ledger import Numbers
from parallel_core.optimizer.data_parallel import DistributedDataParallel
from parallel_core.optimizer.finalize import finalize_model_grads
from parallel_core.optimizer.loss_scaler import DynamicLossScaler, LossScaler
from parallel_core.optimizer.optimizer import Optimizer
from parallel_core.optimizer.schedules import OptimizerParamScheduler
from parallel_core.pipeline.check import check_schedule
from parallel_core.pipeline.exchange import PipelineExchange
from parallel_core.pipeline.executor import run_steps
from parallel_core.pipeline.schedule import Step, make_schedule
from parallel_core.pipeline.stage import ForwardStep, PipelineStage
from parallel_core.spans import span
from parallel_core.training.batches import BatchSource
from parallel_core.training.model import RankModel
from parallel_core.training.scalars import LossTotals, ScalarReducer, Scalars, require_finite

Attempts = Callable[[int, BatchSource, Callable[[BatchSource], Scalars]], Scalars]
"""`attempts(iteration, data, compute) -> compute(data)`, computed once or again before the update (`results`)."""


@dataclass(frozen=True)
class StepReport:
    """What one iteration did; the same on every rank.

    Attributes:
        losses: mean over all tokens of the global batch, by name; None if no token counts.
        grad_norm: global gradient norm before clipping.
        lr: learning rate of the update.
        weight_decay: weight decay of the update.
        loss_scale: loss scale that the gradients carried.
        skipped: no update was made, because the gradients overflowed or no token of the batch counts.
        stop: a rank asks for the run to end.
    """

    losses: dict[str, float | None]
    grad_norm: float
    lr: float
    weight_decay: float
    loss_scale: float
    skipped: bool
    stop: bool


class TrainingStep:
    """Runs iterations of one rank's model chunks.

    Args:
        config: the run.
        context: this rank's groups.
        model: this rank's chunks.
        forward_step_func: Megatron's contract, see `pipeline.stage.ForwardStep`.
        scheduler: learning rate and weight decay.
        scaler: loss scale.
    """

    def __init__(
        self,
        config: AllConfig,
        context: ParallelContext,
        model: RankModel,
        forward_step_func: ForwardStep,
        scheduler: OptimizerParamScheduler,
        scaler: LossScaler,
    ) -> None:
        training, sequence_parallel = config.training_config, config.parallel_config.sequence_parallel
        self.config, self.context, self.model = config, context, model
        self.scheduler, self.scaler = scheduler, scaler
        self._per_token = training.calculate_per_token_loss
        dynamic = isinstance(scaler, DynamicLossScaler)  # reacts to what is not finite by itself
        self._check_losses = training.check_for_nan_in_loss_and_grad and not dynamic
        self.ddp = DistributedDataParallel(
            model.chunks,
            training,
            context.groups,
            is_first_stage=context.is_first_stage,
        )
        self.optimizer = Optimizer(
            self.ddp,
            config.optimizer_config,
            coordinates=context.coordinates,
            scaler=scaler,
            check_for_nan=training.check_for_nan_in_loss_and_grad,
        )
        self._stages = [self._make_stage(chunk, forward_step_func) for chunk in range(len(model.chunks))]
        rows = config.model_config.seq_length // context.cp.size // (context.tp.size if sequence_parallel else 1)
        shape = (rows, config.dataset_config.batch_size, config.model_config.hidden_size)
        dtype = ms.float32 if config.model_config.fp32_residual_connection else config.model_config.compute_dtype
        self._exchange = PipelineExchange(
            context.pp,
            shape,
            getattr(ms, dtype) if isinstance(dtype, str) else dtype,
            model.layout.placement,
        )
        self._schedules: dict[tuple[int, bool], list[Step]] = {}
        self._scalars = ScalarReducer(context.world, exactly=training.deterministic_mode)
        self._iteration = 0
        self.attempts: Attempts = lambda iteration, data, compute: compute(data)

    def _make_stage(self, chunk: int, forward_step_func: ForwardStep) -> PipelineStage:
        context, layout = self.context, self.model.layout

        def before_forward(microbatch: int) -> None:
            # Microbatches are numbered over all data parallel ranks, so that no two draw the same masks.
            number = microbatch * context.dp.size + context.dp.rank
            self.model.streams.start_microbatch(self._iteration, number)
            self.ddp.finish_param_gather(chunk)

        return PipelineStage(
            self.model.chunks[chunk],
            forward_step_func,
            is_first=layout.is_first(context.pp.rank, chunk),
            is_last=layout.is_last(context.pp.rank, chunk),
            per_token_loss=self._per_token,
            tokens_group=context.cp,
            before_forward=before_forward,
            before_last_backward=lambda: self.ddp.enable_sync(chunk),
            before_last_weight_grad=lambda: self.ddp.enable_late_sync(chunk),
            after_backward=lambda: self.ddp.order.end_microbatch(chunk),
        )

    def train(
        self,
        data: BatchSource,
        iteration: int,
        num_microbatches: int,
        samples: int,
        stop: Callable[[], bool] = lambda: False,
    ) -> StepReport:
        """Run one iteration and make its update.

        A batch of which no token counts says nothing: it makes no update (Megatron-LM makes one with gradients of zero,
        in which weight decay and momentum move the weights).

        Args:
            data: this rank's microbatches.
            iteration: number of the iteration, from 1.
            num_microbatches: microbatches of this rank.
            samples: samples of the iteration over all ranks.
            stop: asked, when the iteration is nearly done, whether this rank wants the run to end.

        Raises:
            ResultError: if a loss or a gradient is not finite, and check_for_nan_in_loss_and_grad asks for that.
            ParallelCoreError: if overflows have brought training to a halt.

        Communication: the schedule's transfers, the gradients' reductions, and one all-reduce of scalars.
        """
        self._iteration = iteration
        self.model.streams.training = True
        found = self.attempts(iteration, data, lambda source: self._compute(source, num_microbatches, stop))
        losses, scale = found.losses.means(), self.scaler.scale
        lr, weight_decay = self.scheduler.get_lr(), self.scheduler.get_wd()
        if found.tokens == 0 and found.squares == 0:
            return StepReport(losses, 0.0, lr, weight_decay, scale, skipped=True, stop=found.stop)
        if self._check_losses and math.isfinite(found.squares):  # the optimizer tells of gradients, by name
            require_finite(losses, iteration)
        factor = 1.0 / max(found.tokens, 1.0) if self._per_token else 1.0
        with span("optimizer", 1):
            result = self.optimizer.step(self.scheduler, found.squares, factor)
        self.scaler.require_progress()
        if result.success:
            self.scheduler.step(samples)
        return StepReport(losses, result.grad_norm, lr, weight_decay, scale, not result.success, found.stop)

    def _compute(self, data: BatchSource, num_microbatches: int, stop: Callable[[], bool]) -> Scalars:
        """Complete the gradients of one batch, and return the numbers of all ranks."""
        self.ddp.start_iteration()
        loss_scale = self.ddp.order.loss_scale(self.scaler.scale, num_microbatches)
        self.model.ledger.start_iteration(loss_scale, num_microbatches)
        with span("forward-backward", 1):
            self._run(data, num_microbatches, forward_only=False)
        with span("all-grads-sync", 1):
            self.ddp.order.finish(num_microbatches)
            finalize_model_grads(self.ddp, self.context.tp, self.context.embedding)
        numbers = self.model.ledger.finish_iteration(self.context.tp.rank == 0 and self.context.dp_cp.rank == 0)
        squares = self.ddp.order.squares(self.optimizer.local_squares, self.context.coordinates)
        return self._reduce_scalars(squares, stop, numbers)

    @property
    def reports(self) -> list[Any]:
        """What the last stage's microbatches reported on this rank; see `PipelineStage.reports`."""
        return list(self._stages[-1].reports) if self.context.is_last_stage else []

    def evaluate(
        self,
        data: BatchSource,
        iteration: int,
        num_microbatches: int,
        batches: int,
        stop: Callable[[], bool] = lambda: False,
    ) -> dict[str, float | None] | None:
        """Return the mean losses over all tokens of `batches` global batches, without dropout; the same on every rank.

        Args:
            data: this rank's microbatches.
            iteration: iterations completed.
            num_microbatches: microbatches of this rank in one batch.
            batches: global batches.
            stop: asked after each batch whether this rank wants the run to end.

        Returns:
            Mean by name, None where no token counts; None in place of it all if a rank asked to stop on the way.
        """
        self._iteration = iteration
        self.model.streams.training = False
        totals = LossTotals()
        for _ in range(batches):
            self._run(data, num_microbatches, forward_only=True)
            found = self._reduce_scalars(0.0, stop)
            if found.stop:
                return None
            totals.add(found.losses)
        return totals.means()

    def collect_non_loss_data(self, data: BatchSource, iteration: int, num_microbatches: int) -> list[Any]:
        """Return what `loss_func(output, non_loss_data=True)` gives for one global batch; on the last stage."""
        self._iteration = iteration
        self.model.streams.training = False
        self._run(data, num_microbatches, forward_only=True, non_loss_data=True)
        return list(self._stages[-1].reports)

    def schedule(self, num_microbatches: int, forward_only: bool = False) -> list[list[Step]]:
        """Return the steps of every pipeline rank."""
        parallel = self.config.parallel_config
        return make_schedule(
            self.model.layout.num_ranks,
            self.model.layout.num_chunks,
            num_microbatches,
            name=parallel.pipeline_schedule,
            group_size=parallel.microbatch_group_size_per_virtual_pipeline_stage,
            forward_only=forward_only,
        )

    def _run(
        self, data: BatchSource, num_microbatches: int, *, forward_only: bool, non_loss_data: bool = False
    ) -> None:
        key = (num_microbatches, forward_only)
        if key not in self._schedules:
            steps = self.schedule(num_microbatches, forward_only)
            layout = self.model.layout
            check_schedule(
                steps, layout.num_chunks, num_microbatches, forward_only=forward_only, placement=layout.placement
            )
            self._schedules[key] = steps[self.context.pp.rank]
        for chunk, stage in enumerate(self._stages):
            stage.start_iteration(
                data.iterator(chunk),
                num_microbatches,
                loss_scale=self.ddp.order.loss_scale(self.scaler.scale, num_microbatches),
                forward_only=forward_only,
                non_loss_data=non_loss_data,
            )
        run_steps(
            self._schedules[key], self._stages, self._exchange, self.config.parallel_config.overlap_p2p_comm
        )
        self._exchange.finish()

    def _reduce_scalars(self, squares: Any, stop: Callable[[], bool], numbers: Numbers | None = None) -> Scalars:
        """Sum over the world; every number is contributed once.

        Losses and tokens come from the last stage's tensor parallel rank 0, squares are as `Optimizer.local_squares`
        counts them; every rank has its share of its routers' numbers.
        """
        context = self.context
        speaks = context.is_last_stage and context.tp.rank == 0
        reports = self.reports if speaks else []
        return self._scalars.reduce([*reports, (0.0, numbers)] if numbers else reports, squares, stop)
