"""A stand-in for the training script: what each rank does is said on the command line.

`rank_script.py [--communicate] [--DO RANK...]...` with DO one of: fail (an exception), mistake (a ConfigError), kill
(SIGKILL to itself), lose_peer (a CommError), hang (wait until told to stop), stuck (the same, deaf to SIGTERM), spawn
(leave a child in a session of its own), save (write a file on SIGTERM), save_slowly (promise to stop, and write it
three seconds after SIGTERM), chatter (print for ever).
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from parallel_core.environment import promise_to_stop
from parallel_core.errors import CommError, ConfigError
from parallel_core.launch.entry import run_as_rank

ACTIONS = ("spawn", "fail", "mistake", "kill", "chatter", "hang", "save", "save_slowly", "lose_peer", "stuck")


def act(action: str, rank: int) -> None:
    if action == "fail":
        raise ValueError(f"rank {rank} met a bad value")
    if action == "mistake":
        raise ConfigError("num_layers=3 cannot be split over 2 stages")
    if action == "lose_peer":
        time.sleep(0.05)
        raise CommError("all_reduce over group tp (ranks 0, 1): peer is gone")
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "spawn":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    if action == "save":
        saved = Path(os.environ["LOG_DIR"], f"saved_{rank}")
        signal.signal(signal.SIGTERM, lambda *_: (saved.touch(), os._exit(0)))
    if action == "save_slowly":
        asked: list[int] = []
        signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
        with promise_to_stop():
            print(f"INFO - rank {rank} waits", flush=True)
            while not asked:
                time.sleep(0.05)
            time.sleep(3)
            Path(os.environ["LOG_DIR"], f"saved_{rank}").touch()
    if action == "stuck":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if action == "chatter":
        while True:
            print(f"INFO - rank {rank} waits", flush=True)
            time.sleep(0.05)
    if action in ("hang", "save", "stuck"):
        print(f"INFO - rank {rank} waits", flush=True)
        time.sleep(600)


def communicate() -> None:
    """Sum the ranks' numbers, so that the whole start-up of the backend is exercised."""
    import mindspore as ms
    from mindspore import mint
    from mindspore.communication import get_group_size, get_rank, init

    ms.set_context(device_target="CPU")
    init()
    rank = get_rank()
    x = ms.Tensor([float(rank)])
    mint.distributed.all_reduce(x)
    if rank == get_group_size() - 1:
        print(f"INFO - sum {x.asnumpy()[0]:g} of {get_group_size()} ranks", flush=True)
    mint.distributed.barrier()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--communicate", action="store_true")
    for action in ACTIONS:
        parser.add_argument(f"--{action}", type=int, nargs="*", default=[])
    arguments = parser.parse_args()
    rank = int(os.environ.get("RANK_ID", "0"))
    print(f"DEBUG - rank {rank} with {os.environ['OMP_NUM_THREADS']} threads", flush=True)
    if arguments.communicate:
        communicate()
    for action in ACTIONS:
        if rank in getattr(arguments, action):
            act(action, rank)
    print(f"INFO - rank {rank} done", flush=True)


run_as_rank(main)
