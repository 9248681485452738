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
    assert_megatron_computes(tmp_path, np.load(GOLDEN / name.split("/")[0] / "step_0011_io.npz"))


@pytest.mark.parametrize("module", ["", "--target-moe-grouped-gemm"], ids=["SequentialMLP", "GroupedMLP"])
def test_a_real_mixture_of_experts_gives_megatrons_losses(tmp_path, module):
    """Two ranks of experts become one, in either of Megatron's modules that need no TransformerEngine."""
    golden = GOLDEN.parent / "parity" / "moe_mixtral"
    save = ["--save", str(tmp_path / "m"), "--target-expert-model-parallel-size", "1", *module.split(), "--quiet"]
    assert main(["--to", "megatron", "--load", str(golden / "ckpt_torch_ep2"), *save]) == 0
    assert_megatron_computes(tmp_path, np.load(golden / "step_0011_io.npz"))


def assert_megatron_computes(tmp_path: Path, io) -> None:
    np.save(tmp_path / "tokens.npy", io["tokens"])
    script = Path(__file__).with_name("peer_megatron.py")
    files = [tmp_path / "m" / "iter_0000010", tmp_path / "tokens.npy", tmp_path / "logits.npy"]
    done = subprocess.run([PEER, script, *files], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    logits = np.load(tmp_path / "logits.npy")
    # The checkpoint is of another layout's run than these values: sums in another order, over ten updates.
    if "logits" in io:
        np.testing.assert_allclose(logits, io["logits"], rtol=0, atol=1e-5)
    else:
        chosen = np.take_along_axis(logits, io["labels"][..., None].astype(np.int64), -1)[..., 0]
        losses = np.log(np.exp(logits.astype(np.float64)).sum(-1)) - chosen
        np.testing.assert_allclose(losses, io["token_loss"], rtol=0, atol=1e-5)
