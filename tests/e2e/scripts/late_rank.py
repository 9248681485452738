"""Rank 0 loses patience, rank 1 waits in a group's operation, rank 2 is late in a layer."""

from __future__ import annotations

import os
import time

from parallel_core.comm import watchdog
from parallel_core.errors import CommError
from parallel_core.launch.entry import run_as_rank
from parallel_core.spans import span


def slow_layer() -> None:
    time.sleep(600)


def main() -> None:
    rank = int(os.environ["RANK_ID"])
    with span("iteration", 0, iteration=7):
        if rank == 2:
            with span("forward-compute", microbatch=3, chunk=0):
                slow_layer()
        if rank == 1:
            with watchdog.Watchdog(600).watch("all_reduce(sum) in group tp"):
                watchdog.Watchdog(600)._run()
        time.sleep(1.5)
        raise CommError("all_reduce(sum) in group tp of (2, 3) Float32 did not complete within 1.5 s")


if __name__ == "__main__":
    run_as_rank(main)
