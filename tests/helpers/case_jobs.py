"""The pytest side of multi-rank cases: one job per world size, its records, and what to say when a case fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from parallel_core.launch.console import last_lines
from parallel_core.launch.processes import die_with_parent
from tests.helpers.cases import Case
from tests.helpers.launching import launcher_environment
from tests.helpers.rank_main import case_heading, read_records

START_LIMIT_S = 300.0
STRAGGLER_GRACE_S = 5.0
"""How long ranks may take to finish a case after one of them failed it."""
_LIMITS = {"STOP_GRACE_S": "1", "MS_CPU_COMM_OP_TIMEOUT": "30"}
MAX_BROKEN_JOBS = 10
"""Broken jobs of one world size after which a session does not run the rest of that size."""


class CaseFailed(Exception):
    """A case failed on at least one rank; the message is what pytest shows."""


@dataclass
class Job:
    """One running job: cases in order, and the processes that run them."""

    world_size: int
    cases: list[Case]
    directory: Path
    process: subprocess.Popen[bytes]
    first_seen: dict[int, float] = field(default_factory=dict)

    @classmethod
    def start(cls, world_size: int, cases: list[Case], directory: Path) -> Job:
        """Start the launcher on `rank_main.py`; it dies with this process."""
        directory.mkdir(parents=True)
        plan = directory / "plan.json"
        steps = [[str(one.path), one.function, one.variant] for one in cases]
        plan.write_text(json.dumps({"directory": str(directory), "cases": steps}), encoding="utf-8")
        script = Path(__file__).with_name("rank_main.py")
        with (directory / "console.txt").open("wb") as console:
            process = subprocess.Popen(
                [sys.executable, "-m", "parallel_core.launch", "--plain", str(script), str(plan)],
                env=launcher_environment(directory / "logs", NPROC=str(world_size), **_LIMITS),
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        return cls(world_size, cases, directory, process)

    def records(self, number: int) -> dict[int, dict[str, dict]]:
        """Return, for each rank, its records of case `number` by event."""
        found: dict[int, dict[str, dict]] = {}
        for rank in range(self.world_size):
            lines = read_records(self.directory / f"rank_{rank}.jsonl")
            found[rank] = {one["event"]: one for one in lines if one["case"] == number}
        return found

    def end(self) -> None:
        """End the job and every process of it."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.process.wait()

    def stacks(self, ranks: list[int]) -> dict[int, str]:
        """Ask `ranks` for the stacks of all their threads."""
        for rank in ranks:
            lines = read_records(self.directory / f"rank_{rank}.jsonl")
            if lines:
                try:
                    os.kill(lines[0]["pid"], signal.SIGUSR1)
                except ProcessLookupError:
                    continue
        time.sleep(1.0)
        return {rank: (self.directory / f"stack_{rank}.txt").read_text(errors="replace").strip() for rank in ranks}


class CaseJobs:
    """All jobs of one pytest session."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._selected: dict[int, list[Case]] = {}
        self._jobs: dict[int, Job] = {}
        self.broken: dict[int, list[str]] = {}
        """For each world size, the cases that broke a job."""
        self.unable: dict[int, str] = {}
        """For each world size whose job did not reach its first case, that case."""

    def select(self, cases: list[Case]) -> None:
        """Say which cases the session will ask for, in order."""
        for one in cases:
            self._selected.setdefault(one.world_size, []).append(one)

    def run(self, one: Case) -> None:
        """Return when `one` has passed on every rank.

        Raises:
            CaseFailed: if it has not, with the first failing rank's traceback and where the others are.
        """
        job = self._job_for(one)
        number = job.cases.index(one)
        broke = True
        try:
            outcomes = self._await(job, number)
            failed = {rank: events["failed"] for rank, events in outcomes.items() if "failed" in events}
            unfinished = [rank for rank, events in outcomes.items() if not events.keys() & {"passed", "failed"}]
            if not failed and not unfinished:
                broke = False
                return
            in_step = len(failed) == job.world_size and len({each["kind"] for each in failed.values()}) == 1
            broke = not in_step or any(each["peer_loss"] for each in failed.values())
            raise CaseFailed(_describe(job, number, failed, unfinished))
        finally:
            if broke:
                name = f"{one.function}[{one.label}]"
                self.broken.setdefault(one.world_size, []).append(name)
                if not any(job.records(0).values()):
                    self.unable[one.world_size] = name
                self._jobs.pop(one.world_size).end()
            elif number == len(job.cases) - 1:
                self._jobs.pop(one.world_size).end()

    def end(self) -> None:
        """End every job that still runs."""
        for job in self._jobs.values():
            job.end()
        self._jobs.clear()

    def _job_for(self, one: Case) -> Job:
        size = one.world_size
        if size not in self._jobs:
            broken = self.broken.get(size, [])
            if size in self.unable:
                raise CaseFailed(f"not run: no job of {size} ranks starts; see {self.unable[size]}")
            if len(broken) >= MAX_BROKEN_JOBS:
                raise CaseFailed(f"not run: {len(broken)} jobs of {size} ranks were broken, last by {broken[-1]}")
            todo = self._selected[size][self._selected[size].index(one) :]
            directory = self._directory / f"{size}_ranks_{len(broken)}"
            self._jobs[size] = Job.start(size, todo, directory)
        return self._jobs[size]

    def _await(self, job: Job, number: int) -> dict[int, dict[str, dict]]:
        """Return the records of a case when all ranks have ended it, or when waiting longer makes no sense."""
        begun = time.monotonic()
        started = failed_at = None
        while True:
            records = job.records(number)
            ended = [rank for rank, events in records.items() if events.keys() & {"passed", "failed"}]
            if len(ended) == job.world_size or job.process.poll() is not None:
                return job.records(number)
            now = time.monotonic()
            if started is None and any("start" in events for events in records.values()):
                started = now
            if failed_at is None and any("failed" in events for events in records.values()):
                failed_at = now
            if failed_at is not None and now - failed_at > STRAGGLER_GRACE_S:
                return records
            if now - (started or begun) > (job.cases[number].timeout_s if started else START_LIMIT_S):
                return records
            time.sleep(0.02)


def _describe(job: Job, number: int, failed: dict[int, dict], unfinished: list[int]) -> str:
    one = job.cases[number]
    parts = [f"{one.function}[{one.label}] failed"]
    if failed:
        # A rank that lost its peer is not the cause while another failed for a reason of its own.
        order = sorted(failed, key=lambda rank: (failed[rank]["peer_loss"], failed[rank]["time"]))
        parts.append(f"rank {order[0]} first:\n{failed[order[0]]['traceback'].rstrip()}")
        parts += [f"rank {rank} then: {failed[rank]['traceback'].strip().splitlines()[-1]}" for rank in order[1:]]
    if job.process.poll() is not None:
        parts.append(f"the job ended (status {job.process.returncode}) with ranks {unfinished} in this case:")
        parts.append("\n".join(last_lines(job.directory / "console.txt", 40)))
    elif unfinished:
        if not failed:
            parts.append(f"no rank failed, but ranks {unfinished} did not end it within {one.timeout_s:g} s")
        for rank, stack in job.stacks(unfinished).items():
            parts.append(f"rank {rank} stands here:\n{stack or 'no stack: it has not started, or does not react'}")
    for rank in sorted(failed)[:1] or unfinished[:1]:
        parts += _log_of(job, number, rank)
    return "\n".join(parts)


def _log_of(job: Job, number: int, rank: int) -> list[str]:
    path = job.directory / "logs" / f"worker_{rank}.log"
    lines = last_lines(path, 200)
    starts = [place for place, line in enumerate(lines) if line.startswith(case_heading(number))]
    own = lines[starts[-1] + 1 :] if starts else lines
    return [f"log of rank {rank} ({path}):", *own[-30:]] if own else [f"log of rank {rank}: {path}"]
