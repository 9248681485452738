"""Start the launcher as a user does, and look for processes it left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from parallel_core.launch.processes import environment_of, process_table
from parallel_core.launch.report import LOG_DIR_VARIABLE

REPO = Path(__file__).resolve().parents[2]
PATIENCE_S = 120.0
"""How long a test waits for something that takes a second on an idle machine, before it calls it missing."""

_FROM_OUTSIDE = ("NPROC", "MASTER_PORT", "LOG_DIR", "DEVICE_TARGET", "OMP_NUM_THREADS", "GLOG_v", "NNODES", "RANK_ID")


def launcher_environment(log_dir: Path, **variables: str) -> dict[str, str]:
    """Return an environment for the launcher that holds nothing of the caller's own job."""
    clean = {name: value for name, value in os.environ.items() if name not in _FROM_OUTSIDE}
    path = os.pathsep.join(filter(None, [str(REPO), clean.get("PYTHONPATH")]))
    return {**clean, "PYTHONPATH": path, "DEVICE_TARGET": "CPU", "LOG_DIR": str(log_dir), **variables}


def start_launcher(log_dir: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    """Start `python -m parallel_core.launch --plain arguments…`; stdout and stderr are one pipe."""
    return subprocess.Popen(
        [sys.executable, "-m", "parallel_core.launch", "--plain", *arguments],
        env=launcher_environment(log_dir, **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=heed_signals,
    )


def heed_signals() -> None:
    """Undo in a child what `nohup` and a shell's `&` hand down: an ignored SIGINT, which a launcher leaves ignored."""
    for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(one, signal.SIG_DFL)


def run_launcher(log_dir: Path, *arguments: str, **variables: str) -> tuple[int, str]:
    """Run the launcher to its end and return its exit status and console."""
    process = start_launcher(log_dir, *arguments, **variables)
    output, _ = process.communicate(timeout=PATIENCE_S)
    return process.returncode, output


def processes_of(log_dir: Path) -> list[int]:
    """Return the processes that belong to a job logging to `log_dir` (msrun, scheduler, ranks and their children)."""
    tag = str(log_dir.resolve())
    return [pid for pid in process_table() if environment_of(pid).get(LOG_DIR_VARIABLE) == tag]


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Poll `condition` until it holds; fail with `what` when it does not for `PATIENCE_S`."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {PATIENCE_S:g} s in vain: {what}")
        time.sleep(0.05)
