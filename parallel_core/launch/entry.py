"""The entry of a script: run it as a rank whose failure the launcher can tell."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from parallel_core.launch.report import report_failure


def run_as_rank(main: Callable[[], object]) -> None:
    """Run `main()`; when it fails, report the error and end the process with its status.

    A `ParallelCoreError` is shown as its message, anything else with its traceback. A rank of a job ends at once,
    without the exit handlers of the backend, which may wait for ranks that are waiting for this one.

    Raises:
        SystemExit: in a program of one process, with the status of the error.
    """
    try:
        main()
    except SystemExit as exc:
        if exc.code in (None, 0):
            raise
        _end(report_failure(exc))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        _end(130)
    except Exception as exc:
        _end(report_failure(exc))


def _end(status: int) -> None:
    if "MS_ROLE" not in os.environ:
        raise SystemExit(status)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)
