"""What a rank says when it fails: one small file that names the error, for the launcher to show."""

from __future__ import annotations

import json
import os
import re
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

from parallel_core.environment import LOG_DIR_VARIABLE
from parallel_core.errors import (
    CommError,
    ConfigError,
    ParallelCoreError,
    ResultError,
    printable,
    printable_lines,
)
from parallel_core.files import create_file, read_regular
from parallel_core.records import Record, parse_json

CONFIG_ERROR_STATUS = 2
"""Exit status after a `ConfigError`, in the launcher and in a rank."""

MAX_REPORT_BYTES = 64 << 20
"""Far more than any traceback."""

_PEER_LOSS = re.compile(
    r"(recv|send|allreduce|all_?gather|broadcast|barrier|collective)\w* failed"
    r"|did not complete within|disconnected|connection (?:reset|refused|closed)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class FailureReport:
    """Why one rank failed, in its own words."""

    rank: int
    time: float
    """Seconds since the epoch, read when the error was caught."""
    kind: str
    """Class name of the exception."""
    message: str
    traceback: str
    """The formatted traceback; empty for a user's mistake, which needs none."""
    exit_status: int
    peer_loss: bool
    """Whether the error reads like the consequence of another rank's failure."""

    def text(self) -> str:
        """Return what to show: the traceback, or for a user's mistake the message alone."""
        return self.traceback.rstrip() or f"{self.kind}: {self.message}"


def report_path(log_dir: Path, rank: int) -> Path:
    """Return where the failure report of `rank` stands."""
    return log_dir / f"error_rank_{rank}.json"


def read_report(path: Path) -> FailureReport | None:
    """Return the report at `path`, or None when there is none that can be read."""
    try:
        data = read_regular(path, MAX_REPORT_BYTES)
        said = Record(parse_json(data, str(path), CommError), str(path), CommError)
        return FailureReport(
            rank=said.integer("rank"),
            time=float(said.number("time")),
            kind=said.text("kind"),
            message=_lines(said, "message"),
            traceback=_lines(said, "traceback"),
            exit_status=said.integer("exit_status", minimum=-255, maximum=255),
            peer_loss=said.flag("peer_loss"),
        )
    except (OSError, CommError):
        return None


def _lines(said: Record, key: str) -> str:
    """Return a text of several lines, with everything else that a terminal would act on spelled out."""
    text = said.values.get(key)
    if not isinstance(text, str):
        said.refuse(key, "text")
    return "\n".join(map(printable, str(text).splitlines()))


def is_peer_loss(exc: BaseException) -> bool:
    """Return whether an error reads like the consequence of another rank's failure."""
    return isinstance(exc, CommError) or _PEER_LOSS.search(str(exc)) is not None


def report_failure(exc: BaseException) -> int:
    """Write the failure report of this rank, print the error to stderr, and return the exit status to end with.

    Under the launcher the report goes to `error_rank_R.json` in the log directory; without it only stderr is written.
    """
    status = _exit_status(exc)
    expected = isinstance(exc, (ParallelCoreError, SystemExit))
    trace = "" if expected else "".join(traceback.format_exception(exc))
    report = FailureReport(
        rank=int(os.environ.get("RANK_ID", "0")),
        time=time.time(),
        kind=type(exc).__name__,
        message=str(exc),
        traceback=trace,
        exit_status=status,
        peer_loss=is_peer_loss(exc),
    )
    log_dir = os.environ.get(LOG_DIR_VARIABLE)
    if log_dir and os.environ.get("MS_ROLE") == "MS_WORKER":
        path = report_path(Path(log_dir), report.rank)
        partial = path.with_suffix(".tmp")
        try:
            with create_file(partial) as file:
                file.write(json.dumps(asdict(report)))
            os.replace(partial, path)
        except OSError as error:
            print(f"cannot write {path}: {error}", file=sys.stderr)
    text = report.text() if not isinstance(exc, ConfigError) else str(exc)
    print(printable_lines(text), file=sys.stderr, flush=True)
    return status


def _exit_status(exc: BaseException) -> int:
    if isinstance(exc, SystemExit):
        return exc.code if isinstance(exc.code, int) else 1
    if isinstance(exc, ResultError):
        return exc.exit_status
    return CONFIG_ERROR_STATUS if isinstance(exc, ConfigError) else 1
