"""Multi-latent attention: twenty iterations and the first gradients against Megatron-LM's, layouts against one rank."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.e2e.runs import Run, several
from tests.parity.golden import COMMON, arrays, assert_follows, curve, write_initial_checkpoint
from tests.parity.test_one_step import full_gradients, probed, relative_error

MODEL = """
    --normalization RMSNorm --position-embedding-type rope --rotary-base 10000 --swiglu --ffn-hidden-size 64
    --disable-bias-linear --untie-embeddings-and-output-weights --norm-epsilon 1e-5 --init-method-std 0.02
    --multi-latent-attention --q-lora-rank 24 --kv-lora-rank 16 --qk-head-dim 16 --qk-pos-emb-head-dim 8
    --v-head-dim 16 --qk-layernorm
""".split()
ROPE = ["--rope-type", "rope"]
YARN = "--rope-type yarn --rotary-scaling-factor 4 --mscale 1.0 --mscale-all-dim 0.5".split()
TOLERANCE = 2e-6  # float32, 20 updates: see test_curves.py
STEP_TOLERANCE = 1e-5  # see test_one_step.py
SHORT = ["--exit-interval", "3"]
SELECTIVE = "--recompute-granularity selective --recompute-modules core_attn mla_up_proj".split()
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 2".split()
ONE_RANK: dict[str, list[str]] = {
    "rope": ROPE,
    "yarn": YARN,
    "selective": [*ROPE, *SHORT, *SELECTIVE],
    "full": [*ROPE, *SHORT, *FULL],
}


def argv(initial: str, flags: list[str], *, fused: bool = True) -> list[str]:
    """Return the arguments of a run, by the compiled kernels or by plain operators."""
    common = list(COMMON)
    if fused:
        place = common.index("--kernels")
        del common[place : place + 2], common[common.index("--no-rope-fusion")]
    return ["--config", "empty.yaml", *common, *MODEL, *flags, "--load", initial, "--finetune"]


@pytest.fixture(scope="module")
def initial_weights(workplace: Path) -> str:
    return write_initial_checkpoint("mla_dense", workplace / "mla_dense_init")


@pytest.fixture(scope="module")
def one_rank(workplace: Path, initial_weights: str, tmp_path_factory) -> dict[str, Run]:
    plan = {name: {"argv": argv(initial_weights, flags), "probe": [1, 3]} for name, flags in ONE_RANK.items()}
    return several(tmp_path_factory.mktemp("latent"), 1, plan, cwd=workplace)


@pytest.mark.parametrize(("name", "golden"), [("rope", "tp1pp1"), ("yarn", "yarn_tp1pp1")])
def test_twenty_updates_follow_megatron(name: str, golden: str, one_rank):
    assert one_rank[name].status == 0, one_rank[name].console
    assert_follows(one_rank[name].steps, curve("mla_dense", golden), TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "golden"), [(ROPE, "tp1pp1"), (YARN, "yarn_tp1pp1")], ids=["rope", "yarn"])
def test_plain_operators_follow_megatron(flags: list[str], golden: str, workplace, initial_weights, tmp_path):
    plan = {"plain": {"argv": argv(initial_weights, flags, fused=False)}}
    run = several(tmp_path, 1, plan, cwd=workplace)["plain"]
    assert run.status == 0, run.console
    assert_follows(run.steps, curve("mla_dense", golden), TOLERANCE)


LAYOUTS = {
    "pp2": ("pp2", "--pipeline-model-parallel-size 2"),
    "tp2": ("tp1pp1", "--tensor-model-parallel-size 2"),
    "tp2sp": ("tp1pp1", "--tensor-model-parallel-size 2 --sequence-parallel"),
}
"""Megatron's curve and flags; its own runs with tensor parallelism lose gradients, here they equal its one process."""


@pytest.mark.slow
def test_layouts_follow_megatron(workplace, initial_weights, tmp_path):
    plan = {name: {"argv": argv(initial_weights, [*ROPE, *words.split()])} for name, (_, words) in LAYOUTS.items()}
    for name, run in several(tmp_path, 2, plan, cwd=workplace).items():
        assert run.status == 0, run.console
        assert_follows(run.steps, curve("mla_dense", LAYOUTS[name][0]), TOLERANCE)


@pytest.mark.parametrize(("name", "file"), [("rope", "step_0001_io"), ("yarn", "yarn_step_0001")])
def test_losses_and_gradients_of_the_first_step(name: str, file: str, one_rank):
    io = arrays("mla_dense", f"{file}.npz")
    (found,) = probed(one_rank[name], 1)
    losses = found["token_loss"].reshape(io["token_loss"].shape)
    assert relative_error(losses, io["token_loss"]) < STEP_TOLERANCE
    gradients = full_gradients([found])
    squares = sum(float((gradient.astype(np.float64) ** 2).sum()) for gradient in gradients.values())
    assert abs(squares**0.5 / float(io["grad_norm"]) - 1) < STEP_TOLERANCE
    for key, norm in io.items():
        if key.startswith("grad_norm/"):
            got = np.linalg.norm(gradients[key.removeprefix("grad_norm/")].astype(np.float64))
            assert abs(got / norm - 1) < STEP_TOLERANCE, key


@pytest.mark.parametrize("name", ["selective", "full"])
def test_recomputation_changes_no_bit(name: str, one_rank):
    first, second = one_rank["rope"], one_rank[name]
    assert second.status == 0, second.console
    for i, step in second.steps.items():
        assert (step["loss"], step["grad_norm"]) == (first.steps[i]["loss"], first.steps[i]["grad_norm"])
    one, other = full_gradients(probed(first, 3)), full_gradients(probed(second, 3))
    assert [key for key in one if not np.array_equal(one[key], other[key])] == []
