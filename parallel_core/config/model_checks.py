"""Rules across the model's options: rotary scaling, residuals, attention windows."""

from __future__ import annotations

from parallel_core.config import table
from parallel_core.config.bert_checks import BERT_CHECKS
from parallel_core.config.latent_checks import LATENT_CHECKS
from parallel_core.config.multi_token_checks import MULTI_TOKEN_CHECKS
from parallel_core.config.resolution import Resolution, Rules
from parallel_core.config.schema import DEFAULTS, UNLIMITED

MODEL_CHECKS = Rules({**LATENT_CHECKS, **MULTI_TOKEN_CHECKS, **BERT_CHECKS})


@MODEL_CHECKS
def rotary_scaling(r: Resolution) -> None:
    """Rotary frequencies are scaled in one way, and with the numbers of that way."""
    kind = r["rope_type"] if r["multi_latent_attention"] else r["position_embedding_type"]
    yarn = "rope_type yarn" if r["multi_latent_attention"] else "position_embedding_type yarn"
    dynamic = r["rope_dynamic_factor"] != 1.0
    if r["use_rope_scaling"] and kind != "rope":
        r.fail("use_rope_scaling position_embedding_type", "scales the frequencies of rope, and of nothing else")
    if dynamic and kind != "rope":
        r.fail("rope_dynamic_factor position_embedding_type", "scales the frequencies of rope, and of nothing else")
    if dynamic and r["use_rope_scaling"]:
        r.fail("rope_dynamic_factor use_rope_scaling", "scale the same frequencies; give one")
    if dynamic and r.positive("kv_channels") and int(r["kv_channels"] * r["rotary_percent"]) <= 2:
        r.fail("rope_dynamic_factor kv_channels", "needs at least 4 rotated channels")
    if r["rope_dynamic_factor"] < 1:
        r.fail("rope_dynamic_factor", "must be at least 1")
    for names, there, feature in (
        (("rope_low_freq_factor", "rope_high_freq_factor"), r["use_rope_scaling"], "use_rope_scaling"),
        (_YARN.split(), kind == "yarn", yarn),
        (("rope_original_max_position_embeddings",), r["use_rope_scaling"] or dynamic or kind == "yarn",
         f"use_rope_scaling, rope_dynamic_factor or {yarn}"),
    ):
        for name in names:
            if not there and r.is_given(name) and r[name] != DEFAULTS[table.BY_NAME[name].fields[0]]:
                r.fail(name, f"belongs to {feature}")
    if r["rope_high_freq_factor"] <= r["rope_low_freq_factor"]:
        r.fail("rope_low_freq_factor rope_high_freq_factor", "the first must be below the second")
    if r["yarn_beta_fast"] < r["yarn_beta_slow"]:
        r.fail("yarn_beta_fast yarn_beta_slow", "the first must not be below the second")
    if kind == "yarn" and r["rotary_base"] <= 1:
        r.fail("rotary_base position_embedding_type", "must be above 1")


_YARN = """
    yarn_rotary_scaling_factor yarn_beta_fast yarn_beta_slow yarn_correction_range_round_to_int yarn_mscale
    yarn_mscale_all_dim yarn_attention_factor
"""


@MODEL_CHECKS
def residuals(r: Resolution) -> None:
    """Attention and MLP side by side branch off before their norms."""
    if r["parallel_residual"] and r["apply_residual_connection_post_layernorm"]:
        r.fail("parallel_residual apply_residual_connection_post_layernorm", "place the residual twice; give one")


@MODEL_CHECKS
def query_layer(r: Resolution) -> None:
    """PanGu-alpha's query layer asks by learned positions, and is the last layer."""
    if r["top_query_layer"] == "none":
        return
    if r["position_embedding_type"] != "learned_absolute":
        r.fail("top_query_layer position_embedding_type", "asks by learned positions; give learned_absolute")
    for name in ("qk_layernorm", "parallel_residual"):
        if r[name]:
            r.fail(f"top_query_layer {name}", "the query layer has no form of it; leave one out")
    if r["noop_layers"] and r["num_layers"] - 1 in r["noop_layers"]:
        last = r["num_layers"] - 1
        r.fail("top_query_layer noop_layers", f"the query layer is layer {last}, which must not be left out")


@MODEL_CHECKS
def attention_window(r: Resolution) -> None:
    """An attention window has two numbers, positions before and after its own that a query sees; none come after."""
    window, pattern = r["window_size"], r["window_attn_skip_freq"]
    if pattern is not None and r["pre_tockens"] == UNLIMITED:
        r.fail("window_attn_skip_freq", "says in which layers there is a window, and there is none; give window_size")
    if isinstance(pattern, tuple) and r["num_layers"] and len(pattern) != r["num_layers"]:
        r.fail("window_attn_skip_freq num_layers", f"has {len(pattern)} entries, one for every layer is needed")
    if window is None:
        return
    if len(window) != 2 or window[0] < -1:
        r.fail("window_size", "takes two numbers: positions before (-1: all) and after its own that a query sees")
    elif window[1] not in (0, -1) or (window[1] == -1 and window[0] != -1):
        r.fail("window_size", "the second number must be 0, causal attention")
