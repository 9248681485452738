"""When every action of a schedule starts and ends, from durations alone. Pure Python.

The clock obeys the executor: a rank runs its steps in order, sends do not block it, and it waits for a received tensor
when it is used (`wait_late`) or when it is announced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from parallel_core.errors import ConfigError
from parallel_core.layout.stages import Placement
from parallel_core.pipeline.schedule import RECEIVES, SENDS, TRANSFER_OF, Action, Op, Step, destination

Duration = Callable[[int, Action], float]
"""Takes a rank and a computation (F, B, I or W), and returns how long it takes."""


class Span(NamedTuple):
    """One action and its time."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """What `simulate` returns: the spans of every rank in order, in the unit of the durations."""

    spans: tuple[tuple[Span, ...], ...]

    @property
    def end(self) -> float:
        """When the last rank is done."""
        return max((rank[-1].end for rank in self.spans if rank), default=0.0)

    def busy(self, rank: int) -> float:
        """Return the time that `rank` computes."""
        return sum(span.end - span.start for span in self.spans[rank])

    def idle_share(self, rank: int) -> float:
        """Return the share of the whole time that `rank` does not compute."""
        return 1.0 - self.busy(rank) / self.end if self.end else 0.0

    @property
    def bubble_share(self) -> float:
        """The mean of the ranks' idle shares."""
        return sum(map(self.idle_share, range(len(self.spans)))) / max(1, len(self.spans))


def uniform_durations(
    forward_time: float = 1.0, backward_time: float = 2.0, weight_grad_time: float | None = None
) -> Duration:
    """Return a duration that depends on the operation only; times are of one model chunk and microbatch.

    Args:
        forward_time: of F.
        backward_time: of B, or of I and W together.
        weight_grad_time: of W; None: half of B.

    Raises:
        ConfigError: if a time is negative or not finite, or W takes longer than B.
    """
    for name, value in (("forward_time", forward_time), ("backward_time", backward_time)):
        if not 0 <= value < float("inf"):
            raise ConfigError(f"{name}={value}: use a number of 0 or more")
    late = backward_time / 2 if weight_grad_time is None else weight_grad_time
    if not 0 <= late <= backward_time:
        raise ConfigError(f"weight_grad_time={late}: use a number from 0 to backward_time={backward_time}")
    times = {Op.FORWARD: forward_time, Op.BACKWARD: backward_time}
    times.update({Op.INPUT_GRAD: backward_time - late, Op.WEIGHT_GRAD: late})
    return lambda rank, action: times[action.op]


def simulate(
    steps: Sequence[Sequence[Step]],
    duration: Duration | None = None,
    *,
    transfer_time: float = 0.0,
    wait_late: bool = True,
    placement: Placement | None = None,
) -> Timeline:
    """Return when every action of every rank runs.

    Args:
        steps: the steps of every rank, as `make_schedule` returns them.
        duration: how long an action takes; None: 1 forward, 2 backward, half of it for the weights.
        transfer_time: from the start of a send to the arrival of the tensor, in the unit of the durations.
        wait_late: as for `run_steps`.
        placement: where the stages are; None: `Placement.in_turn`.

    Raises:
        ConfigError: if a rank waits for a tensor that nobody sends, or `transfer_time` is not a number of 0 or more.
    """
    if not 0 <= transfer_time < float("inf"):
        raise ConfigError(f"transfer_time={transfer_time}: use a number of 0 or more")
    chunks = 1 + max((step.compute.chunk for own in steps for step in own if step.compute is not None), default=0)
    placement = placement or Placement.in_turn(len(steps), chunks)
    clocks = [_Rank(rank, placement, list(of_rank)) for rank, of_rank in enumerate(steps)]
    arrivals: dict[tuple[int, Action], float] = {}
    duration = duration or uniform_durations()
    while any(not clock.done for clock in clocks):
        moved = [clock.advance(arrivals, duration, transfer_time, wait_late) for clock in clocks]
        if not any(moved):
            stuck = ", ".join(f"rank {clock.rank} at step {clock.position}" for clock in clocks if not clock.done)
            raise ConfigError(f"the schedule cannot make progress: {stuck} wait for tensors that nobody sends")
    return Timeline(tuple(tuple(clock.spans) for clock in clocks))


class _Rank:
    """One rank's clock and its place in its steps."""

    def __init__(self, rank: int, placement: Placement, steps: list[Step]) -> None:
        self.rank, self._placement, self._steps = rank, placement, steps
        self._receives = {action for step in steps for action in step.exchange if action.op in RECEIVES}
        self.position = 0
        self._part = 0  # of the present step: 0 is its compute action, i its i-th transfer
        self._now = 0.0
        self.spans: list[Span] = []

    @property
    def done(self) -> bool:
        return self.position == len(self._steps)

    def advance(
        self, arrivals: dict[tuple[int, Action], float], duration: Duration, transfer_time: float, wait_late: bool
    ) -> bool:
        """Run until a tensor is missing; return whether anything was run."""
        moved = False
        while not self.done:
            step = self._steps[self.position]
            if self._part == 0:
                if not self._compute(step.compute, arrivals, duration):
                    return moved
            elif not self._transfer(step.exchange[self._part - 1], arrivals, transfer_time, wait_late):
                return moved
            moved = True
            self._part += 1
            if self._part > len(step.exchange):
                self.position, self._part = self.position + 1, 0
        return moved

    def _compute(
        self, action: Action | None, arrivals: dict[tuple[int, Action], float], duration: Duration
    ) -> bool:
        if action is None:
            return True
        transfer = TRANSFER_OF.get(action.op)
        needed = None if transfer is None else Action(transfer.receive, action.microbatch, action.chunk)
        if needed is not None and needed in self._receives:
            if (self.rank, needed) not in arrivals:
                return False
            self._now = max(self._now, arrivals[self.rank, needed])
        start, self._now = self._now, self._now + duration(self.rank, action)
        self.spans.append(Span(action, start, self._now))
        return True

    def _transfer(
        self, action: Action, arrivals: dict[tuple[int, Action], float], transfer_time: float, wait_late: bool
    ) -> bool:
        if action.op in SENDS:
            arrivals[destination(self._placement, self.rank, action)] = self._now + transfer_time
            return True
        if not wait_late:
            if (self.rank, action) not in arrivals:
                return False
            self._now = max(self._now, arrivals[self.rank, action])
        return True
