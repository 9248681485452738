"""Two ranks of this machine reduce a tensor together; a script for the launcher, and the check that runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from parallel_core.bundled import shared_folder
from parallel_core.doctor.finding import BAD, GOOD, NOTE, Finding

_OUTPUT = "PARALLEL_CORE_DOCTOR_OUTPUT"
_LIMIT_S = 180.0


def two_ranks() -> Iterator[Finding]:
    """A job of two ranks starts, reduces a tensor, and ends."""
    root = str(Path(__file__).resolve().parents[2])
    with tempfile.TemporaryDirectory(prefix="parallel_core_doctor_") as folder:
        environment = {name: value for name, value in os.environ.items()
                       if name not in ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")}  # fmt: skip
        environment |= {_OUTPUT: folder, "NPROC": "2", "LOG_DIR": f"{folder}/logs"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "parallel_core.launch", "--plain", str(Path(__file__).resolve())]
        begun = time.monotonic()
        try:
            done = subprocess.run(command, cwd=shared_folder(), env=environment, stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT, text=True, timeout=_LIMIT_S, check=False)  # fmt: skip
        except subprocess.TimeoutExpired:
            yield Finding("two ranks", BAD, f"did not end within {_LIMIT_S:g} s",
                          "look for a firewall between this host's own addresses, and for a busy machine")  # fmt: skip
            return
        seconds = time.monotonic() - begun
        result = Path(folder) / "rank_0.json"
        if done.returncode or not result.is_file():
            last = "\n".join(done.stdout.splitlines()[-8:])
            yield Finding("two ranks", BAD, f"the job failed after {seconds:.0f} s:\n{last}", "mend what it says first")
            return
        said = json.loads(result.read_text(encoding="utf-8"))
    found = f"a job of two in {seconds:.0f} s; over {said['backend']}: 4 B in {said['small_us']:.0f} us, 1 MB in " \
            f"{said['large_us'] / 1e3:.2f} ms"  # fmt: skip
    if said["backend"] == "MCCL":
        yield Finding("two ranks", NOTE, found, "shared memory is several times faster; see the compiler and shared "
                      "memory above")  # fmt: skip
    else:
        yield Finding("two ranks", GOOD, found)


def main() -> None:
    """Reduce tensors as a rank, and write how long it took."""
    import numpy as np
    from mindspore import Tensor

    from parallel_core.comm.factory import carrier_of
    from parallel_core.config.schema import ModelParallelConfig
    from parallel_core.context import ParallelContext
    from parallel_core.training.runtime import start_runtime

    rank, world_size = start_runtime()
    context = ParallelContext.create(ModelParallelConfig(tensor_model_parallel_size=world_size), rank, world_size)
    times = {}
    for name, elements in (("small_us", 1), ("large_us", 1 << 18)):
        x = Tensor(np.full(elements, rank + 1, np.float32))
        total = context.world.all_reduce(x).asnumpy()
        if not (total == 3).all():
            raise SystemExit(f"1 + 2 is {total[0]} on rank {rank}: the backend is broken")
        begun = time.perf_counter()
        for _ in range(20):
            context.world.all_reduce(x)
        times[name] = (time.perf_counter() - begun) / 20 * 1e6
    said = {"backend": carrier_of(context.world), **times}
    Path(os.environ[_OUTPUT], f"rank_{rank}.json").write_text(json.dumps(said), encoding="utf-8")
    context.destroy()


if __name__ == "__main__":
    from parallel_core.launch.entry import run_as_rank

    run_as_rank(main)
