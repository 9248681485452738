"""The settings that define a model, in the words of Megatron-LM's arguments and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from parallel_core.config import table
from parallel_core.config.argument import MAPPED
from parallel_core.config.latent_attention import TRAINED_LENGTH
from parallel_core.config.model_keys import (
    DEFINING,
    FIELD_OF,
    NAME_OF,
    has_effect,
    model_of_settings,
    model_settings,
    value_of,
)
from parallel_core.config.rules import asks_for_nothing, build_config, run_rules
from parallel_core.config.schema import UNLIMITED, TransformerConfig
from parallel_core.config.values import Given, Unreadable, convert
from parallel_core.errors import ConfigError

_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
_ALSO_SAID_BY = {
    "hidden_act": ("bias_gelu_fusion", "squared_relu", "openai_gelu"),
    "qkv_has_bias": ("add_bias_linear", "add_qkv_bias"),
    "add_qkv_bias": ("add_bias_linear",),
    "add_dense_bias": ("add_bias_linear",),
    "swiglu": ("swiglu",),
}
"""Settings that follow from arguments which are not theirs by name."""

_MEGATRON_HAS_ONLY: dict[str, Any] = {
    "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0,
    "rope_dynamic_factor": 1.0,
    "yarn_attention_factor": 0.0,
    "use_sandwich_norm": False,
    "parallel_residual": False,
    "embedding_multiplier": 1.0,
    "top_query_layer": "none",
    "moe.moe_router_rounds": False,
    "bert.num_tokentypes": 2,
    "bert.bert_head": "none",
    "num_labels": 0,
    "softmax_scale": 0.0,
    "scale_attn_by_inverse_layer_idx": False,
}
"""Fields that Megatron has no argument for, with the value of all its models."""

NOT_BUILT = """
    moe_latent_size hybrid_override_pattern hybrid_layer_pattern is_hybrid_model
    attention_output_gate qk_l2_norm softmax_type mrope_section no_rope_freq quick_geglu glu_linear_offset
    activation_func_clamp_value experimental_attention_variant linear_attention_freq use_mup enable_mhc_connections
    heterogeneous_layers_config_path heterogeneous_layers_config_encoded_json
""".split()
"""Refused arguments that make another model; the others are about runs, and say nothing of the weights."""


def refused_by(args: Mapping[str, Any]) -> str | None:
    """Return the first argument that asks for a model that is not built, and what it is; None without one."""
    for name in NOT_BUILT:
        if name in args and not asks_for_nothing(name, args[name]):
            return f"{table.BY_NAME[name].reason} ({name}={args[name]!r})"
    return None


def settings_of_megatron(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return what Megatron's arguments, of any version, say of the model, by this project's argument names.

    What the arguments do not speak of (an older version did not have it) is left out.

    Args:
        args: plain arguments, with Megatron's derivations in them or not.

    Raises:
        ConfigError: an argument has a value that cannot be read.
    """
    given: dict[str, Given] = {}
    said: set[str] = set()
    for key, raw in args.items():
        found = table.find(str(key))
        if found is None or found[0].status != MAPPED or not _defines(found[0].fields):
            continue
        argument, negated = found
        said.update(argument.fields)
        if raw is None:  # the version has the argument, and the run its default
            continue
        try:
            value = convert(argument, raw)
        except Unreadable as error:
            raise ConfigError(f"{key} {error}") from None
        if argument.name not in given or argument.name == key:
            given[argument.name] = Given(argument.name, not value if negated else value, "checkpoint", str(key), raw)
    if not {"num_layers", "hidden_size", "num_attention_heads"} <= given.keys():
        return {name: entry.value for name, entry in given.items() if name in FIELD_OF and entry.value is not None}
    for name in ("seq_length", "padded_vocab_size"):  # of no interest here, and the model cannot be made without
        given.setdefault(name, Given(name, 1, "checkpoint", name))
    model = build_config(run_rules(given, None)).model_config
    if model.use_rope_scaling:
        said.add("model_config.rope_original_max_position_embeddings")
    settings = model_settings(model)
    known = {name: value for name, value in settings.items() if _is_said(name, settings, given, said)}
    if args.get("padded_vocab_size") is None:
        known.pop("padded_vocab_size", None)
    return known


def _defines(fields: tuple[str, ...]) -> bool:
    paths = [field.removeprefix("model_config.") for field in fields if field.startswith("model_config.")]
    return any(path in DEFINING or path in ("group_query_attention", "seq_length") for path in paths)


def _is_said(name: str, settings: Mapping[str, Any], given: Mapping[str, Given], said: set[str]) -> bool:
    if name in _SIZES or FIELD_OF.get(name) in _MEGATRON_HAS_ONLY or name == "pre_tockens":
        return True  # a version without the argument has no such models
    if name == "hidden_act" and settings[name] == "swiglu":
        return True
    if name in _ALSO_SAID_BY and any(other in given for other in _ALSO_SAID_BY[name]):
        return True
    return name != "hidden_act" and f"model_config.{FIELD_OF.get(name)}" in said


def megatron_arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as Megatron's arguments, so that a Megatron run of them computes the same.

    Args:
        settings: as `model_settings` returns them, or a part of them; what they do not say is not said here either.

    Raises:
        ConfigError: Megatron has no argument for one of the settings; it is named.
    """
    model = model_of_settings(settings)
    for field, only in _MEGATRON_HAS_ONLY.items():
        if value_of(model, field) != only and has_effect(model, field):
            raise ConfigError(f"{NAME_OF[field]}={value_of(model, field)!r}: Megatron has no argument for it")
    args = {
        name: value for name, value in settings.items() if name not in FIELD_OF or table.BY_NAME[name].origin != _OWN
    }
    if "hidden_act" in settings:
        args.update(_activation(model))
    if "qkv_has_bias" in settings or "add_dense_bias" in settings:
        args.update(_biases(model))
    args.update(_rotation(model, settings))
    if model.fa_config.pre_tokens < UNLIMITED:
        args["window_size"] = [model.fa_config.pre_tokens, 0]
    return {name: value for name, value in args.items() if name not in _SPEED_ONLY}


_OWN = "parallel_core"
_SPEED_ONLY = ("hidden_act", "add_dense_bias", "use_sandwich_norm", "pre_tockens")


def _activation(model: TransformerConfig) -> dict[str, Any]:
    act = model.hidden_act
    if act == "gelu_tanh" and not model.add_bias_linear:
        act = "openai_gelu"  # the same function; Megatron's fused bias-GELU needs a bias
    if act not in ("gelu", "gelu_tanh", "swiglu", "squared_relu", "openai_gelu"):
        raise ConfigError(f"hidden_act={act!r}: Megatron has no argument for it")
    flags = {name: act == name for name in ("swiglu", "squared_relu", "openai_gelu")}
    return {**flags, "bias_gelu_fusion": act == "gelu_tanh"}


def _biases(model: TransformerConfig) -> dict[str, Any]:
    qkv_follows = model.qkv_has_bias or not model.add_bias_linear or model.mla.multi_latent_attention
    if model.out_proj_has_bias != model.add_bias_linear or not qkv_follows:
        raise ConfigError(
            f"qkv_has_bias={model.qkv_has_bias}, add_dense_bias={model.out_proj_has_bias}, "
            f"add_bias_linear={model.add_bias_linear}: Megatron has biases in all linear layers, in query, key and "
            "value alone, or in none"
        )
    return {"add_bias_linear": model.add_bias_linear, "add_qkv_bias": model.qkv_has_bias}


def _rotation(model: TransformerConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return positions in the types Megatron's parser gives them: whole numbers for base and interpolation."""
    args: dict[str, Any] = {}
    trained = model.rope_original_max_position_embeddings
    if model.is_rotary and model.use_rope_scaling and trained != _LLAMA3_POSITIONS:
        raise ConfigError(f"rope_original_max_position_embeddings={trained}: Megatron has {_LLAMA3_POSITIONS} alone")
    for name in ("rotary_base", "rotary_seq_len_interpolation_factor"):
        value = settings.get(name)
        if isinstance(value, float) and value.is_integer():
            args[name] = int(value)
    if args.get("rotary_seq_len_interpolation_factor") == 1:
        args["rotary_seq_len_interpolation_factor"] = None
    if model.mla.multi_latent_attention:
        return {**args, **_latent_rotation(model)}
    if model.position_embedding_type == "yarn":
        args["yarn_original_max_position_embeddings"] = trained
        args["rotary_scaling_factor"] = model.yarn_rotary_scaling_factor
        args.update(mscale=model.yarn_mscale, mscale_all_dim=model.yarn_mscale_all_dim)
    return args


def _latent_rotation(model: TransformerConfig) -> dict[str, Any]:
    """Return the numbers of YaRN as Megatron's multi-latent attention takes them."""
    if not model.has_yarn:
        return {}
    for field, only in (
        ("rope_original_max_position_embeddings", TRAINED_LENGTH), ("yarn_beta_fast", 32.0), ("yarn_beta_slow", 1.0),
        ("yarn_correction_range_round_to_int", True),
    ):  # fmt: skip
        if getattr(model, field) != only:
            raise ConfigError(
                f"{NAME_OF[field]}={getattr(model, field)!r}: Megatron's multi-latent attention has {only!r} alone"
            )
    return {
        "rotary_scaling_factor": model.yarn_rotary_scaling_factor,
        "mscale": model.yarn_mscale,
        "mscale_all_dim": model.yarn_mscale_all_dim,
    }


_LLAMA3_POSITIONS = 8192
