"""MindSpore's threads: as many as asked, and asleep when there is nothing to do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import pytest

SCRIPT = """
import json, sys, time
from pathlib import Path
import mindspore as ms, numpy as np
from mindspore import Tensor
from parallel_core.ops.thread_pool import limit_threads

ms.set_context(mode=ms.PYNATIVE_MODE, device_target="CPU", pynative_synchronize=True)
limited = [limit_threads(int(n)) for n in sys.argv[1:]]

def switches():
    found = {}
    for task in Path("/proc/self/task").iterdir():
        text = (task / "status").read_text()
        name = text.split()[1]
        if name.startswith(("ActorThread", "KernelThread")):
            found[name] = sum(int(line.split()[1]) for line in text.splitlines() if "ctxt_switches" in line)
    return found

x = Tensor(np.ones((512, 512), np.float32))
exact = float((x * 3.0 - x).sum().asnumpy()) == 2.0 * x.size
for _ in range(20):  # more than MindSpore takes to choose how to split an operator
    x = x * 1.0
    x.T.contiguous().asnumpy()
before = switches()
time.sleep(0.5)
after = switches()
print(json.dumps({"limited": limited, "exact": exact, "idle": {k: after[k] - before[k] for k in after}}))
"""


def run(*arguments: str) -> dict:
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], cwd=root, capture_output=True, text=True, timeout=300, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not ms.__version__.startswith("2.10."), reason="the pool of this MindSpore is left alone")
@pytest.mark.parametrize("number", [1, 2])
def test_the_pool_has_the_threads_asked_for_and_they_sleep(number):
    got = run(str(number), "7")
    assert got["limited"] == [True, False]  # the pool is made once
    assert got["exact"]
    assert len(got["idle"]) == number  # the calling thread computes too, and one thread is MindSpore's actors'
    assert max(got["idle"].values()) < 100, "a sleeping thread is not scheduled; a spinning one is, all the time"
