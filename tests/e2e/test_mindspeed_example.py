"""`examples/pretrain_gpt_mindspeed.py`: scripts written for MindSpeed-Core-MS train the same model, in any layout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.launching import REPO, launcher_environment, run_launcher

EXAMPLE = REPO / "examples" / "pretrain_gpt_mindspeed.py"
FLAGS = """
    --num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16
    --micro-batch-size 2 --global-batch-size 8 --train-iters 4 --lr 1e-2 --mock-data --tokenizer-type NullTokenizer
    --vocab-size 63 --padded-vocab-size 64 --kernels local --log-interval 1 --eval-interval 2 --eval-iters 1
    --attention-dropout 0 --hidden-dropout 0
"""


def alone(script: Path, folder: Path, *more: str) -> list[dict]:
    """Run a script on one process and return its metrics."""
    environment = launcher_environment(folder, OMP_NUM_THREADS="1", GLOG_v="3")
    command = [sys.executable, str(script), *FLAGS.split(), "--log-dir", str(folder), *more]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return metrics(folder)


def metrics(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def curve(rows: list[dict]) -> list[tuple]:
    return [(row["iteration"], row.get("split"), row["loss"], row.get("grad_norm")) for row in rows]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The same configuration through the package's own script."""
    return curve(alone(REPO / "pretrain_gpt.py", tmp_path_factory.mktemp("reference") / "logs"))


def assert_same_curve(rows: list[dict], reference: list[tuple], rtol: float) -> None:
    got = curve(rows)
    assert [row[:2] for row in got] == [row[:2] for row in reference]
    for ours, theirs in zip(got, reference):
        assert ours[2] == pytest.approx(theirs[2], rel=rtol)
        if theirs[3] is not None:  # evaluations have none
            assert ours[3] == pytest.approx(theirs[3], rel=10 * rtol)


def test_the_example_trains_the_packages_model(reference, tmp_path):
    # The masked mean is multiplied by the number of tokens again: one rounding in float32.
    assert_same_curve(alone(EXAMPLE, tmp_path / "logs"), reference, 1e-6)


@pytest.mark.slow
def test_a_users_model_class_trains_alike_in_parallel(reference, tmp_path):
    layout = """
        --tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2
        --virtual-pipeline-model-parallel-size 2 --own-model
    """
    logs = tmp_path / "logs"
    words = [*FLAGS.split(), *layout.split(), "--log-dir", str(logs)]
    status, console = run_launcher(logs, str(EXAMPLE), *words, NPROC="4")
    assert status == 0, console
    assert_same_curve(metrics(logs), reference, 2e-6)  # fp32, sums in another order


def test_a_resumed_run_goes_on_with_the_next_sample(reference, tmp_path):
    checkpoint = str(tmp_path / "checkpoint")
    alone(EXAMPLE, tmp_path / "first", "--save", checkpoint, "--exit-interval", "2")
    rest = alone(EXAMPLE, tmp_path / "second", "--load", checkpoint)
    assert os.path.isdir(checkpoint)
    rest = [row for row in rest if row["iteration"] > 2]
    assert_same_curve(rest, [row for row in reference if row[0] > 2], 1e-6)
