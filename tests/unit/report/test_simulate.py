"""The simulated clock against the longest path through the schedule's dependencies, and against closed formulas."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel_core.errors import ConfigError
from parallel_core.pipeline.figures import bubble_share
from parallel_core.pipeline.schedule import Action, Op, Step, make_schedule
from parallel_core.report.simulate import simulate, uniform_durations


@st.composite
def schedules(draw):
    ranks = draw(st.integers(1, 6))
    chunks = draw(st.integers(1, 3)) if ranks > 1 else 1
    microbatches = ranks * draw(st.integers(1, 3))
    return ranks, chunks, microbatches


def longest_path(steps, num_chunks, times, transfer):
    """Earliest ends when every action waits for its producer and for the action before it on its rank."""
    num_ranks, ends, left = len(steps), {}, [[s.compute for s in rank if s.compute] for rank in steps]
    clocks = [0.0] * num_ranks
    while any(left):
        for rank, todo in enumerate(left):
            if not todo:
                continue
            op, microbatch, chunk = todo[0]
            stage = chunk * num_ranks + rank
            last = num_ranks * num_chunks - 1
            if op is Op.FORWARD:
                needs = None if stage == 0 else (op, microbatch, stage - 1)
            else:
                needs = (Op.FORWARD, microbatch, stage) if stage == last else (op, microbatch, stage + 1)
            if needs is not None and needs not in ends:
                continue
            far = needs is not None and needs[2] % num_ranks != rank
            ready = 0.0 if needs is None else ends[needs] + (transfer if far else 0.0)
            clocks[rank] = max(clocks[rank], ready) + times(rank, todo.pop(0))
            ends[op, microbatch, stage] = clocks[rank]
    return ends


@settings(max_examples=60, deadline=None)
@given(schedules(), st.floats(0, 3), st.integers(0, 10**6))
def test_ends_are_the_longest_paths(sizes, transfer, seed):
    ranks, chunks, microbatches = sizes

    def times(rank, action):
        return 0.5 + hash((seed, rank, action.microbatch, action.chunk, action.op.value)) % 7 / 4

    steps = make_schedule(ranks, chunks, microbatches)
    timeline = simulate(steps, times, transfer_time=transfer)
    ends = longest_path(steps, chunks, times, transfer)
    for rank, spans in enumerate(timeline.spans):
        assert [span.action for span in spans] == [step.compute for step in steps[rank] if step.compute]
        for span in spans:
            stage = span.action.chunk * ranks + rank
            assert span.end == pytest.approx(ends[span.action.op, span.action.microbatch, stage])
    assert timeline.end == pytest.approx(max(ends.values()))


@settings(max_examples=60, deadline=None)
@given(schedules(), st.floats(0.1, 3), st.floats(0.1, 3))
def test_the_bubble_of_equal_stages_is_the_ideal_one(sizes, forward, backward):
    ranks, chunks, microbatches = sizes
    timeline = simulate(make_schedule(ranks, chunks, microbatches), uniform_durations(forward, backward))
    work = chunks * microbatches * (forward + backward)
    assert timeline.end == pytest.approx(work + (ranks - 1) * (forward + backward))
    assert timeline.bubble_share == pytest.approx(bubble_share(ranks, chunks, microbatches))
    for rank in range(ranks):
        assert timeline.busy(rank) == pytest.approx(work)


@settings(max_examples=40, deadline=None)
@given(schedules(), st.floats(0, 3))
def test_waiting_late_is_never_slower(sizes, transfer):
    steps = make_schedule(*sizes)
    late = simulate(steps, transfer_time=transfer)
    early = simulate(steps, transfer_time=transfer, wait_late=False)
    assert late.end <= early.end + 1e-9
    assert [[span.action for span in rank] for rank in late.spans] == [
        [span.action for span in rank] for rank in early.spans
    ]


def test_waiting_at_the_announcement_delays_what_does_not_need_the_tensor():
    f0, f1 = Action(Op.FORWARD, 0, 0), Action(Op.FORWARD, 1, 0)
    send, receive = Action(Op.SEND_FORWARD, 1, 0), Action(Op.RECV_FORWARD, 1, 0)
    own = Action(Op.BACKWARD, 0, 0)
    steps = [
        [Step(f0, ()), Step(f1, (send,))],
        [Step(None, (receive,)), Step(own, ()), Step(f1, ())],
    ]
    late, early = (simulate(steps, transfer_time=0.5, wait_late=wait).spans[1] for wait in (True, False))
    assert [(span.start, span.end) for span in late] == [(0.0, 2.0), (2.5, 3.5)]
    assert [(span.start, span.end) for span in early] == [(2.5, 4.5), (4.5, 5.5)]


def test_forward_only_needs_no_backward():
    timeline = simulate(make_schedule(4, 2, 8, forward_only=True))
    assert timeline.end == 8 * 2 + 3


def test_a_tensor_that_nobody_sends_is_an_error():
    steps = make_schedule(2, 1, 2)
    steps[0][0] = Step(steps[0][0].compute, ())
    with pytest.raises(ConfigError, match=r"rank 0 at step \d+, rank 1 at step \d+ wait for tensors that nobody sends"):
        simulate(steps)


@pytest.mark.parametrize("bad", [{"transfer_time": -1.0}, {"transfer_time": float("nan")}])
def test_times_are_checked(bad):
    with pytest.raises(ConfigError, match="transfer_time="):
        simulate(make_schedule(1, 1, 1), **bad)
    with pytest.raises(ConfigError, match="backward_time=inf"):
        uniform_durations(1.0, float("inf"))
