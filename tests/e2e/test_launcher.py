"""The launcher with real msrun jobs: how they end, what the console says, and that nothing is left."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from parallel_core.launch.processes import environment_of
from tests.helpers.launching import (
    PATIENCE_S,
    REPO,
    launcher_environment,
    processes_of,
    run_launcher,
    start_launcher,
    wait_until,
)

SCRIPT = str(REPO / "tests/e2e/scripts/rank_script.py")
TINY = str(REPO / "configs/gpt_tiny.yaml")
TWO_RANKS = ["--config", TINY, "--pipeline-model-parallel-size", "1", "--num-layers", "1", "--eval-iters", "0"]


@pytest.fixture
def log_dir(tmp_path: Path):
    """A log directory whose job must be gone when the test ends, however the test ends."""
    path = tmp_path / "logs"
    yield path
    left = processes_of(path)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, f"processes left behind: {left}"


def console_when(process: subprocess.Popen[str], wanted: list[str]) -> None:
    """Read the console until every wanted line has come."""
    missing = set(wanted)
    while missing:
        line = process.stdout.readline()
        assert line, f"the console ended before {missing}"
        missing.discard(line.strip())


def test_a_job_that_ends_well_shows_each_console_line_once(log_dir):
    status, console = run_launcher(log_dir, SCRIPT, "--communicate", NPROC="2", OMP_NUM_THREADS="3")
    assert status == 0, console
    lines = console.splitlines()
    assert lines[0] == f"INFO - starting 2 ranks on CPU; logs: {log_dir}/worker_*.log"
    assert sorted(lines[1:-1]) == ["INFO - rank 0 done", "INFO - rank 1 done", "INFO - sum 1 of 2 ranks"]
    assert lines[-1] == f"INFO - 2 ranks ended well; logs: {log_dir}/worker_*.log"
    assert "DEBUG - rank 1 with 3 threads" in (log_dir / "worker_1.log").read_text()


def test_a_failing_rank_ends_the_job_and_shows_its_traceback(log_dir):
    status, console = run_launcher(log_dir, SCRIPT, "--fail", "1", "--hang", "0", "--spawn", "0", NPROC="2")
    assert status == 1
    assert "ERROR - rank 1 failed first, of 2 ranks: ValueError: rank 1 met a bad value" in console
    assert 'raise ValueError(f"rank {rank} met a bad value")' in console
    assert "rank 0 then" not in console  # it failed because it was told to stop


def test_a_killed_rank_is_named_and_not_the_peers_that_lost_it(log_dir):
    status, console = run_launcher(log_dir, SCRIPT, "--kill", "1", "--lose_peer", "0", "2", NPROC="3")
    assert status == 128 + signal.SIGKILL
    assert "ERROR - rank 1 failed first, of 3 ranks: killed by signal 9 (SIGKILL)" in console
    assert "DEBUG - rank 1 with" in console  # the last lines of its log


def test_a_rank_killed_from_outside_while_all_wait(log_dir):
    process = start_launcher(log_dir, SCRIPT, "--hang", "0", "1", NPROC="2")
    console_when(process, ["INFO - rank 0 waits", "INFO - rank 1 waits"])
    (victim,) = [pid for pid in processes_of(log_dir) if _is_worker(environment_of(pid), 0)]
    os.kill(victim, signal.SIGKILL)
    console, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGKILL
    assert "ERROR - rank 0 failed first, of 2 ranks: killed by signal 9" in console


def _is_worker(environment: dict[str, str], rank: int) -> bool:
    return environment.get("MS_ROLE") == "MS_WORKER" and environment.get("RANK_ID") == str(rank)


def test_a_mistake_is_shown_as_its_message_alone(log_dir):
    status, console = run_launcher(log_dir, SCRIPT, "--mistake", "0", "1", NPROC="2")
    assert status == 2
    assert "ConfigError: num_layers=3 cannot be split over 2 stages" in console
    assert "Traceback" not in console + (log_dir / "worker_0.log").read_text()


def test_a_script_that_cannot_be_imported_is_reported(log_dir, tmp_path):
    script = tmp_path / "broken.py"
    script.write_text("import no_such_module\n")
    status, console = run_launcher(log_dir, str(script), NPROC="1")
    assert status == 1
    assert "ModuleNotFoundError: No module named 'no_such_module'" in console


def current_folder_of_somebody(tmp_path):
    """Return a folder whose files would be taken for modules of Python, of its packages and of this one."""
    folder = tmp_path / "anybodys"
    folder.mkdir()
    names = ("yaml", "random", "json", "runpy", "os", "glob", "dataclasses", "numpy", "mindspore", "parallel_core")
    for name in (*names, "sitecustomize", "usercustomize", "neighbour"):
        (folder / f"{name}.py").write_text(f"open({str(folder / 'ran')!r}, 'a').write({name!r})")
    return folder


@pytest.mark.parametrize("variables", [{}, {"PYTHONPATH": f":{REPO}::"}], ids=["usual", "empty entries"])
def test_nothing_is_imported_from_the_current_folder(log_dir, tmp_path, variables):
    """The wrapper, the launcher, msrun, the scheduler and the rank; a script's own neighbours are found."""
    folder, scripts = current_folder_of_somebody(tmp_path), tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "neighbour.py").write_text("print('INFO - the right neighbour', flush=True)")
    (scripts / "pretrain_gpt.py").write_text("import neighbour, yaml, random, json, numpy, mindspore")
    wrapper = (REPO / "pretrain_gpt.sh").read_text()
    assert '"$here/pretrain_$model.py"' in wrapper
    wrapper = wrapper.replace('"$here/pretrain_$model.py"', f'"{scripts}/pretrain_gpt.py"')
    (scripts / "wrapper.sh").write_text(wrapper.replace('here="$(cd "$directory" && pwd)"', f'here="{REPO}"'))
    environment = {**launcher_environment(log_dir), "PYTHON": sys.executable, **variables}
    done = subprocess.run(
        ["/bin/bash", str(scripts / "wrapper.sh"), "--train-iters", "20", *TWO_RANKS],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "INFO - the right neighbour" in done.stdout, done.stdout + done.stderr
    assert not (folder / "ran").exists(), (folder / "ran").read_text()


def test_the_launcher_as_a_module_imports_nothing_from_the_current_folder_of_its_own(log_dir, tmp_path):
    folder = current_folder_of_somebody(tmp_path)
    for name in ("parallel_core", "os", "runpy", "sitecustomize", "usercustomize"):  # Python's own, before it asks
        (folder / f"{name}.py").unlink()
    command = [sys.executable, "-m", "parallel_core.launch", "--plain", SCRIPT]
    environment = launcher_environment(log_dir, NPROC="1")
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (folder / "ran").exists(), (folder / "ran").read_text()


def test_no_module_of_the_launcher_hides_one_of_python():
    """A rank is started by its file, whose folder is the first to be searched until the script's takes its place."""
    names = {path.stem for path in (REPO / "parallel_core/launch").glob("*.py")}
    assert "rank" in names and not names & sys.stdlib_module_names


@pytest.mark.parametrize(("signum", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_ranks_save_and_ends_every_process(log_dir, signum, expected):
    process = start_launcher(log_dir, SCRIPT, "--spawn", "1", "--save", "0", "1", NPROC="2")
    console_when(process, ["INFO - rank 0 waits", "INFO - rank 1 waits"])
    process.send_signal(signum)
    console, _ = process.communicate()
    assert process.returncode == expected
    assert f"stopped by {signum.name}" in console
    assert sorted(path.name for path in log_dir.glob("saved_*")) == ["saved_0", "saved_1"]


def test_a_rank_deaf_to_the_request_is_killed_after_the_grace(log_dir):
    process = start_launcher(log_dir, SCRIPT, "--stuck", "0", "--save", "1", NPROC="2", STOP_GRACE_S="0.5")
    console_when(process, ["INFO - rank 0 waits", "INFO - rank 1 waits"])
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == 130
    assert (log_dir / "saved_1").exists()


SHORT_GRACE = """
import os, sys
from dataclasses import replace
from pathlib import Path
from parallel_core.launch.job import Job
from parallel_core.launch.plan import plan_job, prepare_log_dir

spec = replace(plan_job(tuple(sys.argv[1:]), 2, Path(os.environ["LOG_DIR"]), os.environ), stop_grace_s=0.5)
prepare_log_dir(spec.log_dir)
sys.exit(Job(spec).run())
"""
"""The launcher with a grace that is over before a rank has saved, and that nobody asked for."""


def start_with_short_grace(log_dir: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SHORT_GRACE, SCRIPT, *arguments], env=launcher_environment(log_dir, **variables),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def test_ranks_that_save_get_the_time_it_takes(log_dir):
    process = start_with_short_grace(log_dir, "--save_slowly", "0", "1")
    console_when(process, ["INFO - rank 0 waits", "INFO - rank 1 waits"])
    process.send_signal(signal.SIGTERM)
    console, _ = process.communicate()
    assert process.returncode == 143
    assert "INFO - they end the running iteration and save first, however long that takes" in console
    assert "killing" not in console
    assert sorted(path.name for path in log_dir.glob("sav*")) == ["saved_0", "saved_1"]


def test_patience_ends_with_the_ranks_that_promised(log_dir):
    process = start_with_short_grace(log_dir, "--save_slowly", "0", "--stuck", "1")
    console_when(process, ["INFO - rank 0 waits", "INFO - rank 1 waits"])
    process.send_signal(signal.SIGTERM)
    console, _ = process.communicate()
    assert (log_dir / "saved_0").exists()
    assert (
        "WARNING - killing rank(s) 1, which did not end within STOP_GRACE_S=0.5 s: what they had not saved is lost"
    ) in console


def test_a_grace_that_is_given_holds_and_the_launcher_says_what_it_cost(log_dir):
    process = start_launcher(log_dir, SCRIPT, "--save_slowly", "0", "1", NPROC="2", STOP_GRACE_S="0.5")
    console_when(process, ["INFO - rank 0 waits", "INFO - rank 1 waits"])
    process.send_signal(signal.SIGINT)
    console, _ = process.communicate()
    assert process.returncode == 130 and not list(log_dir.glob("saved_*"))
    assert (
        "WARNING - killing rank(s) 0, 1, which did not end within STOP_GRACE_S=0.5 s: what they had not saved is lost"
    ) in console


def test_a_second_ctrl_c_does_not_wait_for_the_grace(log_dir):
    process = start_launcher(log_dir, SCRIPT, "--stuck", "0", NPROC="1", STOP_GRACE_S="3600")
    console_when(process, ["INFO - rank 0 waits"])
    process.send_signal(signal.SIGINT)
    console_when(process, ["INFO - SIGINT: stopping the ranks; press again to end them at once"])
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130


def test_a_killed_launcher_takes_its_ranks_with_it(log_dir):
    process = start_launcher(log_dir, SCRIPT, "--stuck", "0", "1", NPROC="2")
    console_when(process, ["INFO - rank 0 waits", "INFO - rank 1 waits"])
    assert len(processes_of(log_dir)) >= 2
    process.kill()
    process.communicate()
    wait_until(lambda: not processes_of(log_dir), "the ranks end with the launcher")


def test_a_launcher_killed_while_ranks_start_leaves_none(log_dir):
    process = start_launcher(log_dir, SCRIPT, "--stuck", "0", "1", NPROC="2")
    wait_until(lambda: (log_dir / "worker_0.log").exists(), "msrun starts the ranks")
    process.kill()
    process.communicate()
    wait_until(lambda: not processes_of(log_dir), "msrun and the ranks end with the launcher")


def test_a_port_in_use_is_named_before_anything_starts(log_dir):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        status, console = run_launcher(log_dir, SCRIPT, NPROC="2", MASTER_PORT=str(port))
    assert status == 2
    assert console == (
        f"MASTER_PORT={port}: port {port} is in use on this machine, perhaps by a scheduler that is still closing; "
        "give another, or unset MASTER_PORT and a free one is chosen\n"
    )
    assert not log_dir.exists()


def test_old_logs_are_replaced_and_other_files_kept(log_dir):
    log_dir.mkdir()
    for name in ("worker_0.log", "worker_7.log", "scheduler.log", "metrics.jsonl", "error_rank_0.json", "notes.txt"):
        (log_dir / name).write_text("INFO - of an earlier run\n")
    status, console = run_launcher(log_dir, SCRIPT, NPROC="1")
    assert status == 0
    assert "earlier" not in console
    assert sorted(path.name for path in log_dir.iterdir()) == [
        "msrun.log",
        "notes.txt",
        "scheduler.log",
        "worker_0.log",
    ]


def test_a_log_directory_in_use_is_refused(log_dir):
    process = start_launcher(log_dir, SCRIPT, "--hang", "0", NPROC="1")
    console_when(process, ["INFO - rank 0 waits"])
    status, console = run_launcher(log_dir, SCRIPT, NPROC="1")
    assert (status, console) == (
        2,
        f"LOG_DIR={log_dir} belongs to a run that is still going; give this one another LOG_DIR\n",
    )
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == 143


def test_a_closed_console_ends_the_job(log_dir):
    process = start_launcher(log_dir, SCRIPT, "--chatter", "0", "--hang", "1", NPROC="2")
    console_when(process, ["INFO - rank 0 waits"])
    process.stdout.close()  # as `| head` does
    process.wait()
    assert process.returncode == 128 + signal.SIGPIPE


def run_wrapper(directory: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["/bin/bash", str(REPO / "pretrain_gpt.sh"), *arguments]
    environment = {**launcher_environment(directory / "logs"), "PYTHON": sys.executable, **variables}
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)


def test_the_wrapper_checks_the_bundled_configuration_from_any_directory(tmp_path):
    done = run_wrapper(tmp_path, "--train-iters", "3", "--tensor-model-paralel-size", "2")
    assert done.returncode == 2
    assert done.stdout == f"INFO - no argument of the model, the layout or the data: --config {TINY} is used\n"
    assert "--tensor-model-paralel-size: unknown argument; did you mean --tensor-model-parallel-size?" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_wrapper_adds_nothing_to_a_command_line_of_ones_own(tmp_path):
    """A pasted Megatron command keeps Megatron's defaults: the bundled configuration has width 128 and 2 x 2 ranks."""
    done = run_wrapper(tmp_path, "--num-layers", "3", "--seq-length", "8", "--micro-batch-size", "1", "--lr", "1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "2 problems in the configuration:\n"
        "  hidden_size: required, and not given; add hidden_size to the file or --hidden-size N\n"
        "  num_attention_heads: required, and not given; add num_attention_heads to the file or --num-attention-heads "
        f"N\n  To change the small model that runs without arguments, add --config {TINY}\n"
    )


def test_the_wrapper_takes_a_given_configuration_instead_of_the_bundled_one(tmp_path):
    done = run_wrapper(tmp_path, "--config", "mine.yaml")
    assert (done.returncode, done.stderr) == (2, "mine.yaml: no such file\n")


def test_the_wrapper_says_what_it_reads_from_the_environment(tmp_path):
    done = run_wrapper(tmp_path, "--help")
    assert done.returncode == 0
    assert {"NPROC", "MASTER_PORT", "LOG_DIR", "DEVICE_TARGET", "PYTHON"} <= set(done.stdout.split())


def test_the_wrapper_without_a_python_says_so(tmp_path):
    done = run_wrapper(tmp_path, PYTHON="", PATH=str(tmp_path))
    assert (done.returncode, done.stderr) == (
        2,
        "no python or python3 on PATH; activate the environment parallel_core is installed in\n",
    )


def test_a_python_without_the_dependencies_is_named(tmp_path):
    done = run_wrapper(tmp_path, PYTHON=bare_python(tmp_path))
    assert done.returncode == 2
    assert "has no mindspore, no numpy, no pyyaml" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_rank_killed_while_training_ends_the_job_and_leaves_its_metrics(log_dir, tmp_path):
    command = ["/bin/bash", str(REPO / "pretrain_gpt.sh"), *TWO_RANKS, "--train-iters", "100000", "--log-interval", "1"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**launcher_environment(log_dir), "PYTHON": sys.executable},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    read = []
    for line in process.stdout:
        read.append(line)
        if line.startswith("INFO - Epoch: 0, Step: 2, Loss: "):
            (victim,) = [pid for pid in processes_of(log_dir) if _is_worker(environment_of(pid), 1)]
            os.kill(victim, signal.SIGKILL)
    console = "".join(read)
    assert process.wait() == 128 + signal.SIGKILL, console
    assert read[0].startswith("INFO - starting 2 ranks (tensor 2) on CPU")
    assert "ERROR - rank 1 failed first, of 2 ranks: killed by signal 9 (SIGKILL)" in console
    metrics = [json.loads(line) for line in (log_dir / "metrics.jsonl").read_text().splitlines()]
    assert [entry["iteration"] for entry in metrics[:2]] == [1, 2]


def bare_python(directory: Path) -> str:
    """Return a command that runs this Python without its site packages."""
    script = directory / "bare_python"
    script.write_text(f'#!/bin/bash\nexec {sys.executable} -S "$@"\n')
    script.chmod(0o755)
    return str(script)


def test_the_ranks_read_the_configuration_that_the_launcher_resolved(log_dir, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text((REPO / "configs/gpt_tiny.yaml").read_text())
    console = subprocess.run(
        [sys.executable, "-m", "parallel_core.launch", str(REPO / "tests/e2e/scripts/read_configuration.py"),
         "--config", str(file), "--pipeline-model-parallel-size", "1", "--num-layers", "3"],
        env=launcher_environment(log_dir), capture_output=True, text=True, timeout=PATIENCE_S,
    )
    assert console.returncode == 0, console.stdout + console.stderr
    assert console.stdout.count("INFO - 3 layers on 2 ranks") == 2


# ---- why it broke ---------------------------------------------------------------------------------------------------
def test_a_hang_says_which_rank_was_late_and_where(log_dir):
    """Rank 0 gives up; rank 1 waits as well; rank 2 is inside a span, and its stack is shown."""
    script = str(REPO / "tests/e2e/scripts/late_rank.py")
    status, console = run_launcher(log_dir, script, NPROC="3")
    assert status != 0
    late = console.index("rank 2 was late: iteration 7 > forward-compute (microbatch 3, chunk 0), for ")
    assert "late_rank.py:" in console[late:].splitlines()[1] and "slow_layer" in console[late:].splitlines()[1]
    assert "rank 1 waited too" in console[late:]
    report = (log_dir / "crash_report.txt").read_text()
    for rank in range(3):
        assert f"== rank {rank} ==" in report
    assert "slow_layer" in report and "CommError: all_reduce" in report and "MindSpore" in report
    assert f"All that is known: {log_dir}/crash_report.txt" in console


def test_a_failure_that_is_no_wait_shows_no_other_rank(log_dir):
    status, console = run_launcher(log_dir, SCRIPT, "--fail", "1", "--hang", "0", NPROC="2")
    assert status != 0 and "was late" not in console
    assert "rank 1 met a bad value" in (log_dir / "crash_report.txt").read_text()
