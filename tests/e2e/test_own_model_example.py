"""`examples/own_model.py`: tensor parallel layers in a user's model train alike on one process and on two."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.helpers.launching import REPO, launcher_environment, run_launcher

EXAMPLE = str(REPO / "examples" / "own_model.py")


def losses(text: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"step +\d+, loss ([\d.]+)", text)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> list[float]:
    environment = launcher_environment(tmp_path_factory.mktemp("logs"), GLOG_v="3")
    done = subprocess.run([sys.executable, EXAMPLE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return losses(done.stdout)


def test_it_learns(alone):
    assert len(alone) == 30
    assert alone[0] > 4  # ln(64) = 4.16 for a guess
    assert alone[-1] < 0.01


@pytest.mark.parametrize("words", [pytest.param([], marks=pytest.mark.slow), ["--sequence-parallel"]])
def test_two_ranks_are_one(alone, tmp_path, words):
    status, console = run_launcher(tmp_path / "logs", EXAMPLE, *words, NPROC="2")
    assert status == 0, console
    # fp32: one sum of two parts in every layer; printed with six decimals.
    assert losses(console) == pytest.approx(alone, rel=1e-4, abs=2e-6)
