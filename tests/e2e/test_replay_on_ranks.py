"""A job whose numbers are not finite names the command that finds the layer, and that command finds it."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.e2e.runs import SMALL, pretrain_gpt, working_directory
from tests.helpers.launching import launcher_environment


@pytest.mark.slow
def test_the_command_that_a_failed_job_prints_names_the_layer(tmp_path):
    workplace = working_directory(tmp_path / "work")
    words = "--tensor-model-parallel-size 2 --lr 1e38 --min-lr 1e38 --lr-warmup-iters 0 --clip-grad 0 --optimizer sgd"
    given = {word for word in words.split() if word.startswith("--")}
    kept = [word for pair in zip(SMALL[::2], SMALL[1::2]) if pair[0] not in given for word in pair]
    words += f" --save {tmp_path}/ck --save-interval 1"
    arguments = ["--config", "empty.yaml", *kept, *words.split()]
    run = pretrain_gpt(tmp_path / "logs", arguments, cwd=workplace, status=1)
    command = re.search(r"Which layer it comes from: (.+)$", run.console, re.M)[1]
    assert " --replay " in command and f"LOG_DIR={tmp_path}/logs/replay_" in command
    environment = {k: v for k, v in launcher_environment(tmp_path / "x").items() if k != "LOG_DIR"}
    done = subprocess.run(command, shell=True, cwd=workplace, env=environment, capture_output=True, text=True)
    (report,) = (tmp_path / "logs").glob("replay_*/crash_report.txt")
    for text in (done.stdout + done.stderr, report.read_text()):
        assert "the first value that is not finite is on rank" in text and re.search(r"decoder\.layers\.\d", text), text
    assert done.returncode == 1
    assert (tmp_path / "logs/crash_report.txt").exists()  # the run's own stays
