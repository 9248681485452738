"""The schedules against Megatron-LM's rule, and the checker against schedules that are wrong."""

from __future__ import annotations

import queue
import random
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from parallel_core.errors import ConfigError, ParallelCoreError
from parallel_core.layout.stages import Placement
from parallel_core.pipeline.check import check_schedule
from parallel_core.pipeline.executor import run_steps
from parallel_core.pipeline.figures import bubble_share, format_steps, peak_in_flight
from parallel_core.pipeline.schedule import (
    Action,
    Op,
    Step,
    add_exchanges,
    make_schedule,
    one_f_one_b,
)
from parallel_core.report.simulate import simulate

PATIENCE_S = 20.0


def compute_order(steps: list[Step]) -> list[str]:
    return [str(step.compute) for step in steps if step.compute is not None]


def megatron_order(P: int, V: int, M: int, G: int, rank: int) -> list[str]:
    """Write down what rank `rank` computes, straight from the description of Megatron's two loops."""
    if V == 1:
        warmup = min(P - rank - 1, M)
        order = [f"F{m}.0" for m in range(warmup)]
        for m in range(M - warmup):
            order += [f"F{warmup + m}.0", f"B{m}.0"]
        return order + [f"B{m}.0" for m in range(M - warmup, M)]
    table = []
    for start in range(0, M, G):
        for chunk in range(V):
            table += [(m, chunk) for m in range(start, min(start + G, M))]
    total = M * V
    warmup = min(total, (P - rank - 1) * 2 + (V - 1) * G)
    order = ["F{}.{}".format(*table[k]) for k in range(warmup)]
    for k in range(warmup, total):
        m, chunk = table[k - warmup]
        order += ["F{}.{}".format(*table[k]), f"B{m}.{V - 1 - chunk}"]
    for k in range(total - warmup, total):
        m, chunk = table[k]
        order.append(f"B{m}.{V - 1 - chunk}")
    return order


def legal_cases() -> Iterator[tuple[int, int, int, int]]:
    for P in range(1, 9):
        for M in range(1, 13):
            yield P, 1, M, P
    for P in range(2, 9):
        for V in (2, 3, 4):
            for M in range(P, 3 * P + 1):
                for G in range(P, min(M, P + 3) + 1):
                    if M % G == 0 or M % G >= P:
                        yield P, V, M, G


def test_the_order_is_megatrons_in_a_sweep() -> None:
    cases = list(legal_cases())
    assert len(cases) > 300
    for P, V, M, G in cases:
        steps = make_schedule(P, V, M, group_size=G)
        for rank in range(P):
            assert compute_order(steps[rank]) == megatron_order(P, V, M, G, rank), (P, V, M, G, rank)
        check_schedule(steps, V, M)


def test_the_printed_example_of_four_ranks_two_chunks_eight_microbatches() -> None:
    steps = make_schedule(4, 2, 8)
    assert " ".join(compute_order(steps[0])) == (
        "F0.0 F1.0 F2.0 F3.0 F0.1 F1.1 F2.1 F3.1 F4.0 F5.0 "
        "F6.0 B0.1 F7.0 B1.1 F4.1 B2.1 F5.1 B3.1 F6.1 B0.0 F7.1 B1.0 "
        "B2.0 B3.0 B4.1 B5.1 B6.1 B7.1 B4.0 B5.0 B6.0 B7.0"
    )
    assert " ".join(compute_order(steps[3])) == (
        "F0.0 F1.0 F2.0 F3.0 "
        "F0.1 B0.1 F1.1 B1.1 F2.1 B2.1 F3.1 B3.1 F4.0 B0.0 F5.0 B1.0 F6.0 B2.0 F7.0 B3.0 "
        "F4.1 B4.1 F5.1 B5.1 F6.1 B6.1 F7.1 B7.1 B4.0 B5.0 B6.0 B7.0"
    )


def test_forward_only_keeps_the_forward_order_with_chunks_too() -> None:
    """Evaluation with a virtual pipeline."""
    for P, V, M, G in legal_cases():
        steps = make_schedule(P, V, M, group_size=G, forward_only=True)
        check_schedule(steps, V, M, forward_only=True)
        for rank in range(P):
            forwards = [name for name in megatron_order(P, V, M, G, rank) if name.startswith("F")]
            assert compute_order(steps[rank]) == forwards


class Pair:
    """Messages from one rank to another; a send blocks until the receiver has announced a receive."""

    def __init__(self) -> None:
        self.announced = threading.Semaphore(0)
        self.messages: queue.Queue[object] = queue.Queue()
        self.expected: deque[Receive] = deque()


class Receive:
    """An announced message; messages arrive in the order they were sent, whichever is waited for first."""

    def __init__(self, pair: Pair) -> None:
        self.pair, self.value = pair, None
        pair.expected.append(self)
        pair.announced.release()

    def wait(self) -> object:
        while self.value is None:
            self.pair.expected.popleft().value = self.pair.messages.get(timeout=PATIENCE_S)
        return self.value


class Wire:
    """One rank's end of the exchange."""

    def __init__(self, pairs: dict[tuple[int, int], Pair], rank: int, num_ranks: int) -> None:
        self.pairs, self.rank, self.num_ranks = pairs, rank, num_ranks

    def send(self, action: Action, tensor: object) -> None:
        pair = self.pairs[self.rank, (self.rank + (1 if action.op is Op.SEND_FORWARD else -1)) % self.num_ranks]
        assert pair.announced.acquire(timeout=PATIENCE_S), f"deadlock: rank {self.rank} in {action}"
        pair.messages.put(tensor)

    def receive(self, action: Action) -> Receive:
        peer = (self.rank + (-1 if action.op is Op.RECV_FORWARD else 1)) % self.num_ranks
        return Receive(self.pairs[peer, self.rank])


class PathStage:
    """Checks that every microbatch comes from the stage before it, and its gradient from the stage after."""

    def __init__(self, stage: int, last: int) -> None:
        self.stage, self.last = stage, last
        self.kept: set[int] = set()
        self.late: set[int] = set()
        self.forwards: list[int] = []
        self.backwards: list[int] = []
        self.last_flags: list[bool] = []

    def forward(self, microbatch: int, activation: object) -> object:
        assert activation == (None if self.stage == 0 else ("a", self.stage - 1, microbatch))
        self.kept.add(microbatch)
        self.forwards.append(microbatch)
        return ("a", self.stage, microbatch)

    def backward(self, microbatch: int, grad_output: object, is_last: bool) -> object:
        assert grad_output == (None if self.stage == self.last else ("g", self.stage + 1, microbatch))
        self.kept.remove(microbatch)
        self.backwards.append(microbatch)
        self.last_flags.append(is_last)
        return ("g", self.stage, microbatch)

    def input_grad(self, microbatch: int, grad_output: object) -> object:
        assert grad_output == (None if self.stage == self.last else ("g", self.stage + 1, microbatch))
        assert microbatch in self.kept - self.late
        self.late.add(microbatch)
        return ("g", self.stage, microbatch)

    def weight_grad(self, microbatch: int, is_last: bool) -> None:
        self.late.remove(microbatch)
        self.kept.remove(microbatch)
        self.backwards.append(microbatch)
        self.last_flags.append(is_last)


def run_all_ranks(steps: list[list[Step]], V: int, wait_late: bool = True) -> list[list[PathStage]]:
    """Run every rank in a thread, with sends that block."""
    P = len(steps)
    stages = [[PathStage(chunk * P + rank, P * V - 1) for chunk in range(V)] for rank in range(P)]
    pairs = {(a, b): Pair() for a in range(P) for b in range(P)}
    with ThreadPoolExecutor(P) as pool:
        jobs = [pool.submit(run_steps, steps[r], stages[r], Wire(pairs, r, P), wait_late) for r in range(P)]
        for job in jobs:
            job.result()
    assert all(pair.messages.empty() for pair in pairs.values())
    return stages


EXECUTED = [(1, 1, 3, 1), (2, 1, 1, 2), (4, 1, 7, 4), (2, 2, 4, 2), (2, 4, 5, 3), (3, 3, 7, 4), (4, 2, 8, 4)]


@pytest.mark.parametrize("name", ["auto", "zero-bubble"])
@pytest.mark.parametrize("wait_late", [True, False])
def test_the_executor_brings_every_microbatch_through_every_stage(wait_late: bool, name: str) -> None:
    """Sends block until they are received, and nothing deadlocks, waiting early or late."""
    for P, V, M, G in EXECUTED:
        for row in run_all_ranks(make_schedule(P, V, M, name=name, group_size=G), V, wait_late):
            for stage in row:
                assert stage.forwards == list(range(M)) and sorted(stage.backwards) == list(range(M))
                assert not stage.kept
                assert stage.last_flags == [False] * (M - 1) + [True]


def test_a_tensor_that_is_received_and_never_used_is_named() -> None:
    pairs = {(a, b): Pair() for a in range(2) for b in range(2)}
    announced = Step(None, (Action(Op.RECV_FORWARD, 1, 0),))
    with pytest.raises(ParallelCoreError, match="received but never used: rF1.0"):
        run_steps([announced], [PathStage(1, 1)], Wire(pairs, 1, 2))


# ---- wrong schedules ------------------------------------------------------------------------------------------------
WRONG_CASES = [(1, 1, 3), (2, 1, 4), (4, 1, 6), (2, 2, 4), (3, 2, 6)]


def copy(steps: list[list[Step]]) -> list[list[Step]]:
    return [list(own) for own in steps]


@pytest.mark.parametrize(("P", "V", "M"), WRONG_CASES)
def test_every_dropped_compute_action_is_detected(P: int, V: int, M: int) -> None:
    steps = make_schedule(P, V, M)
    for rank in range(P):
        for i, step in enumerate(steps[rank]):
            if step.compute is None:
                continue
            for left in ([], [Step(None, step.exchange)]):  # with its transfers, and without
                wrong = copy(steps)
                wrong[rank][i : i + 1] = left
                with pytest.raises(ParallelCoreError, match=f"rank {rank}: {step.compute} is missing"):
                    check_schedule(wrong, V, M)


@pytest.mark.parametrize(("P", "V", "M"), WRONG_CASES)
def test_every_duplicated_compute_action_is_detected(P: int, V: int, M: int) -> None:
    steps = make_schedule(P, V, M)
    for rank in range(P):
        for i, step in enumerate(steps[rank]):
            if step.compute is None:
                continue
            wrong = copy(steps)
            wrong[rank].insert(i, Step(step.compute, ()))
            with pytest.raises(ParallelCoreError, match=f"{step.compute} is done 2 times"):
                check_schedule(wrong, V, M)


@pytest.mark.parametrize(("P", "V", "M"), WRONG_CASES)
def test_every_dropped_duplicated_or_swapped_transfer_is_detected(P: int, V: int, M: int) -> None:
    steps = make_schedule(P, V, M)
    for rank in range(P):
        for i, (compute, exchange) in enumerate(steps[rank]):
            for j in range(len(exchange)):
                for changed in (exchange[:j] + exchange[j + 1 :], exchange[: j + 1] + exchange[j:]):
                    wrong = copy(steps)
                    wrong[rank][i] = Step(compute, changed)
                    with pytest.raises(ParallelCoreError, match="the pipeline schedule is wrong"):
                        check_schedule(wrong, V, M)


def test_a_send_before_its_result_exists_is_detected() -> None:
    steps = make_schedule(2, 1, 2)
    compute, exchange = steps[0][0]
    wrong = [[Step(None, exchange), Step(compute, ()), *steps[0][1:]], steps[1]]
    with pytest.raises(ParallelCoreError, match="rank 0: after None it sends sF0.0 instead of nothing"):
        check_schedule(wrong, 1, 2)


@pytest.mark.parametrize(("P", "V", "M"), WRONG_CASES)
def test_every_swap_of_neighbouring_steps_is_detected_or_not_megatrons(P: int, V: int, M: int) -> None:
    """Some swaps give another schedule that works; none gives Megatron's, and none that is accepted can hang."""
    steps = make_schedule(P, V, M)
    refused = 0
    for rank in range(P):
        for i in range(len(steps[rank]) - 1):
            wrong = copy(steps)
            wrong[rank][i], wrong[rank][i + 1] = wrong[rank][i + 1], wrong[rank][i]
            if compute_order(wrong[rank]) == compute_order(steps[rank]):
                continue
            assert compute_order(wrong[rank]) != megatron_order(P, V, M, P, rank)
            try:
                check_schedule(wrong, V, M)
            except ParallelCoreError:
                refused += 1
            else:
                run_all_ranks(wrong, V)
    assert refused


def test_a_swap_of_microbatches_of_one_chunk_is_detected_on_a_single_rank() -> None:
    """The data of a chunk comes in order, so its microbatches must."""
    steps = make_schedule(1, 1, 3)
    wrong = [[steps[0][i] for i in (2, 1, 0, 3, 4, 5)]]
    with pytest.raises(ParallelCoreError, match="F|B"):
        check_schedule(wrong, 1, 3)
    order = [Action(Op.FORWARD, 1, 0), Action(Op.FORWARD, 0, 0), Action(Op.BACKWARD, 1, 0), Action(Op.BACKWARD, 0, 0)]
    with pytest.raises(ParallelCoreError, match="its data comes in order"):
        check_schedule([[Step(action, ()) for action in order]], 1, 2)


def test_random_damage_never_passes_and_then_hangs() -> None:
    rng = random.Random(0)
    for _ in range(200):
        P, V, M = rng.choice(WRONG_CASES[1:])
        steps = make_schedule(P, V, M)
        rank = rng.randrange(P)
        a, b = rng.sample(range(len(steps[rank])), 2)
        steps[rank][a], steps[rank][b] = steps[rank][b], steps[rank][a]
        try:
            check_schedule(steps, V, M)
        except ParallelCoreError:
            continue
        run_all_ranks(steps, V)


def test_receives_placed_where_they_are_used_would_deadlock_and_are_detected() -> None:
    """Blocking sends: two ranks that both send first never meet."""
    send = Action(Op.SEND_FORWARD, 0, 0)
    steps = [
        [Step(Action(Op.FORWARD, 0, 0), (send, Action(Op.RECV_BACKWARD, 0, 0))), Step(Action(Op.BACKWARD, 0, 0), ())],
        [
            Step(None, ()),
            Step(Action(Op.FORWARD, 0, 0), ()),
            Step(Action(Op.BACKWARD, 0, 0), (Action(Op.SEND_BACKWARD, 0, 0), Action(Op.RECV_FORWARD, 0, 0))),
        ],
    ]
    with pytest.raises(ParallelCoreError, match="rank 1: F0.0 runs before rF0.0"):
        check_schedule(steps, 1, 1)


def test_a_compute_order_that_cannot_progress_is_refused() -> None:
    order = one_f_one_b(2, 2)
    order[1] = list(reversed(order[1]))
    with pytest.raises(ConfigError, match="cannot make progress; next actions are rank 0: F|rank 0: B"):
        add_exchanges(order, 1)


# ---- numbers --------------------------------------------------------------------------------------------------------
def test_microbatch_counts_that_starve_an_interleaved_pipeline_are_refused() -> None:
    for M, G, words in ((3, 0, "use at least 4"), (9, 0, "the last group .* would hold 1"), (8, 3, "4, 3, 8")):
        with pytest.raises(ConfigError, match=words):
            make_schedule(4, 2, M, group_size=G)
    make_schedule(4, 2, 9, group_size=5)  # a remainder of 4 keeps four ranks busy


def test_activations_in_flight_are_bounded_by_the_pipelines_depth() -> None:
    """1F1B holds P - r microbatches however many there are."""
    for M in (8, 32):
        assert [peak_in_flight(own) for own in make_schedule(4, 1, M)] == [4, 3, 2, 1]
    assert peak_in_flight(make_schedule(4, 2, 8)[0]) == 11  # warm-up 10, then one more before each backward


def test_the_bubble_shrinks_with_chunks() -> None:
    assert bubble_share(4, 1, 8) == pytest.approx(3 / 11)
    assert bubble_share(4, 2, 8) == pytest.approx(3 / 19)


def test_the_printed_table_holds_every_action_once() -> None:
    steps = make_schedule(3, 2, 6)
    table = format_steps(steps, with_exchanges=True)
    assert len(table.splitlines()) == len(steps[0]) + 1
    names = [cell for line in table.splitlines()[1:] for cell in line.replace("|", " ").split()[1:]]
    for rank in range(3):
        for step in steps[rank]:
            if step.compute is not None:
                assert names.count(str(step.compute)) == 3


@pytest.mark.parametrize(("P", "M"), [(2, 2), (3, 5), (4, 8)])
def test_every_part_asks_the_placement_where_stages_are(P, M):
    """Ranks in the opposite order: the same schedule with its columns exchanged."""
    backwards = Placement(tuple((P - 1 - rank,) for rank in range(P)))
    order = list(reversed(one_f_one_b(P, M)))
    steps = add_exchanges(order, 1, backwards)
    check_schedule(steps, 1, M, placement=backwards)
    computed = [[step.compute for step in own] for own in make_schedule(P, 1, M)]
    assert [[step.compute for step in own] for own in steps] == computed[::-1]
    usual = simulate(make_schedule(P, 1, M), transfer_time=0.5)
    assert simulate(steps, transfer_time=0.5, placement=backwards).spans == usual.spans[::-1]
    with pytest.raises(ParallelCoreError, match="after F0.0 it sends nothing instead of sF0.0"):
        check_schedule(steps, 1, M)


def test_a_placement_names_every_stage_once():
    placement = Placement.in_turn(3, 2)
    assert placement.table == ((0, 3), (1, 4), (2, 5))
    for stage in range(6):
        assert placement.stage(*placement.place(stage)) == stage
    assert placement.neighbour(2, 0, 1) == (0, 1) and placement.neighbour(0, 1, -1) == (2, 0)
    assert placement.neighbour(0, 0, -1) is None and placement.neighbour(2, 1, 1) is None
    assert placement.is_first(0, 0) and placement.is_last(2, 1) and not placement.is_last(2, 0)


def test_a_schedule_is_chosen_by_its_name():
    assert make_schedule(2, 1, 4, name="1f1b") == make_schedule(2, 1, 4)
    assert make_schedule(2, 2, 4, name="interleaved") == make_schedule(2, 2, 4)
    with pytest.raises(ConfigError, match="'gpipe' does not exist; use auto, 1f1b, interleaved"):
        make_schedule(2, 1, 4, name="gpipe")
    with pytest.raises(ConfigError, match="1f1b runs one chunk on each rank, not 2"):
        make_schedule(2, 2, 4, name="1f1b")
