"""The update: unscale, check, clip, Adam or SGD on float32 masters, and back to the parameters.

With the distributed optimizer (ZeRO stage 1, arXiv:1910.02054) each data parallel rank keeps the masters and the state
of its part of every bucket only, and the updated parameters are gathered.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mindspore import Parameter

from parallel_core.errors import ConfigError, ResultError, bullet_list
from parallel_core.layout.shard import TensorShard, shard_of
from parallel_core.optimizer import flat
from parallel_core.optimizer.data_parallel import DistributedDataParallel
from parallel_core.optimizer.flat import Flat
from parallel_core.optimizer.grad_buffer import ParamAndGradBuffer
from parallel_core.optimizer.loss_scaler import DynamicLossScaler, LossScaler
from parallel_core.optimizer.schedules import OptimizerParamScheduler

if TYPE_CHECKING:
    from parallel_core.config.schema import OptimizerConfig

STATE_OF = {"adam": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}
"""Names of the state kept for every master weight, by optimizer_type."""

_LONG_AFTER = 1 << 30
"""A step number at which Adam's bias corrections are exactly 1."""


@dataclass(frozen=True)
class Segment:
    """The part of one parameter whose master this rank keeps.

    Elements [start, end) of the buffer; [state, state + end - start) of the buffer's state; the first one is element
    `offset` of the parameter. `counts` tells whether its gradient counts in the global norm on this rank.
    """

    buffer: int
    parameter: int
    start: int
    end: int
    state: int
    offset: int
    shard: TensorShard
    counts: bool


@dataclass(frozen=True)
class StepResult:
    """What an update reports: whether it was made, and the global gradient norm before clipping (unscaled)."""

    success: bool
    grad_norm: float


class Optimizer:
    """Updates the parameters of a `DistributedDataParallel`.

    Args:
        ddp: parameters and reduced gradients.
        config: optimizer type, its constants, clipping.
        coordinates: this rank's position on the axes that parameters are cut or repeated over (see
            `TensorShard.is_first_copy`): gradients of repeated parameters count once in the norm.
        scaler: the loss scale that the gradients carry.
        check_for_nan: raise on a gradient that is not finite, unless the loss scale is dynamic.
    """

    def __init__(
        self,
        ddp: DistributedDataParallel,
        config: OptimizerConfig,
        *,
        coordinates: Mapping[str, int],
        scaler: LossScaler,
        check_for_nan: bool = True,
    ) -> None:
        if config.optimizer_type not in STATE_OF:
            raise ConfigError(f"optimizer={config.optimizer_type!r} does not exist; use {' or '.join(STATE_OF)}")
        self.ddp, self.config, self.scaler, self.step_count = ddp, config, scaler, 0
        self._check_for_nan = check_for_nan
        self.segments: list[Segment] = []
        self._masters: list[Flat | None] = []
        self.state: list[dict[str, Flat]] = []
        for number, buffer in enumerate(ddp.buffers):
            self._add_buffer(number, buffer, coordinates)

    def _add_buffer(self, number: int, buffer: ParamAndGradBuffer, coordinates: Mapping[str, int]) -> None:
        length = 0
        for bucket, where in enumerate(buffer.layout.buckets):
            own_start, own_end = buffer.owned(where)
            for slot in buffer.layout.slots:
                start, end = max(slot.start, own_start), min(slot.end, own_end)
                if slot.bucket == bucket and start < end:
                    shard, state = shard_of(buffer.parameters[slot.index]), length + start - own_start
                    # Reduced gradients are the same on all replicas, except where each has a part of its own.
                    counts = shard.is_first_copy(coordinates) and (buffer.sharded or buffer.group.rank == 0)
                    self.segments.append(
                        Segment(number, slot.index, start, end, state, start - slot.start, shard, counts)
                    )
            length += own_end - own_start
        self.state.append({key: flat.zeros(length, "float32") for key in STATE_OF[self.config.optimizer_type]})
        if buffer.dtype == "float32":
            self._masters.append(None)  # the parameters are their own masters
        else:
            self._masters.append(flat.zeros(length, "float32"))
            self._copy_parameters_to_masters(number)

    def _copy_parameters_to_masters(self, number: int) -> None:
        for segment in self.segments:
            if segment.buffer == number:
                self.master(segment).copy_(self.ddp.buffers[number].params.part(segment.start, segment.end))

    def master(self, segment: Segment) -> Flat:
        """Return the float32 master weights of a segment."""
        masters = self._masters[segment.buffer]
        if masters is None:
            return self.ddp.buffers[segment.buffer].params.part(segment.start, segment.end)
        return masters.part(segment.state, segment.state + segment.end - segment.start)

    def state_part(self, segment: Segment, key: str) -> Flat:
        """Return the state `key` of a segment."""
        return self.state[segment.buffer][key].part(segment.state, segment.state + segment.end - segment.start)

    def reload_masters(self) -> None:
        """Take the parameters' present values as masters, after they were loaded from elsewhere."""
        for number, masters in enumerate(self._masters):
            if masters is not None:
                self._copy_parameters_to_masters(number)

    def local_squares(self) -> Any:
        """Return this rank's share of the squared gradient norm, of gradients as they stand in the buffers.

        Over all ranks of the world the shares add up to the square of the global norm; a share that is not finite shows
        an overflow.
        """
        return sum(
            self.ddp.buffers[s.buffer].grads.part(s.start, s.end).sum_of_squares()
            for s in self.segments
            if s.counts
        )

    def step(
        self, scheduler: OptimizerParamScheduler, squares: float, gradient_factor: float = 1.0
    ) -> StepResult:
        """Make one update with reduced gradients, or none if they are not finite.

        Args:
            scheduler: learning rate and weight decay of this update.
            squares: `local_squares` summed over the ranks.
            gradient_factor: factor of all gradients (1 / number of tokens for per-token losses).

        Raises:
            ResultError: if a gradient is not finite, that is checked and no dynamic loss scale is there to react;
                the parameters are named.
        """
        unscale = gradient_factor / self.scaler.scale
        norm = math.sqrt(squares) * unscale if squares >= 0 else math.nan
        overflow = not math.isfinite(norm)
        if overflow:
            if self._check_for_nan and not isinstance(self.scaler, DynamicLossScaler):
                self._raise_not_finite(norm)
            self.scaler.update(True)
            return StepResult(False, norm)
        clip = self.config.clip_grad
        factor = unscale * min(1.0, clip / (norm + 1e-6)) if clip > 0 else unscale
        self.step_count += 1
        for segment in self.segments:
            self._update(segment, scheduler, factor)
        self.gather_parameters()
        self.scaler.update(False)
        return StepResult(True, norm)

    def _update(self, segment: Segment, scheduler: OptimizerParamScheduler, factor: float) -> None:
        config, shard, buffer = self.config, segment.shard, self.ddp.buffers[segment.buffer]
        gradient = buffer.grads.part(segment.start, segment.end)
        masters = self._masters[segment.buffer]
        rounded = None if masters is None else buffer.params.part(segment.start, segment.end)
        decoupled = shard.is_embedding_or_output and config.decoupled_lr > 0
        lr = scheduler.get_lr(config.decoupled_lr, config.decoupled_min_lr) if decoupled else scheduler.get_lr()
        weight_decay = scheduler.get_wd() if shard.decays else 0.0
        options = {"lr": lr, "weight_decay": weight_decay, "grad_scale": factor, "rounded": rounded}
        if config.optimizer_type == "adam":
            self.master(segment).adam_(
                gradient,
                self.state_part(segment, "exp_avg"),
                self.state_part(segment, "exp_avg_sq"),
                step=self.step_count if config.adam_bias_correction else _LONG_AFTER,
                betas=config.betas,
                eps=config.eps,
                **options,
            )
        else:
            momentum = self.state_part(segment, "momentum_buffer")
            self.master(segment).sgd_(gradient, momentum, momentum=config.sgd_momentum, **options)

    def gather_parameters(self) -> None:
        """Give every data parallel rank all parameters; with overlap, waiting is left to the next forward pass."""
        sharded = [buffer for buffer in self.ddp.buffers if buffer.sharded and buffer.group.size > 1]
        for buffer in sharded:
            for bucket in reversed(range(len(buffer.layout.buckets))):  # the first layers are needed first
                buffer.start_gather(bucket)
        if not self.config.overlap_param_gather:
            self.ddp.finish_param_gather()

    def _raise_not_finite(self, norm: float) -> None:
        names = [
            s.shard.name
            for s in self.segments
            if not math.isfinite(self.ddp.buffers[s.buffer].grads.part(s.start, s.end).sum_of_squares())
        ]
        where = bullet_list(dict.fromkeys(names)) if names else "  (on another rank)"
        raise ResultError(
            f"the gradient norm is {norm} after {self.step_count} updates; parameters whose gradient is not finite on "
            f"this rank:\n{where}\nLower --lr, or use --no-check-for-nan-in-loss-and-grad to skip such updates."
        )

    def segments_by_parameter(self) -> Iterator[tuple[Parameter, list[Segment]]]:
        """Yield every parameter with the segments of it that this rank keeps (checkpoints)."""
        for number, buffer in enumerate(self.ddp.buffers):
            for index, parameter in enumerate(buffer.parameters):
                yield parameter, [s for s in self.segments if s.buffer == number and s.parameter == index]

    def memory_bytes(self) -> int:
        """Return the bytes of this rank's masters and optimizer state."""
        masters = sum(m.tensor().nbytes for m in self._masters if m is not None)
        return masters + sum(part.tensor().nbytes for state in self.state for part in state.values())
