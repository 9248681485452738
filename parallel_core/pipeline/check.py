"""Proves that a schedule is complete and cannot deadlock, by running it without processes. Pure Python."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from parallel_core.errors import ConfigError, ParallelCoreError, bullet_list
from parallel_core.layout.stages import Placement
from parallel_core.pipeline.schedule import SENDS, TRANSFER_OF, Action, Op, Step, destination, origin

_AFTER = {Op.BACKWARD: Op.FORWARD, Op.INPUT_GRAD: Op.FORWARD, Op.WEIGHT_GRAD: Op.INPUT_GRAD}
"""What a microbatch needs on the same rank before an action."""


def check_schedule(
    steps: Sequence[Sequence[Step]],
    num_chunks: int,
    num_microbatches: int,
    *,
    forward_only: bool = False,
    placement: Placement | None = None,
) -> None:
    """Return if every rank's steps do all the work once, in an order that works, and all transfers meet.

    Args:
        steps: the steps of every rank.
        num_chunks: model chunks per rank.
        num_microbatches: microbatches of each chunk.
        forward_only: there are no backward passes.
        placement: where the stages are; None: `Placement.in_turn`.

    Raises:
        ParallelCoreError: if an action is missing, done twice or out of order, or ranks would wait for each other
            for ever; every finding is named, up to ten.
    """
    placement = placement or Placement.in_turn(len(steps), num_chunks)
    findings = [
        f"rank {rank}: {finding}"
        for rank, own in enumerate(steps)
        for finding in (
            *_compute_findings(own, num_chunks, num_microbatches, forward_only),
            *_transfer_findings(own, rank, placement),
        )
    ]
    findings += list(_pairing_findings(steps, placement))
    findings += [] if findings else list(_deadlock_findings(steps, placement))
    if findings:
        raise ParallelCoreError("the pipeline schedule is wrong:\n" + bullet_list(findings))


def _compute_findings(
    steps: Sequence[Step], num_chunks: int, num_microbatches: int, forward_only: bool
) -> Iterator[str]:
    done = [step.compute for step in steps if step.compute is not None]
    split = {action[1:] for action in done if action.op in (Op.INPUT_GRAD, Op.WEIGHT_GRAD)}
    wanted = set()
    for one in ((m, c) for m in range(num_microbatches) for c in range(num_chunks)):
        backward = (Op.INPUT_GRAD, Op.WEIGHT_GRAD) if one in split else (Op.BACKWARD,)
        wanted |= {Action(op, *one) for op in (Op.FORWARD, *(() if forward_only else backward))}
    counts = Counter(done)
    yield from (f"{action} is missing" for action in sorted(wanted - set(done), key=str))
    yield from (f"{action} does not belong here" for action in sorted(set(done) - wanted, key=str))
    yield from (f"{action} is done {count} times" for action, count in counts.items() if count > 1)
    place = {action: i for i, action in enumerate(done)}
    for action, i in place.items():
        before = action._replace(op=_AFTER.get(action.op, action.op))
        if place.get(before, len(done)) > i:
            yield f"{action} comes before {before}"
    for chunk in range(num_chunks):
        order = [a.microbatch for a in done if a.op is Op.FORWARD and a.chunk == chunk]
        if order != sorted(order):
            yield f"chunk {chunk} runs microbatches {order} forward; its data comes in order"


def _transfer_findings(steps: Sequence[Step], rank: int, placement: Placement) -> Iterator[str]:
    """Every result is sent in its own step, and every input is received before the step that needs it."""
    received: Counter[Action] = Counter()
    for step in steps:
        sent = [action for action in step.exchange if action.op in SENDS]
        expected: list[Action] = []
        transfer = TRANSFER_OF.get(step.compute.op) if step.compute is not None else None
        if step.compute is not None and transfer is not None and placement.num_ranks > 1:
            _, microbatch, chunk = step.compute
            needed = Action(transfer.receive, microbatch, chunk)
            if placement.neighbour(rank, chunk, -transfer.stages):
                if not received[needed]:
                    yield f"{step.compute} runs before {needed}"
                received[needed] -= 1
            if placement.neighbour(rank, chunk, transfer.stages):
                expected = [Action(transfer.send, microbatch, chunk)]
        if sent != expected:
            yield f"after {step.compute} it sends {_names(sent)} instead of {_names(expected)}"
        received.update(action for action in step.exchange if action.op not in SENDS)
    yield from (f"{action} is received and never used" for action, count in received.items() if count > 0)


def _pairing_findings(steps: Sequence[Sequence[Step]], placement: Placement) -> Iterator[str]:
    """What one rank sends another is what that one receives from it, in the same order."""
    sent: dict[tuple[int, int], list[Action]] = defaultdict(list)
    received: dict[tuple[int, int], list[Action]] = defaultdict(list)
    for rank, own in enumerate(steps):
        for action in (action for step in own for action in step.exchange):
            try:
                if action.op in SENDS:
                    peer, arriving = destination(placement, rank, action)
                    sent[rank, peer].append(arriving)
                else:
                    received[origin(placement, rank, action), rank].append(action)
            except ConfigError as error:
                yield str(error)
    for pair in sorted({*sent, *received}):
        if sent[pair] != received[pair]:
            place = next(
                (i for i, (a, b) in enumerate(zip(sent[pair], received[pair])) if a != b),
                min(len(sent[pair]), len(received[pair])),
            )
            yield (
                f"rank {pair[0]} to rank {pair[1]}, message {place}: sent as {_at(sent[pair], place)}, "
                f"received as {_at(received[pair], place)}"
            )


def _deadlock_findings(steps: Sequence[Sequence[Step]], placement: Placement) -> Iterator[str]:
    """Run all transfers as if a send blocked until its receive."""
    queues = [[action for step in own for action in step.exchange] for own in steps]
    places = [0] * len(steps)
    moved = True
    while moved:
        moved = False
        for rank, queue in enumerate(queues):
            if places[rank] == len(queue) or queue[places[rank]].op not in SENDS:
                continue
            peer, arriving = destination(placement, rank, queue[places[rank]])
            if places[peer] < len(queues[peer]) and queues[peer][places[peer]] == arriving:
                places[rank], places[peer], moved = places[rank] + 1, places[peer] + 1, True
    for rank, queue in enumerate(queues):
        if places[rank] < len(queue):
            yield f"rank {rank} waits for ever in {queue[places[rank]]}"


def _at(actions: Sequence[Action], place: int) -> str:
    return str(actions[place]) if place < len(actions) else "nothing"


def _names(actions: Sequence[Action]) -> str:
    return ", ".join(map(str, actions)) or "nothing"
