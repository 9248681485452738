"""A user's own microbatches end before the run does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.e2e.runs import SMALL, read_rows, working_directory
from tests.helpers.launching import launcher_environment

SCRIPT = """
import numpy as np
import pretrain_gpt
from parallel_core.launch.entry import run_as_rank
from parallel_core.training import pretrain

def batches(number):
    generator = np.random.default_rng(0)
    for _ in range(number):
        text = generator.integers(0, 255, (2, 17), np.int32)
        positions = np.tile(np.arange(16, dtype=np.int32), (2, 1))
        yield {
            "tokens": text[:, :-1], "labels": text[:, 1:], "position_ids": positions,
            "loss_mask": np.ones((2, 16), np.float32),
        }

run_as_rank(lambda: pretrain(
    None, pretrain_gpt.model_provider_func, forward_step_func=pretrain_gpt.model_forward_step,
    train_data_loader=batches(10),
))
"""


def test_data_that_runs_out_ends_the_run_and_says_so(tmp_path: Path):
    workplace = working_directory(tmp_path / "work")
    (workplace / "own_data.py").write_text(SCRIPT)
    environment = launcher_environment(tmp_path / "unused")
    arguments = ["--config", "empty.yaml", *SMALL, "--log-dir", str(tmp_path / "logs")]
    done = subprocess.run(
        [sys.executable, "own_data.py", *arguments],
        cwd=workplace, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert done.stderr.splitlines()[-1] == (
        "DataError: the data is used up: the dataset holds fewer samples than the run asks for; give --train-iters or "
        "--train-samples that fit, more data, or --dataloader-type cyclic; of batches of one's own give what can be "
        "iterated again (a list, a class with __iter__) in place of an iterator"
    )
    assert "Traceback" not in done.stderr
    # Ten microbatches are two iterations of four and half of a third.
    rows = read_rows(tmp_path / "logs" / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == [1, 2]
