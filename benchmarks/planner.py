"""The planner's prices beside what runs on this machine take: seconds of an iteration and memory, layout by layout.

python benchmarks/planner.py [--device FILE.yaml] [--sizes A,B,X] [--layouts ...] [--rounds 3] [--json FILE]

Without --device the machine is calibrated first. Layouts are words as for `python -m parallel_core.report.memory`; all
of a size are trained on two ranks, one after the other, in a job for each round. The seconds of an iteration are the
slower rank's, the fewest of all rounds, because what others do on the machine only adds; memory is that of the fullest
rank: the real buffers, and the peak of activations. The exit status is 1 if predicted and measured seconds correlate
less than 0.9 over all layouts, a size's fastest layout is not among its three that are predicted to be fastest (those
within 3 % of it count as the fastest too), or a predicted memory is 10 % off.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

import numpy as np  # noqa: E402

from parallel_core.config.load import load_config  # noqa: E402
from parallel_core.planner.calibrate import calibrate  # noqa: E402
from parallel_core.planner.device import Device, device_text, load_device  # noqa: E402
from parallel_core.planner.search import Found, Searcher  # noqa: E402
from parallel_core.report.memory import layout_flags, measured_memory  # noqa: E402
from parallel_core.report.short_run import ShortRun, run_on_ranks, write_report  # noqa: E402

OUTPUT = "BENCH_PLANNER_OUTPUT"
RANKS, WARM_UP, STEPS = 2, 1, 3
NEAR = 0.03
_COMMON = """
    --num-attention-heads 8 --tokenizer-type NullTokenizer --vocab-size 8191 --make-vocab-size-divisible-by 1
    --attention-dropout 0 --hidden-dropout 0 --train-iters 3 --lr 1e-4
"""
_DENSE = ("dp2", "dp2+distopt", "dp2+full", "tp2", "tp2+sp", "pp2", "pp2+vpp2", "pp2+zb", "cp2", "cp2+a2a")
_EXPERTS = ("dp2", "dp2+ep2", "tp2+sp", "tp2+sp+ep2+etp1", "pp2", "pp2+zb", "cp2+ep2")
SIZES: dict[str, tuple[str, tuple[str, ...]]] = {
    "A": (
        "--num-layers 4 --hidden-size 256 --seq-length 128 --max-position-embeddings 128 --micro-batch-size 4 "
        "--global-batch-size 16",
        _DENSE,
    ),
    "B": (
        "--num-layers 4 --hidden-size 512 --seq-length 512 --max-position-embeddings 512 --micro-batch-size 1 "
        "--global-batch-size 4",
        _DENSE,
    ),
    "X": (
        "--num-layers 4 --hidden-size 256 --seq-length 256 --max-position-embeddings 256 --micro-batch-size 2 "
        "--global-batch-size 8 --num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 512 --disable-bias-linear "
        "--swiglu --normalization RMSNorm --moe-token-dispatcher-type alltoall",
        _EXPERTS,
    ),
}
"""Model and batch, and the layouts that are run."""


def arguments_of(size: str, layout: str) -> list[str]:
    return [*_COMMON.split(), *SIZES[size][0].split(), *layout_flags(layout)[0]]


def be_a_rank(cases: list[list[str]]) -> None:
    """Run every (size, layout) and leave its seconds and memory."""
    from parallel_core.training.runtime import select_kernels, start_runtime

    rank, world = start_runtime()
    found: dict[str, Any] = {}
    for size, layout in cases:
        config = load_config(arguments_of(size, layout), world_size=world).config
        select_kernels(config)
        run = ShortRun(config, rank, world)
        times = []
        for _ in range(WARM_UP + STEPS):
            run.context.world.barrier()
            start = time.perf_counter()
            run.iterate()
            times.append(time.perf_counter() - start)
        found[f"{size} {layout}"] = {"seconds": times[WARM_UP:], "memory": asdict(measured_memory(run))}
        run.close()
    write_report(OUTPUT, rank, found)


def measure(cases: list[list[str]]) -> list[dict[str, Any]]:
    """Return what each rank of one job found."""
    variables = {"DEVICE_TARGET": "CPU", "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // RANKS))}
    return run_on_ranks(__file__, ["--rank", json.dumps(cases)], RANKS, OUTPUT, **variables)


def compare(device: Device, size: str, layouts: list[str], rounds: int) -> list[dict[str, Any]]:
    """Return one row for each layout of a size; every round is a job of its own."""
    jobs = [measure([[size, layout] for layout in layouts]) for _ in range(rounds)]
    rows = []
    for layout in layouts:
        name = f"{size} {layout}"
        predicted = predict(device, size, layout)
        steps = [max(pair) for ranks in jobs for pair in zip(*(one[name]["seconds"] for one in ranks))]
        rows.append(
            {
                "size": size,
                "layout": layout,
                "seconds": min(steps),
                "predicted_seconds": predicted.price.seconds,
                "bytes": min(max(sum(one[name]["memory"].values()) for one in ranks) for ranks in jobs),
                "predicted_bytes": predicted.memory.total,
                "parts": predicted.price.parts,
            }
        )
    return rows


def predict(device: Device, size: str, layout: str) -> Found:
    """Return the planner's price of a layout."""
    searcher = Searcher(RANKS, device, float("inf"))
    return searcher.found(load_config(arguments_of(size, layout), world_size=RANKS).config, {})


def line(row: dict[str, Any]) -> str:
    """Return a table row."""
    seconds, size = row["predicted_seconds"] / row["seconds"], row["predicted_bytes"] / row["bytes"]
    return (
        f"{row['size']:4} | {row['layout']:15} | {row['seconds'] * 1e3:11.1f} | {row['predicted_seconds'] * 1e3:9.1f} "
        f"| {seconds:5.2f} | {row['bytes'] / 2**20:12.1f} | {row['predicted_bytes'] / 2**20:9.1f} | {size:5.2f}"
    )


def judge(rows: list[dict[str, Any]]) -> tuple[list[str], bool]:
    """Return the sentences about the table, and whether all of them are good."""
    pairs = np.array([[row["seconds"], row["predicted_seconds"]] for row in rows])
    correlation = float(np.corrcoef(pairs.T)[0, 1])
    lines, good = [f"correlation of seconds over {len(rows)} layouts: {correlation:.3f}"], correlation > 0.9
    for size in dict.fromkeys(row["size"] for row in rows):
        own = [row for row in rows if row["size"] == size]
        if len(own) > 3:
            fastest = min(row["seconds"] for row in own)
            best = [row["layout"] for row in own if row["seconds"] <= (1 + NEAR) * fastest]
            three = [row["layout"] for row in sorted(own, key=lambda row: row["predicted_seconds"])[:3]]
            found = bool(set(best) & set(three))
            lines.append(f"{size}: fastest {' or '.join(best)}; predicted {', '.join(three)}")
            good = good and found
            inner = np.array([[row["seconds"], row["predicted_seconds"]] for row in own])
            lines[-1] += f"; correlation within {float(np.corrcoef(inner.T)[0, 1]):.3f}"
    worst = max(rows, key=lambda row: abs(row["predicted_bytes"] / row["bytes"] - 1))
    off = worst["predicted_bytes"] / worst["bytes"] - 1
    lines.append(f"memory: at most {100 * abs(off):.1f}% off ({worst['size']} {worst['layout']})")
    return lines, good and abs(off) < 0.1


def main() -> int:
    """Print the table and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="a device file of this machine; default: calibrate it now")
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--layouts", help="default: each size's own")
    parser.add_argument("--rounds", type=int, default=3, help="jobs of each size")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        be_a_rank(json.loads(options.rank))
        return 0
    device = load_device(options.device) if options.device else calibrate(RANKS, "this machine")
    print(device_text(device), flush=True)
    print("size | layout          | measured ms | predicted | ratio | measured MiB | predicted | ratio")
    rows: list[dict[str, Any]] = []
    for size in options.sizes.split(","):
        layouts = options.layouts.split(",") if options.layouts else list(SIZES[size][1])
        of_size = compare(device, size, layouts, options.rounds)
        rows += of_size
        print("\n".join(map(line, of_size)), flush=True)
    lines, good = judge(rows)
    print("\n".join(lines))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    from parallel_core.launch.entry import run_as_rank

    if OUTPUT in os.environ:
        run_as_rank(main)
    sys.exit(main())
