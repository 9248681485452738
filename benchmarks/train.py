"""Tokens per second of a training step, ours and Megatron-LM's in alternation, for sizes A and B and several layouts.

python benchmarks/train.py [--sizes A,B] [--layouts tp1,tp2,tp2sp,pp2,pp2vpp2,dp2,dp2dist] [--rounds 3] [--json FILE]
python benchmarks/train.py --sizes L,XL --layouts core1,cp2,cp2gather,cp2a2a,tp2sp [--steps 7]      # long sequences
python benchmarks/train.py --sizes M --layouts tp1,tp2sp,ep2                        # 8 experts, 2 for each token
                           [--peer-python PYTHON --peer-script train_mcore.py] [--kernels auto|local] [--bf16]
                           [--fp16] [--profile]
python benchmarks/train.py --sizes G                                                # GPT-2 124M, sequences of 1024
python benchmarks/train.py --sizes S --layouts tp1,tp2,dp4,pp8,zb4,cp4,tp16 --rounds 1          # many ranks on one host
python benchmarks/train.py --sizes SM --layouts tp1,ep2,ep4,ep8,tp2ep4sp --rounds 1             # the same with experts

Other layouts are written as their axes: tp4sp, dp8dist, zb4 (a pipeline that splits backward passes), tp2pp2dp4, ep4
(of dp4). They are ours alone, and `cost` below a size is their milliseconds over those of tp1, which has all cores: the
work of a step is the same, so 1.00 is no cost. `busy` is how many cores the ranks keep busy: what waits sleeps.

Layouts with cp, and core1 (one process on one core), are ours alone; below each size, `time` and `memory` are every
layout's share of core1's milliseconds and of its megabytes above the libraries'.

The peer is a script that trains megatron.core's GPTModel on gloo, run by a Python that has torch and megatron-core;
it takes --tp --pp --vpp --sp --dist-opt --bf16 --hidden --layers --heads --seq --vocab --mbs --num-microbatches
--iters --warmup --lr --quiet --out FILE, for size M --experts --topk --moe-ffn --ep --aux --act --norm --pos --untied,
and writes {"curve": [{"ms": milliseconds of a step}, ...]}. Without it only
ours is measured. Both train the same model, batch and number of processes; a step is forward, backward, reduction and
update. The ratio is the median of the rounds' ratios; columns with + are megabytes above what importing the libraries
alone takes. With pipeline stages, `ideal` is the bubble of the schedule simulated with every measured forward and
backward time of the step, and `late` how much longer than this simulation the pipeline takes.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from parallel_core.data.indexed_dataset import IndexedDatasetBuilder  # noqa: E402
from parallel_core.pipeline.schedule import Action, Op, make_schedule  # noqa: E402
from parallel_core.report.simulate import simulate  # noqa: E402

WARM_UP = 2
PARTS = ("matmul", "other kernels", "communication", "idle", "python and MindSpore")
OF_EXPERTS = ("routing", "experts")
"""Seconds that are also in `PARTS`: routing with the permutation of rows, and the products of experts."""


@dataclass(frozen=True)
class Size:
    """A model and its batch."""

    hidden: int
    seq: int
    mbs: int
    layers: int = 4
    heads: int = 8
    vocab: int = 8192
    microbatches: int = 4
    positions: str = "learned_absolute"
    norm: str = "LayerNorm"
    ours: tuple[str, ...] = ()
    """Flags of a model of another kind."""
    peer: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens of a step over all ranks."""
        return self.seq * self.mbs * self.microbatches


@dataclass(frozen=True)
class Layout:
    """Flags of both programs for one way to spread the model."""

    ours: tuple[str, ...] = ()
    peer: tuple[str, ...] = ()
    ranks: int = 2
    stages: int = 1
    chunks: int = 1
    replicas: int = 1
    threads: int = 0
    """Of each rank; 0: its share of the cores."""


_EXPERTS = tuple(
    """--swiglu --disable-bias-linear
    --untie-embeddings-and-output-weights --num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 512
    --moe-aux-loss-coeff 1e-2 --moe-token-dispatcher-type alltoall""".split()
)
_PEER_EXPERTS = tuple(
    "--experts 8 --topk 2 --moe-ffn 512 --act swiglu --norm RMSNorm --pos rope --untied --aux 1e-2".split()
)
SIZES = {
    "A": Size(256, 128, 4),
    "B": Size(512, 256, 2),
    "M": Size(256, 128, 4, positions="rope", norm="RMSNorm", ours=_EXPERTS, peer=_PEER_EXPERTS),
    "G": Size(768, 1024, 1, layers=12, heads=12, vocab=50304, microbatches=2),
    "S": Size(256, 256, 1, layers=16, heads=16, vocab=4096, microbatches=16),
    "SM": Size(256, 128, 1, microbatches=16, positions="rope", norm="RMSNorm", ours=_EXPERTS, peer=_PEER_EXPERTS),
    "L": Size(128, 4096, 1, layers=6, heads=4, vocab=2048, microbatches=2, positions="rope"),
    "XL": Size(128, 16384, 1, layers=6, heads=4, vocab=2048, microbatches=1, positions="rope"),
}
_TP, _PP = ("--tensor-model-parallel-size", "2"), ("--pipeline-model-parallel-size", "2")
_CP = ("--context-parallel-size", "2")
LAYOUTS = {
    "tp1": Layout(ranks=1),
    "tp2": Layout(_TP, ("--tp", "2")),
    "tp2sp": Layout((*_TP, "--sequence-parallel"), ("--tp", "2", "--sp")),
    "pp2": Layout(_PP, ("--pp", "2"), stages=2),
    "pp2vpp2": Layout(
        (*_PP, "--num-layers-per-virtual-pipeline-stage", "1"), ("--pp", "2", "--vpp", "2"), stages=2, chunks=2
    ),
    "dp2": Layout(replicas=2),
    "dp2dist": Layout(("--use-distributed-optimizer",), ("--dist-opt",), replicas=2),
    "ep2": Layout(("--expert-model-parallel-size", "2"), ("--ep", "2"), replicas=2),
    "core1": Layout(ranks=1, threads=1),
    "cp2": Layout(_CP),
    "cp2gather": Layout((*_CP, "--cp-comm-type", "all_gather")),
    "cp2a2a": Layout((*_CP, "--cp-comm-type", "a2a")),
}
_AXES = {
    "tp": ("--tensor-model-parallel-size",),
    "pp": ("--pipeline-model-parallel-size",),
    "zb": ("--pipeline-schedule", "zero-bubble", "--pipeline-model-parallel-size"),
    "cp": ("--context-parallel-size",),
    "ep": ("--expert-model-parallel-size",),
}
_SWITCHES = {"sp": "--sequence-parallel", "dist": "--use-distributed-optimizer"}


def layout_named(name: str) -> Layout:
    """Return a layout of the table, or one that is written as its axes, such as tp2pp4sp.

    Raises:
        SystemExit: the name is neither.
    """
    if name in LAYOUTS:
        return LAYOUTS[name]
    if not re.fullmatch(r"((tp|pp|zb|cp|ep|dp)\d+|sp|dist)+", name):
        raise SystemExit(f"--layouts {name}: write one of {', '.join(LAYOUTS)}, or axes such as tp2pp4sp")
    words: list[str] = [_SWITCHES[word] for word in re.findall(r"sp|dist", re.sub(r"[a-z]+\d+", " ", name))]
    sizes = {axis: int(size) for axis, size in re.findall(r"(tp|pp|zb|cp|ep|dp)(\d+)", name)}
    for axis, size in sizes.items():
        words += [*_AXES[axis], str(size)] if axis in _AXES else []
    replicas = max(sizes.get("dp", 1), sizes.get("ep", 1))
    stages = max(sizes.get("pp", 1), sizes.get("zb", 1))
    ranks = replicas * stages * sizes.get("tp", 1) * sizes.get("cp", 1)
    # A pipeline that splits backward passes is not simulated here.
    return Layout(tuple(words), ranks=ranks, stages=1 if "zb" in sizes else stages, replicas=replicas)


BY_DEFAULT = tuple(name for name in LAYOUTS if name not in ("core1", "ep2") and not name.startswith("cp"))
WITH_PEER = (*BY_DEFAULT, "ep2")


def write_data(folder: Path) -> Path:
    """Write a dataset of random tokens and return its prefix; the peer makes up its tokens as it goes."""
    generator = np.random.default_rng(0)
    with IndexedDatasetBuilder(f"{folder}/tokens.bin", dtype=np.uint16) as builder:
        for _ in range(100):
            builder.add_document(generator.integers(0, 2000, 2000), [2000])
        builder.finalize(f"{folder}/tokens.idx")
    return folder / "tokens"


def our_command(size: Size, layout: Layout, steps: int, folder: Path) -> list[str]:
    flags = {
        "--num-layers": size.layers,
        "--hidden-size": size.hidden,
        "--num-attention-heads": size.heads,
        "--seq-length": size.seq,
        "--max-position-embeddings": size.seq,
        "--micro-batch-size": size.mbs,
        "--global-batch-size": size.mbs * size.microbatches,
        "--tokenizer-type": "NullTokenizer",
        "--vocab-size": size.vocab - 1,
        "--make-vocab-size-divisible-by": 1,
        "--position-embedding-type": size.positions,
        "--normalization": size.norm,
        "--attention-dropout": 0,
        "--hidden-dropout": 0,
        "--train-iters": steps,
        "--lr": 1e-4,
        "--eval-iters": 0,
        "--data-path": write_data(folder),
        "--split": "1,0,0",
        "--data-cache-path": folder / "cache",
        "--log-interval": 1,
    }
    words = [word for key, value in flags.items() for word in (key, str(value))]
    words += size.ours
    script = str(REPO / "benchmarks" / "train_rank.py")
    start = [sys.executable] if layout.ranks == 1 else [sys.executable, "-m", "parallel_core.launch", "--plain"]
    return [*start, script, *words, *layout.ours]


def peer_command(python: str, script: str, size: Size, layout: Layout, steps: int, out: Path) -> list[str]:
    torchrun = [python, "-m", "torch.distributed.run", "--nproc-per-node", str(layout.ranks)]
    flags: dict[str, Any] = {
        "--hidden": size.hidden,
        "--layers": size.layers,
        "--heads": size.heads,
        "--seq": size.seq,
        "--vocab": size.vocab,
        "--mbs": size.mbs,
        "--num-microbatches": size.microbatches // layout.replicas,
        "--iters": steps,
        "--warmup": 2,
        "--lr": 1e-4,
        "--out": out,
    }
    words = [str(word) for pair in flags.items() for word in pair]
    return [*torchrun, "--master-port", str(free_port()), script, *words, "--quiet", *size.peer, *layout.peer]


def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class MemoryWatch:
    """Largest resident memory of a process and its descendants, read while they run."""

    def __init__(self, pid: int) -> None:
        self._pid, self._stop = pid, threading.Event()
        self.peaks: dict[int, int] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.2):
            for pid in self._family():
                try:
                    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                except OSError:
                    continue
                peak = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)
                self.peaks[pid] = max(peak, self.peaks.get(pid, 0))

    def _family(self) -> list[int]:
        family, queue = [], [self._pid]
        while queue:
            pid = queue.pop()
            family.append(pid)
            for task in Path(f"/proc/{pid}/task").glob("*/children"):
                try:
                    queue += [int(word) for word in task.read_text().split()]
                except OSError:
                    continue
        return family

    def megabytes(self, ranks: int) -> float:
        """Stop, and return the peak of the largest `ranks` processes' mean."""
        self._stop.set()
        self._thread.join()
        return sum(sorted(self.peaks.values(), reverse=True)[:ranks]) / ranks / 1024


def run(command: list[str], layout: Layout, folder: str, **environment: str) -> float:
    """Run a job to its end and return the peak memory of a rank in MB."""
    ranks = layout.ranks
    threads = str(layout.threads or max(1, (os.cpu_count() or 1) // ranks))
    variables = {**os.environ, "OMP_NUM_THREADS": threads, **environment}
    log = Path(folder) / "log.txt"
    with log.open("w") as out:
        process = subprocess.Popen(command, env=variables, stdout=out, stderr=subprocess.STDOUT, cwd=folder)
        watch = MemoryWatch(process.pid)
        status = process.wait(timeout=3600)
    peak = watch.megabytes(ranks)
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")
    return peak


def run_ours(size: Size, layout: Layout, steps: int, kernels: str, profile: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        environment = {"NPROC": str(layout.ranks), "LOG_DIR": f"{folder}/logs", "DEVICE_TARGET": "CPU"}
        environment |= {"PYTHONPATH": str(REPO), "BENCH_OUT": folder, "PARALLEL_CORE_KERNELS": kernels}
        if profile:
            environment["BENCH_PROFILE"] = "1"
        peak = run(our_command(size, layout, steps, Path(folder)), layout, folder, **environment)
        ranks = [json.loads(Path(folder, f"ours_{r}.json").read_text()) for r in range(layout.ranks)]
    rows = [rank["steps"][WARM_UP:] for rank in ranks]
    # The slowest rank's clock is the step's.
    milliseconds = [max(row[i]["step"] for row in rows) * 1e3 for i in range(len(rows[0]))]
    total = sum(row["step"] for rank in rows for row in rank)
    shares = {part: sum(row[part] for rank in rows for row in rank) / total for part in (*PARTS, *OF_EXPERTS)}
    first = ranks[0]
    busy = layout.ranks * sum(row["cpu"] for rank in rows for row in rank) / total
    result = {"ms": milliseconds, "peak_mb": peak, "shares": shares, "kernels": first["kernels"], "top": first["top"]}
    result["busy"] = busy
    if layout.stages > 1:
        result["pipeline"] = [pipeline_against_schedule(list(of_step), size, layout) for of_step in zip(*rows)]
    return result


def pipeline_against_schedule(ranks: list[dict[str, Any]], size: Size, layout: Layout) -> tuple[float, float]:
    """Return the bubble of the schedule with one step's measured times, and the measured time over the schedule's."""
    times = [{Action(Op[op], microbatch, chunk): s for op, microbatch, chunk, s in rank["actions"]} for rank in ranks]
    schedule = make_schedule(layout.stages, layout.chunks, size.microbatches // layout.replicas)
    ideal = simulate(schedule, lambda rank, action: times[rank][action])
    measured = max(rank["pipeline end"] for rank in ranks) - min(rank["pipeline start"] for rank in ranks)
    return ideal.bubble_share, measured / ideal.end


@functools.cache
def imported_mb(python: str, modules: str) -> float:
    """Return the resident megabytes of a Python that has imported the modules."""
    code = f"import {modules}; print([w for w in open('/proc/self/status') if w.startswith('VmRSS')][0].split()[1])"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) / 1024


def run_peer(python: str, script: str, size: Size, layout: Layout, steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        threads = str(max(1, (os.cpu_count() or 1) // layout.ranks))
        # The job runs in `folder`: relative paths are the caller's. Links stay: they make Python an environment's.
        paths = os.path.abspath(python), os.path.abspath(script)
        command = peer_command(*paths, size, layout, steps, out)
        peak = run(command, layout, folder, ORACLE_THREADS=threads)
        return {"ms": [row["ms"] for row in json.loads(out.read_text())["curve"]][WARM_UP:], "peak_mb": peak}


def measure(name: str, size_name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run ours and the peer in alternation; return medians over all measured steps."""
    size, layout = SIZES[size_name], layout_named(name)
    if arguments.bf16:
        layout = replace(layout, ours=(*layout.ours, "--bf16"), peer=(*layout.peer, "--bf16"))
    if arguments.fp16:  # with a loss scale that skips no step
        layout = replace(layout, ours=(*layout.ours, "--fp16", "--initial-loss-scale", "1024"))
    ours: list[dict[str, Any]] = []
    peer: list[dict[str, Any]] = []
    for _ in range(arguments.rounds):
        ours.append(run_ours(size, layout, arguments.steps, arguments.kernels, arguments.profile))
        if arguments.peer_python and name in WITH_PEER:
            peer.append(run_peer(arguments.peer_python, arguments.peer_script, size, layout, arguments.steps))
    milliseconds = statistics.median(ms for one in ours for ms in one["ms"])
    result: dict[str, Any] = {
        "size": size_name,
        "layout": name,
        "ms": milliseconds,
        "tokens_per_s": size.tokens / milliseconds * 1e3,
        "peak_mb": max(one["peak_mb"] for one in ours),
        "shares": {part: statistics.mean(one["shares"][part] for one in ours) for part in (*PARTS, *OF_EXPERTS)},
        "busy": statistics.mean(one["busy"] for one in ours),
        "ranks": layout.ranks,
        "kernels": ours[0]["kernels"],
        "top": ours[0]["top"],
    }
    result["over_import_mb"] = result["peak_mb"] - imported_mb(sys.executable, "mindspore")
    if layout.stages > 1:
        pipeline = [step for one in ours for step in one["pipeline"]]
        result["ideal_bubble"] = statistics.median(bubble for bubble, _ in pipeline)
        result["over_ideal"] = statistics.median(late for _, late in pipeline)
    if peer:
        peer_ms = statistics.median(ms for one in peer for ms in one["ms"])
        result |= {"peer_ms": peer_ms, "peer_tokens_per_s": size.tokens / peer_ms * 1e3}
        pairs = zip(ours, peer)
        result["ratios"] = [statistics.median(b["ms"]) / statistics.median(a["ms"]) for a, b in pairs]
        result |= {"ratio": statistics.median(result["ratios"]), "peer_peak_mb": max(one["peak_mb"] for one in peer)}
        base = imported_mb(arguments.peer_python, "torch, megatron.core")
        result["peer_over_import_mb"] = result["peer_peak_mb"] - base
    return result


HEADING = (
    f"{'size':4} {'layout':9} {'ours t/s':>9} {'peer t/s':>9} {'ratio':>6} {'matmul':>7} {'kernel':>7} {'comm':>6} "
    f"{'idle':>6} {'python':>7} {'ideal':>6} {'late':>6} {'MB':>5} {'peer':>5} {'+MB':>5} {'+peer':>5}"
)


def line(row: dict[str, Any]) -> str:
    """Return a table row; idle is the measured bubble, ideal the schedule's."""
    shares = [f"{100 * row['shares'][part]:.1f}%" for part in PARTS]
    ideal = f"{100 * row['ideal_bubble']:.1f}%" if "ideal_bubble" in row else ""
    late = f"{100 * (row['over_ideal'] - 1):.1f}%" if "over_ideal" in row else ""
    columns = ("peak_mb", "peer_peak_mb", "over_import_mb", "peer_over_import_mb")
    memory = [row.get(key, float("nan")) for key in columns]
    peer = f"{row['peer_tokens_per_s']:9.0f} {row['ratio']:6.2f}" if "ratio" in row else f"{'':9} {'':6}"
    return (
        f"{row['size']:4} {row['layout']:9} {row['tokens_per_s']:9.0f} {peer} {shares[0]:>7} {shares[1]:>7} "
        f"{shares[2]:>6} {shares[3]:>6} {shares[4]:>7} {ideal:>6} {late:>6} " + " ".join(f"{mb:5.0f}" for mb in memory)
    )


def against_one_core(rows: list[dict[str, Any]]) -> list[str]:
    """Return, for each layout of a size, its shares of one core's milliseconds and memory; nothing without core1."""
    one = next((row for row in rows if row["layout"] == "core1"), None)
    if one is None:
        return []
    return [
        f"     {row['layout']:10} time {row['ms'] / one['ms']:.2f}  memory "
        f"{row['over_import_mb'] / one['over_import_mb']:.2f}"
        for row in rows if row is not one
    ]  # fmt: skip


def against_tp1(rows: list[dict[str, Any]]) -> list[str]:
    """Return, for each layout of a size, what it costs over one rank with all cores; nothing without both."""
    one = next((row for row in rows if row["layout"] == "tp1"), None)
    if one is None or len(rows) == 1:
        return []
    return [
        f"     {row['layout']:10} {row['ranks']:2} ranks  cost {row['ms'] / one['ms']:.2f}  busy {row['busy']:.2f}"
        for row in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="A,B")
    parser.add_argument("--layouts", default=",".join(BY_DEFAULT))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help=f"of each run; the first {WARM_UP} do not count")
    parser.add_argument("--kernels", default="auto", choices=["auto", "local"])
    parser.add_argument("--bf16", action="store_true", help="both train with --bf16")
    parser.add_argument("--fp16", action="store_true", help="ours trains with --fp16, the peer in float32")
    parser.add_argument("--profile", action="store_true", help="name the ten most expensive functions (slows the run)")
    parser.add_argument("--peer-python", default=os.environ.get("PEER_PYTHON"))
    parser.add_argument("--peer-script", default=os.environ.get("PEER_SCRIPT"))
    parser.add_argument("--json")
    arguments = parser.parse_args()
    if bool(arguments.peer_python) != bool(arguments.peer_script):
        parser.error("--peer-python and --peer-script (or PEER_PYTHON and PEER_SCRIPT) go together")
    if arguments.steps < WARM_UP + 5:
        parser.error(f"--steps must be at least {WARM_UP + 5}: medians are over five steps or more")
    print(HEADING, flush=True)
    rows: list[dict[str, Any]] = []
    for size in arguments.sizes.split(","):
        for layout in arguments.layouts.split(","):
            row = measure(layout, size, arguments)
            rows.append(row)
            print(line(row), flush=True)
            if row["shares"]["experts"]:
                routing, experts = (100 * row["shares"][part] for part in OF_EXPERTS)
                print(f"     routing and permutation {routing:.1f}% of a step, experts' products {experts:.1f}%")
            for entry in row["top"]:
                print(f"     {entry['ms per step']:9.2f} ms {entry['calls per step']:8.1f} x  {entry['operator']}")
        of_size = [row for row in rows if row["size"] == size]
        print("\n".join((*against_one_core(of_size), *against_tp1(of_size))), flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
