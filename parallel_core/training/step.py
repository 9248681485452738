"""One iteration: all microbatches through the pipeline, gradients completed, one update."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor

from parallel_core.config.schema import AllConfig
from parallel_core.context import ParallelContext
from parallel_core.optimizer.data_parallel import DistributedDataParallel
from parallel_core.optimizer.finalize import finalize_model_grads
from parallel_core.optimizer.loss_scaler import LossScaler
from parallel_core.optimizer.optimizer import Optimizer
from parallel_core.optimizer.schedules import OptimizerParamScheduler
from parallel_core.pipeline.check import check_schedule
from parallel_core.pipeline.exchange import PipelineExchange
from parallel_core.pipeline.executor import run_steps
from parallel_core.pipeline.schedule import Step, make_schedule
from parallel_core.pipeline.stage import ForwardStep, PipelineStage
from parallel_core.training.batches import BatchSource
from parallel_core.training.model import RankModel


@dataclass(frozen=True)
class StepReport:
    """What one iteration did; the same on every rank.

    Attributes:
        losses: mean over all tokens of the global batch, by name.
        grad_norm: global gradient norm before clipping.
        lr: learning rate of the update.
        weight_decay: weight decay of the update.
        loss_scale: loss scale that the gradients carried.
        skipped: no update was made, because the gradients overflowed.
        stop: a rank asks for the run to end.
    """

    losses: dict[str, float]
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
        self._report_names: list[str] | None = None
        self._iteration = 0

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
        )

    def train(self, data: BatchSource, iteration: int, num_microbatches: int, samples: int, stop: bool) -> StepReport:
        """Run one iteration and make its update.

        Args:
            data: this rank's microbatches.
            iteration: number of the iteration, from 1.
            num_microbatches: microbatches of this rank.
            samples: samples of the iteration over all ranks.
            stop: this rank asks for the run to end.

        Communication: the schedule's transfers, the gradients' reductions, and one all-reduce of scalars.
        """
        self._iteration = iteration
        self.model.streams.training = True
        self.ddp.start_iteration()
        self._run(data, num_microbatches, forward_only=False)
        finalize_model_grads(self.ddp, self.context.tp, self.context.embedding)
        losses, tokens, squares, stops = self._reduce_scalars(self.optimizer.local_squares(), stop)
        lr, weight_decay, scale = self.scheduler.get_lr(), self.scheduler.get_wd(), self.scaler.scale
        factor = 1.0 / max(tokens, 1.0) if self._per_token else 1.0
        result = self.optimizer.step(self.scheduler, squares, factor)
        if result.success:
            self.scheduler.step(samples)
        return StepReport(losses, result.grad_norm, lr, weight_decay, scale, not result.success, stops > 0)

    def evaluate(self, data: BatchSource, iteration: int, num_microbatches: int, batches: int) -> dict[str, float]:
        """Return the mean losses over `batches` global batches, without dropout; the same on every rank."""
        self._iteration = iteration
        self.model.streams.training = False
        sums: dict[str, float] = {}
        for _ in range(batches):
            self._run(data, num_microbatches, forward_only=True)
            losses, *_ = self._reduce_scalars(0.0, False)
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value / batches
        return sums

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
                loss_scale=self.scaler.scale,
                forward_only=forward_only,
                non_loss_data=non_loss_data,
            )
        run_steps(
            self._schedules[key], self._stages, self._exchange, self.config.parallel_config.overlap_p2p_comm
        )
        self._exchange.finish()

    def _reduce_scalars(self, squares: float, stop: bool) -> tuple[dict[str, float], float, float, float]:
        """Return (mean losses, tokens, squared gradient norm, ranks that ask to stop), in one all-reduce of the world.

        Every number is contributed once: losses and tokens by the last stage's tensor parallel rank 0, squares as
        `Optimizer.local_squares` counts them.
        """
        context = self.context
        speaks = context.is_last_stage and context.tp.rank == 0
        reports = self._stages[-1].reports if speaks else []
        if self._report_names is None:
            names = list(reports[0][1]) if reports else []
            self._report_names = next(filter(None, context.world.all_gather_object(names)), [])
        tokens = sum(float(count) for count, _ in reports)
        sums = [sum(float(report[name][0]) for _, report in reports) for name in self._report_names]
        numbers = [sum(float(report[name][1]) for _, report in reports) for name in self._report_names]
        vector = np.array([squares, tokens, float(stop), *sums, *numbers], np.float32)
        total = context.world.all_reduce_(Tensor(vector)).asnumpy().astype(np.float64)
        count = len(self._report_names)
        means = {
            name: float(total[3 + i] / total[3 + count + i]) if total[3 + count + i] else math.nan
            for i, name in enumerate(self._report_names)
        }
        return means, float(total[1]), float(total[0]), float(total[2])
