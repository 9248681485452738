"""The real torch and megatron-core open what this project wrote, where an environment with them is given."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from parallel_core.convert.cli import main

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "checkpoint"
PEER = os.environ.get("PARALLEL_CORE_PEER_PYTHON", "")

pytestmark = pytest.mark.skipif(
    not PEER, reason="PARALLEL_CORE_PEER_PYTHON names no python with torch and megatron-core"
)


@pytest.mark.parametrize("target_format", ["torch", "torch_dist"])
@pytest.mark.parametrize("name", ["gpt2/ckpt_torch_tp2pp2", "llama/ckpt_torch_pp2vpp2"])
def test_a_real_gpt_model_gives_megatrons_logits(tmp_path, name, target_format):
    save = ["--save", str(tmp_path / "m"), "--target-format", target_format]
    layout = ["--target-tensor-parallel-size", "1", "--target-pipeline-parallel-size", "1"]
    assert main(["--load", str(GOLDEN / name), "--save", str(tmp_path / "n"), "--quiet"]) == 0
    assert main(["--to", "megatron", "--load", str(tmp_path / "n"), *save, *layout, "--quiet"]) == 0
    io = np.load(GOLDEN / name.split("/")[0] / "step_0011_io.npz")
    np.save(tmp_path / "tokens.npy", io["tokens"])
    script = Path(__file__).with_name("peer_megatron.py")
    files = [tmp_path / "m" / "iter_0000010", tmp_path / "tokens.npy", tmp_path / "logits.npy"]
    done = subprocess.run([PEER, script, *files], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    # The checkpoint is of another layout's run than the logits: sums in another order, over ten updates.
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), io["logits"], rtol=0, atol=1e-5)
