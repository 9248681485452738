"""Which rank failed first, and how to say it."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from parallel_core.errors import printable
from parallel_core.launch.console import last_lines
from parallel_core.launch.report import FailureReport

_CONSEQUENCE_WINDOW_S = 1.0
_MESSAGE_LIMIT = 160
_HINTS = {
    int(signal.SIGKILL): "; if nobody sent it, look for the out-of-memory killer in dmesg",
    int(signal.SIGSTOP): "; it did not go on, which SIGCONT would have made it do",
    int(signal.SIGBUS): "; memory that it had mapped was gone: a file cut while it was read, a full disk or /dev/shm",
    int(signal.SIGTERM): "; if nobody sent it, MindSpore did, because another rank had gone",
}
PEER_TIMEOUT_STATUS = 75
"""Exit status of a rank whose communication took longer than the time limit (`comm.watchdog.EXIT_CODE`)."""


@dataclass(frozen=True)
class RankFailure:
    """How one rank (or the scheduler, or msrun) ended."""

    role: int | str
    time: float
    """Seconds since the epoch: when the error was caught in the rank, or else when its end was noticed."""
    status: int
    """Exit status; negative for the signal that ended the process."""
    report: FailureReport | None = None
    said: str = ""
    """Of another node: what became of it, after its name in a sentence."""
    follows: bool = False
    """Of another node: whether that follows from something else."""

    @property
    def name(self) -> str:
        """`rank 3`, `scheduler`, `msrun`, or `node 1 (10.0.0.2, its host)`."""
        return f"rank {self.role}" if isinstance(self.role, int) else self.role

    @property
    def is_consequence(self) -> bool:
        """Whether it looks like the end of a rank that lost another one.

        Besides an error that says so: MindSpore sends SIGTERM to the ranks that are left when one has gone.
        """
        if self.said:
            return self.follows
        if self.report is not None:
            return self.report.peer_loss
        return self.status in (-signal.SIGTERM, PEER_TIMEOUT_STATUS)

    def job_status(self) -> int:
        """Return the exit status for the whole job, never 0."""
        return 128 - self.status if self.status < 0 else self.status or 1

    def summary(self, limit: int | None = _MESSAGE_LIMIT) -> str:
        """Return how it ended, on one line; of an error's first line `limit` characters (None: all)."""
        if self.said:
            return printable(self.said[:limit])
        if self.report is not None:
            message = self.report.message.strip().splitlines() or [""]
            return printable(f"{self.report.kind}: {message[0][:limit]}")
        if self.status < 0:
            number = -self.status
            known = number in set(signal.Signals)
            name = f" ({signal.Signals(number).name})" if known else ""
            verb = "stopped" if number == signal.SIGSTOP else "killed"
            return f"{verb} by signal {number}{name}{_HINTS.get(number, '')}"
        if self.status == PEER_TIMEOUT_STATUS:
            return "gave up waiting for another rank"
        return f"ended with status {self.status}, without an error of its own"


def first_failure(failures: Sequence[RankFailure]) -> RankFailure:
    """Return the failure the others follow from: the earliest.

    An error that reads like the loss of a peer gives way to another kind of failure noticed shortly after it, because
    a rank can see its peer vanish before the launcher learns that the peer was killed, and to what another node says,
    whenever that comes.
    """
    in_order = sorted(failures, key=lambda failure: failure.time)
    first = in_order[0]
    if first.is_consequence:
        for other in in_order[1:]:
            if not other.is_consequence and (other.said or other.time - first.time < _CONSEQUENCE_WINDOW_S):
                return other
    return first


def describe_failures(log_dir: Path, num_ranks: int, failures: Sequence[RankFailure], ended_well: Sequence[int]) -> str:
    """Return the text the console ends with: the first failure in full, the others in a line each.

    Args:
        log_dir: where the ranks log.
        num_ranks: ranks of the job.
        failures: one or more.
        ended_well: the ranks that had ended with status 0 before.
    """
    first = first_failure(failures)
    lines = [f"ERROR - {first.name} failed first, of {num_ranks} ranks: {first.summary(limit=None)}"]
    if first.said:
        lines = [f"ERROR - {first.name} {first.summary(limit=None)}"]
    elif first.report is not None and (first.report.traceback or "\n" in first.report.message):
        lines += _indented(first.report.text().splitlines())
    elif first.report is None:
        log = log_dir / (f"worker_{first.role}.log" if isinstance(first.role, int) else f"{first.role}.log")
        tail = last_lines(log)
        lines += [f"  the last lines of {log}:", *_indented(tail)] if tail else [f"  {log} is empty"]
    lines += [f"  {other.name} then: {other.summary()}" for other in failures if other is not first]
    if ended_well:
        lines.append(f"  ended before that, with status 0: ranks {', '.join(map(str, ended_well))}")
    lines.append(f"  All ranks were stopped. Logs: {log_dir}/worker_*.log")
    return "\n".join(lines)


def _indented(lines: list[str]) -> list[str]:
    return [f"    {printable(line)}" for line in lines]
