"""The YAML layouts in circulation, all read into Megatron's names.

Flat Megatron names; Megatron-LM's `language_model`/`model_parallel` sections; the guide's nested
`train_config`/`accelerate_config`/`model_config.llm`; and the five sections named after the config's fields, which is
also how a resolved config is saved. MindFormers' has a room of its own, `mindformers`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from parallel_core.config import table
from parallel_core.config.schema import DEFAULTS, NOTHING
from parallel_core.config.values import Given, shortened
from parallel_core.config.yaml_tree import Leaf

SECTIONS = ("model_config", "parallel_config", "training_config", "dataset_config", "optimizer_config")
MEGATRON_SECTIONS = ("language_model", "model_parallel")
NESTED_SECTIONS = ("train_config", "accelerate_config")

_Values = dict[str, object]
_Reader = Callable[[object], _Values]


def _as(name: str) -> _Reader:
    return lambda value: {name: value}


def _opposite(name: str) -> _Reader:
    return lambda value: {name: None if value is None else str(value).lower() in ("false", "no", "off", "0")}


def _is_float32(name: str) -> _Reader:
    return lambda value: {name: None if value is None else str(value) in ("float32", "fp32")}


def _logits(value: object) -> _Values:
    return {"fp16_lm_cross_entropy": str(value) in ("float16", "fp16")} if value is not None else {}


def _attention(value: object) -> _Values:
    kind = str(value).upper()
    if kind in ("MHA", "GQA"):
        return {"group_query_attention": kind == "GQA"}
    return {"group_query_attention": True, "num_query_groups": 1} if kind == "MQA" else {"attention_type": value}


_FUSIONS = {
    "flash_attention": "use_flash_attn",
    "rope": "apply_rope_fusion",
    "swiglu": "bias_swiglu_fusion",
    "rmsnorm": "use_fused_rmsnorm",
    "masked_softmax": "masked_softmax_fusion",
    "gradient_accumulation": "gradient_accumulation_fusion",
    "bias_dropout": "bias_dropout_fusion",
    "bias_gelu": "bias_gelu_fusion",
}


def _fused(on: bool) -> _Reader:
    def read(value: object) -> _Values:
        words = value if isinstance(value, list) else str(value or "").split(",")
        names = [str(word).strip() for word in words if str(word).strip()]
        return {_FUSIONS.get(name, f"{name} (among the fused operators)"): on for name in names}

    return read


def _target_cells(value: object) -> _Values:
    """Read MindSpeed-Core-MS's list: {target_cells: [expressions]}, and {cell, rank, alpha} for some of them."""
    if not isinstance(value, list) or not any(isinstance(entry, dict) for entry in value):
        return {"lora_target_modules": value}
    modules: list[object] = []
    own: list[str] = []
    for entry in value:
        if not isinstance(entry, dict):
            return {f"{shortened(str(entry))} (among target_cells that are mappings)": entry}
        if set(entry) == {"target_cells"}:
            named = entry["target_cells"]
            modules += named if isinstance(named, list) else [named]
        elif "cell" in entry and set(entry) <= {"cell", "rank", "alpha"}:
            rank, alpha = entry.get("rank"), entry.get("alpha")
            own.append(f"{entry['cell']}={'' if rank is None else rank}{'' if alpha is None else f':{alpha}'}")
        else:
            return {f"{shortened(str(entry))} (among target_cells: give target_cells, or cell, rank and alpha)": entry}
    return ({"lora_target_modules": modules} if modules else {}) | ({"lora_target_ranks": own} if own else {})


_LORA_SECTIONS = ("lora_config", "training_config.lora_config", "model_config.lora_config")
_LORA_KEYS: dict[str, _Reader] = {
    **{name: _as(name) for name in ("use_lora", "lora_rank", "lora_alpha", "lora_dropout")},
    "target_cells": _target_cells,
}

NESTED: dict[str, _Reader] = {
    **{f"{section}.{key}": reader for section in _LORA_SECTIONS for key, reader in _LORA_KEYS.items()},
    "accelerate_config.parallelization.tensor_parallel": _as("tensor_model_parallel_size"),
    "accelerate_config.parallelization.use_sequence_parallel": _as("sequence_parallel"),
    "accelerate_config.parallelization.pipeline.num_stages": _as("pipeline_model_parallel_size"),
    "accelerate_config.parallelization.pipeline.layer_list": _as("num_layer_list"),
    "accelerate_config.parallelization.pipeline.num_layers_per_vpp": _as("num_layers_per_virtual_pipeline_stage"),
    "accelerate_config.precision.param_init_dtype": _as("params_dtype"),
    "accelerate_config.precision.compute_dtype": _as("compute_dtype"),
    "accelerate_config.precision.softmax_compute_dtype": _is_float32("attention_softmax_in_fp32"),
    "accelerate_config.precision.logits_compute_dtype": _logits,
    "accelerate_config.precision.grad_accumulation_dtype": _is_float32("accumulate_allreduce_grads_in_fp32"),
    "accelerate_config.precision.residual_connection": _is_float32("fp32_residual_connection"),
    "accelerate_config.precision.fused_operators": _fused(True),
    "accelerate_config.precision.nofused_operators": _fused(False),
    "model_config.llm.tokenizer.padded_size": _as("padded_vocab_size"),
    "model_config.llm.tokenizer.divided_by": _as("make_vocab_size_divisible_by"),
    "model_config.llm.tokenizer.use_fast": _opposite("tokenizer_hf_no_use_fast"),
    "model_config.llm.embedding.hidden_size": _as("hidden_size"),
    "model_config.llm.embedding.init_std": _as("embedding_init_method_std"),
    "model_config.llm.position.type": _as("position_embedding_type"),
    "model_config.llm.position.max_size": _as("max_position_embeddings"),
    "model_config.llm.position.rope_base": _as("rotary_base"),
    "model_config.llm.blocks.num_layers": _as("num_layers"),
    "model_config.llm.blocks.init_std": _as("init_method_std"),
    "model_config.llm.blocks.sandwich_norm": _as("use_sandwich_norm"),
    "model_config.llm.blocks.layernorm.norm_type": _as("normalization"),
    "model_config.llm.blocks.layernorm.epsilon": _as("norm_epsilon"),
    "model_config.llm.blocks.attention.attention_type": _attention,
    "model_config.llm.blocks.attention.head_num": _as("num_attention_heads"),
    "model_config.llm.blocks.attention.kv_group_size": _as("num_query_groups"),
    "model_config.llm.blocks.attention.qkv_bias": _as("qkv_has_bias"),
    "model_config.llm.blocks.attention.projection_bias": _as("add_dense_bias"),
    "model_config.llm.blocks.attention.dropout_rate": _as("attention_dropout"),
    "model_config.llm.blocks.attention.post_norm_scale": _as("attn_post_norm_scale"),
    "model_config.llm.blocks.ffn.hidden_size": _as("ffn_hidden_size"),
    "model_config.llm.blocks.ffn.activation": _as("hidden_act"),
    "model_config.llm.blocks.ffn.dropout_rate": _as("hidden_dropout"),
    "model_config.llm.blocks.ffn.mlp_bias": _as("add_bias_linear"),
    "model_config.llm.blocks.ffn.post_norm_scale": _as("ffn_post_norm_scale"),
    "moe_config.expert_num": lambda value: {"num_experts": None if str(value) == "1" else value},
    "moe_config.num_experts_chosen": lambda value: {"moe_router_topk": value, "moe_router_pre_softmax": True},
    "moe_config.capacity_factor": lambda value: {
        "moe_expert_capacity_factor": value, "moe_token_drop_policy": "position"
    },
    "moe_config.aux_loss_factor": _as("moe_aux_loss_coeff"),
    "model_config.llm.head.shared_embedding": _opposite("untie_embeddings_and_output_weights"),
}
"""The guide's nested keys whose name differs from the argument's; the others stand for themselves."""

_MEGATRON_YAML: dict[str, _Reader] = {
    "activation_func": lambda value: {
        {"swiglu": "swiglu", "squaredrelu": "squared_relu"}.get(str(value), "hidden_act"):
        True if str(value) in ("swiglu", "squaredrelu") else None if str(value) == "gelu" else value
    },
    "gated_linear_unit": lambda value: {} if value in (None, False) else {"gated_linear_unit": value},
}
_SECTION_NAMES: dict[str, str] = {
    "dataset_config.batch_size": "micro_batch_size",
    "training_config.profile": "profile",
    "parallel_config.recompute": "recompute",
}


def read_forms(leaves: Iterable[Leaf], user_names: Iterable[str] = ()) -> tuple[list[Given], list[str]]:
    """Return what YAML values mean in Megatron's names, whatever layout they stand in, and what is unknown."""
    given: list[Given] = []
    problems: list[str] = []
    user = set(user_names)
    for leaf in leaves:
        values = _meaning(leaf, user)
        if values is None:
            problems.append(_unknown(leaf, user))
            continue
        for name, value in values.items():
            written = ".".join(leaf.path)
            if name in user:
                given.append(Given(name, value, leaf.source, written, leaf.written))
                continue
            found = table.find(name)
            if found is None:
                problems.append(f"{leaf.source}: {written}: unknown: {name}")
                continue
            argument, negated = found
            if negated and value is not None:
                value = str(value).lower() in ("false", "no", "off", "0")
            given.append(Given(argument.name, value, leaf.source, written, leaf.written))
    return given, problems


def _meaning(leaf: Leaf, user: set[str]) -> _Values | None:
    """Return {argument: value} for one YAML value, or None when its key is unknown."""
    keys = tuple(key.replace("-", "_") for key in leaf.path)
    dotted, last = ".".join(keys), keys[-1]
    if dotted in NESTED:
        return NESTED[dotted](leaf.value)
    if keys[0] in MEGATRON_SECTIONS and last in _MEGATRON_YAML:
        return _MEGATRON_YAML[last](leaf.value)
    if keys[0] in SECTIONS and len(keys) > 1 and keys[1] != "llm":
        return _section(dotted, last, leaf.value)
    nested = keys[0] in (*NESTED_SECTIONS, *MEGATRON_SECTIONS) or keys[:2] == ("model_config", "llm")
    if len(keys) > 1 and not nested:
        return None
    if len(keys) == 1 and leaf.value == {} and keys[0] in (*SECTIONS, *MEGATRON_SECTIONS, *NESTED_SECTIONS):
        return {}
    if len(keys) == 1 and leaf.value is None and keys[0] in (*SECTIONS, *MEGATRON_SECTIONS, *NESTED_SECTIONS):
        return {}
    return {last: leaf.value} if last in user or table.find(last) else None


def _section(dotted: str, last: str, value: object) -> _Values | None:
    """Read a key of the five sections: a field's name, or any name of the argument table."""
    if dotted in _SECTION_NAMES:
        return {_SECTION_NAMES[dotted]: value}
    direct = table.DIRECT.get(dotted)
    if direct is not None:
        return {} if says_nothing(dotted, value) else {direct.name: value}
    return {last: value} if table.find(last) else None


def says_nothing(path: str, value: object) -> bool:
    """Whether a field's value is its own word for "derive it" or "none", which its argument says by being absent."""
    if isinstance(value, bool) or (table.DIRECT[path].default is not None and path not in _RESOLVED_NOTHING):
        return False
    value = tuple(value) if isinstance(value, list) else value
    return value in (*NOTHING, 1) and value == _RESOLVED_NOTHING.get(path, DEFAULTS.get(path))


_RESOLVED_NOTHING: dict[str, object] = {
    "parallel_config.virtual_pipeline_model_parallel_size": 1,
    "model_config.moe.moe_layer_freq": (),
}
"""What a resolved configuration has where nothing was said, if that is not the field's default."""


def _unknown(leaf: Leaf, user: set[str]) -> str:
    written = shortened(".".join(leaf.path))
    if len(leaf.path) > 1 and leaf.path[0] not in (*SECTIONS, *MEGATRON_SECTIONS, *NESTED_SECTIONS):
        known = ", ".join((*SECTIONS, *MEGATRON_SECTIONS, *NESTED_SECTIONS))
        return f"{leaf.source}: {shortened(leaf.path[0])}: unknown section; there are {known}"
    return f"{leaf.source}: {written}: unknown argument{table.suggestion(leaf.path[-1], tuple(user))}"
