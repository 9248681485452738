"""Runs one rank's steps. Knows nothing of schedules, tensors or frameworks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from parallel_core.errors import ParallelCoreError
from parallel_core.pipeline.schedule import SENDS, TRANSFER_OF, Action, Op, Step


class Stage(Protocol):
    """One model chunk on this rank."""

    def forward(self, microbatch: int, activation: Any) -> Any:
        """Return the chunk's output for `microbatch`, from the previous stage's (None on the first)."""

    def backward(self, microbatch: int, grad_output: Any, is_last: bool) -> Any:
        """Return the gradient for the chunk's input; `is_last` tells the last backward pass of the iteration."""


class Received(Protocol):
    """A tensor that was announced."""

    def wait(self) -> Any:
        """Return it."""


class Exchange(Protocol):
    """Moves activations and gradients between neighbouring stages."""

    def send(self, action: Action, tensor: Any) -> None:
        """Start sending what `action` names."""

    def receive(self, action: Action) -> Received:
        """Announce what `action` names."""


def run_steps(steps: Sequence[Step], stages: Sequence[Stage], exchange: Exchange, wait_late: bool = True) -> None:
    """Run `steps` on this rank's model chunks.

    Args:
        steps: this rank's part of a schedule.
        stages: the model chunks.
        exchange: transport between ranks.
        wait_late: wait for a received tensor when it is used instead of when it is announced
            (Megatron: overlap_p2p_comm). The order of all operations is the same either way.

    Raises:
        ParallelCoreError: if a tensor was received and never used, or used and never received.
    """
    inbox: dict[Action, Received] = {}
    backwards_left = [0] * len(stages)
    for step in steps:
        if step.compute is not None and step.compute.op is Op.BACKWARD:
            backwards_left[step.compute.chunk] += 1
    for step in steps:
        output = None
        if step.compute is not None:
            op, microbatch, chunk = step.compute
            if op is Op.FORWARD:
                received = inbox.pop(Action(TRANSFER_OF[op].receive, microbatch, chunk), None)
                output = stages[chunk].forward(microbatch, None if received is None else received.wait())
            else:
                backwards_left[chunk] -= 1
                received = inbox.pop(Action(TRANSFER_OF[op].receive, microbatch, chunk), None)
                gradient = None if received is None else received.wait()
                output = stages[chunk].backward(microbatch, gradient, backwards_left[chunk] == 0)
        for action in step.exchange:
            if action.op in SENDS:
                exchange.send(action, output)
            else:
                inbox[action] = exchange.receive(action)
                if not wait_late:
                    inbox[action].wait()
    if inbox:
        raise ParallelCoreError(f"pipeline: received but never used: {', '.join(map(str, inbox))}")
