"""Entry point of one rank: `python …/launch/rank.py SCRIPT args…`, started by the launcher, or through msrun.

By its path, since `python -m` would import from the current folder first, which may be anybody's.

Ties the process to the launcher before anything else is imported, then runs the script as `__main__`. Where the
launcher asks for it, this process forks the ranks instead (`launch.fork`). The scheduler is started by the same
command: it serves the ranks here, and the script never sees it.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from parallel_core.launch.activity import tell_activity
from parallel_core.launch.entry import run_as_rank
from parallel_core.launch.fork import FORK_VARIABLE, fork_ranks
from parallel_core.launch.processes import die_with
from parallel_core.launch.report import LOG_DIR_VARIABLE

LAUNCHER_VARIABLE = "PARALLEL_CORE_LAUNCHER_PID"
"""Set by the launcher: its process id."""


def main() -> None:
    """Run the script named by the first argument with the arguments after it, or serve as the scheduler."""
    sys.path[:] = [folder for folder in sys.path if folder and os.path.abspath(folder) != os.path.dirname(__file__)]
    die_with(int(os.environ[LAUNCHER_VARIABLE]))
    if FORK_VARIABLE in os.environ:
        fork_ranks(Path(sys.argv[1]))
        die_with(int(os.environ[LAUNCHER_VARIABLE]))  # a child is tied to nobody, until its parent ends
    if os.environ["MS_ROLE"] == "MS_SCHED":
        _serve_ranks()
        return
    script = sys.argv[1]
    sys.argv = sys.argv[1:]
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
    tell_activity(Path(os.environ[LOG_DIR_VARIABLE]), int(os.environ["RANK_ID"]))
    run_as_rank(lambda: runpy.run_path(script, run_name="__main__"))


def _serve_ranks() -> None:
    """Be the scheduler until the ranks have ended."""
    from mindspore.communication import init

    init("mccl")


if __name__ == "__main__":
    main()
