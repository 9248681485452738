"""Runs one rank's steps. Knows nothing of schedules, tensors or frameworks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from parallel_core.errors import ParallelCoreError
from parallel_core.pipeline.schedule import COMPLETES_GRADIENTS, SENDS, TRANSFER_OF, Action, Op, Step
from parallel_core.spans import span

_DIRECTION = {Op.FORWARD: "forward", Op.SEND_FORWARD: "forward", Op.SEND_BACKWARD: "backward"}


class Stage(Protocol):
    """One model chunk on this rank."""

    def forward(self, microbatch: int, activation: Any) -> Any:
        """Return the chunk's output for `microbatch`, from the previous stage's (None on the first)."""

    def backward(self, microbatch: int, grad_output: Any, is_last: bool) -> Any:
        """Return the gradient for the chunk's input; `is_last` tells the last backward pass of the iteration."""

    def input_grad(self, microbatch: int, grad_output: Any) -> Any:
        """Return the gradient for the chunk's input, and leave those of its weights for `weight_grad`."""

    def weight_grad(self, microbatch: int, is_last: bool) -> None:
        """Compute what `input_grad` left; `is_last` tells the last backward pass of the iteration."""


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
        ParallelCoreError: if a tensor was received and never used, or used and never received; if gradients of weights
            were left and never computed.
    """
    inbox: dict[Action, Received] = {}
    late: set[tuple[int, int]] = set()
    backwards_left = [0] * len(stages)
    for step in steps:
        if step.compute is not None and step.compute.op in COMPLETES_GRADIENTS:
            backwards_left[step.compute.chunk] += 1
    for step in steps:
        output = None
        if step.compute is not None:
            op, microbatch, chunk = step.compute
            name, transfer, entry = _DIRECTION.get(op, "backward"), TRANSFER_OF.get(op), None
            received = None if transfer is None else inbox.pop(Action(transfer.receive, microbatch, chunk), None)
            if received is not None:
                with span(f"{name}-recv", microbatch=microbatch, chunk=chunk):
                    entry = received.wait()
            if op in COMPLETES_GRADIENTS:
                backwards_left[chunk] -= 1
            is_last = backwards_left[chunk] == 0
            with span(f"{name}-compute", microbatch=microbatch, chunk=chunk):
                if op is Op.FORWARD:
                    output = stages[chunk].forward(microbatch, entry)
                elif op is Op.BACKWARD:
                    output = stages[chunk].backward(microbatch, entry, is_last)
                elif op is Op.INPUT_GRAD:
                    output = stages[chunk].input_grad(microbatch, entry)
                    late.add((microbatch, chunk))
                else:
                    stages[chunk].weight_grad(microbatch, is_last)
                    late.discard((microbatch, chunk))
        for action in step.exchange:
            if action.op in SENDS:
                with span(f"{_DIRECTION[action.op]}-send", microbatch=action.microbatch, chunk=action.chunk):
                    exchange.send(action, output)
            else:
                inbox[action] = exchange.receive(action)
                if not wait_late:
                    inbox[action].wait()
    if inbox:
        raise ParallelCoreError(f"pipeline: received but never used: {', '.join(map(str, inbox))}")
    if late:
        names = ", ".join(str(Action(Op.WEIGHT_GRAD, *place)) for place in sorted(late))
        raise ParallelCoreError(f"pipeline: gradients of weights were left and never computed: {names}")
