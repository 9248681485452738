"""Rules of multi-latent attention."""

from __future__ import annotations

from parallel_core.config import table
from parallel_core.config.resolution import Resolution, Rules
from parallel_core.config.schema import DEFAULTS

LATENT_CHECKS = Rules()

_SIZES = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
_OTHER_ROTATIONS = (
    "rotary_interleaved", "rotary_percent", "use_rope_scaling", "rope_dynamic_factor",
    "rotary_seq_len_interpolation_factor",
)  # fmt: skip


@LATENT_CHECKS
def latent_sizes(r: Resolution) -> None:
    """Sizes of latents and heads belong to multi-latent attention, and channels turn in pairs."""
    for name in _SIZES:
        if r[name] is not None and r[name] <= 0:
            r.fail(name, "must be above zero")
    if not r["multi_latent_attention"]:
        for name in _SIZES:
            if r.is_given(name) and r[name] != DEFAULTS[table.BY_NAME[name].fields[0]]:
                r.fail(name, "belongs to multi_latent_attention; give that too, or leave it out")
        if r["rope_type"] == "yarn":
            r.fail("rope_type", "belongs to multi_latent_attention; write position_embedding_type yarn")
    elif r.positive("qk_pos_emb_head_dim") and r["qk_pos_emb_head_dim"] % 2:
        r.fail("qk_pos_emb_head_dim", "channels turn in pairs; it must be an even number")


@LATENT_CHECKS
def latent_attention(r: Resolution) -> None:
    """Multi-latent attention has rotary positions of its own, no groups of heads and no biases of query and key."""
    if not r["multi_latent_attention"]:
        return
    if r["position_embedding_type"] != "rope":
        r.fail("multi_latent_attention position_embedding_type",
               "has rotary positions of its own, of kind rope_type; write position_embedding_type rope")
    if r["group_query_attention"]:
        r.fail("multi_latent_attention group_query_attention", "every head has keys of its own; leave the groups out")
    if r["add_qkv_bias"] or r["qkv_has_bias"]:
        given = "add_qkv_bias" if r["add_qkv_bias"] else "qkv_has_bias"
        r.fail(f"multi_latent_attention {given}", "its projections have no biases; leave it out")
    for name in _OTHER_ROTATIONS:
        if r[name] != DEFAULTS[table.BY_NAME[name].fields[0]]:
            r.fail(f"multi_latent_attention {name}", "its frequencies are rope's or yarn's as they are; leave it out")
    if r.is_given("yarn_mscale") and not r["yarn_mscale"] and r["yarn_rotary_scaling_factor"] > 1:
        r.fail("multi_latent_attention yarn_mscale", "0 cannot be told from the default, 1; give a number above zero")
