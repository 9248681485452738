"""What it gains to compute a microbatch in parts, one beside the tensor parallel sum of another.

python benchmarks/interleave.py [--ranks 2] [--links 0,20,40] [--rounds 10] [--hidden 512] [--json FILE]

Forward and backward passes of one microbatch, on real ranks: whole; whole with sums in the background (what backward
gains by itself); in two parts. They take turns in each round, and the figures are medians over rounds of a round's own
ratio. Shared memory is as fast as the cores that would compute meanwhile, so a link is put in its place: `--links` are
milliseconds that a megabyte takes beside that, asleep, in which a core is free; 0 is shared memory alone.
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
from types import SimpleNamespace
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

RUNS = {"whole": (False, 1), "whole, sums in the background": (True, 1), "two parts": (True, 2)}


def be_a_rank(options: argparse.Namespace, folder: str) -> None:
    """Time every run in turn and leave the seconds of each."""
    import mindspore as ms
    import numpy as np
    from mindspore import Tensor

    from parallel_core import ops
    from parallel_core.comm.background import in_background
    from parallel_core.comm.factory import group_factory
    from parallel_core.comm.mindspore_comm import start_communication
    from parallel_core.config.schema import TransformerConfig
    from parallel_core.pipeline.stage import PipelineStage
    from parallel_core.training.forward_step import masked_loss
    from parallel_core.transformer import GPTModel, ModelStage

    ms.set_context(mode=ms.PYNATIVE_MODE, device_target="CPU", pynative_synchronize=True)
    rank, world = start_communication()
    ops.use_kernels("auto", 1)
    make = group_factory("auto", 120.0, rank, world)
    S, B = options.sequence, options.batch
    config = TransformerConfig(
        num_layers=options.layers, hidden_size=options.hidden, num_attention_heads=8, vocab_size=1024, seq_length=S,
        hidden_dropout_rate=0.0, attention_dropout_rate=0.0,
    )  # fmt: skip
    tokens = Tensor(np.random.default_rng(0).integers(0, 1024, (B, S)).astype(np.int32))
    mask = Tensor(np.ones((B, S), np.float32))
    everyone, link = make("world", list(range(world))), [0.0]

    def stage_of(background: bool, parts: int, name: str) -> PipelineStage:
        group: Any = make(f"tp {name}", list(range(world)))
        reduce_ = group.all_reduce_

        def slow(x: Tensor, op: str = "sum") -> Tensor:
            result = reduce_(x, op)
            time.sleep(link[0] * x.size * 4 / 1e6)
            return result

        group.all_reduce_ = slow
        run: Any = SimpleNamespace(parallel_config=SimpleNamespace(micro_batch_interleave_num=parts))
        model = GPTModel(ModelStage(config, in_background(group) if background else group, run=run))

        def step(data: Any, chunk: Any) -> Any:
            return chunk(tokens, None, None, tokens), lambda losses, **_: masked_loss(mask, losses)

        return PipelineStage(model, step, is_first=True, is_last=True)

    stages = {name: stage_of(*how, name) for name, how in RUNS.items()}
    found: dict[str, dict[str, list[float]]] = {}
    for number in options.links.split(","):
        link[0] = float(number) / 1e3
        rows: dict[str, list[float]] = {name: [] for name in RUNS}
        for _ in range(options.rounds + 1):
            for name, stage in stages.items():
                everyone.barrier()
                start = time.perf_counter()
                stage.start_iteration(iter(()), 1)
                stage.forward(0, None)
                stage.backward(0, None, True)
                everyone.barrier()
                rows[name].append(time.perf_counter() - start)
        found[number] = {name: seconds[1:] for name, seconds in rows.items()}
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found), encoding="utf-8")
    everyone.barrier()


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--links", default="0,10,20,40", help="milliseconds for a megabyte")
    parser.add_argument("--rounds", type=int, default=10)
    for name, value in (("hidden", 512), ("layers", 4), ("sequence", 256), ("batch", 4)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        be_a_rank(options, options.rank)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        words = [*sys.argv[1:], "--rank", folder]
        command = [sys.executable, "-m", "parallel_core.launch", "--plain", str(Path(__file__).resolve()), *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "NPROC": str(options.ranks), "LOG_DIR": f"{folder}/logs"}
        environment |= {"DEVICE_TARGET": "CPU", "PYTHONPATH": str(REPO)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=1200)
        if done.returncode:
            raise SystemExit(f"the ranks failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        found = json.loads(Path(folder, "found.json").read_text())
    print("link ms/MB | run                           | median ms | of whole")
    for link, rows in found.items():
        for name, seconds in rows.items():
            ratio = statistics.median(one / whole for one, whole in zip(seconds, rows["whole"]))
            print(f"{link:>10} | {name:<29} | {statistics.median(seconds) * 1e3:9.1f} | {ratio:.3f}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
