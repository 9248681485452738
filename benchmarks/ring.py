"""The timeline of ring attention: what every rank sends, computes and waits for in one forward and backward pass.

python benchmarks/ring.py [--ranks 2] [--sequence 4096] [--heads 4] [--head-size 32] [--json FILE]

Times are milliseconds of one clock that all ranks share. A message that was sent before its receiver asked for it was
on its way while the receiver computed; `waits` is how long receiving took, the copy out of shared memory included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
CALLS = 3
"""Only the last one is shown: the first ones load kernels and memory."""

Event = tuple[str, float, float]
"""What, and the seconds at which it began and ended."""


def be_a_rank(arguments: argparse.Namespace, folder: str) -> None:
    """Run ring attention and write this rank's events."""
    sys.path.insert(0, str(REPO))
    import mindspore as ms
    import numpy as np
    from mindspore import Tensor, nn

    from parallel_core import ops
    from parallel_core.autograd import backward
    from parallel_core.comm.factory import group_factory
    from parallel_core.comm.mindspore_comm import start_communication
    from parallel_core.context_parallel.attention import ContextAttention, ContextGroups

    ms.set_context(mode=ms.PYNATIVE_MODE, device_target="CPU", pynative_synchronize=True)
    rank, world = start_communication()
    ops.use_kernels("auto", 1)
    group = group_factory("auto", 120.0, rank, world)("world", list(range(world)))
    events: list[Event] = []

    def clocked(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*inputs: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = function(*inputs, **options)
            events.append((what, start, time.perf_counter()))
            return result

        return call

    def shifting(x: Tensor) -> Any:
        handle = start_shift(x)
        handle.wait = clocked("receive", handle.wait)
        return handle

    start_shift = clocked("send", group.shift_start)
    group.shift_start = shifting  # type: ignore[method-assign]
    group.passing = lambda: None  # type: ignore[method-assign] # in one call there would be nothing to see
    ops.attention_of_meetings = clocked("attend", ops.attention_of_meetings)
    ops.attention_of_meetings_grad = clocked("attend", ops.attention_of_meetings_grad)

    N, D, S = arguments.heads, arguments.head_size, arguments.sequence // world

    class Attend(nn.Cell):
        def construct(self, mixed: Tensor) -> Tensor:
            return attention.packed(mixed, D, scale=D**-0.5)

    attention, cell = ContextAttention(ContextGroups(group), "p2p"), Attend()
    cell.set_grad(True)
    rng = np.random.default_rng(rank)
    for _ in range(CALLS):
        mixed = Tensor(rng.standard_normal((S, 1, N, 3 * D)).astype(np.float32))
        group.barrier()
        events.clear()
        out = cell(mixed)
        forward = list(events)
        backward(cell, (mixed,), [], out)
        both = {"forward": forward, "backward": events[len(forward) :]}
    group.barrier()
    Path(folder, f"rank_{rank}.json").write_text(json.dumps(both), encoding="utf-8")


def launch(arguments: argparse.Namespace) -> list[dict[str, list[Event]]]:
    """Run the ranks, one core each, and return their events."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "NPROC": str(arguments.ranks), "LOG_DIR": f"{folder}/logs"}
        environment |= {"DEVICE_TARGET": "CPU", "PYTHONPATH": str(REPO)}
        start = [sys.executable, "-m", "parallel_core.launch", "--plain", str(Path(__file__).resolve())]
        done = subprocess.run(
            [*start, *sys.argv[1:], "--folder", folder], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"the ranks failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        return [json.loads(Path(folder, f"rank_{r}.json").read_text()) for r in range(arguments.ranks)]


def summary(ranks: list[list[Event]]) -> dict[str, float]:
    """Return how many messages were under way before they were asked for, and what ranks spent on what, in ms."""
    in_time, messages, spent = 0, 0, {"attend": 0.0, "send": 0.0, "receive": 0.0}
    for number, mine in enumerate(ranks):
        for what, start, end in mine:
            spent[what] += (end - start) * 1e3 / len(ranks)
        sent = [end for what, _, end in ranks[number - 1] if what == "send"]
        asked = [start for what, start, _ in mine if what == "receive"]
        messages += len(asked)
        in_time += sum(one <= other for one, other in zip(sent, asked))
    return {"messages": messages, "under way before they were asked for": in_time, **spent}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--sequence", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-size", type=int, default=32)
    parser.add_argument("--json", help="write all events here")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        be_a_rank(arguments, arguments.folder)
        return
    ranks = launch(arguments)
    for part in ("forward", "backward"):
        first = min(start for rank in ranks for _, start, _ in rank[part])
        for number, rank in enumerate(ranks):
            print(f"{part}, rank {number}")
            for what, start, end in rank[part]:
                print(f"  {(start - first) * 1e3:9.2f} to {(end - first) * 1e3:9.2f}  {what}")
        found = summary([rank[part] for rank in ranks])
        in_time, messages = found["under way before they were asked for"], found["messages"]
        print(f"{part}: {in_time:.0f} of {messages:.0f} messages were under way before they were asked for; a rank "
              f"attends {found['attend']:.2f} ms, sends {found['send']:.2f} ms, waits {found['receive']:.2f} ms")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(ranks, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
