"""Pipeline schedules as data: who computes what, and who talks to whom, tick by tick.

Pure Python: no tensors, no groups, no framework. The executor walks one rank's steps; tests walk all ranks' at once.

Vocabulary
    P  pipeline ranks            V  model chunks per rank (virtual pipeline size)
    M  microbatches per step     G  microbatches run on one chunk before the next
    stage: which (rank, chunk) is which stage, in [0, P * V), is said by a `layout.stages.Placement`

A backward pass is whole (B), or split: I computes the gradient of the input, which the previous stage waits for, and W,
any time later, those of the weights, which nobody waits for.

Source: Narayanan et al. 2021 (arXiv:2104.04473), section 2.2. The compute order is Megatron-LM's.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from parallel_core.errors import ConfigError
from parallel_core.layout.stages import Placement


class Op(enum.Enum):
    """What happens to a microbatch; the values are the letters used when a schedule is printed."""

    FORWARD = "F"
    BACKWARD = "B"
    INPUT_GRAD = "I"
    WEIGHT_GRAD = "W"
    SEND_FORWARD = "sF"
    RECV_FORWARD = "rF"
    SEND_BACKWARD = "sB"
    RECV_BACKWARD = "rB"


class Transfer(NamedTuple):
    """How the result of a computation travels: sent as one op, received as another, so many stages further."""

    send: Op
    receive: Op
    stages: int


TRANSFER_OF = {
    Op.FORWARD: Transfer(Op.SEND_FORWARD, Op.RECV_FORWARD, 1),
    Op.BACKWARD: Transfer(Op.SEND_BACKWARD, Op.RECV_BACKWARD, -1),
    Op.INPUT_GRAD: Transfer(Op.SEND_BACKWARD, Op.RECV_BACKWARD, -1),
}
"""What is sent after a computation, and received before it; computations that are not named here send nothing."""

SENDS = {transfer.send: transfer for transfer in TRANSFER_OF.values()}
RECEIVES = {transfer.receive: transfer for transfer in TRANSFER_OF.values()}
COMPLETES_GRADIENTS = (Op.BACKWARD, Op.WEIGHT_GRAD)
"""What a microbatch's gradients are complete after, and its activations free."""


class Action(NamedTuple):
    """`op` on `microbatch` for the rank's model chunk `chunk`. Printed as `F3.0`."""

    op: Op
    microbatch: int
    chunk: int

    def __str__(self) -> str:
        return f"{self.op.value}{self.microbatch}.{self.chunk}"


class Step(NamedTuple):
    """One tick of one rank: run `compute` (if any), then do all of `exchange`, in this order."""

    compute: Action | None
    exchange: tuple[Action, ...]


def destination(placement: Placement, rank: int, send: Action) -> tuple[int, Action]:
    """Return the rank that a send goes to, and the receive it is there."""
    transfer = SENDS[send.op]
    place = placement.neighbour(rank, send.chunk, transfer.stages)
    if place is None:
        raise ConfigError(f"pipeline: {send} of rank {rank} leaves the pipeline")
    return place[0], Action(transfer.receive, send.microbatch, place[1])


def origin(placement: Placement, rank: int, receive: Action) -> int:
    """Return the rank that a received tensor comes from."""
    place = placement.neighbour(rank, receive.chunk, -RECEIVES[receive.op].stages)
    if place is None:
        raise ConfigError(f"pipeline: {receive} of rank {rank} comes from outside the pipeline")
    return place[0]


class Schedule(NamedTuple):
    """A way to run a pipeline: where its stages are, and in which order every rank computes."""

    placement: Callable[[int, int], Placement]
    """Takes pipeline ranks P and chunks per rank V."""
    compute: Callable[[int, int, int, int], list[list[Action]]]
    """Takes P, V, microbatches M and group size G (0: P) and returns each rank's actions in order."""
    splits_backward: bool = False


def schedule_named(name: str, num_chunks: int) -> Schedule:
    """Return a schedule by its name in `SCHEDULES`; `auto` is 1F1B, interleaved where a rank has several chunks.

    Raises:
        ConfigError: if there is none of that name, or it cannot run so many chunks.
    """
    found = SCHEDULES.get(name_of_schedule(name, num_chunks))
    if found is None:
        raise ConfigError(f"pipeline schedule {name!r} does not exist; use auto, {', '.join(SCHEDULES)}")
    return found


def name_of_schedule(name: str, num_chunks: int) -> str:
    """Return what `auto` stands for: 1F1B, interleaved where a rank has several chunks; any other name as it is."""
    return ("interleaved" if num_chunks > 1 else "1f1b") if name == "auto" else name


def make_schedule(
    num_ranks: int,
    num_chunks: int,
    num_microbatches: int,
    *,
    name: str = "auto",
    group_size: int = 0,
    forward_only: bool = False,
) -> list[list[Step]]:
    """Return the steps of every rank for one iteration.

    Args:
        num_ranks: pipeline ranks P.
        num_chunks: model chunks per rank V.
        num_microbatches: microbatches per iteration M.
        name: see `schedule_named`.
        group_size: see `interleaved_one_f_one_b`; 0 is P.
        forward_only: leave the backward passes out (evaluation).

    Raises:
        ConfigError: if the microbatches cannot feed an interleaved pipeline.
    """
    schedule = schedule_named(name, num_chunks)
    compute = schedule.compute(num_ranks, num_chunks, num_microbatches, group_size)
    if forward_only:
        compute = [[action for action in actions if action.op is Op.FORWARD] for actions in compute]
    return add_exchanges(compute, num_chunks, schedule.placement(num_ranks, num_chunks))


def one_f_one_b(num_ranks: int, num_microbatches: int) -> list[list[Action]]:
    """Return the compute order of 1F1B: rank r runs P - r - 1 warm-up forwards, then forward and backward in turn."""
    order = [(microbatch, 0) for microbatch in range(num_microbatches)]
    return [_weave(order, order, min(num_ranks - rank - 1, num_microbatches)) for rank in range(num_ranks)]


def interleaved_one_f_one_b(
    num_ranks: int, num_chunks: int, num_microbatches: int, group_size: int | None = None, *, hop: int = 2
) -> list[list[Action]]:
    """Return the compute order of interleaved 1F1B.

    Args:
        num_ranks: pipeline ranks P.
        num_chunks: model chunks per rank V.
        num_microbatches: microbatches per iteration M.
        group_size: microbatches run on one chunk before moving to the next; default P
            (Megatron: --microbatch-group-size-per-virtual-pipeline-stage).
        hop: warm-up forwards more than the next rank's.

    Raises:
        ConfigError: if `num_microbatches` cannot be cut into groups that keep every rank fed.
    """
    group_size = num_ranks if group_size is None else group_size
    if not num_ranks <= group_size <= num_microbatches:
        raise ConfigError(
            f"interleaved 1F1B needs pipeline_model_parallel_size <= "
            f"microbatch_group_size_per_virtual_pipeline_stage <= number of microbatches, got {num_ranks}, "
            f"{group_size}, {num_microbatches}; use at least {max(num_ranks, group_size)} microbatches "
            f"(global_batch_size / micro_batch_size / data parallel size)"
        )
    tail = num_microbatches % group_size
    if 0 < tail < num_ranks:
        raise ConfigError(
            f"the last group of the interleaved schedule would hold {tail} of {num_microbatches} microbatches, fewer "
            f"than pipeline_model_parallel_size={num_ranks}; use a multiple of {group_size} microbatches, or leave a "
            f"remainder of at least {num_ranks}"
        )
    forwards = [
        (microbatch, chunk)
        for start in range(0, num_microbatches, group_size)
        for chunk in range(num_chunks)
        for microbatch in range(start, min(start + group_size, num_microbatches))
    ]
    backwards = [(microbatch, num_chunks - 1 - chunk) for microbatch, chunk in forwards]
    warmups = [hop * (num_ranks - rank - 1) + (num_chunks - 1) * group_size for rank in range(num_ranks)]
    return [_weave(forwards, backwards, min(warmup, len(forwards))) for warmup in warmups]


def _one_chunk(num_ranks: int, num_chunks: int, num_microbatches: int, group_size: int) -> list[list[Action]]:
    if num_chunks > 1:
        raise ConfigError(f"pipeline schedule 1f1b runs one chunk on each rank, not {num_chunks}; use interleaved")
    return one_f_one_b(num_ranks, num_microbatches)


def _several_chunks(num_ranks: int, num_chunks: int, num_microbatches: int, group_size: int) -> list[list[Action]]:
    return interleaved_one_f_one_b(num_ranks, num_chunks, num_microbatches, group_size or None)


SCHEDULES = {
    "1f1b": Schedule(Placement.in_turn, _one_chunk),
    "interleaved": Schedule(Placement.in_turn, _several_chunks),
}
"""Schedules by name; `pipeline/zero_bubble.py` adds one."""


def add_exchanges(
    compute: Sequence[Sequence[Action]], num_chunks: int, placement: Placement | None = None
) -> list[list[Step]]:
    """Cut a compute order into ticks and attach every transfer, on both ends, to the tick that produced it.

    Both ends of a transfer sit in the same tick and within a tick all ranks list the transfers in one global order, so
    the messages between two ranks are sent and received in the same order, and the whole cannot deadlock, even where
    a send blocks until it is received.

    Args:
        compute: each rank's forward and backward actions in order.
        num_chunks: model chunks per rank V.
        placement: where the stages are; None: `Placement.in_turn`.

    Raises:
        ConfigError: if the compute order itself cannot make progress.
    """
    num_ranks = len(compute)
    placement = placement or Placement.in_turn(num_ranks, num_chunks)
    todo = [deque(actions) for actions in compute]
    done: set[tuple[Op, int, int]] = set()
    steps: list[list[Step]] = [[] for _ in compute]
    while any(todo):
        running = [
            queue[0] if queue and _is_ready(queue[0], placement.stage(rank, queue[0].chunk), placement, done) else None
            for rank, queue in enumerate(todo)
        ]
        if not any(running):
            heads = ", ".join(f"rank {rank}: {queue[0] if queue else 'done'}" for rank, queue in enumerate(todo))
            raise ConfigError(f"the pipeline's compute order cannot make progress; next actions are {heads}")
        exchange: list[list[Action]] = [[] for _ in compute]
        for rank, action in enumerate(running):
            if action is None:
                continue
            todo[rank].popleft()
            op = Op.BACKWARD if action.op is Op.INPUT_GRAD else action.op
            done.add((op, action.microbatch, placement.stage(rank, action.chunk)))
            transfer = TRANSFER_OF.get(action.op)
            if transfer is not None and num_ranks > 1 and placement.neighbour(rank, action.chunk, transfer.stages):
                send = Action(transfer.send, action.microbatch, action.chunk)
                peer, receive = destination(placement, rank, send)
                exchange[rank].append(send)
                exchange[peer].append(receive)
        for rank in range(num_ranks):
            steps[rank].append(Step(running[rank], tuple(exchange[rank])))
    return steps


def _is_ready(action: Action, stage: int, placement: Placement, done: set[tuple[Op, int, int]]) -> bool:
    if action.op is Op.WEIGHT_GRAD:
        return True  # its I stands before it in the same list
    if action.op is Op.FORWARD:
        return stage == 0 or (Op.FORWARD, action.microbatch, stage - 1) in done
    if stage == placement.num_stages - 1:
        return (Op.FORWARD, action.microbatch, stage) in done
    return (Op.BACKWARD, action.microbatch, stage + 1) in done


def _weave(
    forwards: Sequence[tuple[int, int]], backwards: Sequence[tuple[int, int]], warmup: int
) -> list[Action]:
    """Return warm-up forwards, then one forward and one backward in turn, then the remaining backwards."""
    f = [Action(Op.FORWARD, *item) for item in forwards]
    b = [Action(Op.BACKWARD, *item) for item in backwards]
    steady = [action for pair in zip(f[warmup:], b) for action in pair]
    return f[:warmup] + steady + b[len(f) - warmup :]
