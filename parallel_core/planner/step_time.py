"""What an iteration costs: every rank's passes through the real schedule, then reductions and the update."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from parallel_core.config.plan import BYTES, StageParameters, stage_parameters
from parallel_core.config.schema import AllConfig
from parallel_core.layout.recompute import recompute_plan
from parallel_core.layout.stages import Placement, StageLayout
from parallel_core.pipeline.schedule import Op, schedule_named
from parallel_core.planner.device import Device, Span
from parallel_core.planner.layer_time import (
    AGAIN,
    CAUSES,
    FORWARD,
    INPUT_GRAD,
    WEIGHT_GRAD,
    LayerClock,
    MicrobatchTimes,
    Spans,
)

BYTES_OF_ADAM, BYTES_OF_NORM = 28, 4
"""What an update moves for a weight: gradient, and master weight and moments there and back; its norm reads it once."""

PASSES = {Op.FORWARD: 0, Op.BACKWARD: 1, Op.INPUT_GRAD: 2, Op.WEIGHT_GRAD: 3}


@dataclass(frozen=True)
class Price:
    """Seconds of an iteration, and where they go on the rank that computes longest."""

    seconds: float
    parts: dict[str, float]
    """Cause -> seconds; their sum is `seconds`."""


@dataclass(frozen=True)
class StageTimes:
    """Seconds of one microbatch on [pipeline rank, chunk], and what they are spent on.

    Attributes:
        forward: [P, V].
        input_grad: [P, V], with recomputation, without the gradients of weights.
        weight_grad: [P, V].
        causes: [P, causes], of all chunks, without recomputation.
        again: [P], recomputation.
    """

    forward: np.ndarray
    input_grad: np.ndarray
    weight_grad: np.ndarray
    causes: np.ndarray
    again: np.ndarray

    @property
    def work(self) -> np.ndarray:
        """Seconds that each rank computes for one microbatch, [P]."""
        return (self.forward + self.input_grad + self.weight_grad).sum(1)


def stage_times(
    config: AllConfig, layout: StageLayout, clock: LayerClock, pieces: MicrobatchTimes, counts: np.ndarray
) -> StageTimes:
    """Return the times of every stage.

    Args:
        config: the run.
        layout: where its layers are.
        clock: prices of this layout.
        pieces: `clock.times()`.
        counts: `layer_counts(config, layout)`.
    """
    total = counts[:, :, 0, None, None] * pieces.dense + counts[:, :, 1, None, None] * pieces.sparse
    again = _again(config, layout, counts, clock, pieces)
    total[0, 0] += pieces.embedding
    total[-1, -1] += pieces.head
    of_phase = total.sum(3)
    return StageTimes(
        of_phase[:, :, FORWARD],
        of_phase[:, :, INPUT_GRAD] + again,
        of_phase[:, :, WEIGHT_GRAD],
        total[:, :, :AGAIN].sum((1, 2)),
        again.sum(1),
    )


def layer_counts(config: AllConfig, layout: StageLayout) -> np.ndarray:
    """Return how many layers with an MLP and with experts are on [pipeline rank, chunk]: [P, V, 2]."""
    noop, moe = set(config.parallel_config.noop_layers), config.model_config.moe
    out = np.zeros((layout.num_ranks, layout.num_chunks, 2))
    for rank, row in enumerate(layout.layers):
        for chunk, layers in enumerate(row):
            for layer in layers:
                if layer not in noop:
                    out[rank, chunk, int(bool(moe.num_experts) and moe.has_experts(layer))] += 1
    return out


def _again(
    config: AllConfig, layout: StageLayout, counts: np.ndarray, clock: LayerClock, pieces: MicrobatchTimes
) -> np.ndarray:
    """Return the seconds of recomputation on [pipeline rank, chunk]; of some layers of a chunk, by their share."""
    model, parallel = config.model_config, config.parallel_config
    listed = parallel.recompute or parallel.select_recompute
    if model.recompute_granularity == "none" and not listed:
        return np.zeros(counts.shape[:2])
    whole = counts[:, :, 0] * pieces.dense[AGAIN].sum() + counts[:, :, 1] * pieces.sparse[AGAIN].sum()
    attention = counts.sum(2) * clock.attention_again()[AGAIN].sum()
    shares = np.zeros((*counts.shape[:2], 2))
    of_number: dict[int, tuple[float, float]] = {}
    for rank, row in enumerate(layout.layers):
        for chunk, layers in enumerate(row):
            number = len(layers)
            if number and (listed or number not in of_number):
                plan = recompute_plan(model, parallel, number, rank, chunk)
                fully = sum(map(len, plan.segments))
                of_number[number] = fully / number, max(0, plan.core_attention - fully) / number
            shares[rank, chunk] = of_number.get(number, (0.0, 0.0))
    return shares[:, :, 0] * whole + shares[:, :, 1] * attention


# ---- the pipeline ---------------------------------------------------------------------------------------------------
@functools.lru_cache(maxsize=64)
def _orders(name: str, ranks: int, chunks: int, microbatches: int, group: int) -> list[list[tuple[int, int, int]]]:
    """Return each rank's (pass, microbatch, chunk) in the schedule's order."""
    compute = schedule_named(name, chunks).compute(ranks, chunks, microbatches, group)
    return [[(PASSES[action.op], action.microbatch, action.chunk) for action in order] for order in compute]


def pipeline_seconds(
    name: str, times: StageTimes, microbatches: int, group: int = 0, transfer: float = 0.0
) -> float:
    """Return when the last rank is done: `report.simulate.simulate`'s clock, without the list of transfers.

    A rank runs its passes in the schedule's order and waits for what a pass needs. Beyond `_enough` microbatches every
    further one takes what the slowest rank works on it.
    """
    ranks, chunks = times.forward.shape
    work = times.work
    if ranks == 1:
        return float(work[0]) * microbatches
    few = _enough(ranks, microbatches, group)
    end = _run(_orders(name, ranks, chunks, few, group), times, few, transfer)
    return end + (microbatches - few) * float(work.max())


def _enough(ranks: int, microbatches: int, group: int) -> int:
    """Return a number of microbatches after which the pipeline is in its steady state, congruent by the group."""
    size = group or ranks
    least = 2 * size
    return microbatches if microbatches <= least else least + (microbatches - least) % size


def _run(
    orders: Sequence[Sequence[tuple[int, int, int]]], times: StageTimes, microbatches: int, transfer: float
) -> float:
    ranks, chunks = times.forward.shape
    stages = ranks * chunks
    table = Placement.in_turn(ranks, chunks).table
    missing = -1.0
    arrived = [[missing] * microbatches for _ in range(stages + 1)]  # an activation at the stage that needs it
    arrived[0] = [0.0] * microbatches
    returned = [[missing] * microbatches for _ in range(stages)]  # its output's gradient
    whole = times.input_grad + times.weight_grad
    durations = [[one[rank].tolist() for one in (times.forward, whole, times.input_grad, times.weight_grad)]
                 for rank in range(ranks)]  # fmt: skip
    places, clocks = [0] * ranks, [0.0] * ranks
    left = sum(map(len, orders))
    while left:
        before = left
        for rank, order in enumerate(orders):
            place, now, own, stage_of = places[rank], clocks[rank], durations[rank], table[rank]
            while place < len(order):
                kind, microbatch, chunk = order[place]
                stage = stage_of[chunk]
                if kind == 0:
                    ready = arrived[stage][microbatch]
                elif kind == 3:
                    ready = 0.0
                else:
                    ready = returned[stage][microbatch]
                if ready == missing:
                    break
                now = max(now, ready) + own[kind][chunk]
                if kind == 0 and stage == stages - 1:
                    returned[stage][microbatch] = now
                elif kind == 0:
                    arrived[stage + 1][microbatch] = now + transfer
                elif kind != 3 and stage:
                    returned[stage - 1][microbatch] = now + transfer
                place += 1
            left -= place - places[rank]
            places[rank], clocks[rank] = place, now
        if left == before:
            raise RuntimeError("the schedule cannot make progress")
    return max(clocks)


def pipeline_bound(times: StageTimes, microbatches: int, split: bool) -> float:
    """Return what no schedule of these stages is faster than.

    A rank begins when the first microbatch has come through the ranks before it. When it has worked off all of them,
    the last gradient of its input goes back through these ranks, unless the rank may still have weights' to compute.
    """
    first = times.forward[:, 0]
    back = times.input_grad[:, 0] if split else times.input_grad[:, 0] + times.weight_grad[:, 0]
    ahead = np.concatenate([[0.0], np.cumsum(first)[:-1]])
    behind = np.zeros_like(ahead) if split else np.concatenate([[0.0], np.cumsum(back)[:-1]])
    return float((ahead + behind + times.work * microbatches).max())


# ---- after the passes -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Closing:
    """Seconds after the last pass, on one rank."""

    reduction: float
    """Of gradients and parameters over data parallel ranks, as far as nothing hides it."""
    update: float


def closing_times(
    config: AllConfig, device: Device, spans: Spans, held: StageParameters, last_backward: float, tied: bool
) -> Closing:
    """Return the seconds of reduction and update.

    Args:
        config: the run.
        device: the machine.
        spans: the groups of the layout.
        held: the rank's parameters.
        last_backward: seconds of the last microbatch's backward pass, behind which an overlapped reduction runs.
        tied: the rank sums the gradient of an embedding that another stage has too.
    """
    training, model = config.training_config, config.model_config
    width = BYTES[model.params_dtype]
    grad_width = 4 if training.accumulate_allreduce_grads_in_fp32 or width == 4 else 2
    dense = held.total - held.experts
    seconds, gathered = 0.0, 0.0
    for count, span in ((dense, spans.dp_cp), (held.experts, spans.edp)):
        if training.use_distributed_optimizer:
            seconds += device.collective_seconds("reduce_scatter", count * grad_width, span)
            gathered += device.collective_seconds("all_gather", count * width, span)
        else:
            seconds += device.collective_seconds("all_reduce", count * grad_width, span)
    if device.overlap and training.overlap_grad_reduce:
        seconds = max(0.0, seconds - last_backward)
    if device.overlap and config.optimizer_config.overlap_param_gather:
        gathered = max(0.0, gathered - last_backward / 2)
    if tied:
        table = model.vocab_size // config.parallel_config.tensor_model_parallel_size * model.hidden_size
        seconds += device.collective_seconds("all_reduce", table * grad_width, Span(2, spans.pp.stride))
    share = 1.0
    if training.use_distributed_optimizer:
        own = dense / spans.dp_cp.size + held.experts / spans.edp.size
        share = own / max(1, held.total)
    adam = config.optimizer_config.optimizer_type == "adam"
    moved = BYTES_OF_ADAM - (0 if adam else 8) + BYTES_OF_NORM + (width if width == 2 else 0)
    update = held.total * (moved * share + grad_width) / device.update_gb_per_s / 1e9  # and gradients are emptied
    return Closing(seconds + gathered, update)


class Pricer:
    """One layout's price; `bound` is quick and never above `price`."""

    def __init__(
        self, config: AllConfig, world_size: int, device: Device, layout: StageLayout,
        pieces: tuple[LayerClock, MicrobatchTimes] | None = None, counts: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        parallel = config.parallel_config
        self.config, self.device, self.layout = config, device, layout
        self.spans = Spans.of(config, world_size)
        clock = LayerClock(config, device, self.spans)
        self.clock, self.pieces = pieces or (clock, clock.times())
        self.counts = layer_counts(config, layout) if counts is None else counts
        self.microbatches = config.dataset_config.micro_batch_num
        self.times = stage_times(config, layout, self.clock, self.pieces, self.counts)
        self._split = schedule_named(parallel.pipeline_schedule, layout.num_chunks).splits_backward

    @functools.cached_property
    def _closing(self) -> Closing:
        """The longest of the first and the last rank's, which hold more than those between."""
        config, ends = self.config, {0, self.layout.num_ranks - 1}
        tied = self.layout.num_ranks > 1 and config.model_config.shares_word_embeddings
        backward = self.times.input_grad + self.times.weight_grad
        found = [
            closing_times(config, self.device, self.spans, stage_parameters(config, self.layout, rank),
                          float(backward[rank].sum()), tied)
            for rank in ends
        ]  # fmt: skip
        return max(found, key=lambda one: one.reduction + one.update)

    @property
    def _after(self) -> float:
        return self._closing.reduction + self._closing.update + self.device.step_us * 1e-6

    @property
    def bound(self) -> float:
        """Seconds that an iteration takes at least."""
        return pipeline_bound(self.times, self.microbatches, self._split) + self._after

    def price(self) -> Price:
        """Return the seconds of an iteration, with the pipeline's schedule simulated."""
        parallel = self.config.parallel_config
        group = parallel.microbatch_group_size_per_virtual_pipeline_stage
        end = pipeline_seconds(
            parallel.pipeline_schedule, self.times, self.microbatches, group, self.pieces.transfer
        )
        rank = int(self.times.work.argmax())
        parts = {
            cause: float(seconds) * self.microbatches for cause, seconds in zip(CAUSES, self.times.causes[rank])
        }
        parts["recomputation"] = float(self.times.again[rank]) * self.microbatches
        parts["pipeline bubble"] = max(0.0, end - float(self.times.work[rank]) * self.microbatches)
        parts["reduction of gradients"] = self._closing.reduction
        parts["update"] = self._closing.update
        parts["dispatch"] += self.device.step_us * 1e-6
        return Price(end + self._after, parts)
