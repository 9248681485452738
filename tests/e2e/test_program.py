"""What a run prints, writes and leaves behind, through the real `pretrain_gpt.sh`."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from parallel_core.checkpoint import find_checkpoint
from parallel_core.launch.processes import environment_of
from tests.e2e.runs import SMALL, finish, pretrain_gpt, read_rows, start, working_directory
from tests.helpers.launching import REPO, launcher_environment, processes_of, wait_until

STEP_LINE = re.compile(
    r"^INFO - Epoch: \d+, Step: \d+, Loss: -?[\d.]+, Time: [\d.]+ ms, LR: [\d.e+-]+, Grad norm: [\d.]+, "
    r"Tokens/s: \d+, Loss scale: [\d.e+]+, Skipped: \d+, Memory: \d+ MB, Progress: \d+/\d+ \(\d+%\), Left: [\d:]+"
)
GREPPED = re.compile(r"INFO - Epoch: (\d+), Step: (\d+), Loss: (\d+\.\d{10}|nan|inf), Time: (\d+\.\d{2}) ms")
"""The part of the line that people look for."""
METRICS = {
    "iteration": int, "consumed_samples": int, "loss": float, "grad_norm": float, "lr": float, "weight_decay": float,
    "loss_scale": float, "skipped": bool, "elapsed_ms": float, "tokens_per_s": float,
}  # fmt: skip
EVALUATION = {"iteration": int, "split": str, "loss": float, "ppl": float}
TWO_STAGES = ["--pipeline-model-parallel-size", "2"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    return working_directory(tmp_path_factory.mktemp("program"))


@pytest.fixture
def log_dir(tmp_path: Path):
    """A log directory whose job must be gone when the test ends, however the test ends."""
    path = tmp_path / "logs"
    yield path
    left = processes_of(path)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, f"processes left behind: {left}"


def small(**changes: str) -> list[str]:
    flags = list(SMALL)
    for name, value in changes.items():
        flag = "--" + name.replace("_", "-")
        if flag in flags:
            flags[flags.index(flag) + 1] = value
        else:
            flags += [flag, value]
    return ["--config", "empty.yaml", *flags]


def test_console_logs_metrics_and_checkpoints(workplace: Path, log_dir, tmp_path):
    save = tmp_path / "ckpt"
    flags = small(
        train_iters="8", split="70,20,10", eval_iters="1", eval_interval="3", save=str(save), save_interval="4"
    )
    run = pretrain_gpt(log_dir, [*flags, *TWO_STAGES], cwd=workplace)

    steps = [line for line in run.console.splitlines() if "Step:" in line and "Evaluation" not in line]
    assert len(steps) == 8
    for number, line in enumerate(steps, start=1):
        assert STEP_LINE.match(line), line
        assert GREPPED.match(line)[2] == str(number)
        assert float(GREPPED.match(line)[3]) == pytest.approx(run.steps[number]["loss"], abs=1e-9)
    # Rank 0's log has them, though the losses are made by the other; and the console shows each once.
    assert sum("Step:" in line for line in (log_dir / "worker_1.log").read_text().splitlines()) == 0
    assert steps == [
        line for line in (log_dir / "worker_0.log").read_text().splitlines() if line.startswith("INFO - Epoch")
    ]

    evaluations = [line for line in run.console.splitlines() if "Evaluation:" in line]
    assert [re.match(r"INFO - Evaluation: (\w+), Step: (\d+), Loss: \d+\.\d{10}, PPL: \d+\.\d{4}$", line).groups()
            for line in evaluations] == [("validation", "3"), ("validation", "6"), ("validation", "8"), ("test", "8")]
    assert [(row["split"], row["iteration"]) for row in run.evaluations] == [
        ("validation", 3), ("validation", 6), ("validation", 8), ("test", 8)
    ]  # fmt: skip
    for rows, keys in ((run.steps.values(), METRICS), (run.evaluations, EVALUATION)):
        for row in rows:
            assert {key: type(value) for key, value in row.items()} == keys
    for row in run.evaluations:
        assert row["ppl"] == pytest.approx(math.exp(row["loss"]))
    assert [row["consumed_samples"] for row in run.steps.values()] == [8 * i for i in range(1, 9)]

    assert [line for line in run.console.splitlines() if "Saved checkpoint" in line] == [
        f"INFO - Saved checkpoint {save}/iter_0000004", f"INFO - Saved checkpoint {save}/iter_0000008"
    ]  # fmt: skip
    assert (save / "latest_checkpointed_iteration.txt").read_text().strip() == "8"
    assert f"--load {save}" in run.console  # the commands to try next
    assert run.console.splitlines()[-1] == f"INFO - 2 ranks ended well; logs: {log_dir}/worker_*.log"


def worker(log_dir: Path, rank: int) -> int:
    def is_it(environment: dict[str, str]) -> bool:
        return environment.get("MS_ROLE") == "MS_WORKER" and environment.get("RANK_ID") == str(rank)

    (found,) = [pid for pid in processes_of(log_dir) if is_it(environment_of(pid))]
    return found


def iterations_done(log_dir: Path) -> int:
    try:
        return max((row["iteration"] for row in read_rows(log_dir / "metrics.jsonl")), default=0)
    except json.JSONDecodeError:  # the last line is being written
        return 0


ENDLESS = {"train_iters": "100000", "log_interval": "1000", "split": "100,0,0"}


def test_a_killed_rank_ends_the_job_and_leaves_a_whole_checkpoint(workplace: Path, log_dir, tmp_path):
    save = tmp_path / "ckpt"
    flags = [*small(**ENDLESS, save=str(save), save_interval="2", keep_checkpoint_max="2"), *TWO_STAGES]
    process = start(log_dir, flags, cwd=workplace)
    wait_until(lambda: iterations_done(log_dir) >= 7 or process.poll() is not None, "seven iterations")
    os.kill(worker(log_dir, 1), signal.SIGKILL)
    begun = time.monotonic()
    run = finish(process, log_dir)
    assert run.status == 128 + signal.SIGKILL
    assert "ERROR - rank 1 failed first, of 2 ranks: killed by signal 9 (SIGKILL)" in run.console
    assert not processes_of(log_dir)
    assert time.monotonic() - begun < 120  # seconds on an idle machine; not the ten minutes of a lost peer
    last = find_checkpoint(save, None, check=True)  # whatever a save left half done is no checkpoint
    iteration = int(Path(last).name.removeprefix("iter_"))
    assert iteration >= 4 and iteration % 2 == 0
    on = small(**ENDLESS, load=str(save), exit_interval="2")
    again = pretrain_gpt(tmp_path / "again", on, cwd=workplace)
    assert sorted(again.steps) == [iteration + 1, iteration + 2]


@pytest.mark.parametrize(
    ("number", "ranks"), [(signal.SIGINT, 2), pytest.param(signal.SIGTERM, 1, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_ends(number: signal.Signals, ranks: int, workplace: Path, log_dir, tmp_path):
    save = tmp_path / "ckpt"
    flags = [*small(**ENDLESS, save=str(save)), *(TWO_STAGES if ranks == 2 else [])]
    # The grace is long: nothing here is about how fast a busy machine saves.
    process = start(log_dir, flags, cwd=workplace, STOP_GRACE_S="100")
    wait_until(lambda: iterations_done(log_dir) >= 3 or process.poll() is not None, "three iterations")
    process.send_signal(number)
    run = finish(process, log_dir)
    assert run.status == 128 + number, run.console
    assert not processes_of(log_dir)
    last = max(run.steps)
    assert f"INFO - Saved checkpoint {save}/iter_{last:07d}" in run.console
    assert f"INFO - Stopped after iteration {last} of 100000" in run.console
    assert find_checkpoint(save, None, check=True).name == f"iter_{last:07d}"


def test_a_loss_that_is_no_number_ends_the_run_and_names_the_parameters(workplace: Path, log_dir):
    flags = [*small(lr="1e30", min_lr="0", lr_warmup_iters="0", clip_grad="0"), *TWO_STAGES]
    run = pretrain_gpt(log_dir, flags, cwd=workplace, status=1)
    assert "the gradient norm is nan after" in run.console or "the gradient norm is inf after" in run.console
    assert re.search(r"\n +.*decoder\.layers\.\d\.\S+", run.console)
    assert "--no-check-for-nan-in-loss-and-grad" in run.console
    assert "Traceback" not in run.console


def test_a_loss_that_is_no_number_is_printed(workplace: Path, log_dir):
    flags = small(lr="1e30", min_lr="0", lr_warmup_iters="0", clip_grad="0", train_iters="6")
    run = pretrain_gpt(log_dir, [*flags, "--no-check-for-nan-in-loss-and-grad"], cwd=workplace)
    lost = [i for i, loss in run.column("loss").items() if loss is None]
    assert lost and lost[-1] == 6 and sorted(run.steps) == [1, 2, 3, 4, 5, 6]
    for iteration in lost:
        assert re.search(rf"INFO - Epoch: \d+, Step: {iteration}, Loss: nan, Time: ", run.console)


def printed_commands(console: str) -> list[str]:
    """The commands under `Next:`, as they stand on the console."""
    lines = [line.removeprefix("INFO - ") for line in console.splitlines()]
    start = next(number for number, line in enumerate(lines) if line.endswith("Next:")) + 1
    return [line for line in lines[start:] if line.startswith("  ")]


def test_the_commands_printed_at_the_end_run_as_printed(workplace: Path, log_dir, tmp_path):
    """From the same directory and environment: the run goes on, in two layouts, and the checkpoint is shown."""
    environment = {**launcher_environment(log_dir), "PYTHON": sys.executable}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    flags = small(train_iters="2", lr_warmup_iters="1", save=str(tmp_path / "my ck"), eval_iters="0")
    first = pretrain_gpt(log_dir, [*flags, *TWO_STAGES], cwd=workplace)
    commands = printed_commands(first.console)
    assert [command.partition("    # ")[2] for command in commands] == ["train on", "in another layout", "look inside"]
    for command, iterations in zip(commands, (52, 52, 0)):
        done = subprocess.run(
            ["bash", "-c", command], cwd=workplace, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, command + "\n" + done.stdout + done.stderr
        if iterations:
            assert f"Saved checkpoint {tmp_path}/my ck/iter_{iterations:07d}" in done.stdout
        (tmp_path / "my ck" / "latest_checkpointed_iteration.txt").write_text("2")


def test_the_commands_of_a_script_of_ones_own_run_as_printed(workplace: Path, tmp_path):
    environment = {**launcher_environment(tmp_path / "logs"), "PATH": os.environ["PATH"]}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    script = tmp_path / "my own.py"
    script.write_text((REPO / "pretrain_gpt.py").read_text())
    flags = small(train_iters="2", lr_warmup_iters="1", save=str(tmp_path / "ck"), eval_iters="0")

    def run(command: list[str]) -> str:
        done = subprocess.run(command, cwd=workplace, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    commands = printed_commands(run(["python", str(script), *flags]))
    assert [command.partition("    # ")[2] for command in commands] == ["train on", "look inside"]
    assert f"Saved checkpoint {tmp_path}/ck/iter_0000052" in run(["bash", "-c", commands[0]])
    assert "52" in run(["bash", "-c", commands[1]])
