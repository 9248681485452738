"""Multi-token prediction over latent attention and experts (a small DeepSeek-V3) against Megatron-LM's run of it."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest

from parallel_core.checkpoint import CheckpointWriter, TensorShard, find_checkpoint, open_checkpoint
from tests.e2e.runs import Run, several
from tests.parity.experts import joined
from tests.parity.golden import COMMON, GOLDEN, arrays
from tests.parity.test_one_step import full_gradients, probed, relative_error

FAMILY = "moe_deepseek"
MODEL = """
    --normalization RMSNorm --position-embedding-type rope --rotary-base 10000 --swiglu --disable-bias-linear
    --untie-embeddings-and-output-weights --norm-epsilon 1e-5 --init-method-std 0.02 --ffn-hidden-size 64
    --num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 16 --moe-router-score-function sigmoid
    --moe-router-enable-expert-bias --moe-router-bias-update-rate 1e-3 --moe-router-num-groups 2
    --moe-router-group-topk 1 --moe-router-topk-scaling-factor 2.5 --moe-router-load-balancing-type seq_aux_loss
    --moe-aux-loss-coeff 1e-2 --moe-shared-expert-intermediate-size 16 --moe-layer-freq [0,1,1,1]
    --moe-router-dtype fp32 --rope-type rope --moe-token-dispatcher-type alltoall --multi-latent-attention
    --q-lora-rank 24 --kv-lora-rank 16 --qk-head-dim 16 --qk-pos-emb-head-dim 8 --v-head-dim 16 --qk-layernorm
    --mtp-num-layers 1 --mtp-loss-scaling-factor 0.1
""".split()
# float32, 20 updates: see test_curves.py. Each expert's gradient is a sum over a part of the tokens.
TOLERANCE = 2e-6
GRADIENTS = 1e-5
AFTER_A_FLIP = 1e-5
ONE_RANK = {
    "plain": [],
    "full": "--recompute-granularity full --recompute-method block --recompute-num-layers 4 --exit-interval 3".split(),
    "selective": "--recompute-granularity selective --exit-interval 3".split(),
}
LAYOUTS: dict[str, tuple[int, str, str]] = {
    "pp2": (2, "pp2", "--pipeline-model-parallel-size 2"),
    "m_on_the_last_stage": (
        2, "pp2", "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Ettt|tmL"
    ),
    "pp2vpp2": (2, "pp2", "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
    "tp2sp": (2, "tp1pp1", "--tensor-model-parallel-size 2 --sequence-parallel"),
    "cp2": (2, "tp1pp1", "--context-parallel-size 2"),
    "ep2": (2, "ep2", "--expert-model-parallel-size 2"),
    "ep2_allgather": (2, "ep2_allgather", "--expert-model-parallel-size 2 --moe-token-dispatcher-type allgather"),
    "tp2ep2": (
        4, "tp1pp1", "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2"
    ),
    "pp2ep2": (4, "pp2ep2", "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2"),
    "dp2ep2distopt": (2, "dp2ep2distopt", "--expert-model-parallel-size 2 --use-distributed-optimizer"),
}  # fmt: skip
"""Ranks, Megatron's curve, flags. Megatron's own runs with tensor parallelism lose gradients, and it ran no CP on CPU:
here these equal its one process."""


@functools.cache
def curve(name: str) -> dict[int, dict]:
    return {row["iteration"]: row for row in json.loads((GOLDEN / FAMILY / "curves.json").read_text())[name]}


def argv(start: str, flags: list[str], *, fused: bool = True) -> list[str]:
    common = list(COMMON)
    if fused:
        place = common.index("--kernels")
        del common[place : place + 2]
    return ["--config", "empty.yaml", *common, *MODEL, *flags, "--load", start, "--finetune"]


@pytest.fixture(scope="module")
def start(workplace: Path) -> str:
    weights = joined(arrays(FAMILY, "params_0000.npz"))
    routers = [name for name in weights if name.endswith("router.weight")]
    weights |= {f"{name.removesuffix('weight')}expert_bias": np.zeros(8, np.float32) for name in routers}
    writer = CheckpointWriter(workplace / f"{FAMILY}_init", 0, 0, 1)
    writer.begin()
    shards = {name: (TensorShard.full(name, value.shape, "float32"), value) for name, value in weights.items()}
    writer.commit([writer.write_rank_file(shards)], {"model_config": {}, "consumed_train_samples": 0})
    return str(workplace / f"{FAMILY}_init")


@pytest.fixture(scope="module")
def one_rank(workplace: Path, start: str, tmp_path_factory) -> dict[str, Run]:
    plan = {name: {"argv": argv(start, flags), "probe": [1, 3]} for name, flags in ONE_RANK.items()}
    return several(tmp_path_factory.mktemp("multi_token"), 1, plan, cwd=workplace)


def assert_follows(
    steps: dict[int, dict], golden: dict[int, dict], tolerance: float = TOLERANCE, balance: float | None = None
) -> None:
    for iteration, want in golden.items():
        for name in ("loss", "grad_norm", "mtp_1 loss", "seq_load_balancing_loss"):
            if name in want:
                error = abs(steps[iteration][name] / want[name] - 1)
                most = balance if balance is not None and name.startswith("seq") else tolerance
                assert error < most, f"iteration {iteration}, {name}: {steps[iteration][name]}, not {want[name]}"


def test_twenty_updates_follow_megatron(one_rank):
    assert one_rank["plain"].status == 0, one_rank["plain"].console
    # From iteration 12 on a token or two stand so near a tie between two experts that rounding decides: the balancing
    # loss moves by 1.4e-5, and the losses by 1e-5.
    golden = curve("tp1pp1")
    assert_follows(one_rank["plain"].steps, {i: row for i, row in golden.items() if i < 12})
    assert_follows(one_rank["plain"].steps, {i: row for i, row in golden.items() if i >= 12}, 5e-5)


def test_every_gradient_of_the_first_step_is_megatrons(one_rank):
    (found,) = probed(one_rank["plain"], 1)
    io, want = arrays(FAMILY, "step_0001_io.npz"), joined(arrays(FAMILY, "step_0001_grads.npz"))
    assert relative_error(found["token_loss"].reshape(io["token_loss"].shape), io["token_loss"]) < GRADIENTS
    got = full_gradients([found])
    assert sorted(got) == sorted(want)
    errors = {name: relative_error(got[name], want[name]) for name in want}
    assert not {name: error for name, error in errors.items() if not error < GRADIENTS}


@pytest.mark.parametrize("name", ["full", "selective"])
def test_recomputation_changes_no_bit(name: str, one_rank):
    run, plain = one_rank[name], one_rank["plain"]
    assert run.status == 0, run.console
    for i, step in run.steps.items():
        assert all(step[key] == plain.steps[i][key] for key in ("loss", "grad_norm", "mtp_1 loss"))


def test_every_tensor_of_megatrons_checkpoint_is_read():
    path = GOLDEN / FAMILY / "ckpt_torch_dist_ep2"
    source = open_checkpoint(find_checkpoint(path))
    weights = {name: x.shape for name, x in joined(arrays(FAMILY, "params_0000.npz")).items()}
    found = {key: source.info(key).shape for key in source.keys()}  # noqa: SIM118 - a method of the protocol
    biases = {key for key in found if key.endswith("expert_bias")}
    assert {key: shape for key, shape in found.items() if "@" not in key and key not in biases} == weights
    assert len(biases) == 4 and all(f"{key}@exp_avg_sq" in found for key in weights)
    assert source.common["model_config"]["mtp_num_layers"] == 1


OTHER_LAYOUTS = ("--pipeline-model-parallel-size 2", "--tensor-model-parallel-size 2 --sequence-parallel")


@pytest.mark.parametrize("flags", ["", *(pytest.param(words, marks=pytest.mark.slow) for words in OTHER_LAYOUTS)])
def test_a_run_goes_on_from_megatrons_checkpoint_in_another_layout(flags: str, workplace: Path, tmp_path: Path):
    path = str(GOLDEN / FAMILY / "ckpt_torch_dist_ep2")
    resumed = [*argv("", flags.split())[:-3], "--load", path]
    run = several(tmp_path, 2 if flags else 1, {"resumed": {"argv": resumed}}, cwd=workplace)["resumed"]
    assert run.status == 0, run.console
    rows = curve("resume_ep2")
    # The balancing loss counts a plain top-k, in which one near-tie of 4 x 512 tokens moves it by about 1e-5.
    assert_follows(run.steps, {i: row for i, row in rows.items() if i < 15}, balance=5e-5)
    assert_follows(run.steps, {i: row for i, row in rows.items() if i >= 15}, 1e-4)  # Megatron's flip, see below


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_follow_megatron(layout: str, workplace: Path, start: str, tmp_path: Path):
    ranks, golden, flags = LAYOUTS[layout]
    run = several(tmp_path, ranks, {layout: {"argv": argv(start, flags.split())}}, cwd=workplace)[layout]
    assert run.status == 0, run.console
    # Near-ties that the order of sums tells apart, with margins measured on one process. At iteration 13 it is 1.5e-8
    # in the plain top-k that the balancing loss counts, which moves what is logged by 1.4e-5. At iteration 15 it is
    # 3.0e-8 in a routing decision: Megatron-LM's `ep2` went the other way than its other runs; a run here goes either.
    rows = curve(golden)
    assert_follows(run.steps, {i: row for i, row in rows.items() if i < 15}, balance=5e-5)
    later = [{i: row for i, row in curve(name).items() if i >= 15} for name in (golden, "ep2")]
    try:
        assert_follows(run.steps, later[0], AFTER_A_FLIP, balance=5e-5)
    except AssertionError:
        assert_follows(run.steps, later[1], AFTER_A_FLIP, balance=5e-5)
