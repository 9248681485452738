"""Multi-latent attention in every layout against one process."""

from __future__ import annotations

from parallel_core.config.latent_attention import MLAConfig
from tests.helpers.cases import CaseContext, case
from tests.ranks.cases_layouts import check, settings
from tests.ranks.support import LLAMA

MLA = MLAConfig(
    multi_latent_attention=True, q_lora_rank=6, kv_lora_rank=5, qk_head_dim=4, qk_pos_emb_head_dim=2, v_head_dim=3
)
MODEL = {
    **LLAMA.model, "group_query_attention": False, "num_query_groups": 8, "kv_channels": 0, "qk_layernorm": True,
    "position_embedding_type": "rope", "mla": MLA, "yarn_rotary_scaling_factor": 4.0, "yarn_mscale_all_dim": 0.5,
}  # fmt: skip
WITHOUT_QUERY_LATENT = {**MODEL, "mla": MLAConfig(**{**vars(MLA), "q_lora_rank": 0, "rope_type": "rope"})}
WITHOUT_QUERY_LATENT["yarn_rotary_scaling_factor"] = 1.0
LAYOUTS_OF_2 = ["cp2 p2p", "cp2 a2a"]
SLOW_LAYOUTS_OF_2 = ["pp2 vpp2", "dp2 distopt overlap", "cp2 all_gather"]
LAYOUTS_OF_4 = ["tp2 sp pp2", "tp2 cp2 sp", "cp4 a2a+p2p", "tp4 sp", "tp2 sp distopt overlap", "cp2 pp2"]


def compare(ctx: CaseContext, layout: str, model: dict = MODEL) -> None:
    check(ctx, LLAMA.with_(model=model), settings(layout).with_(model=model))


@case(world_size=2)
def test_the_shared_rotary_key_has_the_gradient_of_all_heads_under_tensor_parallelism(ctx: CaseContext) -> None:
    """Each rank's heads give a part of it; a rank that kept its own part alone would be off by the other's."""
    compare(ctx, "tp2")


@case(world_size=2)
def test_latent_norms_count_once_under_tensor_parallelism_without_sequence_parallelism(ctx: CaseContext) -> None:
    """Every rank has their whole gradient, which a sum over the ranks would double. Queries without a latent too."""
    compare(ctx, "tp2", {**MODEL, "mla": MLAConfig(**{**vars(MLA), "v_head_dim": 8})})
    compare(ctx, "tp2", WITHOUT_QUERY_LATENT)


@case(world_size=2)
def test_latents_of_a_part_of_the_sequence_have_partial_gradients(ctx: CaseContext) -> None:
    compare(ctx, "tp2 sp")
    compare(ctx, "tp2 sp", WITHOUT_QUERY_LATENT)


@case(world_size=2, variants=[{"layout": name} for name in LAYOUTS_OF_2])
def test_two_ranks_train_latent_attention_like_one(ctx: CaseContext, layout: str) -> None:
    compare(ctx, layout)


@case(world_size=2, variants=[{"layout": name} for name in SLOW_LAYOUTS_OF_2], slow=True)
def test_two_more_ranks_train_latent_attention_like_one(ctx: CaseContext, layout: str) -> None:
    compare(ctx, layout)


@case(world_size=4, variants=[{"layout": name} for name in LAYOUTS_OF_4], slow=True)
def test_four_ranks_train_latent_attention_like_one(ctx: CaseContext, layout: str) -> None:
    compare(ctx, layout)
