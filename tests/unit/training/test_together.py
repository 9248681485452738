"""Files that all ranks wait for: slow is healthy, a failure is everybody's. Ranks are threads here."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from parallel_core.checkpoint import AsyncSaver, CheckpointWriter, TensorShard, find_checkpoint
from parallel_core.errors import CheckpointError, CommError
from parallel_core.training.together import together

LIMIT_S = 0.4


class Threads:
    """A group whose ranks are threads, and which fails like a real one when a rank is later than the limit."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier, self._values = threading.Barrier(size), [None] * size
        self._rank = threading.local()

    def all_gather_object(self, value: Any) -> list[Any]:
        self._values[self._rank.value] = value
        try:
            self._barrier.wait(LIMIT_S)
            values = list(self._values)
            self._barrier.wait(LIMIT_S)
        except threading.BrokenBarrierError:
            raise CommError(f"all_gather_object did not complete within {LIMIT_S} s") from None
        return values

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """Return what `work(rank)` returned or raised on every rank."""
        out: list[Any] = [None] * self.size

        def of(rank: int) -> None:
            self._rank.value = rank
            try:
                out[rank] = work(rank)
            except Exception as error:
                out[rank] = error

        ranks = [threading.Thread(target=of, args=(rank,)) for rank in range(self.size)]
        for one in ranks:
            one.start()
        for one in ranks:
            one.join()
        return out


def test_a_write_that_takes_longer_than_the_communication_limit_is_waited_for():
    group = Threads(2)

    def write(rank: int) -> str:
        time.sleep(5 * LIMIT_S * rank)
        return f"written by {rank}"

    assert group.run(lambda rank: together(group, lambda: write(rank), LIMIT_S)) == ["written by 0", "written by 1"]
    # The same work between two bare collectives does end the run: that is what the rounds are for.
    bare = Threads(2)
    plain = bare.run(lambda rank: (write(rank), bare.all_gather_object(None)))
    assert any(isinstance(outcome, CommError) for outcome in plain)


def test_a_failure_on_one_rank_is_everybodys_at_once():
    group, begun = Threads(3), time.monotonic()
    forever = threading.Event()

    def write(rank: int) -> None:
        if rank == 1:
            raise CheckpointError("rank 1 could not write: No space left on device")
        forever.wait(60)

    outcomes = group.run(lambda rank: together(group, lambda: write(rank), LIMIT_S))
    forever.set()
    assert [(type(one), str(one)) for one in outcomes] == [
        (CheckpointError, "rank 1 could not write: No space left on device")
    ] * 3
    assert time.monotonic() - begun < 30  # nobody waited for the others' work


def test_a_bug_is_raised_where_it_is():
    group = Threads(2)
    outcomes = group.run(lambda rank: together(group, lambda: 1 / rank, LIMIT_S))
    assert isinstance(outcomes[0], ZeroDivisionError) and isinstance(outcomes[1], CommError)


@pytest.mark.parametrize("can_tell", [True, False], ids=["it can say so", "the disk takes no note either"])
def test_a_failed_save_in_the_background_is_everybodys(can_tell, tmp_path):
    group, given_up = Threads(2), threading.Event()
    shard = TensorShard.full("w", (4,), "float32")
    writers = [CheckpointWriter(tmp_path, 1, rank, 2) for rank in range(2)]
    writers[0].begin()

    def save(rank: int) -> None:
        if rank == 1:
            if can_tell:
                writers[1].report_failure("disk quota exceeded")
            raise CheckpointError("rank 1: disk quota exceeded")
        writers[0].write_rank_file({"w": (shard, np.ones(4, np.float32))})
        writers[0].commit(writers[0].collect_manifests(given_up=given_up.is_set), {})

    def wait(rank: int) -> None:
        saver = AsyncSaver()
        saver.start({}, lambda copies: save(rank))
        try:
            together(group, saver.wait, LIMIT_S)
        except CheckpointError:
            given_up.set()
            raise

    outcomes = group.run(wait)
    assert all(isinstance(one, CheckpointError) and "disk quota exceeded" in str(one) for one in outcomes)
    with pytest.raises(CheckpointError):
        find_checkpoint(tmp_path)
    for one in threading.enumerate():
        if one.name in ("checkpoint-save", "files"):
            one.join(10)
            assert not one.is_alive()
