"""AUTO_RESTART: a job whose processes are killed goes on as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from parallel_core.launch.processes import environment_of
from tests.e2e.runs import SMALL, finish, pretrain_gpt, read_rows, start, working_directory
from tests.helpers.launching import launcher_environment, processes_of, wait_until

TIMES = ("elapsed_ms", "tokens_per_s")


def arguments(save: Path, *more: str) -> list[str]:
    words = ["--tensor-model-parallel-size", "2", "--save-interval", "5", "--save", str(save), "--load", str(save)]
    return ["--config", "empty.yaml", *SMALL, *words, *more]


def rows(log_dir: Path) -> list[dict]:
    found = read_rows(log_dir / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in TIMES} for row in found]


def a_process(log_dir: Path, role: str) -> int | None:
    """Return a process of the job: `scheduler`, or `rank 1`."""
    for pid in processes_of(log_dir):
        found = environment_of(pid)
        if role == "scheduler" and found.get("MS_ROLE") == "MS_SCHED":
            return pid
        if found.get("MS_ROLE") == "MS_WORKER" and role == f"rank {found.get('RANK_ID')}":
            return pid
    return None


def kill(log_dir: Path, role: str, number: int) -> None:
    pid = a_process(log_dir, role)
    if pid is not None:
        os.kill(pid, number)


def iterations(log_dir: Path) -> int:
    return max((row["iteration"] for row in read_rows(log_dir / "metrics.jsonl")), default=0)


@pytest.fixture
def undisturbed(tmp_path):
    workplace = working_directory(tmp_path / "work")
    return workplace, rows(pretrain_gpt(tmp_path / "calm", arguments(tmp_path / "calm_ckpt"), cwd=workplace).log_dir)


@pytest.mark.slow
def test_a_killed_rank_costs_no_number(undisturbed, tmp_path):
    workplace, calm = undisturbed
    logs = tmp_path / "logs"
    process = start(logs, arguments(tmp_path / "ckpt"), cwd=workplace, AUTO_RESTART="1")
    wait_until(lambda: iterations(logs) >= 7, "seven iterations")
    kill(logs, "rank 1", signal.SIGKILL)
    run = finish(process, logs)
    assert run.status == 0, run.console
    assert "WARNING - start 2, from iteration" in run.console and "killed by signal 9" in run.console
    assert (logs / "crash_report_1.txt").exists()
    assert rows(logs) == calm
    assert processes_of(logs) == []


@pytest.mark.slow
def test_many_kills_of_anything_cost_no_number(undisturbed, tmp_path):
    workplace, calm = undisturbed
    logs, rng = tmp_path / "logs", random.Random(3)
    process = start(logs, arguments(tmp_path / "ckpt", "--async-save"), cwd=workplace, AUTO_RESTART="50")
    kills = 0
    while process.poll() is None and kills < 12:
        time.sleep(rng.uniform(1.0, 9.0))
        role = rng.choice(["rank 0", "rank 1", "scheduler"])
        number = rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV, signal.SIGSTOP])
        if a_process(logs, role) is not None:
            kill(logs, role, number)
            kills += 1
    run = finish(process, logs)
    assert run.status == 0, run.console
    assert rows(logs) == calm
    assert processes_of(logs) == []


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], "--save and --load name one directory; they are not given and not given"),
        (["--save", "a", "--load", "b"], "they are a and b"),
        (["--save", "a", "--load", "a"], "needs --save-interval"),
        (["--save", "a", "--load", "a", "--save-interval", "5", "--finetune"], "every start begins at iteration 0"),
    ],
)
def test_what_cannot_go_on_by_itself_is_refused(more, words, tmp_path):
    workplace = working_directory(tmp_path)
    run = pretrain_gpt(tmp_path / "logs", ["--config", "empty.yaml", *SMALL, *more], cwd=workplace, status=2,
                       AUTO_RESTART="2")  # fmt: skip
    assert "AUTO_RESTART=2" in run.console and words in run.console


def test_a_job_that_gets_nowhere_stays_down(tmp_path):
    workplace = working_directory(tmp_path)
    program = tmp_path / "pretrain_gpt.py"
    program.write_text("import sys\nsys.exit(3)\n")
    command = [sys.executable, "-m", "parallel_core.launch", str(program), *arguments(tmp_path / "ckpt")]
    environment = launcher_environment(tmp_path / "logs", AUTO_RESTART="1", NPROC="2")
    done = subprocess.run(command, cwd=workplace, env=environment, capture_output=True, text=True)
    assert done.returncode == 3
    assert "AUTO_RESTART=1: it failed 2 times without a checkpoint in between; it stays down" in done.stdout
