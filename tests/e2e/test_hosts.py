"""Jobs on several hosts, which are namespaces here: losses, who is lost, what is gone on with."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from parallel_core.launch.processes import descendants, environment_of
from tests.e2e.runs import SMALL, pretrain_gpt, read_rows, working_directory
from tests.helpers.hosts import Host, Network, why_no_hosts
from tests.helpers.launching import REPO, launcher_environment, processes_of, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_no_hosts()), reason=why_no_hosts())]

TIMES = ("elapsed_ms", "tokens_per_s")
PORT = 8848


def without_times(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


class HostsJob:
    """A job whose nodes are hosts, started one by one."""

    def __init__(self, network: Network, folder: Path, count: int, words: list[str], **variables: str) -> None:
        self.folder, self.words, self.variables = folder, words, {"NPROC": str(2 * count), **variables}
        self.hosts: list[Host] = [network.host(number) for number in range(count)]
        self.workplace = working_directory(folder / "work")
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        for node in range(count):
            self.start(node)

    def start(self, node: int) -> None:
        """Start a node's launcher; what an earlier one printed stays."""
        environment = launcher_environment(
            self.logs(node), PYTHON=sys.executable, NNODES=str(len(self.hosts)), NODE_RANK=str(node),
            MASTER_ADDR=self.hosts[0].address, MASTER_PORT=str(PORT), OMP_NUM_THREADS="1", **self.variables,
        )  # fmt: skip
        command = ["bash", str(REPO / "pretrain_gpt.sh"), "--config", "empty.yaml", *SMALL, *self.words]
        output = self.folder / f"console_{node}.txt"
        self.processes[node] = self.hosts[node].start(
            command, cwd=self.workplace, environment=environment, output=output
        )

    def logs(self, node: int) -> Path:
        return self.folder / f"logs_{node}"

    def console(self, node: int) -> str:
        return (self.folder / f"console_{node}.txt").read_text()

    def wait(self) -> dict[int, int]:
        """Wait for every launcher, and return the exit statuses."""
        return {node: process.wait(timeout=600) for node, process in self.processes.items()}

    @property
    def rows(self) -> list[dict]:
        return without_times(read_rows(self.logs(0) / "metrics.jsonl"))

    def iteration(self) -> int:
        return max((row["iteration"] for row in self.rows), default=0)

    def below(self, node: int) -> list[int]:
        """Return the processes on a host, without those that hold it."""
        return [*descendants(self.processes[node].pid), *descendants(self.hosts[node].first)]

    def launchers(self, node: int) -> list[int]:
        """Return the process of a node's launcher, if there is one."""
        below = descendants(self.processes[node].pid)
        return [pid for pid in below if environment_of(pid).get("LOG_DIR") and "MS_ROLE" not in environment_of(pid)][:1]


@pytest.fixture
def network() -> Iterator[Network]:
    with Network() as made:
        yield made


def test_two_hosts_train_as_one(network, tmp_path):
    words = ["--tensor-model-parallel-size", "2"]
    alone = pretrain_gpt(tmp_path / "alone", ["--config", "empty.yaml", *SMALL, *words], NPROC="4",
                         cwd=working_directory(tmp_path / "alone_work"))  # fmt: skip
    job = HostsJob(network, tmp_path, 2, words)
    assert job.wait() == {0: 0, 1: 0}, job.console(0) + job.console(1)
    keys = ("iteration", "loss", "lr", "grad_norm")
    want = [{key: row[key] for key in keys} for row in alone.rows]
    for row, expected in zip(job.rows, want, strict=True):
        assert {key: row[key] for key in keys} == pytest.approx(expected, rel=1e-12)
    said = next(line for line in job.console(0).splitlines() if "Communication: " in line)
    assert said == "INFO - Communication: tp over shared memory; dp, world over MCCL"


@pytest.mark.parametrize("how", ["launcher killed", "host killed", "host unplugged"])
def test_a_lost_node_is_named_on_every_other_one(how, network, tmp_path):
    job = HostsJob(network, tmp_path, 3, ["--global-batch-size", "12", "--train-iters", "10000"], NPROC="3")
    wait_until(lambda: job.iteration() >= 3, "three iterations")
    begun = time.monotonic()
    if how == "launcher killed":
        os.kill(job.launchers(1)[0], signal.SIGKILL)
    else:
        if how == "host unplugged":
            job.hosts[1].cut_off()
            wait_until(lambda: job.processes[0].poll() is not None, "node 0 gives up")
        job.hosts[1].kill()
    statuses = {node: job.processes[node].wait(timeout=120) for node in (0, 2)}
    took = time.monotonic() - begun
    assert all(statuses.values())
    why = "nothing has come from it for 20 s" if how == "host unplugged" else "its launcher has gone"
    for node in (0, 2):
        assert f"ERROR - node 1 (10.77.0.2, host-1) is lost: {why}" in job.console(node), job.console(node)
        assert processes_of(job.logs(node)) == []
    print(f"{how}: named after at most {took:.0f} s")
    print(job.console(2)[-1500:])


def test_a_job_goes_on_with_the_hosts_that_are_left(network, tmp_path):
    layout = ["--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"]
    alone = pretrain_gpt(tmp_path / "alone", ["--config", "empty.yaml", *SMALL, *layout, "--train-iters", "60"],
                         cwd=working_directory(tmp_path / "alone_work"), NPROC="4")  # fmt: skip
    ckpt = str(tmp_path / "ckpt")
    words = [*layout, "--save", ckpt, "--load", ckpt, "--save-interval", "5", "--elastic", "--train-iters", "60"]
    job = HostsJob(network, tmp_path, 2, words, AUTO_RESTART="2", CLUSTER_TIME_OUT="25")
    wait_until(lambda: job.iteration() >= 7, "seven iterations")
    job.hosts[1].kill()
    assert job.processes[0].wait(timeout=300) == 0, job.console(0)
    said = job.console(0)
    assert "node 1 (10.77.0.2, host-1) of NNODES=2 did not come to 10.77.0.1, port 8849, within 25 s" in said, said
    assert "WARNING - --elastic: going on with " in said
    assert [row["iteration"] for row in job.rows] == list(range(1, 61))
    for row, expected in zip(job.rows, alone.rows, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    print(said)


KILLS = int(os.environ.get("PARALLEL_CORE_SOAK_KILLS", "50"))
ITERATIONS = 40 * KILLS
TARGETS = ("rank", "launcher", "host", "scheduler")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP)


class Disturbance:
    """Kills one thing of a job after another, and starts again what has ended, as what runs a cluster does."""

    def __init__(self, job: HostsJob, network: Network, seed: int) -> None:
        self.job, self.network = job, network
        self.random = random.Random(seed)
        self.kills: list[str] = []
        self.due: dict[int, float] = {}
        """Processes that are stopped, and when they go on."""

    def disturb(self) -> None:
        """Do to the job what nobody would."""
        target, number, node = self.random.choice(TARGETS), self.random.choice(SIGNALS), self.random.randrange(2)
        node = 0 if target == "scheduler" else node
        pids = self._processes(target, node)
        if not pids:
            return
        self.kills.append(f"{target} of node {node}: {signal.Signals(number).name}")
        with (self.job.folder / "kills.txt").open("a") as file:
            file.write(f"{time.strftime('%X')} at iteration {self.job.iteration()}: {self.kills[-1]}\n")
        if target == "host" and number == signal.SIGKILL:
            self.job.hosts[node].kill()
            self.job.processes[node].wait()
            self.job.hosts[node] = self.network.host(node)
            self.job.start(node)
            return
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        if number == signal.SIGSTOP and target in ("launcher", "host"):  # others end what is stopped; these go on
            then = time.monotonic() + self.random.uniform(1.0, 25.0)
            # nsenter stops with its child, and goes on with it only if it is told to itself.
            self.due.update(dict.fromkeys([*pids, self.job.processes[node].pid], then))

    def _processes(self, target: str, node: int) -> list[int]:
        below = self.job.below(node)
        roles = {pid: environment_of(pid).get("MS_ROLE") for pid in below}
        if target == "host":
            return below
        if target == "launcher":
            return self.job.launchers(node)
        wanted = "MS_SCHED" if target == "scheduler" else "MS_WORKER"
        return [pid for pid, role in roles.items() if role == wanted][:1]

    def look_after(self) -> None:
        """Let go on what was stopped for a while, and start again what has ended badly."""
        for pid in [pid for pid, then in self.due.items() if time.monotonic() > then]:
            del self.due[pid]
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        for node, process in self.job.processes.items():
            # A rank that gets SIGTERM while it trains asks all of them to save and end, which is no failure.
            if process.poll() or (process.poll() == 0 and self.job.iteration() < ITERATIONS):
                self.job.start(node)

    def run(self) -> None:
        """Disturb the job until it was done often enough, and then let it come to its end."""
        following, iterations, last = 0.0, 5, self.job.iteration()
        while self.job.processes[0].poll() != 0 or self.job.iteration() < ITERATIONS:
            time.sleep(0.2)
            self.look_after()
            now, done = time.monotonic(), self.job.iteration()
            # Most of them while it trains, by iterations, so that it is not over before; some while it starts.
            if len(self.kills) < KILLS and (now > following or done - last > iterations):
                self.disturb()
                starts = self.random.random() < 0.2
                following = now + (self.random.uniform(1.0, 10.0) if starts else 60.0)
                iterations, last = self.random.randrange(2, 40), done


def test_fifty_kills_of_anything_cost_no_number_and_leave_nothing(network, tmp_path):
    length = ["--train-iters", str(ITERATIONS), "--lr-warmup-iters", "5"]
    arguments = ["--config", "empty.yaml", *SMALL, *length]
    calm = pretrain_gpt(tmp_path / "calm", arguments, cwd=working_directory(tmp_path / "calm_work"), NPROC="2")
    ckpt, temporary = tmp_path / "ckpt", tmp_path / "tmp"
    temporary.mkdir()
    shared_before = set(os.listdir("/dev/shm"))
    words = [*length, "--save", str(ckpt), "--load", str(ckpt), "--save-interval", "10", "--async-save",
             "--distributed-timeout-minutes", "0.5"]  # fmt: skip
    job = HostsJob(network, tmp_path, 2, words, AUTO_RESTART=str(KILLS), NPROC="2", TMPDIR=str(temporary))
    disturbance = Disturbance(job, network, seed=16)
    begun = time.monotonic()
    disturbance.run()
    assert job.processes[1].wait(timeout=120) == 0, job.console(1)[-3000:]
    print(f"{len(disturbance.kills)} kills in {time.monotonic() - begun:.0f} s:", Counter(disturbance.kills))
    assert len(disturbance.kills) == KILLS
    assert job.rows == without_times(calm.rows)
    wait_until(lambda: not job.below(0) and not job.below(1), "no process is left")
    assert processes_of(job.logs(0)) == processes_of(job.logs(1)) == []
    for host in job.hosts:
        table = Path(f"/proc/{host.first}/net/tcp").read_text().splitlines()[1:]
        assert [line for line in table if line.split()[3] == "0A"] == []  # nobody listens
    assert set(os.listdir("/dev/shm")) <= shared_before
    assert list(temporary.rglob("*")) == []
    complete = [folder for folder in ckpt.iterdir() if folder.is_dir()]
    assert not [path for path in ckpt.rglob("*") if "tmp" in path.name or "partial" in path.name], complete
