"""The bubble of pipeline schedules, measured beside the simulated one, with stages that take a given time.

python benchmarks/bubble.py [--ranks 4,8] [--milliseconds 40] [--rounds 3] [--json FILE]

Real ranks run the real executor and exchange; a stage waits on a timer in place of computing, so that the cores of the
machine do not decide. F, I and W of a whole stage take as long as each other; with several chunks each takes its part.
A rank idles for what is left of the step when its stages' own times are taken away; the bubble is the mean idle share.
The exit status is 1 if a step takes 5 % more or less than the simulated one, or a bubble is 5 points off.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from parallel_core.layout.stages import Placement  # noqa: E402
from parallel_core.pipeline.check import check_schedule  # noqa: E402
from parallel_core.pipeline.executor import run_steps  # noqa: E402
from parallel_core.pipeline.schedule import make_schedule  # noqa: E402
from parallel_core.report.simulate import simulate, uniform_durations  # noqa: E402

SCHEDULES = [("1f1b", 1), ("interleaved", 2), ("zero-bubble", 1), ("zero-bubble", 2)]
TOLERANCE = 0.05


class TimerStage:
    """A stage that waits `seconds` for each of F, I and W, and passes on a tensor of its own."""

    def __init__(self, seconds: float, tensor: Any) -> None:
        self._seconds, self._tensor = seconds, tensor
        self.busy = 0.0

    def _wait(self, parts: int) -> Any:
        start = time.perf_counter()
        time.sleep(parts * self._seconds)
        self.busy += time.perf_counter() - start
        return self._tensor

    def forward(self, microbatch: int, activation: Any) -> Any:
        """Wait for F."""
        return self._wait(1)

    def backward(self, microbatch: int, grad_output: Any, is_last: bool) -> Any:
        """Wait for I and W."""
        return self._wait(2)

    def input_grad(self, microbatch: int, grad_output: Any) -> Any:
        """Wait for I."""
        return self._wait(1)

    def weight_grad(self, microbatch: int, is_last: bool) -> None:
        """Wait for W."""
        self._wait(1)


def be_a_rank(milliseconds: float, rounds: int, folder: str) -> None:
    """Run every schedule `rounds` times and leave [start, end, busy] of each."""
    import mindspore as ms
    import numpy as np
    from mindspore import Tensor

    from parallel_core.comm.factory import group_factory
    from parallel_core.comm.mindspore_comm import start_communication
    from parallel_core.pipeline.exchange import PipelineExchange

    ms.set_context(mode=ms.PYNATIVE_MODE, device_target="CPU", pynative_synchronize=True)
    rank, world = start_communication()
    group = group_factory("auto", 120.0, rank, world)("world", list(range(world)))
    tensor = Tensor(np.ones((64, 64), np.float32))
    found: dict[str, list[tuple[float, float, float]]] = {}
    for name, chunks in SCHEDULES:
        steps = make_schedule(world, chunks, 2 * world, name=name)
        check_schedule(steps, chunks, 2 * world)
        for _ in range(rounds + 1):
            stages = [TimerStage(milliseconds / 1e3 / chunks, tensor) for _ in range(chunks)]
            exchange = PipelineExchange(group, (64, 64), ms.float32, Placement.in_turn(world, chunks))
            group.barrier()
            start = time.perf_counter()
            run_steps(steps[rank], stages, exchange)
            end = time.perf_counter()
            exchange.finish()
            found.setdefault(f"{name} {chunks}", []).append((start, end, sum(stage.busy for stage in stages)))
    group.barrier()
    Path(folder, f"rank_{rank}.json").write_text(json.dumps(found), encoding="utf-8")


def measure(ranks: int, milliseconds: float, rounds: int) -> list[dict[str, Any]]:
    """Return one row for each schedule; the first round does not count."""
    with tempfile.TemporaryDirectory() as folder:
        script = str(Path(__file__).resolve())
        command = [sys.executable, "-m", "parallel_core.launch", "--plain", script]
        command += ["--rank", folder, "--milliseconds", str(milliseconds), "--rounds", str(rounds)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "NPROC": str(ranks), "LOG_DIR": f"{folder}/logs"}
        environment |= {"DEVICE_TARGET": "CPU", "PYTHONPATH": str(REPO)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=1200)
        if done.returncode:
            raise SystemExit(f"the ranks failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        of_ranks = [json.loads(Path(folder, f"rank_{rank}.json").read_text()) for rank in range(ranks)]
    rows = []
    for name, chunks in SCHEDULES:
        steps, bubbles = [], []
        for one in zip(*(found[f"{name} {chunks}"][1:] for found in of_ranks)):
            took = max(end for _, end, _ in one) - min(start for start, _, _ in one)
            steps.append(took)
            bubbles.append(statistics.mean(1 - busy / took for _, _, busy in one))
        unit = milliseconds / chunks
        ideal = simulate(make_schedule(ranks, chunks, 2 * ranks, name=name), uniform_durations(unit, 2 * unit))
        rows.append(
            {
                "ranks": ranks,
                "schedule": name,
                "chunks": chunks,
                "microbatches": 2 * ranks,
                "step_ms": statistics.median(steps) * 1e3,
                "simulated_ms": ideal.end,
                "bubble": statistics.median(bubbles),
                "simulated_bubble": ideal.bubble_share,
            }
        )
    return rows


def main() -> int:
    """Print the table and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="4,8", help="numbers of ranks")
    parser.add_argument("--milliseconds", type=float, default=40.0, help="of each of F, I and W of a stage")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        be_a_rank(options.milliseconds, options.rounds, options.rank)
        return 0
    rows = []
    print("ranks | schedule    | V |  M | step ms | simulated | ratio | bubble | simulated")
    for ranks in map(int, options.ranks.split(",")):
        for row in measure(ranks, options.milliseconds, options.rounds):
            rows.append(row)
            print(
                f"{ranks:5d} | {row['schedule']:<11} | {row['chunks']} | {row['microbatches']:2d} | "
                f"{row['step_ms']:7.0f} | {row['simulated_ms']:9.0f} | {row['step_ms'] / row['simulated_ms']:5.3f} | "
                f"{100 * row['bubble']:5.1f}% | {100 * row['simulated_bubble']:8.1f}%",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    off = [
        row
        for row in rows
        if abs(row["step_ms"] / row["simulated_ms"] - 1) > TOLERANCE
        or abs(row["bubble"] - row["simulated_bubble"]) > TOLERANCE
    ]
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(main())
