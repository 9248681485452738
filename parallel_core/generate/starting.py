"""Starting the ranks that a layout needs, and getting what rank 0 writes to the user's terminal."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from parallel_core.errors import ConfigError, ParallelCoreError
from parallel_core.generate.arguments import layout_of
from parallel_core.generate.layout import Layout, check_layout
from parallel_core.launch.job import Job
from parallel_core.launch.plan import plan_job, prepare_log_dir

CONSOLE_VARIABLE = "PARALLEL_CORE_CONSOLE"
"""Set for the ranks of a job: the pipe that leads to the standard output of the command."""


def is_rank() -> bool:
    """Return whether this process is one of a job's ranks."""
    return "MS_ROLE" in os.environ


def check_before(args: argparse.Namespace, layout: Layout) -> None:
    """Refuse what the model of `args` cannot do, before any rank exists.

    Raises:
        ConfigError: the layout, the length or the checkpoint's model cannot be.
        CheckpointError: the checkpoint cannot be read.
    """
    from parallel_core.generate.loading import checked_length, describe

    described = describe(args.load, args.ckpt_step, args.base)
    check_layout(described.model, layout)
    checked_length(described, args.max_length)


def run_or_start(
    program: Path,
    words: Sequence[str],
    args: argparse.Namespace,
    run: Callable[[argparse.Namespace], None],
    *,
    possible: Callable[[], object] = lambda: None,
    checked: Callable[[], object] = lambda: None,
    before_ranks: Callable[[], object] = lambda: None,
) -> int:
    """Run a command here, or on the ranks that its layout needs; return its exit status, 2 for what cannot be.

    Args:
        program: what each rank runs.
        words: the command's.
        args: what they say.
        run: the command on one rank.
        possible: refuses what no layout could do.
        checked: refuses what of the command cannot be, once the layout is known to be one.
        before_ranks: the last check before ranks exist.
    """
    try:
        possible()
        layout = layout_of(args)
        checked()
        if layout.world_size > 1 and not is_rank():
            check_before(args, layout)
            before_ranks()
            return start_ranks(program, words, args, layout)
        run(args)
    except ParallelCoreError as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 130
    return 0


def start_ranks(program: Path, words: Sequence[str], args: argparse.Namespace, layout: Layout) -> int:
    """Run `program` with the command's words on the ranks of `layout`, and return the job's exit status.

    What rank 0 writes to `open_console` goes to standard output, what the launcher says to standard error. Logs of
    ranks go to LOG_DIR, by default to a folder that is removed when all has gone well.

    Raises:
        ConfigError: a variable of the environment is wrong.
    """
    folder = Path(tempfile.mkdtemp(prefix="parallel_core-"))
    log_dir = Path(os.environ.get("LOG_DIR") or folder / "logs")
    command = (str(program), *words)
    spec = plan_job(command, layout.world_size, log_dir, os.environ, 60 * args.distributed_timeout_minutes)
    prepare_log_dir(log_dir)
    pipe = folder / "console"
    os.mkfifo(pipe, 0o600)
    spec = replace(spec, environment={**spec.environment, CONSOLE_VARIABLE: str(pipe)})
    # Open for both: opening does not wait for rank 0, and reading ends when this end is closed by `finished`.
    reader = os.open(pipe, os.O_RDWR | os.O_CLOEXEC)
    ended = threading.Event()
    copier = threading.Thread(target=_copy, args=(reader, ended), daemon=True)
    copier.start()
    status = 1
    try:
        status = Job(spec, out=sys.stderr).run()
    finally:
        ended.set()
        os.write(reader, b"\0")  # wakes the copier, after everything that rank 0 wrote
        copier.join(10)
        os.close(reader)
        if status == 0 and not os.environ.get("LOG_DIR"):
            shutil.rmtree(folder, ignore_errors=True)
    return status


def _copy(reader: int, ended: threading.Event) -> None:
    # Signals are the launcher's, which takes them one at a time in the main thread.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD})
    is_last = False
    while not is_last:
        data = os.read(reader, 1 << 16)
        is_last = ended.is_set() and data.endswith(b"\0")
        with suppress(OSError):  # where nobody reads any more the ranks must not wait for it
            os.write(sys.stdout.fileno(), data[:-1] if is_last else data)


@contextmanager
def open_console() -> Iterator[TextIO]:
    """Give where a command writes for its user: standard output, on a rank of a job that of the launcher."""
    path = os.environ.get(CONSOLE_VARIABLE)
    if not path:
        yield sys.stdout
        return
    with open(path, "w", encoding="utf-8", errors="replace") as console:
        yield console
