"""PanGu-alpha trains the same in every layout: its query layer and its table are the last stage's."""

from __future__ import annotations

from tests.helpers.cases import CaseContext, case
from tests.ranks.cases_layouts import check, settings
from tests.ranks.support import Tiny

PANGU = {"hidden_act": "fast_gelu", "top_query_layer": "norm_before"}
DOCUMENTS = {"reset_attention_mask": True}
LAYOUTS_OF_2 = ["tp2", "tp2 sp", "pp2", "pp2 vpp2", "dp2 distopt overlap", "cp2 p2p", "cp2 a2a"]
LAYOUTS_OF_4 = ["tp2 sp pp2 vpp2", "pp4", "cp2 all_gather pp2", "tp2 sp distopt overlap"]
RECOMPUTED = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@case(world_size=2, variants=[{"layout": name} for name in LAYOUTS_OF_2])
def test_two_ranks_train_a_query_layer_like_one(ctx: CaseContext, layout: str) -> None:
    """The final norm before the query layer, on one stage and on two."""
    run = settings(layout).with_(model=PANGU, data=DOCUMENTS)
    check(ctx, Tiny(model=PANGU, data=DOCUMENTS), run, rtol=4e-6)


@case(world_size=4, variants=[{"layout": name} for name in LAYOUTS_OF_4])
def test_four_ranks_train_a_query_layer_like_one(ctx: CaseContext, layout: str) -> None:
    """The final norm after it, whatever the layout, and all layers recomputed."""
    model = {**PANGU, "top_query_layer": "norm_after"}
    check(ctx, Tiny(model=model), settings(layout).with_(model={**model, **RECOMPUTED}), rtol=4e-6)
