"""MindFormers' Trainer in a job uses all of its ranks, and trains what one process trains."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
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


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp2", "tp2", "pp2"])
def test_the_guides_programs_train_a_given_model_on_all_ranks(tmp_path, layout):
    """A model object, rows that every rank would draw otherwise, copies of batches, evaluation on all ranks."""
    words = (str(Path(SCRIPT).with_name("guide_on_ranks.py")), layout, str(tmp_path / "out"))
    status, console = run_launcher(tmp_path / "logs", *words, NPROC="2")
    assert status == 0, console
    text = (tmp_path / "logs" / "worker_0.log").read_text() + console
    found = json.loads(next(line for line in text.splitlines() if line.startswith("{") and '"size"' in line))
    assert found["size"] == 2 and found["untouched"] and found["again"] == pytest.approx(found["loss"], rel=1e-6)
    trained = losses(tmp_path / "logs")
    assert len(trained) == {"dp2": 8, "tp2": 8, "pp2": 8}[layout] and trained[-1] < trained[0]
    if layout == "dp2":
        assert trained[0] == pytest.approx(np.log(64), abs=0.02)  # the word embedding that was given is zero
