"""MindFormers' Trainer in a job uses all of its ranks, and trains what one process trains."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.launching import launcher_environment, run_launcher

SCRIPT = str(Path(__file__).parent / "scripts" / "trainer_on_ranks.py")


def losses(logs: Path) -> list[float]:
    """Read a run's losses, which lie under output_dir, and in a job where the launcher has its logs."""
    return [json.loads(line)["loss"] for line in (logs / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_ranks_train_like_one(tmp_path):
    environment = launcher_environment(tmp_path / "logs", GLOG_v="3")
    command = [sys.executable, SCRIPT, str(tmp_path / "alone"), "1", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wanted = losses(tmp_path / "alone" / "log")
    assert len(wanted) == 6 and wanted[-1] < wanted[0]
    for name, layout in (("tp2", ("2", "1")), ("pp2", ("1", "2")), ("dp2", ("1", "1"))):
        words = (SCRIPT, str(tmp_path / name), *layout)
        status, console = run_launcher(tmp_path / f"logs_{name}", *words, NPROC="2")
        assert status == 0, console
        assert losses(tmp_path / f"logs_{name}") == pytest.approx(wanted, rel=1e-5), name
