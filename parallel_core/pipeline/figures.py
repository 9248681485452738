"""A schedule in figures: its table, what a rank holds, what it idles. Pure Python."""

from __future__ import annotations

from collections.abc import Sequence

from parallel_core.pipeline.schedule import COMPLETES_GRADIENTS, Op, Step, schedule_named


def format_steps(steps: Sequence[Sequence[Step]], with_exchanges: bool = False) -> str:
    """Return a tick (row) by rank (column) table, for logs and error messages."""
    cells = [
        [
            " ".join(str(a) for a in (step.compute, *(step.exchange if with_exchanges else ())) if a) or "."
            for step in rank
        ]
        for rank in steps
    ]
    widths = [max(map(len, column), default=1) for column in cells]
    head = " tick | " + " | ".join(f"rank {rank}".ljust(width) for rank, width in enumerate(widths))
    rows = [
        f"{tick:5d} | " + " | ".join(cell.ljust(max(width, 6)) for cell, width in zip(row, widths)).rstrip()
        for tick, row in enumerate(zip(*cells))
    ]
    return "\n".join([head, *rows])


def peak_in_flight(steps: Sequence[Step]) -> int:
    """Return the largest number of microbatch activations that one rank holds at once, from F to the end of B or W."""
    alive = peak = 0
    for step in steps:
        if step.compute is not None:
            op = step.compute.op
            alive += 1 if op is Op.FORWARD else -1 if op in COMPLETES_GRADIENTS else 0
            peak = max(peak, alive)
    return peak


def bubble_share(
    num_ranks: int,
    num_chunks: int,
    num_microbatches: int,
    name: str = "auto",
    *,
    forward_time: float = 1.0,
    input_grad_time: float = 1.0,
    weight_grad_time: float = 1.0,
) -> float:
    """Return the ideal share of a step that a rank idles.

    The times are of one chunk's F, I and W; together T. A rank works V * M * T. With 1F1B, interleaved or not, it idles
    (P - 1) * T, so the share is (P - 1) / (V * M + P - 1); with zero bubble it idles (P - 1) * (F + I - W), or not at
    all where that is negative.
    """
    total = forward_time + input_grad_time + weight_grad_time
    idle = total
    if schedule_named(name, num_chunks).splits_backward:
        idle = max(0.0, forward_time + input_grad_time - weight_grad_time)
    idle *= num_ranks - 1
    work = num_chunks * num_microbatches * total
    return idle / (work + idle) if work + idle else 0.0
