"""PanGu-alpha trains the same in every layout: its query layer and its table are the last stage's."""

from __future__ import annotations

from typing import Any

from parallel_core.config.experts import MoEConfig
from tests.helpers.cases import CaseContext, case
from tests.ranks.cases_layouts import check, settings
from tests.ranks.support import Tiny

PANGU = {"hidden_act": "fast_gelu", "top_query_layer": "norm_before"}
DOCUMENTS = {"reset_attention_mask": True}
LAYOUTS_OF_2 = [
    "tp2", "tp2 sp", "pp2", "pp2 vpp2", "dp2", "dp2 distopt overlap", "cp2 p2p", "cp2 all_gather", "cp2 a2a",
]  # fmt: skip
LAYOUTS_OF_4 = ["tp2 sp pp2 vpp2", "pp4", "cp2 all_gather pp2", "tp2 sp cp2 p2p", "tp2 sp distopt overlap"]
RECOMPUTED = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
EXPERTS = {
    "num_experts": 4,
    "moe_ffn_hidden_size": 8,
    "moe_router_topk": 2,
    "moe_router_rounds": True,
    "moe_expert_capacity_factor": 1.1,
    "moe_aux_loss_coeff": (0.05,),
}
"""A full expert leaves tokens out by their place in the whole microbatch, whoever holds them."""
EXPERTS_OF_2 = ["tp2 sp ep2", "cp2 p2p ep2", "dp2 ep2 distopt", "pp2", "pp2 vpp2"]
EXPERTS_OF_4 = ["tp2 sp pp2 vpp2 ep2", "tp2 sp cp2 p2p ep4", "dp4 ep2 distopt overlap"]


@case(world_size=2, variants=[{"layout": name} for name in LAYOUTS_OF_2])
def test_two_ranks_keep_the_final_norm_before_the_query_layer_in_every_layout(ctx: CaseContext, layout: str) -> None:
    """Elsewhere a pipeline moved it behind that layer."""
    run = settings(layout).with_(model=PANGU, data=DOCUMENTS)
    check(ctx, Tiny(model=PANGU, data=DOCUMENTS), run, rtol=RTOL)


@case(world_size=4, variants=[{"layout": name} for name in LAYOUTS_OF_4])
def test_four_ranks_keep_the_final_norm_after_the_query_layer_in_every_layout(ctx: CaseContext, layout: str) -> None:
    """With and without a pipeline, and all layers recomputed."""
    model = {**PANGU, "top_query_layer": "norm_after"}
    check(ctx, Tiny(model=model), settings(layout).with_(model={**model, **RECOMPUTED}), rtol=RTOL)


def with_experts(layout: str, **more: Any) -> Tiny:
    """Return the run of a layout whose words may be epN and alltoall."""
    words = layout.split()
    (ep,) = [int(word[2:]) for word in words if word.startswith("ep")] or [1]
    moe = MoEConfig(**EXPERTS, moe_token_dispatcher_type="alltoall" if "pp2" not in words else "allgather")
    tiny = settings(" ".join(word for word in words if not word.startswith("ep")))
    parallel = {"expert_model_parallel_size": ep, "expert_tensor_parallel_size": 1}
    return tiny.with_(model={**PANGU, "moe": moe, **more}, parallel=parallel, data=DOCUMENTS)


@case(world_size=2, variants=[{"layout": name} for name in EXPERTS_OF_2])
def test_two_ranks_leave_the_same_tokens_out_as_one(ctx: CaseContext, layout: str) -> None:
    check(ctx, with_experts(""), with_experts(layout), rtol=RTOL)


@case(world_size=4, variants=[{"layout": name} for name in EXPERTS_OF_4])
def test_four_ranks_leave_the_same_tokens_out_as_one(ctx: CaseContext, layout: str) -> None:
    """With experts and router computed again in the backward pass."""
    check(ctx, with_experts(""), with_experts(layout, **RECOMPUTED), rtol=RTOL)


RTOL = 1e-6
"""fp32: sums over ranks and microbatches are made in another order."""
