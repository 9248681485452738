"""Layouts on Ascend's double: its operators, its memory, and groups over HCCL, compute what the CPU's do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from parallel_core import ops
from parallel_core.comm.factory import group_factory
from parallel_core.comm.mindspore_comm import start_communication
from parallel_core.context import ParallelContext
from tests.ascend import rank
from tests.helpers.ascend_double import on_ascend_double, round_trips
from tests.helpers.cases import CaseContext, case
from tests.helpers.hccl_double import over_hccl
from tests.ranks.cases_experts import run_of
from tests.ranks.cases_layouts import settings
from tests.ranks.support import LLAMA, Tiny, TinyRun, assert_close, context_of, group_of, world_group

SCALARS = {"training/scalars.py: _on_host": 1, "training/scalars.py: _sum": 1}
"""Where a step reads what a device has computed."""
ROUTED = frozenset({
    "transformer/moe/router.py: __init__",
    "transformer/moe/router.py: forward",
    "transformer/moe/router.py: backward",
    "expert_parallel/dispatch.py: dispatch",
    "expert_parallel/ledger.py: looking_back",
    "expert_parallel/ledger.py: finish_iteration",
    "expert_parallel/ledger.py: _sum",
})  # fmt: skip
"""Where experts are chosen, which is the host's: biases, scores and their gradients, rows to exchange, and loads."""
HALF = Tiny(
    model={"params_dtype": "float16", "compute_dtype": "float16", "kv_channels": 16, "num_layers": 4},
    training={"fp16": True, "loss_scale_value": 64.0},
)


def half(layout: str) -> Tiny:
    """A LLaMA-like model of 16 bits, whose attention is the fused operator's."""
    return settings(layout).with_(model={**LLAMA.model, **HALF.model}, training=HALF.training)


def trained(tiny: Tiny, context: ParallelContext, watched: bool = False) -> SimpleNamespace:
    """Three steps, and what the last one reads on the host."""
    run = TinyRun(tiny, context)
    reports, read = run.train(2), {}
    if watched:
        with round_trips() as counted:
            reports += run.train(1)
        read = dict(counted)
    else:
        reports += run.train(1)
    return SimpleNamespace(
        losses=[report.losses["lm loss"] for report in reports],
        norms=[report.grad_norm for report in reports],
        parameters=run.parameters(),
        loss=run.evaluate()["lm loss"],
        read=read,
    )


def check(ctx: CaseContext, tiny: Tiny, rtol: float, also_read: frozenset[str] = frozenset()) -> Any:
    """Train on the CPU and on the double, and compare; returns the calls of HCCL."""
    cpu = tiny.with_(model={"kernels": "local"})
    want = trained(cpu, context_of(ctx, cpu))
    start_communication()  # of the CPU, once and for all cases of this job, before the device is another
    try:
        with on_ascend_double(), over_hccl(lambda ranks: group_of(ctx, list(ranks)), ctx.world_size) as hccl:
            context = ParallelContext.create(tiny.config().parallel_config, ctx.rank, ctx.world_size)
            got = trained(tiny, context, watched=True)
            assert hccl.unfinished == 0 or "isend" in hccl.calls
    finally:
        ops.use_kernels("local")
    np.testing.assert_allclose(got.losses, want.losses, rtol=rtol)
    np.testing.assert_allclose(got.norms, want.norms, rtol=4 * rtol)
    np.testing.assert_allclose(got.loss, want.loss, rtol=rtol)
    assert_close(got.parameters, want.parameters, 20 * rtol)
    read = {name: times for name, times in got.read.items() if name not in also_read}
    # A rank without a gradient that counts and without a loss has nothing of its own to read.
    assert read in (SCALARS, {"training/scalars.py: _sum": 1}), read
    return hccl.calls


@case(world_size=(2, 4), slow=True)
def test_the_collectives_of_an_npus_script(ctx: CaseContext) -> None:
    """What tests/ascend/rank.py asks of HCCL runs to its end on the double."""
    start_communication(), world_group(ctx)  # of the CPU, as above
    with on_ascend_double(), over_hccl(lambda ranks: group_of(ctx, list(ranks)), ctx.world_size) as hccl:
        rank.WRONG.clear()
        rank.operations(group_factory("auto", 60.0, ctx.rank, ctx.world_size), ctx.rank, ctx.world_size)
    assert not rank.WRONG and hccl.unfinished == 0 and len(hccl.calls) == 9


@case(world_size=2, variants=[{"layout": "tp2 sp"}, {"layout": "dp2 distopt overlap"}])
def test_two_ranks_of_ascend(ctx: CaseContext, layout: str) -> None:
    """Hidden states and buckets: gathered, reduced and scattered."""
    calls = check(ctx, half(layout), 5e-3)
    assert {"reduce_scatter_tensor", "all_gather_into_tensor", "all_reduce"} <= calls.keys()


@case(
    world_size=2,
    variants=[{"layout": layout} for layout in ("tp2", "pp2", "pp2 vpp2", "dp2", "dp2 overlap", "cp2 p2p",
                                                "cp2 all_gather", "cp2 a2a")],
    slow=True,
)  # fmt: skip
def test_every_layout_of_two_ranks_of_ascend(ctx: CaseContext, layout: str) -> None:
    check(ctx, half(layout), 5e-3)
    check(ctx, settings(layout), 2e-5)


@case(world_size=2, variants=[{"layout": "cp2 p2p"}, {"layout": "cp2 all_gather"}, {"layout": "tp2 sp"}], slow=True)
def test_documents_of_cut_sequences_are_known_to_the_host(ctx: CaseContext, layout: str) -> None:
    check(ctx, half(layout).with_(data={"reset_attention_mask": True, "reset_position_ids": True}), 5e-3)


@case(
    world_size=4,
    variants=[{"layout": layout} for layout in ("tp2 sp pp2 vpp2", "tp2 sp distopt overlap", "cp2 p2p tp2 sp",
                                                "cp4 a2a+p2p", "cp2 p2p pp2", "pp2 vpp2 distopt overlap")],
    slow=True,
)  # fmt: skip
def test_every_layout_of_four_ranks_of_ascend(ctx: CaseContext, layout: str) -> None:
    check(ctx, half(layout), 5e-3)


@case(
    world_size=2,
    variants=[{"model": model, "layout": layout} for model, layout in (
        ("softmax", "ep2 alltoall"), ("softmax", "tp2 sp ep2 etp1 alltoall"), ("sigmoid", "ep2 allgather"),
        ("capacity", "ep2 alltoall"), ("padded", "ep2 alltoall"), ("softmax", "ep2 alltoall full"))],
    slow=True,
)  # fmt: skip
def test_experts_of_ascend(ctx: CaseContext, model: str, layout: str) -> None:
    """Their choice is the host's; nothing else goes there."""
    check(ctx, run_of(model, layout), 2e-5, ROUTED)
