"""What a model is: which fields of `TransformerConfig` decide what it computes, and how checkpoints spell them.

A checkpoint stores these settings, `--load` compares them, `--use-checkpoint-args` reads them back, and importers and
exporters map them. This is the one list; a field belongs to `DEFINING` or, with a reason, to `NOT_DEFINING`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from parallel_core.config import table
from parallel_core.config.bert import BertConfig
from parallel_core.config.experts import MoEConfig
from parallel_core.config.latent_attention import MLAConfig
from parallel_core.config.multi_token import MTPConfig
from parallel_core.config.schema import DEFAULTS, UNLIMITED, FlashAttentionConfig, TransformerConfig
from parallel_core.config.values import Unreadable, convert
from parallel_core.errors import ConfigError

DEFINING: tuple[str, ...] = tuple(
    """
    num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels vocab_size
    max_position_embeddings position_embedding_type rotary_base rotary_percent rotary_interleaved
    rotary_seq_len_interpolation_factor use_rope_scaling rope_scaling_factor rope_low_freq_factor rope_high_freq_factor
    rope_dynamic_factor rope_original_max_position_embeddings yarn_rotary_scaling_factor yarn_beta_fast yarn_beta_slow
    yarn_correction_range_round_to_int yarn_mscale yarn_mscale_all_dim yarn_attention_factor
    normalization norm_epsilon apply_layernorm_1p qk_layernorm hidden_act add_bias_linear qkv_has_bias
    out_proj_has_bias untie_embeddings_and_output_weights use_sandwich_norm apply_residual_connection_post_layernorm
    parallel_residual embedding_multiplier softmax_scale scale_attn_by_inverse_layer_idx fa_config.pre_tokens
    window_attn_skip_freq mla.multi_latent_attention mla.q_lora_rank mla.kv_lora_rank mla.qk_head_dim
    mla.qk_pos_emb_head_dim mla.v_head_dim mla.rope_type top_query_layer
    moe.num_experts moe.moe_layer_freq moe.moe_ffn_hidden_size moe.moe_router_topk
    moe.moe_router_score_function moe.moe_router_pre_softmax moe.moe_router_rounds
    moe.moe_router_topk_scaling_factor
    moe.moe_router_num_groups moe.moe_router_group_topk moe.moe_router_enable_expert_bias moe.moe_apply_probs_on_input
    moe.moe_shared_expert_intermediate_size moe.moe_shared_expert_gate
    mtp.mtp_num_layers bert.bert_head bert.num_tokentypes num_labels
    """.split()
)
"""Fields that decide what a model computes from given weights, or what its weights are."""

_KERNEL = "which kernel computes it"
_PRECISION = "in which type it is computed or kept"
_FIRST = "first values of weights, which a checkpoint replaces"
NOT_DEFINING: dict[str, str] = {
    "seq_length": "how the data is cut",
    "group_query_attention": "says whether num_query_groups counts, which is stored resolved",
    "attention_dropout_rate": "training alone",
    "hidden_dropout_rate": "training alone",
    "label_smoothing": "the training loss alone",
    "mtp.mtp_loss_scaling_factor": "the training loss alone",
    "attn_post_norm_scale": _FIRST,
    "ffn_post_norm_scale": _FIRST,
    "init_method_std": _FIRST,
    "embedding_init_std": _FIRST,
    "init_method_xavier_uniform": _FIRST,
    "fp32_residual_connection": _PRECISION,
    "attention_softmax_in_fp32": _PRECISION,
    "apply_query_key_layer_scaling": _PRECISION,
    "fp16_lm_cross_entropy": _PRECISION,
    "params_dtype": _PRECISION,
    "compute_dtype": _PRECISION,
    "embedding_init_dtype": _PRECISION,
    "fp32_matmul_precision": _PRECISION,
    "kernels": _KERNEL,
    "use_flash_attention": _KERNEL,
    "fa_config.next_tokens": "0 in every model that is built",
    "fa_config.input_layout": _KERNEL,
    "apply_swiglu_fusion": _KERNEL,
    "apply_rope_fusion": _KERNEL,
    "apply_rmsnorm_fusion": _KERNEL,
    "moe.moe_router_bias_update_rate": "training alone",
    "moe.moe_router_dtype": _PRECISION,
    "moe.moe_input_jitter_eps": "training alone",
    "moe.moe_router_force_load_balancing": "measurements of speed alone",
    "moe.moe_z_loss_coeff": "training alone",
    "moe.moe_router_load_balancing_type": "training alone, but for sinkhorn's weights",
    "moe.moe_aux_loss_coeff": "training alone",
    "moe.moe_global_aux_loss_form": "training alone",
    "moe.moe_expert_capacity_factor": "how many tokens are left out, which depends on the batch",
    "moe.moe_pad_expert_input_to_capacity": _KERNEL,
    "moe.moe_token_drop_policy": "which tokens are left out",
    "moe.moe_token_dispatcher_type": _KERNEL,
    "moe.moe_shared_expert_overlap": _KERNEL,
    "moe.moe_layer_recompute": "what is computed again",
    "moe.moe_per_layer_logging": "what is logged",
    "recompute_granularity": "what is computed again",
    "recompute_method": "what is computed again",
    "recompute_num_layers": "what is computed again",
    "recompute_modules": "what is computed again",
}

NAME_OF: dict[str, str] = {field: table.DIRECT[f"model_config.{field}"].name for field in DEFINING}
"""Defining field -> the argument that holds its value, which is its key in checkpoints."""
FIELD_OF: dict[str, str] = {name: field for field, name in NAME_OF.items()}


def model_settings(model: TransformerConfig) -> dict[str, Any]:
    """Return what defines `model`, by argument name and ready for JSON; settings without an effect are left out.

    `swiglu` and `add_qkv_bias` repeat `hidden_act` and `qkv_has_bias` in Megatron's words.
    """
    settings = {NAME_OF[field]: value_of(model, field) for field in DEFINING if has_effect(model, field)}
    if "window_attn_skip_freq" in settings:
        settings["window_attn_skip_freq"] = list(model.window_attn_skip_freq) or [1] * model.num_layers
    if "moe_layer_freq" in settings:
        settings["moe_layer_freq"] = list(model.moe.moe_layer_freq) or [1] * model.num_layers
    return {**settings, "swiglu": model.hidden_act == "swiglu", "add_qkv_bias": model.qkv_has_bias}


def value_of(model: TransformerConfig, field: str) -> Any:
    """Return the value of a field by its path below `model_config`."""
    outer, _, inner = field.partition(".")
    return getattr(getattr(model, outer), inner) if inner else getattr(model, outer)


def has_effect(model: TransformerConfig, field: str) -> bool:
    """Tell whether a defining field says anything about this model, given the others."""
    latent = model.mla.multi_latent_attention
    if field in ("kv_channels", "qkv_has_bias"):
        return not latent
    if field.startswith("mla.") and field != "mla.multi_latent_attention":
        return latent
    if field.startswith(("rotary_", "rope_", "use_rope")):
        if field in ("rope_scaling_factor", "rope_low_freq_factor", "rope_high_freq_factor"):
            return model.is_rotary and model.use_rope_scaling
        if field == "rope_original_max_position_embeddings":
            scaled = model.use_rope_scaling or model.rope_dynamic_factor != 1.0
            return model.has_yarn or (model.is_rotary and scaled)
        return model.is_rotary
    if field == "bert.num_tokentypes":
        return model.bert.is_encoder
    if field.startswith("moe."):
        return bool(model.moe.num_experts)
    if field.startswith("yarn_"):
        return model.has_yarn
    if field == "window_attn_skip_freq":
        return model.fa_config.pre_tokens < UNLIMITED
    return True


def model_of_settings(settings: Mapping[str, Any]) -> TransformerConfig:
    """Return the model that stored settings describe; what they do not say has the schema's default.

    Args:
        settings: as `model_settings` returns them, or an older or hand-written part of them.

    Raises:
        ConfigError: a value is not of its argument's type.
    """
    values: dict[str, Any] = {}
    for name, raw in settings.items():
        argument = table.BY_NAME.get(name)
        if argument is None or raw is None or name not in FIELD_OF:
            continue
        try:
            values[FIELD_OF[name]] = convert(argument, raw)
        except Unreadable as error:
            raise ConfigError(f"{name} {error}") from None
    if "hidden_act" not in values and settings.get("swiglu") is not None:
        values["hidden_act"] = "swiglu" if settings["swiglu"] else "gelu_tanh"
    if "qkv_has_bias" not in values and settings.get("add_qkv_bias") is not None:
        values["qkv_has_bias"] = bool(settings["add_qkv_bias"])
    values.setdefault("out_proj_has_bias", values.get("add_bias_linear", True))
    groups = values.pop("num_query_groups", None)
    if groups is not None:
        values.update(num_query_groups=groups, group_query_attention=True)
    window = values.pop("fa_config.pre_tokens", UNLIMITED)
    values["fa_config"] = FlashAttentionConfig(pre_tokens=window)
    values["mtp"] = MTPConfig(mtp_num_layers=values.pop("mtp.mtp_num_layers", 0))
    values["mla"] = MLAConfig(**{name: values.pop(f"mla.{name}") for name in _LATENT if f"mla.{name}" in values})
    values["bert"] = BertConfig(**{field[5:]: values.pop(field) for field in list(values) if field.startswith("bert.")})
    experts = {field[4:]: values.pop(field) for field in list(values) if field.startswith("moe.")}
    values["moe"] = MoEConfig(**experts)
    values.setdefault("seq_length", values.get("max_position_embeddings", 1))
    for name in ("num_layers", "hidden_size", "num_attention_heads", "vocab_size"):
        values.setdefault(name, 1)
    return TransformerConfig(**values)


_LATENT = [field.removeprefix("mla.") for field in DEFINING if field.startswith("mla.")]


def comparable(settings: Mapping[str, Any], seq_length: int) -> dict[str, Any]:
    """Return the settings that must agree for two runs on sequences of `seq_length` to have the same model.

    Padding of the vocabulary depends on the layout, and its real rows are checked where they are loaded; only a learned
    table has as many rows as there are positions; a window that covers the sequence is none.
    """
    left_out = {"vocab_size", "padded_vocab_size"}
    if settings.get("position_embedding_type", "learned_absolute") != "learned_absolute":
        left_out.add("max_position_embeddings")
    kept = {name: value for name, value in settings.items() if name not in left_out and value is not None}
    window = kept.get("pre_tockens")
    if isinstance(window, int) and window >= seq_length - 1:
        kept["pre_tockens"] = UNLIMITED
        kept.pop("window_attn_skip_freq", None)
    return kept


def default_of(field: str) -> Any:
    """Return what a defining field has when nothing is said; None for sizes, which always are."""
    return DEFAULTS.get(f"model_config.{field}")
