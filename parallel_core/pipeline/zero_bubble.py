"""The zero-bubble schedule: split backward passes, whose weights' part fills the waits. Pure Python.

Source: Qi et al. 2023 (arXiv:2401.10241), section 3.1 (ZB-H1); with several chunks PyTorch's
`ScheduleInterleavedZeroBubble`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from parallel_core.layout.stages import Placement
from parallel_core.pipeline.schedule import (
    SCHEDULES,
    Action,
    Op,
    Schedule,
    interleaved_one_f_one_b,
    one_f_one_b,
)


def zero_bubble(
    num_ranks: int, num_chunks: int, num_microbatches: int, group_size: int = 0
) -> list[list[Action]]:
    """Return (interleaved) 1F1B's order with split backward passes, whose W run `rank` passes after their I.

    With one chunk this is ZB-H1: as many microbatches in flight as 1F1B has on its first rank, on every rank. With
    several, one warm-up forward per hop replaces interleaved 1F1B's two: the input's gradient comes back sooner. The
    first rank, where W follows its I at once, runs whole passes.

    Example, rank 1 of P=4, M=8: F0 F1 F2 I0 F3 I1 W0 F4 I2 W1 ... I7 W6 W7.

    Args and errors as for `interleaved_one_f_one_b`.
    """
    if num_chunks == 1:
        base = one_f_one_b(num_ranks, num_microbatches)
    else:
        base = interleaved_one_f_one_b(num_ranks, num_chunks, num_microbatches, group_size or None, hop=1)
    return [order if rank == 0 else _delayed(order, rank) for rank, order in enumerate(base)]


def _delayed(order: Sequence[Action], passes: int) -> list[Action]:
    """Return the order with every backward pass split, and its W so many backward passes later, or at the end."""
    out: list[Action] = []
    late: deque[Action] = deque()
    for action in order:
        if action.op is not Op.BACKWARD:
            out.append(action)
            continue
        out.append(action._replace(op=Op.INPUT_GRAD))
        late.append(action._replace(op=Op.WEIGHT_GRAD))
        if len(late) > passes:
            out.append(late.popleft())
    return [*out, *late]


SCHEDULES["zero-bubble"] = Schedule(Placement.in_turn, zero_bubble, splits_backward=True)
