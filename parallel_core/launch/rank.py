"""Entry point of one rank: `python -m parallel_core.launch.rank SCRIPT args…`, started by the launcher through msrun.

Ties the process to the launcher before anything else is imported, then runs the script as `__main__`.
"""

from __future__ import annotations

import os
import runpy
import sys

from parallel_core.launch.processes import die_with
from parallel_core.launch.report import run_as_rank

LAUNCHER_VARIABLE = "PARALLEL_CORE_LAUNCHER_PID"
"""Set by the launcher: its process id."""


def main() -> None:
    """Run the script named by the first argument with the arguments after it."""
    die_with(int(os.environ[LAUNCHER_VARIABLE]))
    script = sys.argv[1]
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    run_as_rank(lambda: runpy.run_path(script, run_name="__main__"))


if __name__ == "__main__":
    main()
