"""Experts in every layout: rows arrive where they are meant to, and every layout trains as one process does."""

from __future__ import annotations

import functools
import random
from typing import Any

import numpy as np
from mindspore import Tensor

from parallel_core.config.experts import LOSS_NAMES, MoEConfig
from parallel_core.config.multi_token import MTPConfig
from parallel_core.expert_parallel.functions import all_to_all_rows_start
from parallel_core.expert_parallel.ledger import RoutingLedger
from parallel_core.layout.shard import shard_of
from tests.helpers.cases import CaseContext, case
from tests.ranks.cases_latent_attention import MODEL as LATENT
from tests.ranks.cases_layouts import settings
from tests.ranks.support import (
    LLAMA,
    Tiny,
    TinyRun,
    assert_close,
    context_of,
    from_rank_0,
    gather_values,
    parallel_context,
    world_group,
)

ITERATIONS = 3
RTOL = 1e-6
"""fp32: sums over ranks, experts and microbatches are made in another order."""

MODELS: dict[str, dict[str, Any]] = {
    "softmax": {
        "num_experts": 4,
        "moe_ffn_hidden_size": 8,
        "moe_router_load_balancing_type": tuple(LOSS_NAMES),
        "moe_aux_loss_coeff": (2e-2, 1e-2, 3e-2),
        "moe_z_loss_coeff": 1e-2,
        "moe_per_layer_logging": True,
    },
    "sigmoid": {
        "num_experts": 8,
        "moe_ffn_hidden_size": 8,
        "moe_layer_freq": (0, 1, 1, 1),
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": 0.05,
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
        "moe_router_topk": 4,
        "moe_router_topk_scaling_factor": 2.5,
        "moe_router_load_balancing_type": ("seq_aux_loss",),
        "moe_aux_loss_coeff": (1e-2,),
        "moe_shared_expert_intermediate_size": 8,
        "moe_shared_expert_gate": True,
    },
    # Of a width at which no two tokens are within rounding of each other where one of them is the last to be taken.
    "capacity": {"num_experts": 4, "moe_ffn_hidden_size": 16, "moe_expert_capacity_factor": 0.75},
    "padded": {
        "num_experts": 4,
        "moe_ffn_hidden_size": 8,
        "moe_expert_capacity_factor": 0.75,
        "moe_token_drop_policy": "position",
        "moe_pad_expert_input_to_capacity": True,
    },
    "one": {
        "num_experts": 2,
        "moe_ffn_hidden_size": 8,
        "moe_router_topk": 1,
        "moe_router_pre_softmax": True,
        "moe_apply_probs_on_input": True,
    },
}


def run_of(model: str, layout: str, **training: Any) -> Tiny:
    """Return the run of a model in a layout: words of `settings`, epN, etpN, a dispatcher, moe or full (recomputed).

    A model is one of `MODELS`, with latent attention (`sigmoid+mla`), multi-token prediction (`sigmoid+mtp`) or both.
    """
    name, *more = model.split("+")
    words, parallel, moe = [], {}, dict(MODELS[name])
    extra: dict[str, Any] = dict(LATENT) if "mla" in more else {}
    if "mtp" in more:
        extra |= {"mtp": MTPConfig(mtp_num_layers=1, mtp_loss_scaling_factor=0.5), "position_embedding_type": "rope"}
    for word in layout.split():
        if word.startswith("etp"):
            parallel["expert_tensor_parallel_size"] = int(word[3:])
        elif word.startswith("ep"):
            parallel["expert_model_parallel_size"] = int(word[2:])
        elif word in ("alltoall", "allgather"):
            moe["moe_token_dispatcher_type"] = word
        elif word == "ahead":
            moe["moe_shared_expert_overlap"] = True
        elif word == "moe":
            moe["moe_layer_recompute"] = True
        elif word == "full":
            extra |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
        elif word == "act":
            modules = ("core_attn", "moe_act", "mlp", *(("mla_up_proj",) if "mla" in more else ()))
            extra |= {"recompute_granularity": "selective", "recompute_modules": modules}
        else:
            words.append(word)
    tiny = settings(" ".join(words)).with_(model={**LLAMA.model, **extra}, parallel=parallel, training=training)
    return tiny.with_(model={"moe": MoEConfig(**moe)})


def loads(run: TinyRun) -> list[list[np.ndarray]]:
    """Return the tokens of each expert in each layer of this rank, summed over the ranks of its stage; collective."""
    context = run.context
    out = []
    for record in run.step.model.ledger._records:
        counts = record.counts
        for group in (context.tp, context.cp, context.dp):
            if group.size > 1:
                counts = group.all_reduce(Tensor(counts.astype(np.float32))).asnumpy()
        out.append(counts.tolist())
    return out


def outcome(run: TinyRun) -> dict[str, Any]:
    """Train and return everything that must not depend on the layout; collective."""
    initial, reports, decisions = run.parameters(), [], []
    for _ in range(ITERATIONS):
        reports += run.train()
        stages = gather_values(run.context.world, (run.context.pp.rank, loads(run)))
        decisions.append([load for _, load in sorted(dict(stages).items())])
    return {
        "initial": initial,
        "losses": [report.losses for report in reports],
        "norms": [report.grad_norm for report in reports],
        "gradients": run.gradients(),
        "parameters": run.parameters(),
        "evaluation": run.evaluate()["lm loss"],
        "decisions": [sorted(sum(stages, [])) for stages in decisions],
    }


@functools.cache
def reference(tiny: Tiny) -> dict[str, Any]:
    """Train on one process."""
    return outcome(TinyRun(tiny, parallel_context(0, 1)))


def check(ctx: CaseContext, model: str, layout: str, **training: Any) -> None:
    """Train a layout on all ranks and one process, and compare."""
    want = from_rank_0(ctx, lambda: reference(run_of(model, "", **training)))
    tiny = run_of(model, layout, **training)
    got = outcome(TinyRun(tiny, context_of(ctx, tiny)))
    assert_close(got["initial"], want["initial"], 0.0)
    assert got["decisions"] == want["decisions"], "experts got other numbers of tokens"
    for mine, theirs in zip(got["losses"], want["losses"]):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            np.testing.assert_allclose(mine[name], value, rtol=RTOL, err_msg=name)
    np.testing.assert_allclose(got["norms"], want["norms"], rtol=10 * RTOL)
    assert_close(got["gradients"], want["gradients"], 20 * RTOL)
    biases = [name for name in want["parameters"] if name.endswith("expert_bias")]
    for name in biases:
        np.testing.assert_array_equal(got["parameters"][name], want["parameters"][name])
    np.testing.assert_allclose(got["evaluation"], want["evaluation"], rtol=RTOL)


def variants(text: str) -> list[dict[str, str]]:
    """Return a variant for each line `model: layout`."""
    pairs = (line.split(":") for line in text.strip().splitlines())
    return [{"model": model.strip(), "layout": layout.strip()} for model, layout in pairs]


OF_2 = """
    softmax: ep2 alltoall
    softmax: tp2 sp etp1 allgather
    sigmoid: tp2 sp alltoall
    sigmoid: pp2 vpp2 moe
    sigmoid: tp2 sp ep2 etp1 distopt alltoall ahead
    capacity: ep2 alltoall
    padded: ep2 alltoall
    one: ep2 allgather
"""
OF_4 = """
    softmax: tp2 sp ep2 alltoall distopt overlap
    softmax: tp2 sp ep2 etp1 pp2 alltoall full
    softmax: cp2 ep4 alltoall
    sigmoid: pp2 ep2 allgather
    sigmoid: ep2 distopt overlap alltoall moe ahead
"""
SLOW_OF_2 = """
    softmax: ep2 allgather
    softmax: cp2 allgather
    softmax: tp2 sp etp1 alltoall
    sigmoid: dp2 distopt overlap
    sigmoid: cp2 ep2 alltoall
    sigmoid: pp2 full
    sigmoid+mla: tp2 sp alltoall act
"""
SLOW_OF_4 = """
    softmax: tp4 sp ep2 etp2 alltoall
    softmax: tp4 sp ep4 etp1 allgather
    softmax: tp2 cp2 sp ep2 allgather
    sigmoid: tp2 sp ep2 allgather
    sigmoid: ep4 alltoall distopt ahead
    sigmoid: pp2 vpp2 ep2 alltoall distopt
    sigmoid: tp2 sp pp2 etp1 ep2 alltoall moe
    capacity: pp2 ep2 alltoall
    padded: ep4 alltoall distopt
    one: ep2 alltoall
"""


@case(world_size=2, variants=variants(OF_2))
def test_experts_on_two_ranks_train_like_one(ctx: CaseContext, model: str, layout: str) -> None:
    check(ctx, model, layout)


@case(world_size=4, variants=variants(OF_4))
def test_experts_on_four_ranks_train_like_one(ctx: CaseContext, model: str, layout: str) -> None:
    check(ctx, model, layout)


@case(world_size=2, variants=variants(SLOW_OF_2), slow=True)
def test_more_layouts_of_two_ranks(ctx: CaseContext, model: str, layout: str) -> None:
    check(ctx, model, layout)


@case(world_size=4, variants=variants(SLOW_OF_4), slow=True)
def test_more_layouts_of_four_ranks(ctx: CaseContext, model: str, layout: str) -> None:
    check(ctx, model, layout)


@case(world_size=2, variants=[{"layout": "ep2 alltoall"}, {"layout": "tp2 sp etp1 allgather"}], slow=True)
def test_losses_of_routing_per_token_do_not_depend_on_the_layout(ctx: CaseContext, layout: str) -> None:
    check(ctx, "softmax", layout, calculate_per_token_loss=True)


def drawn(seed: int, ranks: int) -> tuple[str, str]:
    """Return a model and a legal layout."""
    rng = random.Random(seed)
    while True:
        tp, pp, cp = (rng.choice((1, 1, 2, 4)) for _ in range(3))
        etp, ep = rng.choice((1, 2)), rng.choice((1, 2, 4))
        model = rng.choice(("softmax", "sigmoid")) + rng.choice(("", "+mla", "+mtp", "+mla+mtp"))
        if ranks % (tp * pp * cp) or ranks % (etp * ep * pp) or pp > 2:
            continue
        if 8 % (2 * cp * tp):
            continue
        words = [f"tp{tp} sp"] if tp > 1 else []
        words += [f"pp{pp}"] if pp > 1 else []
        words += [f"cp{cp}", rng.choice(("p2p", "all_gather"))] if cp > 1 else []
        words += [f"ep{ep}", f"etp{etp}", rng.choice(("alltoall", "allgather"))]
        words += rng.choice(([], ["distopt"], ["distopt", "overlap"], ["moe"], ["act"], ["full"]))
        return model, " ".join(words)


@case(world_size=4, variants=[{"seed": seed} for seed in range(12)], slow=True)
def test_drawn_layouts_train_like_one(ctx: CaseContext, seed: int) -> None:
    check(ctx, *drawn(seed, ctx.world_size))


# ---- where experts of different ranks are easily taken for one another ----------------------------------------------
def experts_of(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: value for name, value in tensors.items() if ".experts." in name}


@case(world_size=2)
def test_as_many_ranks_share_experts_as_were_asked_for_and_start_from_different_ones(ctx: CaseContext) -> None:
    """Expert e starts from the same values wherever it is, and no two experts start alike."""
    tiny = run_of("softmax", "ep2 alltoall")
    run = TinyRun(tiny, context_of(ctx, tiny))
    assert run.context.ep.size == 2
    of_rank = {shard_of(p).name: p for p, _ in run.step.ddp.parameters()}
    one = from_rank_0(ctx, lambda: TinyRun(run_of("softmax", ""), parallel_context(0, 1)).parameters())
    for name, whole in experts_of(one).items():
        own = of_rank[name].asnumpy()
        assert len(own) == len(whole) / 2
        np.testing.assert_array_equal(own, whole[2 * ctx.rank : 2 * ctx.rank + 2])
        assert all(np.abs(whole[a] - whole[b]).max() > 1e-3 for a in range(4) for b in range(a))


CLIPPED = {"clip_grad": 0.01}


@case(world_size=2)
def test_experts_gradients_are_not_averaged_over_ranks_of_other_experts(ctx: CaseContext) -> None:
    """And ranks of different experts clip by one norm, so that what they share stays the same to the bit."""
    got, want = both(ctx, "ep2 alltoall", CLIPPED)
    assert_close(experts_of(got["gradients"]), experts_of(want["gradients"]), 20 * RTOL)
    norms = gather_values(world_group(ctx), got["norm"])
    assert norms[0] == norms[1] and abs(norms[0] / want["norm"] - 1) < 10 * RTOL
    assert norms[0] > 2 * CLIPPED["clip_grad"], "nothing was clipped"
    assert_close(got["parameters"], want["parameters"], 20 * RTOL)


@case(world_size=2)
def test_the_routers_weight_has_the_gradient_of_all_positions(ctx: CaseContext) -> None:
    """Every tensor parallel rank has it whole and sees a part of the sequence."""
    got, want = both(ctx, "tp2 sp alltoall")
    routers = [name for name in want["gradients"] if name.endswith("router.weight")]
    assert len(routers) == 4
    assert_close({n: got["gradients"][n] for n in routers}, {n: want["gradients"][n] for n in routers}, 20 * RTOL)


def both(ctx: CaseContext, layout: str, optimizer: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Return what an iteration does in a layout and in one process; copies of a tensor agree to the bit."""
    mine, one = (run_of("softmax", words).with_(optimizer=optimizer or {}) for words in (layout, ""))
    want = from_rank_0(ctx, lambda: one_iteration(TinyRun(one, parallel_context(0, 1))))
    return [one_iteration(TinyRun(mine, context_of(ctx, mine))), want]


def one_iteration(run: TinyRun) -> dict[str, Any]:
    """Train an iteration; collective."""
    (report,) = run.train()
    return {"norm": report.grad_norm, "gradients": run.gradients(), "parameters": run.parameters()}


# ---- the exchange ---------------------------------------------------------------------------------------------------
@case(world_size=(2, 4), variants=[{"kind": kind} for kind in ("uneven", "nothing", "all to one", "long")])
def test_rows_arrive_in_the_order_of_ranks(ctx: CaseContext, kind: str) -> None:
    """Also with nothing to send, and with parts longer than the memory that ranks share."""
    group, size = world_group(ctx), ctx.world_size
    counts = np.random.default_rng(7).integers(0, 5, (size, size))
    if kind == "nothing":
        counts[:] = 0
    elif kind == "all to one":
        counts[:], counts[:, -1] = 0, 9
    elif kind == "long":
        counts = counts * 2000
    rows = [
        np.concatenate([np.full((n, 65), 10 * source + to, np.float32) for to, n in enumerate(counts[source])])
        for source in range(size)
    ]
    got = group.all_to_all_rows(Tensor(rows[ctx.rank]), counts.astype(np.int64)).asnumpy()
    want = np.concatenate([np.full((counts[s, ctx.rank], 65), 10 * s + ctx.rank, np.float32) for s in range(size)])
    np.testing.assert_array_equal(got, want)
    ahead = all_to_all_rows_start(group, Tensor(rows[ctx.rank]), counts.astype(np.int64))
    np.testing.assert_array_equal(ahead.wait().asnumpy(), want)


# ---- one meaning of the global loss ---------------------------------------------------------------------------------
@case(world_size=2)
def test_a_microbatch_is_compared_with_those_before_it_in_every_layout(ctx: CaseContext) -> None:
    """`global_aux_loss` numbers the microbatches over data parallel ranks; Megatron-LM's form takes whole rounds."""
    counts = np.arange(1, 13, dtype=np.float32).reshape(4, 3)
    dp, moe = world_group(ctx), MoEConfig(num_experts=3)
    alone, shared = RoutingLedger(moe), RoutingLedger(moe, dp=dp)
    theirs = RoutingLedger(MoEConfig(num_experts=3, moe_global_aux_loss_form="megatron"), dp=dp)
    one, two, three = alone.add_router(None), shared.add_router(None), theirs.add_router(None)
    want = [alone.looking_back(one, row)[0] for row in counts]
    np.testing.assert_allclose(want, np.cumsum(counts, 0) / np.arange(1, 5)[:, None])
    for round_number in range(2):
        number = 2 * round_number + ctx.rank
        np.testing.assert_allclose(shared.looking_back(two, counts[number])[0], want[number])
        mean, tokens = theirs.looking_back(three, counts[number])
        np.testing.assert_allclose(mean, counts[: 2 * round_number + 2].sum(0) / (round_number + 1))
        assert tokens == 2
