"""Twenty iterations of a mixture of experts through the real program against Megatron-LM's, and its first gradients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mindspore import Tensor

from parallel_core import ops
from parallel_core.config import load_config
from parallel_core.expert_parallel import routing
from parallel_core.layout.shard import shard_of
from parallel_core.transformer import GPTModel, ModelStage
from tests.e2e.runs import Run, several
from tests.parity.experts import FAMILY, VARIANTS, arguments, assert_follows, curve, joined, write_initial_checkpoint
from tests.parity.golden import GOLDEN, arrays
from tests.parity.test_one_step import full_gradients, probed, relative_error

# float32: two programs sum in different orders, and 20 updates carry the difference on; these runs differ from
# Megatron-LM's by up to 6e-7. Gradients are compared relative to the largest element of each tensor.
TOLERANCE = 2e-6
GRADIENTS = 1e-5
NOT_BY_CURVE = ("cap_position", "cap_position_pad")
"""Megatron-LM keeps what torch.topk makes of ties, not the first tokens; see the test of decisions."""
BY_DEFAULT = ("", "seq_aux", "global_aux", "cap_probs")

LAYOUTS: dict[str, tuple[int, str]] = {
    "ep2": (2, "--expert-model-parallel-size 2"),
    "ep2_allgather": (2, "--expert-model-parallel-size 2 --moe-token-dispatcher-type allgather"),
    "dp2": (2, ""),
    "tp2sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "dp2ep2distopt": (2, "--expert-model-parallel-size 2 --use-distributed-optimizer"),
    "tp2ep2": (4, "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2"),
    "tp2ep2_allgather": (
        4, "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2 "
        "--moe-token-dispatcher-type allgather"
    ),
    "pp2ep2": (4, "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2"),
    "dp4ep2": (4, "--expert-model-parallel-size 2"),
    "dp4ep2distopt": (4, "--expert-model-parallel-size 2 --use-distributed-optimizer"),
}  # fmt: skip
OTHERS: dict[str, tuple[int, str, str]] = {
    "tp2ep2etp1": (
        2, "tp1pp1", "--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2 "
        "--expert-tensor-parallel-size 1"
    ),
    "tp2etp1": (
        2, "tp1pp1", "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1"
    ),
    "cp2ep2": (2, "tp1pp1", "--context-parallel-size 2 --expert-model-parallel-size 2"),
    "pp2vpp2": (2, "tp1pp1", "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
    "recomputed": (2, "tp1pp1", "--expert-model-parallel-size 2 --moe-layer-recompute"),
}  # fmt: skip
"""Layouts that Megatron-LM has no curve of, or a wrong one (experts cut otherwise than the rest, without `ep`): here
they equal its one process."""
VARIANTS_ON_2 = {
    "cap_probs_ep2": "--expert-model-parallel-size 2",
    "cap_probs_tp2sp": "--tensor-model-parallel-size 2 --sequence-parallel",
    "sinkhorn_top1_ep2": "--expert-model-parallel-size 2",
    "pertoken_ep2": "--expert-model-parallel-size 2",
    "global_aux_ep2": "--expert-model-parallel-size 2 --moe-global-aux-loss-form megatron",
}
MOST_IN_ONE_DEFAULT_JOB = ("ep2", "tp2sp", "dp2ep2distopt")


@pytest.fixture(scope="module")
def start(workplace: Path) -> str:
    return write_initial_checkpoint(workplace / f"{FAMILY}_init")


@pytest.fixture(scope="module")
def one_rank(workplace: Path, start: str, tmp_path_factory):
    """A function variant -> run."""
    done: dict[str, Run] = {}

    def get(variant: str) -> Run:
        if variant not in done:
            group = BY_DEFAULT if variant in BY_DEFAULT else [v for v in VARIANTS if v not in BY_DEFAULT]
            plan = {
                f"v_{v}": {"argv": [*arguments(v), "--load", start, "--finetune"], "probe": [] if v else [1, 11]}
                for v in group
            }
            found = several(tmp_path_factory.mktemp("variants"), 1, plan, cwd=workplace)
            done.update({name[2:]: run for name, run in found.items()})
        return done[variant]

    return get


def marks(name: str, default: tuple[str, ...]) -> list:
    return [] if name in default else [pytest.mark.slow]


@pytest.mark.parametrize(
    "variant",
    [pytest.param(v, marks=marks(v, BY_DEFAULT), id=v or "mixtral") for v in ("", *VARIANTS) if v not in NOT_BY_CURVE],
)
def test_twenty_updates_follow_megatron(variant: str, one_rank):
    run = one_rank(variant)
    assert run.status == 0, run.console
    golden = curve(f"variant_{variant}" if variant else "tp1pp1")
    if variant == "cap_probs":
        # At iteration 15 two tokens that compete for the last place in an expert have the same weight to the last bit
        # (the margin is 0, at all others at least 9e-6): here the first is kept, torch.topk keeps the other.
        flips = {i: row for i, row in golden.items() if i >= 15}
        assert_follows({i: run.steps[i] for i in flips}, flips, 1e-4)
        golden = {i: row for i, row in golden.items() if i < 15}
    assert_follows({i: run.steps[i] for i in golden}, golden, TOLERANCE)


@pytest.mark.parametrize("iteration", [1, 11])
def test_every_gradient_is_megatrons(iteration: int, one_rank):
    got = full_gradients(probed(one_rank(""), iteration))
    want = joined(arrays(FAMILY, f"step_{iteration:04d}_grads.npz"))
    assert sorted(got) == sorted(want)
    errors = {name: relative_error(got[name], want[name]) for name in want}
    assert not {name: error for name, error in errors.items() if not error < GRADIENTS}


@pytest.mark.parametrize("variant", ["", *(v for v in VARIANTS if v != "pertoken")])
def test_every_routing_decision_of_the_first_step_is_megatrons(variant: str, monkeypatch):
    """Weights, maps and token losses of four microbatches; where tokens are dropped by position, given its choice."""
    io = arrays(FAMILY, "step_0001_io.npz")
    own = arrays(FAMILY, f"variant_{variant}.npz") if variant else io
    model = load_config(arguments(variant)[2:]).config.model_config
    ops.use_kernels("local")
    made = GPTModel(ModelStage(model))
    weights = joined(arrays(FAMILY, "params_0000.npz"))
    for parameter in made.get_parameters():
        parameter.set_data(Tensor(weights[shard_of(parameter).name]))
    seen: list[routing.Routing] = []
    maps = iter([own[f"decoder.layers.{layer}.mlp.router/routing_map"][m] for m in range(4) for layer in range(4)])

    def given(experts, values, capacity, number, *, by_weight):
        return np.take_along_axis(next(maps), experts, 1).astype(bool)

    def watched(*args):
        seen.append(routing.route(*args))
        return seen[-1]

    monkeypatch.setattr("parallel_core.transformer.moe.router.route", watched)
    if "position" in variant:
        monkeypatch.setattr(routing, "within_capacity", given)
    for microbatch in range(4):
        rows = slice(2 * microbatch, 2 * microbatch + 2)
        tokens, labels = (Tensor(io[name][rows].astype(np.int32)) for name in ("tokens", "labels"))
        loss = made(tokens, None, None, labels)
        assert relative_error(loss.asnumpy(), own["token_loss"][rows]) < GRADIENTS
    for number, found in enumerate(seen):
        microbatch, layer = divmod(number, 4)
        probs = own[f"decoder.layers.{layer}.mlp.router/probs"][microbatch]
        taken = own[f"decoder.layers.{layer}.mlp.router/routing_map"][microbatch]
        dense, chosen = np.zeros_like(probs), np.zeros(probs.shape, bool)
        np.put_along_axis(dense, found.experts, found.weights, 1)
        np.put_along_axis(chosen, found.experts, found.kept, 1)
        np.testing.assert_allclose(dense, probs, atol=2e-6)
        assert (chosen == (taken & (probs > 0))).all()


@pytest.fixture(scope="module")
def laid_out(workplace: Path, start: str, tmp_path_factory):
    """A function (ranks, names) -> the runs of these layouts, which share a job."""
    done: dict[tuple, dict[str, Run]] = {}
    flags = {name: (ranks, words) for name, (ranks, words) in LAYOUTS.items()}
    flags |= {name: (ranks, words) for name, (ranks, _, words) in OTHERS.items()}

    def get(name: str) -> Run:
        ranks = flags[name][0]
        default = name in MOST_IN_ONE_DEFAULT_JOB
        if (ranks, default) not in done:
            names = [n for n in flags if flags[n][0] == ranks and (n in MOST_IN_ONE_DEFAULT_JOB) == default]
            plan = {n: {"argv": [*arguments("", flags[n][1]), "--load", start, "--finetune"]} for n in names}
            done[ranks, default] = several(tmp_path_factory.mktemp("layouts"), ranks, plan, cwd=workplace)
        return done[ranks, default][name]

    return get


@pytest.mark.parametrize(
    "layout", [pytest.param(n, marks=marks(n, MOST_IN_ONE_DEFAULT_JOB)) for n in (*LAYOUTS, *OTHERS)]
)
def test_every_layout_follows_megatron(layout: str, laid_out):
    run = laid_out(layout)
    assert run.status == 0, run.console
    assert_follows(run.steps, curve(layout if layout in LAYOUTS else OTHERS[layout][1]), TOLERANCE)


@pytest.mark.slow
def test_variants_of_two_ranks_follow_megatron(workplace: Path, start: str, tmp_path):
    """Dropping by capacity, which counts a rank's tokens; Sinkhorn; per-token losses; Megatron-LM's global loss."""
    plan = {
        name: {"argv": [*arguments(name.rpartition("_")[0], words), "--load", start, "--finetune"]}
        for name, words in VARIANTS_ON_2.items()
    }
    runs = several(tmp_path, 2, plan, cwd=workplace)
    for name, run in runs.items():
        assert run.status == 0, run.console
        golden = curve(f"variant_{name}")
        until = 15 if name.startswith("cap_probs") else 21  # equal weights again
        golden = {i: row for i, row in golden.items() if i < until}
        assert_follows({i: run.steps[i] for i in golden}, golden, TOLERANCE)


RESUMED: dict[str, tuple[int, str]] = {
    "one": (1, ""),
    "tp2etp1": (2, OTHERS["tp2etp1"][2]),
    "ep2": LAYOUTS["ep2"],
    "dp2ep2distopt": LAYOUTS["dp2ep2distopt"],
    "pp2ep2": LAYOUTS["pp2ep2"],
}


@pytest.mark.parametrize(
    "ranks", [pytest.param(n, marks=[pytest.mark.slow] if n > 1 else []) for n in (1, 2, 4)]
)
def test_megatrons_checkpoint_goes_on_in_any_layout(ranks: int, workplace: Path, tmp_path):
    """Two ranks of experts wrote it, each with an optimizer of its own for them."""
    load = ["--load", str(GOLDEN / FAMILY / "ckpt_torch_ep2")]
    plan = {n: {"argv": [*arguments("", words), *load]} for n, (size, words) in RESUMED.items() if size == ranks}
    for run in several(tmp_path, ranks, plan, cwd=workplace).values():
        assert run.status == 0, run.console
        assert_follows(run.steps, curve("resume_ep2"), TOLERANCE)
