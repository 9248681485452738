"""The guide's YAML and its steps, run on the CPU with its vocabulary and smaller widths."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys

from config_helpers import GOLDEN, ROOT

SMALLER = """--tensor-model-parallel-size 1 --pipeline-model-parallel-size 1 --num-layer-list null
    --num-layers-per-virtual-pipeline-stage null --virtual-pipeline-model-parallel-size null --num-layers 2
    --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 8 --max-position-embeddings 32 --lr 1e-4
    --train-iters 1 --log-interval 1 --eval-iters 0 --mock-data --tokenizer-type NullTokenizer --vocab-size 165000"""


def test_first_loss_is_the_logarithm_of_the_vocabulary(tmp_path):
    words = ["--config", str(GOLDEN / "seed_001.yaml"), *SMALLER.split(), "--run-name", "mine",
             "--log-dir", str(tmp_path)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MS_", "RANK"))}
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "pretrain_gpt_from_guide.py"), *words],
        capture_output=True, text=True, cwd=tmp_path, timeout=300,
        env={**environment, "PYTHONPATH": str(ROOT), "DEVICE_TARGET": "CPU"},
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "run mine: 2 layers" in output
    loss = float(re.search(r"Step: 1, Loss: ([0-9.]+)", output)[1])
    # 32 tokens of random data: each logit has a standard deviation of 0.00884 * sqrt(32) = 0.05.
    assert abs(loss - math.log(165664)) < 4 * 0.05 / math.sqrt(32)
