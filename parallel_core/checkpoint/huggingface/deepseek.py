"""What `config.json` says of DeepSeek-V2 and -V3: multi-latent attention and experts, and where their tensors are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from parallel_core.checkpoint.huggingface.architecture import Fields, Group
from parallel_core.checkpoint.huggingface.rope import rope
from parallel_core.checkpoint.huggingface.tensors import FINAL_NORM, OUTPUT, WORD_EMBEDDINGS, TensorTable
from parallel_core.checkpoint.huggingface.values import Wrong, count, flag, number
from parallel_core.config.latent_attention import MLAConfig
from parallel_core.config.schema import TransformerConfig

DEEPSEEK_TENSORS = TensorTable(
    "model.",
    {
        WORD_EMBEDDINGS: "model.embed_tokens.weight",
        f"{FINAL_NORM}.weight": "model.norm.weight",
        OUTPUT: "lm_head.weight",
    },
    "layers.{}",
    {
        "input_layernorm": ("input_layernorm",),
        "pre_mlp_layernorm": ("post_attention_layernorm",),
        "self_attention.linear_q_proj": ("self_attn.q_proj",),
        "self_attention.linear_q_down_proj": ("self_attn.q_a_proj",),
        "self_attention.q_layernorm": ("self_attn.q_a_layernorm",),
        "self_attention.linear_q_up_proj": ("self_attn.q_b_proj",),
        "self_attention.linear_kv_down_proj": ("self_attn.kv_a_proj_with_mqa",),
        "self_attention.kv_layernorm": ("self_attn.kv_a_layernorm",),
        "self_attention.linear_kv_up_proj": ("self_attn.kv_b_proj",),
        "self_attention.linear_proj": ("self_attn.o_proj",),
        "mlp.linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.linear_fc2": ("mlp.down_proj",),
        "mlp.router": ("mlp.gate",),
        "mlp.shared_experts.linear_fc1": ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
        "mlp.shared_experts.linear_fc2": ("mlp.shared_experts.down_proj",),
    },
    experts={
        "mlp.experts.experts.linear_fc1": ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj"),
        "mlp.experts.experts.linear_fc2": ("mlp.experts.{}.down_proj",),
    },
    behind={"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "final_layernorm": "shared_head.norm"},
    copies={WORD_EMBEDDINGS: "embed_tokens.weight", OUTPUT: "shared_head.head.weight"},
)
_SIZES = {
    "kv_lora_rank": ("kv_lora_rank", 512),
    "qk_nope_head_dim": ("qk_head_dim", 128),
    "qk_rope_head_dim": ("qk_pos_emb_head_dim", 64),
    "v_head_dim": ("v_head_dim", 128),
}
"""Key -> (field of `MLAConfig`, what `transformers` takes without it)."""


def _read(found: Mapping[str, Any], name: str, reader: Any, default: Any) -> Any:
    value = found.get(name)
    try:
        return default if value is None else reader(value)
    except Wrong as error:
        raise Wrong(f"{name}={value!r} {error}") from None


def latent_attention() -> Group:
    """Return the ranks of latents and the sizes of heads."""
    keys = (*_SIZES, "q_lora_rank", "qk_head_dim", "head_dim", "num_key_value_heads", "rope_interleave")

    def read(found: Mapping[str, Any], fields: Fields) -> Fields:
        sizes = {field: _read(found, key, count, default) for key, (field, default) in _SIZES.items()}
        # null is a model whose queries have no latent; `transformers` takes 1536 where nothing is said.
        sizes["q_lora_rank"] = _read(found, "q_lora_rank", count, 0) if "q_lora_rank" in found else 1536
        heads, turning = fields["num_attention_heads"], sizes["qk_pos_emb_head_dim"]
        for key, fine in (
            ("num_key_value_heads", (None, heads)), ("qk_head_dim", (None, sizes["qk_head_dim"] + turning)),
            ("head_dim", (None, turning)), ("rope_interleave", (None, True)),
        ):  # fmt: skip
            if found.get(key) not in fine:
                raise Wrong(f"{key}={found[key]!r} is not built; {fine[1]!r} is")
        if turning % 2:
            raise Wrong(f"qk_rope_head_dim={turning} must be an even number")
        return {"mla.multi_latent_attention": True, **{f"mla.{field}": value for field, value in sizes.items()}}

    def write(model: TransformerConfig) -> dict[str, Any]:
        mla = model.mla
        if not mla.multi_latent_attention:
            raise Wrong("multi_latent_attention=False, True there")
        written = {key: getattr(mla, field) for key, (field, _) in _SIZES.items()}
        written |= {"q_lora_rank": mla.q_lora_rank or None, "qk_head_dim": mla.head_size, "rope_interleave": True}
        return {**written, "head_dim": mla.qk_pos_emb_head_dim, "num_key_value_heads": model.num_attention_heads}

    fields = ("q_lora_rank", *(field for field, _ in _SIZES.values()), "multi_latent_attention")
    return Group(keys, (*(f"mla.{field}" for field in fields), "num_query_groups"), read, write)


def latent_rope() -> Group:
    """Return the group of rotary positions, whose frequencies multi-latent attention names by a type of its own."""
    plain = rope()

    def read(found: Mapping[str, Any], fields: Fields) -> Fields:
        result = plain.read(found, fields)
        kind = result["position_embedding_type"]
        if kind == "yarn" and not result["yarn_mscale"] and result["yarn_mscale_all_dim"]:
            raise Wrong("rope_type='yarn' has mscale_all_dim without mscale; give both")
        if kind == "rope" and (result.get("use_rope_scaling") or set(result) & {
            "rope_dynamic_factor", "rotary_seq_len_interpolation_factor",
        }):  # fmt: skip
            raise Wrong("multi-latent attention has rope_type 'default' or 'yarn'")
        return {**result, "position_embedding_type": "rope", "mla.rope_type": kind}

    def write(model: TransformerConfig) -> dict[str, Any]:
        kind = "yarn" if model.has_yarn else "rope"
        return plain.write(replace(model, position_embedding_type=kind, mla=MLAConfig()))

    return Group(plain.keys, (*plain.fields, "mla.rope_type"), read, write)


def chosen_experts(sigmoid: bool) -> Group:
    """Return the group of experts.

    Args:
        sigmoid: V3's router: sigmoid scores, a bias for the choice, weights that add up to the factor; V2's has the
            softmax of all experts, of which the best are taken as they are.
    """
    scoring, method = ("sigmoid", "noaux_tc") if sigmoid else ("softmax", "greedy")
    keys = (
        "n_routed_experts", "n_shared_experts", "moe_intermediate_size", "num_experts_per_tok", "first_k_dense_replace",
        "moe_layer_freq", "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor", "scoring_func",
        "topk_method",
    )  # fmt: skip
    names = """
        num_experts moe_layer_freq moe_ffn_hidden_size moe_router_topk moe_router_score_function moe_router_pre_softmax
        moe_router_topk_scaling_factor moe_router_num_groups moe_router_group_topk moe_shared_expert_intermediate_size
    """.split()

    def read(found: Mapping[str, Any], fields: Fields) -> Fields:
        for key, fine in (("moe_layer_freq", 1), ("scoring_func", scoring), ("topk_method", method)):
            if found.get(key) not in (None, fine):
                raise Wrong(f"{key}={found[key]!r} is not built; {fine!r} is")
        normed = _read(found, "norm_topk_prob", flag, sigmoid)
        if normed != sigmoid:
            raise Wrong(f"norm_topk_prob={normed!r} is not built; {sigmoid!r} is")
        dense = found.get("first_k_dense_replace", 3 if sigmoid else 0)
        if type(dense) is not int or not 0 <= dense < fields["num_layers"]:
            raise Wrong(f"first_k_dense_replace={dense!r} takes a whole number below num_hidden_layers")
        width = _read(found, "moe_intermediate_size", count, 2048 if sigmoid else 1407)
        best = _read(found, "num_experts_per_tok", count, 8)
        groups, kept = _read(found, "n_group", count, 1), _read(found, "topk_group", count, 1)
        if groups > 1 and (not sigmoid or best // kept != 2):
            raise Wrong(f"n_group={groups} with topk_group={kept} and num_experts_per_tok={best} is not built; groups "
                        "are chosen by their two best, and num_experts_per_tok is twice topk_group")  # fmt: skip
        factor = _read(found, "routed_scaling_factor", number, 2.5 if sigmoid else 1.0)
        values = (
            _read(found, "n_routed_experts", count, 256 if sigmoid else 64),
            (0,) * dense + (1,) * (fields["num_layers"] - dense), width, best, scoring, not sigmoid,
            0.0 if factor == 1.0 else factor, groups if groups > 1 else 0, kept if groups > 1 else 0,
            _read(found, "n_shared_experts", count, 0) * width,
        )  # fmt: skip
        return {f"moe.{name}": value for name, value in zip(names, values, strict=True)}

    def write(model: TransformerConfig) -> dict[str, Any]:
        moe, layers = model.moe, range(model.num_layers)
        dense = sum(not moe.has_experts(i) for i in layers)
        if not moe.num_experts or any(moe.has_experts(i) != (i >= dense) for i in layers):
            raise Wrong("experts in all layers but the first ones there")
        if moe.moe_router_score_function != scoring or (not sigmoid and not moe.moe_router_pre_softmax):
            raise Wrong(f"moe_router_score_function={moe.moe_router_score_function}, {scoring} there")
        wide, width = moe.moe_shared_expert_intermediate_size, moe.moe_ffn_hidden_size
        if wide % width:
            raise Wrong(f"moe_shared_expert_intermediate_size={wide}, a multiple of {width} there")
        groups, kept = moe.moe_router_num_groups or 1, moe.moe_router_group_topk or 1
        if groups > 1 and (not sigmoid or moe.moe_router_topk // kept != 2):
            raise Wrong(f"moe_router_group_topk={kept}, half of {moe.moe_router_topk} there")
        written = {
            "n_routed_experts": moe.num_experts, "n_shared_experts": wide // width or None,
            "moe_intermediate_size": width, "num_experts_per_tok": moe.moe_router_topk, "first_k_dense_replace": dense,
            "n_group": groups, "topk_group": kept, "norm_topk_prob": sigmoid, "topk_method": method,
            "routed_scaling_factor": moe.moe_router_topk_scaling_factor or 1.0, "scoring_func": scoring,
        }  # fmt: skip
        return {**written, "moe_layer_freq": 1}

    return Group(keys, tuple(f"moe.{name}" for name in names), read, write)
