"""Collectives between the ranks of this host: shared memory, MCCL, and gloo when a Python with torch is given.

python benchmarks/collectives.py [--ranks 2] [--peer-python /path/to/python-with-torch] [--json FILE]

The backends take turns, so that a busy machine slows them alike; the figure of a size is the median of all rounds.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
SIZES = [4, 1 << 10, 1 << 14, 1 << 17, 1 << 20, 1 << 22, 1 << 24, 1 << 26]
OPERATIONS = ["all_reduce", "reduce_scatter", "all_gather", "broadcast", "all_to_all", "ping_pong"]


def repetitions(size: int) -> int:
    return 200 if size <= 1 << 14 else 40 if size <= 1 << 20 else 8 if size <= 1 << 24 else 3


def measure(run: Callable[[], object], barrier: Callable[[], object], size: int) -> float:
    """Return the median milliseconds of one call, after two that do not count."""
    run(), run(), barrier()
    times = []
    for _ in range(repetitions(size)):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def ours(backend: str, path: str) -> None:
    """Be one rank: measure everything and let rank 0 write the result."""
    sys.path.insert(0, str(REPO))
    import mindspore as ms
    import numpy as np
    from mindspore import Tensor

    from parallel_core.comm.factory import group_factory
    from parallel_core.comm.mindspore_comm import start_communication

    ms.set_context(mode=ms.PYNATIVE_MODE, device_target="CPU", pynative_synchronize=True)
    rank, world = start_communication()
    group = group_factory(backend, 120.0, rank, world)("world", list(range(world)))
    result: dict[str, dict[int, float]] = {name: {} for name in OPERATIONS}
    for size in SIZES:
        n = max(1, size // 4)
        x = Tensor(np.ones(n, np.float32))
        part = Tensor(np.ones(max(1, n // world), np.float32))

        def ping_pong(x: Tensor = x) -> None:
            if rank == 0:
                group.send(x, 1)
                group.receive(x.shape, x.dtype, 1).wait()
            elif rank == 1:
                group.receive(x.shape, x.dtype, 0).wait()
                group.send(x, 0)

        calls: dict[str, Callable[[], object]] = {
            "all_reduce": lambda x=x: group.all_reduce_(x),
            "all_gather": lambda part=part: group.all_gather(part),
            "broadcast": lambda x=x: group.broadcast_(x),
            "ping_pong": ping_pong,
        }
        if n % world == 0:
            calls["reduce_scatter"] = lambda x=x: group.reduce_scatter(x)
            calls["all_to_all"] = lambda x=x: group.all_to_all(x, 0, 0)
        for name in OPERATIONS:
            if name in calls:
                result[name][size] = measure(calls[name], group.barrier, size)
    group.barrier()
    if rank == 0:
        Path(path).write_text(json.dumps(result), encoding="utf-8")


def gloo(path: str) -> None:
    """The same with torch.distributed; run by the peer's Python under torchrun."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    result: dict[str, dict[int, float]] = {name: {} for name in OPERATIONS}
    for size in SIZES:
        n = max(1, size // 4)
        x, part = torch.ones(n), torch.ones(max(1, n // world))
        whole = [torch.empty_like(part) for _ in range(world)]

        def ping_pong(x: Any = x) -> None:
            if rank == 0:
                dist.send(x, 1)
                dist.recv(x, 1)
            elif rank == 1:
                dist.recv(x, 0)
                dist.send(x, 0)

        calls: dict[str, Callable[[], object]] = {
            "all_reduce": lambda x=x: dist.all_reduce(x),
            "all_gather": lambda part=part, whole=whole: dist.all_gather(whole, part),
            "broadcast": lambda x=x: dist.broadcast(x, 0),
            "ping_pong": ping_pong,
        }
        if n % world == 0:
            calls["reduce_scatter"] = lambda x=x, part=part: dist.reduce_scatter_tensor(part, x)
            calls["all_to_all"] = lambda x=x: dist.all_to_all_single(torch.empty_like(x), x)
        for name in OPERATIONS:
            if name in calls:
                try:
                    result[name][size] = measure(calls[name], dist.barrier, size)
                except RuntimeError as error:  # an operation that this gloo does not have
                    print(f"gloo has no {name}: {error}", file=sys.stderr)
    if rank == 0:
        Path(path).write_text(json.dumps(result), encoding="utf-8")
    dist.destroy_process_group()


def launch(backend: str, ranks: int, peer_python: str | None) -> dict[str, dict[str, float]]:
    """Run one backend on `ranks` processes and return its milliseconds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        script = str(Path(__file__).resolve())
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if backend == "gloo":
            torchrun = [str(peer_python), "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
            command = [*torchrun, "--master-port", str(free_port()), script, "--rank", "gloo", str(path)]
        else:
            command = [sys.executable, "-m", "parallel_core.launch", "--plain", script, "--rank", backend, str(path)]
            environment |= {"NPROC": str(ranks), "LOG_DIR": folder, "DEVICE_TARGET": "CPU", "PYTHONPATH": str(REPO)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=1200)
        if done.returncode or not path.exists():
            raise SystemExit(f"{backend} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        return json.loads(path.read_text(encoding="utf-8"))


def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-python", default=os.environ.get("PEER_PYTHON"), help="a Python that has torch")
    parser.add_argument("--backends", default="shm,mccl,gloo")
    parser.add_argument("--json", help="write all figures here")
    parser.add_argument("--rank", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        gloo(arguments.rank[1]) if arguments.rank[0] == "gloo" else ours(*arguments.rank)
        return
    backends = [b for b in arguments.backends.split(",") if b != "gloo" or arguments.peer_python]
    rounds: dict[str, list[Any]] = {backend: [] for backend in backends}
    for _ in range(arguments.rounds):
        for backend in backends:
            rounds[backend].append(launch(backend, arguments.ranks, arguments.peer_python))
    table: dict[str, dict[str, dict[str, float]]] = {}
    print(f"milliseconds, {arguments.ranks} ranks, medians of {arguments.rounds} rounds; gloo/shm > 1: shm is faster")
    print(f"{'operation':15} {'bytes':>10} " + " ".join(f"{b:>10}" for b in backends) + "   gloo/shm")
    for operation in OPERATIONS:
        for size in SIZES:
            row = {}
            for backend in backends:
                values = [r[operation][str(size)] for r in rounds[backend] if str(size) in r[operation]]
                if values:
                    row[backend] = statistics.median(values)
            table.setdefault(operation, {})[str(size)] = row
            ratio = f"{row['gloo'] / row['shm']:9.1f}x" if "gloo" in row and "shm" in row else ""
            cells = " ".join(f"{row[b]:10.4f}" if b in row else f"{'':>10}" for b in backends)
            print(f"{operation:15} {size:10d} {cells} {ratio}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(table, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
