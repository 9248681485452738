"""The zero-bubble order: what it is, that it is proven like the others, and what it holds and idles."""

from __future__ import annotations

import pytest

from parallel_core.errors import ConfigError, ParallelCoreError
from parallel_core.pipeline.check import check_schedule
from parallel_core.pipeline.executor import run_steps
from parallel_core.pipeline.figures import bubble_share, peak_in_flight
from parallel_core.pipeline.schedule import Action, Op, Step, make_schedule
from parallel_core.report.simulate import simulate, uniform_durations
from tests.unit.pipeline.test_schedules import PathStage, compute_order, legal_cases

COSTS = [(1.0, 1.0, 1.0), (1.0, 1.3, 0.7), (1.0, 2.0, 1.0)]
"""F, I, W: equal; where attention, which has no weights, is heavy; with full recomputation."""


def split(P: int, V: int, M: int, G: int = 0) -> list[list[Step]]:
    return make_schedule(P, V, M, name="zero-bubble", group_size=G)


def names(steps: list[Step]) -> str:
    return " ".join(name.removesuffix(".0") for name in compute_order(steps))


def test_the_order_of_four_ranks_is_zb_h1() -> None:
    """arXiv:2401.10241, figure 3, with whole passes on the first rank."""
    first, second, third, last = map(names, split(4, 1, 8))
    assert first == "F0 F1 F2 F3 B0 F4 B1 F5 B2 F6 B3 F7 B4 B5 B6 B7"
    assert second == "F0 F1 F2 I0 F3 I1 W0 F4 I2 W1 F5 I3 W2 F6 I4 W3 F7 I5 W4 I6 W5 I7 W6 W7"
    assert third == "F0 F1 I0 F2 I1 F3 I2 W0 F4 I3 W1 F5 I4 W2 F6 I5 W3 F7 I6 W4 I7 W5 W6 W7"
    assert last == "F0 I0 F1 I1 F2 I2 F3 I3 W0 F4 I4 W1 F5 I5 W2 F6 I6 W3 F7 I7 W4 W5 W6 W7"


def test_every_legal_case_is_proven() -> None:
    for P, V, M, G in legal_cases():
        steps = split(P, V, M, G)
        check_schedule(steps, V, M)
        kinds = {step.compute.op for own in steps[1:] for step in own if step.compute is not None}
        assert P == 1 or kinds == {Op.FORWARD, Op.INPUT_GRAD, Op.WEIGHT_GRAD}
        for own, whole in zip(steps, make_schedule(P, V, M, group_size=G)):
            order = [a.compute[1:] for a in own if a.compute and a.compute.op in (Op.BACKWARD, Op.WEIGHT_GRAD)]
            assert order == [a.compute[1:] for a in whole if a.compute and a.compute.op is Op.BACKWARD], (
                "gradients are summed in 1F1B's order"
            )


def test_forward_only_has_no_backward_passes() -> None:
    steps = make_schedule(4, 2, 8, name="zero-bubble", forward_only=True)
    check_schedule(steps, 2, 8, forward_only=True)
    assert {step.compute.op for own in steps for step in own if step.compute} == {Op.FORWARD}


@pytest.mark.parametrize("costs", COSTS)
def test_the_bubble_is_the_formulas(costs: tuple[float, float, float]) -> None:
    forward, input_grad, weight_grad = costs
    for P in (2, 4, 8, 16):
        for M in (P, 2 * P, 4 * P):
            for V in (1, 2, 4):
                times = uniform_durations(forward, input_grad + weight_grad, weight_grad)
                want = bubble_share(
                    P, V, M, "zero-bubble",
                    forward_time=forward, input_grad_time=input_grad, weight_grad_time=weight_grad,
                )
                assert simulate(split(P, V, M), times).bubble_share == pytest.approx(want), (P, V, M)
                assert want < bubble_share(P, V, M)


def test_every_rank_holds_what_the_first_of_1f1b_holds() -> None:
    """Interleaved, fewer than interleaved 1F1B's first rank."""
    for P, M in ((2, 8), (4, 8), (8, 32)):
        assert [peak_in_flight(own) for own in split(P, 1, M)] == [P] * P
        assert {peak_in_flight(own) for own in split(P, 2, M)} == {2 * P}
        assert peak_in_flight(make_schedule(P, 2, M)[0]) == 3 * P - 1


# ---- wrong schedules ------------------------------------------------------------------------------------------------
def changed(old: Action, *new: Action) -> list[list[Step]]:
    """Return the steps of three ranks, with rank 2's `old` replaced."""
    steps = split(3, 1, 6)
    place = next(i for i, step in enumerate(steps[2]) if step.compute == old)
    exchange = steps[2][place].exchange
    steps[2][place : place + 1] = [*(Step(action, ()) for action in new[:-1]), Step(new[-1] if new else None, exchange)]
    return steps


I3, W3, B3 = (Action(op, 3, 0) for op in (Op.INPUT_GRAD, Op.WEIGHT_GRAD, Op.BACKWARD))
WRONG = [
    (changed(W3), "rank 2: W3.0 is missing"),
    (changed(W3, W3, W3), "rank 2: W3.0 is done 2 times"),
    (changed(W3, B3), "rank 2: B3.0 does not belong here"),
    (changed(I3, B3), "rank 2: I3.0 is missing"),
    (changed(I3, W3, I3), "rank 2: W3.0 is done 2 times"),
]


@pytest.mark.parametrize(("steps", "message"), WRONG)
def test_a_wrong_split_is_found(steps: list[list[Step]], message: str) -> None:
    with pytest.raises(ParallelCoreError, match=message):
        check_schedule(steps, 1, 6)


def test_weights_before_their_inputs_are_found() -> None:
    steps = split(3, 1, 6)
    own = steps[2]
    early, late = (next(i for i, s in enumerate(own) if s.compute == action) for action in (I3, W3))
    own[early], own[late] = Step(W3, own[early].exchange), Step(I3, own[late].exchange)
    with pytest.raises(ParallelCoreError, match="rank 2: W3.0 comes before I3.0"):
        check_schedule(steps, 1, 6)


def test_the_executor_tells_of_weights_that_nobody_computed() -> None:
    order = [(Op.FORWARD, 0), (Op.FORWARD, 1), (Op.INPUT_GRAD, 0), (Op.INPUT_GRAD, 1), (Op.WEIGHT_GRAD, 1)]
    own = [Step(Action(op, microbatch, 0), ()) for op, microbatch in order]
    with pytest.raises(ParallelCoreError, match="gradients of weights were left and never computed: W0.0"):
        run_steps(own, [PathStage(0, 0)], exchange=None)  # type: ignore[arg-type]


def test_group_sizes_are_refused_as_for_interleaved_1f1b() -> None:
    with pytest.raises(ConfigError, match="interleaved 1F1B needs"):
        split(4, 2, 8, 2)
