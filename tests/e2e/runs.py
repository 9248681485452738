"""Run the training program as a user does, and read what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.helpers.launching import REPO, launcher_environment

TIME_LIMIT_S = 900.0
"""No run here takes this long; a job that hangs ends its test instead of the session."""

SMALL = """
    --num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16
    --micro-batch-size 2 --global-batch-size 8 --train-iters 20 --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine
    --lr-warmup-iters 5 --weight-decay 0.01 --clip-grad 1.0 --adam-beta2 0.95 --seed 1234 --attention-dropout 0
    --hidden-dropout 0 --log-interval 1 --eval-iters 0 --num-workers 0 --make-vocab-size-divisible-by 64
    --tokenizer-type NullTokenizer --vocab-size 255 --data-path corpus_a --split 100,0,0
""".split()
"""A model of 63 thousand parameters on the corpus of `tests/golden/data`, a second's work an iteration or less."""


@dataclass
class Run:
    """A run that has ended."""

    status: int
    console: str
    log_dir: Path
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rows = read_rows(self.log_dir / "metrics.jsonl")

    @property
    def steps(self) -> dict[int, dict[str, Any]]:
        """The metrics of each iteration."""
        return {row["iteration"]: row for row in self.rows if "split" not in row}

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The metrics of each evaluation."""
        return [row for row in self.rows if "split" in row]

    def column(self, key: str) -> dict[int, Any]:
        """One value of each iteration."""
        return {iteration: row[key] for iteration, row in self.steps.items()}

    @property
    def logs(self) -> str:
        """What the ranks wrote."""
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.log_dir.glob("worker_*.log")))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a metrics file; none when it does not exist."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def start(log_dir: Path, arguments: Sequence[str], *, cwd: Path, **variables: str) -> subprocess.Popen[str]:
    """Start `bash pretrain_gpt.sh arguments…` in `cwd`; stdout and stderr are one pipe."""
    environment = launcher_environment(log_dir, PYTHON=sys.executable, **variables)
    return subprocess.Popen(
        ["bash", str(REPO / "pretrain_gpt.sh"), *arguments],
        env=environment,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
        # As at a terminal: a shell gives what it runs in the background an ignored SIGINT, and so pytest's children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process: subprocess.Popen[str], log_dir: Path, read_before: str = "") -> Run:
    """Wait for a started run and return what became of it."""
    try:
        console, _ = process.communicate(timeout=TIME_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        console, _ = process.communicate()
        raise AssertionError(f"the run did not end within {TIME_LIMIT_S:g} s:\n{console}") from None
    return Run(process.returncode, read_before + console, log_dir)


def pretrain_gpt(log_dir: Path, arguments: Sequence[str], *, cwd: Path, status: int = 0, **variables: str) -> Run:
    """Run `bash pretrain_gpt.sh arguments…` to its end, which must be with `status`."""
    run = finish(start(log_dir, arguments, cwd=cwd, **variables), log_dir)
    assert run.status == status, run.console
    return run


def several(directory: Path, num_ranks: int, plan: dict[str, dict[str, Any]], *, cwd: Path) -> dict[str, Run]:
    """Run `pretrain()` once for each entry of `plan` ({"argv": [...], ...}) on the ranks of one job, one after another.

    Starting ranks costs more than training these models, so what need not go through the script shares a start.
    An entry that fails ends with status 1; its console ends with its error. The others of one process still run.
    """
    directory.mkdir(parents=True, exist_ok=True)
    plan_file = directory / "plan.json"
    plan_file.write_text(json.dumps({"directory": str(directory), "runs": plan}))
    script = str(REPO / "tests/e2e/scripts/several_runs.py")
    environment = launcher_environment(directory / "job", NPROC=str(num_ranks))
    command = [sys.executable, "-m", "parallel_core.launch", "--plain", script, str(plan_file)]
    if num_ranks == 1:
        environment |= {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, script, str(plan_file)]
    done = subprocess.run(
        command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=4 * TIME_LIMIT_S, check=False
    )
    found = {}
    for name in plan:
        folder = directory / name
        outcome = json.loads((folder / "outcome.json").read_text()) if (folder / "outcome.json").exists() else None
        if outcome is None:
            tail = "\n".join(path.read_text()[-3000:] for path in (directory / "job").glob("worker_*.log"))
            found[name] = Run(1, f"{name} did not end\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}\n{tail}", folder)
        else:
            said = "".join(path.read_text() for path in sorted(folder.glob("console_*.txt")))
            found[name] = Run(outcome["status"], said + outcome["text"], folder)
    return found


def working_directory(path: Path) -> Path:
    """Return `path` with a copy of the small corpus: its index caches are written beside it."""
    path.mkdir(parents=True, exist_ok=True)
    for name in ("corpus_a.bin", "corpus_a.idx"):
        (path / name).write_bytes((REPO / "tests/golden/data" / name).read_bytes())
    (path / "empty.yaml").write_text("{}\n")
    return path


def config_file(path: Path, text: str) -> str:
    """Write a configuration and return its path."""
    path.write_text(text)
    return os.fspath(path)
