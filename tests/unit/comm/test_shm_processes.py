"""Shared memory between plain processes: what happens when one of them dies, and what is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from parallel_core.comm.shm import library, new_segment
from parallel_core.ops.build import BuildError

REPO = Path(__file__).resolve().parents[3]

RANK = """
    import os, signal, sys
    import mindspore as ms
    import numpy as np
    from mindspore import Tensor
    from parallel_core.comm.shm import ShmGroup, open_segment
    from parallel_core.errors import CommError

    ms.set_context(mode=ms.PYNATIVE_MODE, device_target="CPU", pynative_synchronize=True)
    rank, size, creator, descriptor = map(int, sys.argv[1:5])
    print(os.getpid(), flush=True)
    pids = [int(word) for word in sys.stdin.readline().split()]
    g = ShmGroup("g", range(size), rank, descriptor=open_segment(creator, descriptor), pids=pids, timeout_s=60)
    g.barrier()
    x = Tensor(np.ones(1000, np.float32))
"""


def run_ranks(body: str, size: int = 2) -> list[subprocess.CompletedProcess[str]]:
    """Run `body` on `size` processes after they have formed the group `g`; return what became of each."""
    try:
        library()
    except BuildError as error:
        pytest.skip(str(error))
    script = textwrap.dedent(RANK) + textwrap.dedent(body)
    descriptor = new_segment(size)
    processes = []
    for rank in range(size):
        command = [sys.executable, "-c", script, str(rank), str(size), str(os.getpid()), str(descriptor)]
        environment = {**os.environ, "PYTHONPATH": str(REPO), "GLOG_v": "4"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen(command, env=environment, text=True, **pipes))
    # A rank answers with its process id as the last word of a line: MindSpore may print before it.
    pids = [process.pid for process in processes]
    for process in processes:
        while process.stdout.readline().strip() != str(process.pid):
            pass
    os_line = " ".join(map(str, pids)) + "\n"
    for process in processes:
        process.stdin.write(os_line)
        process.stdin.flush()
    done = []
    for process in processes:
        output, errors = process.communicate(timeout=100)
        done.append(subprocess.CompletedProcess([], process.returncode, output, errors))
    os.close(descriptor)
    return done


@pytest.mark.parametrize(
    ("operation", "words"),
    [
        ("g.all_reduce(x)", "all_reduce(sum) in group g (global ranks [0, 1]) of (1000,) Float32"),
        ("g.receive((3,), ms.float32, 1).wait()", "receive(from=1) in group g"),
        ("g.barrier()", "barrier in group g"),
    ],
)
def test_a_killed_rank_is_named_by_the_one_that_waits(operation, words):
    first, second = run_ranks(
        f"""
        shared = [line.split(maxsplit=5)[-1].strip() for line in open("/proc/self/maps") if " rw-s " in line]
        assert any("parallel_core-group" in path for path in shared), shared
        print("memory with a name:", [path for path in shared if not path.endswith("(deleted)")], flush=True)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            {operation}
        except CommError as error:
            print(error)
            sys.exit(3)
        """
    )
    assert second.returncode == -signal.SIGKILL
    assert first.returncode == 3, first.stderr
    assert words in first.stdout
    assert "global rank 1 has ended" in first.stdout
    # Memory without a name goes with the last process: nothing stays behind, however they end.
    assert "memory with a name: []" in first.stdout and "memory with a name: []" in second.stdout


def test_what_an_ended_rank_has_sent_still_arrives():
    first, second = run_ranks(
        """
        if rank == 1:
            g.send(x, 0)
            g.receive((1,), ms.float32, 0).wait()
            g.send(x * 2, 0)
            sys.exit(0)
        g.receive((1000,), ms.float32, 1).wait()
        g.send(x[:1], 1)
        import select
        select.select([os.pidfd_open(pids[1])], [], [])  # until rank 1 is gone
        print("got", g.receive((1000,), ms.float32, 1).wait().asnumpy().sum())
        """
    )
    assert second.returncode == 0, second.stderr
    assert "got 2000.0" in first.stdout, first.stderr


def test_more_ranks_than_cores():
    size = 5
    done = run_ranks(
        """
        for i in range(50):
            y = g.all_reduce(Tensor(np.full(40_000, rank + i, np.float32)))
            assert (y.asnumpy() == sum(range(size)) + size * i).all()
            g.send(y, (rank + 1) % size)
            g.receive(y.shape, y.dtype, (rank - 1) % size).wait()
        g.barrier()
        """,
        size,
    )
    assert [one.returncode for one in done] == [0] * size, done[0].stderr
