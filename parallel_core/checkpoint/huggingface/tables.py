"""The architectures that are read and written, a table each; to add one is to add a table."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from parallel_core.checkpoint.huggingface.architecture import Architecture, Fields, Group, Key
from parallel_core.checkpoint.huggingface.bert import BERT_CLASSES, BERT_TENSORS, bert_head
from parallel_core.checkpoint.huggingface.deepseek import (
    DEEPSEEK_TENSORS,
    chosen_experts,
    latent_attention,
    latent_rope,
)
from parallel_core.checkpoint.huggingface.rope import rope
from parallel_core.checkpoint.huggingface.tensors import (
    FINAL_NORM,
    OUTPUT,
    POSITIONS,
    QUERIES,
    SCORE,
    WORD_EMBEDDINGS,
    TensorTable,
)
from parallel_core.checkpoint.huggingface.values import Wrong, count, flag, layers, number, one_of, word_for
from parallel_core.checkpoint.huggingface.windows import by_layer, everywhere
from parallel_core.config.schema import TransformerConfig

NEUTRAL = frozenset(
    """
    model_type architectures _name_or_path name_or_path transformers_version torch_dtype dtype auto_map use_cache
    attn_implementation _attn_implementation _attn_implementation_autoset pretraining_tp gradient_checkpointing
    initializer_range bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id mask_token_id unk_token_id
    decoder_start_token_id tokenizer_class prefix attention_dropout hidden_dropout classifier_dropout resid_pdrop
    embd_pdrop attn_pdrop summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
    id2label label2id num_labels problem_type finetuning_task task_specific_params output_attentions
    output_hidden_states output_scores return_dict return_dict_in_generate use_return_dict torchscript max_length
    min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
    repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens tf_legacy_loss use_bfloat16
    chunk_size_feed_forward unsloth_version unsloth_fixed max_new_tokens n_ctx is_llama_config
    """.split()
)
"""Keys that change nothing of what any of these models computes: names, ids, first values, dropout, labels, and
settings of generation and of sequence classification."""
_ONLY: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "is_decoder": (False, True),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "quantization_config": (),
}
_GATED = {
    "silu": "swiglu", "swish": "swiglu", "gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh", "gelu_new": "geglu_tanh",
    "gelu_fast": "geglu_tanh", "gelu_python": "geglu",
}  # fmt: skip
_PLAIN = {
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu": "gelu",
    "gelu_python": "gelu", "quick_gelu": "fast_gelu", "relu": "relu", "relu2": "squared_relu",
    "silu": "silu", "swish": "silu",
}  # fmt: skip
_NO_BIAS = {"add_bias_linear": False, "qkv_has_bias": False, "out_proj_has_bias": False}
_GPT2_FIXED = {
    "position_embedding_type": "learned_absolute", "normalization": "LayerNorm", "add_bias_linear": True,
    "qkv_has_bias": True, "out_proj_has_bias": True, "apply_layernorm_1p": False,
}  # fmt: skip
_RMS = {"normalization": "RMSNorm", "apply_layernorm_1p": False}


def _size(field: str, **more: Any) -> Key:
    return Key((field,), count, **more)


def _untied(default: bool) -> Key:
    """Return `tie_word_embeddings`, which is the opposite of ours."""
    return Key(("untie_embeddings_and_output_weights",), lambda v: not flag(v), lambda v: not v, default)


def _activation(words: Mapping[str, str], default: str) -> Key:
    write = word_for(words)
    return Key(("hidden_act",), one_of(words), lambda v: write("gelu_tanh" if v == "openai_gelu" else v), default)


def _llama_keys(
    *, groups: int | None = None, head_dim: int | None = None, act: str = "silu", tied: bool = False, eps: float = 1e-6
) -> dict[str, Key]:
    return {
        "vocab_size": _size("vocab_size"),
        "hidden_size": _size("hidden_size"),
        "intermediate_size": _size("ffn_hidden_size"),
        "num_hidden_layers": Key(("num_layers",), layers),
        "num_attention_heads": _size("num_attention_heads"),
        "num_key_value_heads": _size("num_query_groups", default=groups),
        "head_dim": _size("kv_channels", default=head_dim),
        "max_position_embeddings": _size("max_position_embeddings"),
        "rms_norm_eps": Key(("norm_epsilon",), number, default=eps),
        "hidden_act": _activation(_GATED, act),
        "tie_word_embeddings": _untied(tied),
    }


_LLAMA_TENSORS = TensorTable(
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
        "self_attention.linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attention.linear_proj": ("self_attn.o_proj",),
        "self_attention.q_layernorm": ("self_attn.q_norm",),
        "self_attention.k_layernorm": ("self_attn.k_norm",),
        "mlp.linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.linear_fc2": ("mlp.down_proj",),
    },
)
_MIXTRAL_TENSORS = replace(
    _LLAMA_TENSORS,
    modules={**_LLAMA_TENSORS.modules, "mlp.router": ("block_sparse_moe.gate",)},
    experts={
        "mlp.experts.experts.linear_fc1": ("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3"),
        "mlp.experts.experts.linear_fc2": ("block_sparse_moe.experts.{}.w2",),
    },
)
_QWEN_MOE_TENSORS = replace(
    _LLAMA_TENSORS,
    modules={
        **_LLAMA_TENSORS.modules,
        "mlp.router": ("mlp.gate",),
        "mlp.shared_experts.linear_fc1": ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
        "mlp.shared_experts.linear_fc2": ("mlp.shared_expert.down_proj",),
    },
    experts={
        "mlp.experts.experts.linear_fc1": ("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj"),
        "mlp.experts.experts.linear_fc2": ("mlp.experts.{}.down_proj",),
    },
    gate="mlp.shared_expert_gate",
)
_PHI3_TENSORS = TensorTable(
    "model.",
    _LLAMA_TENSORS.top,
    "layers.{}",
    {
        **_LLAMA_TENSORS.modules,
        "self_attention.linear_qkv": ("self_attn.qkv_proj",),
        "mlp.linear_fc1": ("mlp.gate_up_proj",),
    },
)
_GPT2_TENSORS = TensorTable(
    "transformer.",
    {
        WORD_EMBEDDINGS: "transformer.wte.weight",
        POSITIONS: "transformer.wpe.weight",
        f"{FINAL_NORM}.weight": "transformer.ln_f.weight",
        f"{FINAL_NORM}.bias": "transformer.ln_f.bias",
        OUTPUT: "lm_head.weight",
        SCORE: "score.weight",
    },
    "h.{}",
    {
        "input_layernorm": ("ln_1",),
        "pre_mlp_layernorm": ("ln_2",),
        "self_attention.linear_qkv": ("attn.c_attn",),
        "self_attention.linear_proj": ("attn.c_proj",),
        "mlp.linear_fc1": ("mlp.c_fc",),
        "mlp.linear_fc2": ("mlp.c_proj",),
    },
    transposed=True,
    ignored=re.compile(r".*\.attn\.(masked_)?bias"),
)
_PANGU_TENSORS = TensorTable(
    "transformer.",
    {**_GPT2_TENSORS.top, QUERIES: "transformer.wqe.weight"},
    "h.{}",
    {
        **_GPT2_TENSORS.modules,
        "self_attention.linear_qkv": ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
        "self_attention.linear_q": ("attn.q_proj",),
        "self_attention.linear_kv": ("attn.k_proj", "attn.v_proj"),
    },
    ignored=_GPT2_TENSORS.ignored,
)
_NEOX_TENSORS = TensorTable(
    "gpt_neox.",
    {
        WORD_EMBEDDINGS: "gpt_neox.embed_in.weight",
        f"{FINAL_NORM}.weight": "gpt_neox.final_layer_norm.weight",
        f"{FINAL_NORM}.bias": "gpt_neox.final_layer_norm.bias",
        OUTPUT: "embed_out.weight",
    },
    "layers.{}",
    {
        "input_layernorm": ("input_layernorm",),
        "pre_mlp_layernorm": ("post_attention_layernorm",),
        "self_attention.linear_qkv": ("attention.query_key_value",),
        "self_attention.linear_proj": ("attention.dense",),
        "mlp.linear_fc1": ("mlp.dense_h_to_4h",),
        "mlp.linear_fc2": ("mlp.dense_4h_to_h",),
    },
    interleaved_qkv=True,
    ignored=re.compile(r".*\.attention\.((masked_)?bias|rotary_emb\.inv_freq)"),
)


def _sparse_layers() -> Group:
    """Return Qwen's words for the layers with experts: every `decoder_sparse_step`-th, but not `mlp_only_layers`."""

    def read(found: Mapping[str, Any], fields: Fields) -> Fields:
        step, dense = found.get("decoder_sparse_step", 1), found.get("mlp_only_layers") or []
        if type(step) is not int or step < 1:
            raise Wrong(f"decoder_sparse_step={step!r} takes a whole number above zero")
        if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
            raise Wrong("mlp_only_layers takes a list of layers")
        pattern = tuple(int((i + 1) % step == 0 and i not in dense) for i in range(fields["num_layers"]))
        if not any(pattern):
            raise Wrong(f"decoder_sparse_step={step} and mlp_only_layers leave no layer with experts")
        return {"moe.moe_layer_freq": pattern}

    def write(model: TransformerConfig) -> dict[str, Any]:
        dense = [i for i in range(model.num_layers) if not model.moe.has_experts(i)]
        return {"decoder_sparse_step": 1, "mlp_only_layers": dense}

    return Group(("decoder_sparse_step", "mlp_only_layers"), ("moe.moe_layer_freq",), read, write)


def _constant(field: str, value: Any) -> Group:
    """Return a field that follows from the model: what `value` makes of its fields."""

    def read(_: Mapping[str, Any], fields: Fields) -> Fields:
        return {field: value(fields["hidden_size"])}

    def write(model: TransformerConfig) -> dict[str, Any]:
        if getattr(model, field) != value(model.hidden_size):
            raise Wrong(f"{field}={getattr(model, field)!r}, {value(model.hidden_size)!r} there")
        return {}

    return Group((), (field,), read, write)


def _gpt2_head_size() -> Group:
    def read(_: Mapping[str, Any], fields: Fields) -> Fields:
        return {"num_query_groups": fields["num_attention_heads"]}

    def write(model: TransformerConfig) -> dict[str, Any]:
        heads, size = model.num_attention_heads, model.kv_channels
        if model.num_query_groups != heads:
            raise Wrong(f"num_query_groups={model.num_query_groups}, as many as heads ({heads}) there")
        if heads * size != model.hidden_size:
            raise Wrong(f"kv_channels={size}, hidden_size / num_attention_heads there")
        return {}

    return Group((), ("kv_channels", "num_query_groups"), read, write)


def _gpt2_scale() -> Group:
    def read(found: Mapping[str, Any], _: Fields) -> Fields:
        value = found.get("scale_attn_weights")
        if value not in (None, True, False):
            raise Wrong(f"scale_attn_weights={value!r} takes true or false")
        return {"softmax_scale": 1.0 if value is False else 0.0}

    def write(model: TransformerConfig) -> dict[str, Any]:
        if model.softmax_scale not in (0.0, 1.0) and model.softmax_scale != 1 / math.sqrt(model.kv_channels):
            raise Wrong(f"softmax_scale={model.softmax_scale}, 1 / sqrt(kv_channels) or 1 there")
        return {"scale_attn_weights": model.softmax_scale != 1.0}

    return Group(("scale_attn_weights",), ("softmax_scale",), read, write)


def _classes() -> Group:
    """Return the classes of a head for whole texts, whose number is that of their names."""

    def read(found: Mapping[str, Any], _: Fields) -> Fields:
        if found.get("architectures") != ["GPT2ForSequenceClassification"]:
            return {"num_labels": 0}
        names = found.get("id2label")
        number = len(names) if isinstance(names, Mapping) else found.get("num_labels", 2)
        if type(number) is not int or number < 1:
            raise Wrong(f"num_labels={number!r} takes a whole number above zero")
        return {"num_labels": number}

    def write(model: TransformerConfig) -> dict[str, Any]:
        if not model.num_labels:
            return {}
        names = {str(i): f"LABEL_{i}" for i in range(model.num_labels)}
        numbers = {name: int(i) for i, name in names.items()}
        return {"architectures": ["GPT2ForSequenceClassification"], "id2label": names, "label2id": numbers}

    return Group(("architectures", "id2label", "label2id"), ("num_labels",), read, write)


def _llama_like(
    model_type: str, class_name: str, keys: Mapping[str, Key], groups: tuple[Group, ...], fixed: Mapping[str, Any],
    only: Mapping[str, tuple[Any, ...]] | None = None, tensors: TensorTable = _LLAMA_TENSORS,
) -> Architecture:  # fmt: skip
    names = (f"{class_name}ForCausalLM", f"{class_name}Model")
    return Architecture(model_type, names, keys, groups, {**_RMS, **fixed}, tensors, {**_ONLY, **(only or {})}, NEUTRAL)


_WIDTH = Key(("ffn_hidden_size", "moe.moe_ffn_hidden_size"), count)


def _expert_keys(experts: int, chosen: int, width: int) -> dict[str, Key]:
    return {
        "num_experts": Key(("moe.num_experts",), count, count, experts, ("num_local_experts",)),
        "num_experts_per_tok": _size("moe.moe_router_topk", default=chosen),
        "moe_intermediate_size": _size("moe.moe_ffn_hidden_size", default=width),
        "norm_topk_prob": Key(("moe.moe_router_pre_softmax",), lambda v: not flag(v), lambda v: not v, False),
    }


_OF_TRAINING = frozenset({"router_aux_loss_coef", "output_router_logits", "router_jitter_noise"})
"""Keys of experts that change nothing of what a model computes."""
_DEPTHS = {"num_nextn_predict_layers": Key(("mtp.mtp_num_layers",), lambda v: count(v) if v else 0, default=0)}
"""Layers that predict tokens beyond the next one, which stand behind the last; files need not hold them."""
_BIASES = Key(("qkv_has_bias", "out_proj_has_bias"), flag, default=False)
_UNUSED: dict[str, tuple[Any, ...]] = {"sliding_window": (), "layer_types": ()}
ARCHITECTURES: dict[str, Architecture] = {
    architecture.model_type: architecture
    for architecture in (
        Architecture(
            "gpt2",
            ("GPT2LMHeadModel", "GPT2Model", "GPT2ForSequenceClassification"),
            {
                "vocab_size": _size("vocab_size"),
                "n_embd": _size("hidden_size", aliases=("hidden_size",)),
                "n_layer": Key(("num_layers",), layers, aliases=("num_hidden_layers",)),
                "n_head": _size("num_attention_heads", aliases=("num_attention_heads",)),
                "n_positions": _size("max_position_embeddings", aliases=("max_position_embeddings",)),
                "n_inner": _size("ffn_hidden_size", default=None),
                "layer_norm_epsilon": Key(("norm_epsilon",), number, default=1e-5),
                "activation_function": _activation(_PLAIN, "gelu_new"),
                "scale_attn_by_inverse_layer_idx": Key(("scale_attn_by_inverse_layer_idx",), flag, default=False),
                "tie_word_embeddings": _untied(True),
            },
            (_gpt2_head_size(), _gpt2_scale(), _classes()),
            _GPT2_FIXED,
            _GPT2_TENSORS,
            _ONLY,
            NEUTRAL | {"reorder_and_upcast_attn"},
        ),
        Architecture(
            "gpt_pangu",
            ("GPTPanguForCausalLM", "GPTPanguModel"),
            {
                "vocab_size": _size("vocab_size"),
                "hidden_size": _size("hidden_size"),
                "num_layers": Key(("num_layers",), layers),
                "num_heads": _size("num_attention_heads"),
                "max_position_embeddings": _size("max_position_embeddings"),
                "intermediate_size": _size("ffn_hidden_size", default=None),
                "layer_norm_epsilon": Key(("norm_epsilon",), number, default=1e-5),
                "activation_function": _activation(_PLAIN, "gelu"),
                "tie_word_embeddings": _untied(True),
            },
            (_gpt2_head_size(), _gpt2_scale()),
            {**_GPT2_FIXED, "top_query_layer": "norm_before"},
            _PANGU_TENSORS,
            _ONLY,
            NEUTRAL,
        ),
        Architecture(
            "bert",
            tuple(BERT_CLASSES),
            {
                "vocab_size": _size("vocab_size"),
                "hidden_size": _size("hidden_size"),
                "num_hidden_layers": Key(("num_layers",), layers),
                "num_attention_heads": _size("num_attention_heads"),
                "intermediate_size": _size("ffn_hidden_size"),
                "max_position_embeddings": _size("max_position_embeddings"),
                "type_vocab_size": _size("bert.num_tokentypes", default=2),
                "layer_norm_eps": Key(("norm_epsilon",), number, default=1e-12),
                "hidden_act": _activation(_PLAIN, "gelu"),
                "tie_word_embeddings": _untied(True),
            },
            (_gpt2_head_size(), bert_head()),
            _GPT2_FIXED,
            BERT_TENSORS,
            {**_ONLY, "is_decoder": (False,), "position_embedding_type": ("absolute",)},
            NEUTRAL | {"hidden_dropout_prob", "attention_probs_dropout_prob"},
        ),
        _llama_like(
            "llama", "Llama",
            {**_llama_keys(), "attention_bias": _BIASES, "mlp_bias": Key(("add_bias_linear",), flag, default=False)},
            (rope(),), {}, _UNUSED,
        ),
        _llama_like(
            "qwen2", "Qwen2", _llama_keys(groups=32), (rope(), by_layer()), {**_NO_BIAS, "qkv_has_bias": True},
            {"attention_bias": (True,), "mlp_bias": (False,)},
        ),
        _llama_like(
            "mistral", "Mistral", _llama_keys(groups=8), (rope(), everywhere(4096)), _NO_BIAS,
            {"attention_bias": (False,), "mlp_bias": (False,)},
        ),
        _llama_like(
            "qwen3", "Qwen3", {**_llama_keys(groups=32, head_dim=128), "attention_bias": _BIASES}, (rope(), by_layer()),
            {"add_bias_linear": False, "qk_layernorm": True}, {"mlp_bias": (False,)},
        ),
        _llama_like(
            "gemma", "Gemma",
            {**_llama_keys(groups=16, head_dim=256, act="gelu_pytorch_tanh", tied=True), "attention_bias": _BIASES},
            (rope(), _constant("embedding_multiplier", math.sqrt)),
            {"add_bias_linear": False, "apply_layernorm_1p": True},
            {**_UNUSED, "mlp_bias": (False,), "use_bidirectional_attention": (False,),
             "hidden_activation": ("gelu_pytorch_tanh",)},
        ),
        Architecture(
            "gpt_neox",
            ("GPTNeoXForCausalLM", "GPTNeoXModel"),
            {
                "vocab_size": _size("vocab_size"),
                "hidden_size": _size("hidden_size"),
                "num_hidden_layers": Key(("num_layers",), layers),
                "num_attention_heads": _size("num_attention_heads"),
                "intermediate_size": _size("ffn_hidden_size"),
                "max_position_embeddings": _size("max_position_embeddings"),
                "layer_norm_eps": Key(("norm_epsilon",), number, default=1e-5),
                "hidden_act": _activation(_PLAIN, "gelu"),
                "use_parallel_residual": Key(("parallel_residual",), flag, default=True),
                "attention_bias": Key(("qkv_has_bias", "out_proj_has_bias"), flag, default=True),
                "tie_word_embeddings": _untied(False),
            },
            (
                rope(percent=0.25, older={"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}),
                _gpt2_head_size(),
            ),
            {"normalization": "LayerNorm", "add_bias_linear": True, "apply_layernorm_1p": False},
            _NEOX_TENSORS,
            {**_ONLY, **_UNUSED},
            NEUTRAL,
        ),
        replace(
            _llama_like(
                "mixtral", "Mixtral",
                {
                    **_llama_keys(groups=8, eps=1e-5), "intermediate_size": _WIDTH,
                    "num_local_experts": Key(("moe.num_experts",), count, count, 8, ("num_experts",)),
                    "num_experts_per_tok": _size("moe.moe_router_topk", default=2),
                },
                (rope(), everywhere(None)), _NO_BIAS, {"attention_bias": (False,), "mlp_bias": (False,)},
                _MIXTRAL_TENSORS,
            ),
            neutral=NEUTRAL | _OF_TRAINING,
        ),
        replace(
            _llama_like(
                "qwen2_moe", "Qwen2Moe",
                {
                    **_llama_keys(groups=16), **_expert_keys(60, 4, 1408),
                    "shared_expert_intermediate_size": _size("moe.moe_shared_expert_intermediate_size", default=5632),
                },
                (rope(), by_layer(), _sparse_layers()),
                {**_NO_BIAS, "qkv_has_bias": True, "moe.moe_shared_expert_gate": True},
                {"mlp_bias": (False,), "qkv_bias": (True,)}, _QWEN_MOE_TENSORS,
            ),
            neutral=NEUTRAL | _OF_TRAINING,
        ),
        replace(
            _llama_like(
                "qwen3_moe", "Qwen3Moe",
                {**_llama_keys(groups=4), **_expert_keys(128, 8, 768), "attention_bias": _BIASES},
                (rope(), by_layer(), _sparse_layers()), {"add_bias_linear": False, "qk_layernorm": True},
                {"mlp_bias": (False,)}, _QWEN_MOE_TENSORS,
            ),
            neutral=NEUTRAL | _OF_TRAINING,
        ),
        *(
            replace(
                _llama_like(
                    name, class_name,
                    {**{key: meaning for key, meaning in _llama_keys(groups=1).items()
                        if key not in ("num_key_value_heads", "head_dim")}, **(_DEPTHS if sigmoid else {})},
                    (latent_attention(), latent_rope(), chosen_experts(sigmoid)),
                    {**_NO_BIAS, "qk_layernorm": True, "moe.moe_router_enable_expert_bias": sigmoid},
                    {"attention_bias": (False,), "mlp_bias": (False,)}, DEEPSEEK_TENSORS,
                ),
                neutral=NEUTRAL | _OF_TRAINING | {"aux_loss_alpha", "seq_aux", "ep_size"},
            )
            for name, class_name, sigmoid in (("deepseek_v3", "DeepseekV3", True), ("deepseek_v2", "DeepseekV2", False))
        ),
        _llama_like(
            "phi3", "Phi3", _llama_keys(eps=1e-5), (rope(trained=4096), everywhere(None)), _NO_BIAS,
            {"attention_bias": (False,), "mlp_bias": (False,)}, _PHI3_TENSORS,
        ),
    )
}  # fmt: skip

NOT_BUILT: dict[str, str] = {
    **dict.fromkeys(
        ("olmoe", "phimoe", "granitemoe", "gpt_oss", "deepseek", "dbrx", "jetmoe"),
        "another mixture of experts",
    ),
    **dict.fromkeys(("kimi_k2", "minicpm3"), "another form of multi-latent attention"),
    **dict.fromkeys(("roberta", "electra", "albert", "deberta", "distilbert"), "an encoder of another form"),
    **dict.fromkeys(("t5", "mt5", "bart", "mbart", "whisper"), "an encoder and a decoder"),
    **dict.fromkeys(("mamba", "mamba2", "jamba", "bamba", "rwkv"), "layers without attention"),
    **dict.fromkeys(("gemma2", "gemma3", "gemma3_text"), "soft caps of scores, or several kinds of rotary positions"),
    **dict.fromkeys(("falcon", "bloom", "mpt", "opt", "gptj", "gpt_bigcode", "phi", "gpt_neo"), "another layer"),
}
"""model_type -> what it needs that is not built."""
