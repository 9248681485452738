"""One job: start its ranks, follow them, and end every process whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from parallel_core import startup
from parallel_core.environment import promise_path
from parallel_core.files import create_file
from parallel_core.launch.activity import Doing, forget
from parallel_core.launch.console import LogFollower
from parallel_core.launch.crash import ask_ranks, describe_wait, write_crash_report
from parallel_core.launch.fork import fork_environment
from parallel_core.launch.host_memory import killed_for_memory
from parallel_core.launch.memory import explain_memory
from parallel_core.launch.nodes import SILENCE_S, News, Nodes
from parallel_core.launch.outcome import RankFailure, describe_failures, first_failure
from parallel_core.launch.processes import adopt_orphans, children, descendants, die_with_parent, environment_of, send
from parallel_core.launch.progress import ProgressLine
from parallel_core.launch.rank import LAUNCHER_VARIABLE
from parallel_core.launch.report import LOG_DIR_VARIABLE, read_report, report_path

SCHEDULER = "scheduler"
_RUN_MSRUN = (
    "import sys; sys.path[:] = [p for p in sys.path if p]; import runpy; "
    "runpy.run_module('mindspore.parallel.cluster.run', run_name='__main__', alter_sys=True)"
)
"""`python -m mindspore.parallel.cluster.run` without the current folder, where `-m` looks for modules first."""
_RANK = Path(__file__).resolve().with_name("rank.py")
_TICK_S = 0.1
_FAILURE_GRACE_S = 3.0
"""The same after a failure: no checkpoint can be whole without the rank that is gone, so it is only for clearing up."""
_KILL_PATIENCE_S = 10.0
_STANDSTILL_S = 30.0
"""How long a rank or the scheduler may be stopped (SIGSTOP) before that is a failure: nothing else ends such a wait."""
_NEWS_S = SILENCE_S + 5.0
"""How long a node whose ranks have lost others waits for news of which node is gone."""


@dataclass(frozen=True)
class JobSpec:
    """Everything needed to start one job on this node (several nodes of NPUs: unverified)."""

    command: tuple[str, ...]
    """The training script and its arguments."""
    num_ranks: int
    """Ranks on all nodes together."""
    log_dir: Path
    master_port: int
    master_addr: str = "127.0.0.1"
    num_nodes: int = 1
    node_rank: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables set for the ranks on top of this process's own."""
    bind_core: str = ""
    """What msrun binds ranks to cores by: True, or cores by device as JSON; empty: nothing."""
    cluster_timeout_s: int = 300
    """How long the ranks wait for each other at start-up."""
    stop_grace_s: float = 15.0
    """How long ranks asked to stop may go on before they are killed."""
    stop_grace_is_given: bool = False
    """The grace is the user's, so it holds for training ranks too; else those get the time their save takes."""

    @property
    def local_ranks(self) -> range:
        """The global ranks on this node."""
        per_node = self.num_ranks // self.num_nodes
        return range(self.node_rank * per_node, (self.node_rank + 1) * per_node)

    @property
    def forks(self) -> bool:
        """Whether the ranks are forked from one process: on CPU and one host, unless msrun binds them to cores."""
        return self.environment.get("DEVICE_TARGET") == "CPU" and self.num_nodes == 1 and not self.bind_core

    def worker_log(self, rank: int) -> Path:
        """Return the log file of one rank."""
        return self.log_dir / f"worker_{rank}.log"

    def start_command(self) -> list[str]:
        """Return the command line of the process that starts the scheduler and the ranks and then ends."""
        return [sys.executable, str(_RANK), *self.command] if self.forks else self.msrun_command()

    def msrun_command(self) -> list[str]:
        """Return the command line of msrun, which imports MindSpore to start processes (`--join=False`: no more)."""
        more = [f"--master_addr={self.master_addr}", f"--node_rank={self.node_rank}"] if self.num_nodes > 1 else []
        more += [f"--bind_core={self.bind_core}"] if self.bind_core else []
        return [
            sys.executable,
            "-c",
            _RUN_MSRUN,
            f"--worker_num={self.num_ranks}",
            f"--local_worker_num={len(self.local_ranks)}",
            f"--master_port={self.master_port}",
            f"--log_dir={self.log_dir}",
            "--join=False",
            f"--cluster_time_out={self.cluster_timeout_s}",
            *more,
            _python_name(),
            str(_RANK),
            *self.command,
        ]


def _python_name() -> str:
    """Return the name by which msrun, which knows only `python` and `python3`, finds this interpreter on PATH."""
    here = Path(sys.executable)
    for name in ("python", "python3"):
        candidate = here.with_name(name)
        if candidate.exists() and candidate.samefile(here):
            return name
    return "python"


def _told_of_children(what: int) -> Iterator[os.waitid_result]:
    """Yield what there is to learn of this process's children now, one after the other; see `os.waitid`."""
    with suppress(ChildProcessError):
        while (told := os.waitid(os.P_ALL, 0, what | os.WNOHANG)) is not None:
            yield told


class Job:
    """The processes of one job, all of them descendants of this process.

    A process of its own (one that forks, or msrun) starts the ranks and ends; this one adopts them, so it alone learns
    how each one ends, in order. The signals it waits for are blocked and taken one at a time, so nothing runs in a
    handler.
    """

    def __init__(
        self, spec: JobSpec, nodes: Nodes | None = None, out: TextIO | None = None, err: TextIO | None = None
    ) -> None:
        self.spec = spec
        self._nodes = nodes
        self._out = out or sys.stdout
        self._err = err or sys.stderr
        logs = [spec.worker_log(rank) for rank in spec.local_ranks]
        self._progress = ProgressLine(spec.log_dir / "metrics.jsonl", self._out)
        self._console = LogFollower(logs, self._out, self._progress)
        self._msrun: subprocess.Popen[bytes] | None = None
        self._role_of: dict[int, int | str] = {}
        self._statuses: dict[int | str, int] = {}
        self._failures: dict[int | str, RankFailure] = {}
        self._standing_since: dict[int | str, float] = {}
        """What is stopped, and since when."""
        self._stop_signal: int | None = None
        self._stopped_by = ""
        """The node that was asked to stop, where it is another one."""
        self._stopping = False
        self._ended_well: list[int] = []
        self._doings: list[Doing] = []
        """What ranks that had not failed were doing when the first one had."""
        self._failed_at = 0.0
        self._most: dict[int, int] = {}
        """Bytes that ranks which have ended had resident at most."""
        self._killed_before = killed_for_memory()
        self.status = 1
        """The exit status, once the job has run."""

    @property
    def was_stopped(self) -> bool:
        """Whether a signal asked for the end."""
        return self._stop_signal is not None

    def run(self) -> int:
        """Run the job to its end and return the exit status: 0, that of the first failing rank, or 128 + signal."""
        adopt_orphans()
        with _signals_blocked() as signals:
            try:
                self._start()
                self._follow(signals)
                if self._nodes is not None and not self._failures and self._stop_signal is None:
                    self._await_nodes(self._nodes, signals)
                if self._failures or self._stop_signal is not None:
                    self._tell_nodes()
                    self._end_ranks(signals)
                    self._await_news(signals)
            finally:
                self._kill_everything()
                if self._nodes is not None:
                    self._nodes.leave_start()
            self._console.end()
        self.status = self._conclude()
        return self.status

    def _start(self) -> None:
        spec = self.spec
        package_root = str(Path(__file__).resolve().parents[2])
        environment = {**os.environ, **spec.environment}
        # An empty entry means the current folder.
        folders = [package_root, *environment.get("PYTHONPATH", "").split(os.pathsep)]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
        environment[LOG_DIR_VARIABLE] = str(spec.log_dir.resolve())
        environment[LAUNCHER_VARIABLE] = str(os.getpid())
        if spec.forks:
            place = spec.master_addr, spec.master_port
            environment |= fork_environment(spec.num_ranks, *place, spec.cluster_timeout_s)
        startup.note("launcher", begins=True)
        environment[startup.STARTUP_VARIABLE] = startup.handed_over()

        def in_child() -> None:
            die_with_parent()
            signal.pthread_sigmask(signal.SIG_SETMASK, [])

        with create_file(spec.log_dir / "msrun.log") as log:
            self._msrun = subprocess.Popen(
                spec.start_command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                preexec_fn=in_child,
            )

    def _follow(self, signals: set[signal.Signals]) -> None:
        """Return when all ranks have ended well, one has failed, or a signal asks to stop."""
        while not self._failures and self._stop_signal is None and not self._all_ranks_ended():
            self._tick(signals)

    def _tick(self, signals: set[signal.Signals]) -> None:
        taken = signal.sigtimedwait(signals, _TICK_S)
        # Of a wait that SIGSTOP and SIGCONT interrupt when its time is over, Python returns memory that nobody filled.
        if taken is not None and taken.si_signo in signals - {signal.SIGCHLD}:
            self._stop_signal = taken.si_signo
        self._reap()
        self._look_for_stopped()
        for news in self._nodes.take_news() if self._nodes is not None else ():
            self._note_news(news)
        for rank in self.spec.local_ranks:
            if rank not in self._failures and rank not in self._statuses:
                self._read_report(rank)
        self._console.poll()

    def _all_ranks_ended(self) -> bool:
        return all(rank in self._statuses for rank in self.spec.local_ranks)

    def _reap(self) -> None:
        """Take the exit status of every child that has ended, and note the failures among them."""
        for ended in _told_of_children(os.WEXITED | os.WNOWAIT):
            pid = ended.si_pid
            if self._msrun is not None and pid == self._msrun.pid:
                # Its children are ours from here on; look at them before any of them is reaped.
                status = self._msrun.wait()
                self._msrun = None
                self._identify_ranks()
                if status != 0:
                    self._note_failure(RankFailure("msrun", time.time(), status))
                continue
            _, encoded, usage = os.wait4(pid, 0)
            status, role = os.waitstatus_to_exitcode(encoded), self._role_of.get(pid)
            if isinstance(role, int):
                self._most[role] = usage.ru_maxrss << 10
            if role is not None:
                self._note_end(role, status)

    def _look_for_stopped(self) -> None:
        """Take note of ranks that are stopped or go on, and of those that have stood still for too long."""
        for found in _told_of_children(os.WSTOPPED | os.WCONTINUED):
            role = self._role_of.get(found.si_pid)
            if role is not None and found.si_code == os.CLD_CONTINUED:
                self._standing_since.pop(role, None)
            elif role is not None:
                self._standing_since.setdefault(role, time.monotonic())
        for role, since in self._standing_since.items():
            matters = role != SCHEDULER or self.spec.num_ranks > 1  # one rank may train without ever calling on it
            if matters and time.monotonic() - since > _STANDSTILL_S and role not in self._statuses:
                self._note_failure(RankFailure(role, time.time(), -signal.SIGSTOP))

    def _identify_ranks(self) -> None:
        """Learn which child is which rank: by its environment, or for one that has ended, by its place in line."""
        found = children(os.getpid())
        ranks = self.spec.local_ranks
        in_order: list[int | str] = [*([SCHEDULER] if len(found) > len(ranks) else []), *ranks]
        for info, by_place in zip(found, in_order):
            environment = environment_of(info.pid)
            role = environment.get("MS_ROLE")
            if role == "MS_SCHED":
                self._role_of[info.pid] = SCHEDULER
            elif role == "MS_WORKER" and environment.get("RANK_ID", "").isdigit():
                self._role_of[info.pid] = int(environment["RANK_ID"])
            else:
                self._role_of[info.pid] = by_place

    def _note_end(self, role: int | str, status: int) -> None:
        self._statuses[role] = status
        reported = isinstance(role, int) and self._read_report(role)
        if status == 0 and isinstance(role, int) and not self._stopping:
            self._ended_well.append(role)
        if role == SCHEDULER and self.spec.num_ranks == 1:
            return  # one rank may train without ever calling on it
        if status != 0 and not reported:
            self._note_failure(RankFailure(role, time.time(), status))

    def _read_report(self, rank: int) -> bool:
        report = read_report(report_path(self.spec.log_dir, rank))
        if report is None:
            return False
        self._note_failure(RankFailure(rank, report.time, report.exit_status, report))
        return True

    def _note_failure(self, failure: RankFailure) -> None:
        """Keep the first failure of each rank; what fails after it was told to stop is no failure."""
        if not self._stopping:
            self._failures.setdefault(failure.role, failure)

    def _note_news(self, news: News) -> None:
        """Keep what became of another node, also while this one's ranks are ending: it may be what they follow from."""
        if not news.stop:
            failure = RankFailure(news.node, time.time(), 1, said=news.said, follows=news.consequence)
            self._failures.setdefault(news.node, failure)
        elif not self._stopping and self._stop_signal is None:
            self._stop_signal, self._stopped_by = news.stop, news.node

    def _tell_nodes(self) -> None:
        """Tell the other nodes why this one's part ends, unless it is one of them that told."""
        if self._nodes is None:
            return
        if self._failures:
            first = first_failure(list(self._failures.values()))
            if not first.said:
                self._nodes.tell(f"has failed: {first.name}: {first.summary(None)}", consequence=first.is_consequence)
        elif not self._stopped_by and self._stop_signal is not None:
            name = signal.Signals(self._stop_signal).name
            self._nodes.tell(f"was asked to stop ({name})", stop=self._stop_signal)

    def _end_ranks(self, signals: set[signal.Signals]) -> None:
        """Ask the ranks to end, and wait for them as long as the grace allows; a second signal ends the wait."""
        if self._stop_signal is not None:
            name = signal.Signals(self._stop_signal).name
            source = f" on {self._stopped_by}" if self._stopped_by else ""
            self._say(f"{name}{source}: stopping the ranks; press again to end them at once")
        stop_signal = self._stop_signal
        if self._failures:
            self._failed_at = time.time()
            living = {role: pid for pid, role in self._role_of.items() if role not in self._statuses}
            asked = {role: pid for role, pid in living.items() if isinstance(role, int) and role not in self._failures}
            self._doings = ask_ranks(self.spec.log_dir, asked)
        for pid, role in self._role_of.items():
            if role != SCHEDULER and role not in self._statuses:
                send(pid, signal.SIGTERM)
        self._stop_signal = None
        self._stopping = True
        patient = stop_signal is not None and not self.spec.stop_grace_is_given and self._will_stop()
        if patient:
            self._say("they end the running iteration and save first, however long that takes")
        self._await_ranks(signals, patient)
        self._stop_signal = stop_signal

    def _await_ranks(self, signals: set[signal.Signals], patient: bool) -> None:
        """Wait for ranks that were asked to end, and say which have to be killed because the grace is over.

        Args:
            signals: what `_tick` takes; another request to stop ends the wait.
            patient: the grace begins only when no rank is left that has promised to end by itself, or one has failed.
        """
        grace, begun = self.spec.stop_grace_s, time.monotonic()
        grace = min(grace, _FAILURE_GRACE_S) if self._failures else grace
        while self._role_of and not self._all_ranks_ended():
            left = [rank for rank in self.spec.local_ranks if rank not in self._statuses]
            ended_badly = any(self._statuses.get(rank) for rank in self.spec.local_ranks)
            if patient and not ended_badly and not self._failures and self._will_stop():
                begun = time.monotonic()
            elif time.monotonic() - begun > grace:
                if not self._failures:
                    self._say(f"killing rank(s) {', '.join(map(str, left))}, which did not end within STOP_GRACE_S="
                              f"{grace:g} s: what they had not saved is lost", "WARNING")  # fmt: skip
                return
            self._tick(signals)
            if self._stop_signal is not None:
                return

    def _will_stop(self) -> bool:
        """Tell whether a rank that is left has promised to end by itself."""
        ranks = [rank for rank in self.spec.local_ranks if rank not in self._statuses]
        return any(promise_path(self.spec.log_dir, rank).exists() for rank in ranks)

    def _await_nodes(self, nodes: Nodes, signals: set[signal.Signals]) -> None:
        """Keep the scheduler, and this node's place, until the ranks of all nodes have ended well, or one has not."""
        nodes.tell_done()
        while not nodes.everyone_is_done and not self._failures and self._stop_signal is None:
            self._tick(signals)
            self._failures.pop(SCHEDULER, None)  # it ends some seconds after the last rank

    def _await_news(self, signals: set[signal.Signals]) -> None:
        """Wait until it is known what the failure of this node's ranks follows from, where that is on another node."""
        deadline = time.monotonic() + _NEWS_S
        while self._nodes is not None and self._failures and self._stop_signal is None:
            failures = list(self._failures.values())
            everyone_has_told = len([one for one in failures if one.said]) >= self.spec.num_nodes - 1
            if not first_failure(failures).is_consequence or everyone_has_told or time.monotonic() > deadline:
                return
            self._tick(signals)

    def _kill_everything(self) -> None:
        """Kill and reap every descendant, also those a dying one leaves behind."""
        self._stopping = True
        deadline = time.monotonic() + _KILL_PATIENCE_S
        while left := descendants(os.getpid()):
            if time.monotonic() > deadline:
                self._say(f"processes {left} do not react to SIGKILL (waiting for a device?)")
                return
            for pid in left:
                send(pid, signal.SIGKILL)
            time.sleep(0.01)
            self._reap()

    def _conclude(self) -> int:
        try:
            return self._tell_end()
        finally:  # whatever is worth keeping is in the report
            for rank in self.spec.local_ranks:
                forget(self.spec.log_dir, rank)

    def _tell_end(self) -> int:
        spec = self.spec
        if self._stop_signal is not None:
            source = f" on {self._stopped_by}" if self._stopped_by else ""
            self._say(f"stopped by {signal.Signals(self._stop_signal).name}{source}; logs: {spec.log_dir}/worker_*.log")
            return 128 + self._stop_signal
        if self._failures:
            failures = list(self._failures.values())
            text = describe_failures(spec.log_dir, spec.num_ranks, failures, self._ended_well)
            wanting = explain_memory(spec.log_dir, spec.command, spec.environment, (spec.num_ranks, spec.local_ranks),
                                     failures, self._most, killed_for_memory() - self._killed_before)  # fmt: skip
            text = "\n".join([text, *wanting, *describe_wait(failures, self._doings, self._failed_at)])
            facts = spec.command, spec.local_ranks, text, failures, self._doings, self._failed_at
            report = write_crash_report(spec.log_dir, *facts)
            print(text + (f"\n  All that is known: {report}" if report else ""), file=self._err, flush=True)
            return first_failure(failures).job_status()
        self._say(f"{spec.num_ranks} ranks ended well; logs: {spec.log_dir}/worker_*.log")
        return 0

    def _say(self, text: str, level: str = "INFO") -> None:
        self._progress.clear()
        print(f"{level} - {text}", file=self._out, flush=True)


@contextmanager
def _signals_blocked() -> Iterator[set[signal.Signals]]:
    """Hold back the signals a job reacts to, except those the caller ignores (nohup, background jobs)."""
    asked = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    signals = {signal.SIGCHLD} | {one for one in asked if signal.getsignal(one) is not signal.SIG_IGN}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield signals
    finally:
        while signal.sigtimedwait(signals, 0):
            pass  # a second Ctrl-C that arrived too late must not interrupt what the caller does next
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
