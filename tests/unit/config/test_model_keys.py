"""One list says what a model is; what it says is stored, compared, read back, and put in Megatron's words."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from parallel_core.checkpoint import CheckpointWriter, TensorShard
from parallel_core.config import AllConfig, load_config, schema
from parallel_core.config.megatron_model import megatron_arguments, refused_by, settings_of_megatron
from parallel_core.config.model_keys import (
    DEFINING,
    NAME_OF,
    NOT_DEFINING,
    has_effect,
    model_of_settings,
    model_settings,
    value_of,
)
from parallel_core.config.vocabulary import stored_settings
from parallel_core.errors import CheckpointError, ConfigError
from parallel_core.training.checkpointing import Checkpointer

BASE = (
    "--num-layers 4 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --micro-batch-size 1 "
    "--padded-vocab-size 320 --mock-data"
)
ROPE = "--position-embedding-type rope"
LLAMA3 = f"{ROPE} --use-rope-scaling"
YARN = "--position-embedding-type yarn --rotary-scaling-factor 4"
WINDOW = "--window-size 8 0"
LATENT = f"{ROPE} --rope-type rope --multi-latent-attention --disable-bias-linear --hidden-act gelu"
MOE = "--num-experts 4"
# field -> (words of both runs, words that change the field)
CHANGES = {
    "num_layers": ("", "--num-layers 2"),
    "hidden_size": ("--kv-channels 16 --ffn-hidden-size 256", "--hidden-size 128"),
    "ffn_hidden_size": ("", "--ffn-hidden-size 128"),
    "num_attention_heads": ("--kv-channels 16", "--num-attention-heads 8"),
    "num_query_groups": ("", "--group-query-attention --num-query-groups 2"),
    "kv_channels": ("", "--kv-channels 32"),
    "max_position_embeddings": ("", "--max-position-embeddings 64"),
    "position_embedding_type": ("", ROPE),
    "rotary_base": (ROPE, "--rotary-base 500000"),
    "rotary_percent": (ROPE, "--rotary-percent 0.5"),
    "rotary_interleaved": (ROPE, "--rotary-interleaved"),
    "rotary_seq_len_interpolation_factor": (ROPE, "--rotary-seq-len-interpolation-factor 4"),
    "use_rope_scaling": (ROPE, "--use-rope-scaling"),
    "rope_scaling_factor": (LLAMA3, "--rope-scaling-factor 32"),
    "rope_low_freq_factor": (LLAMA3, "--rope-low-freq-factor 2"),
    "rope_high_freq_factor": (LLAMA3, "--rope-high-freq-factor 8"),
    "rope_dynamic_factor": (ROPE, "--rope-dynamic-factor 2"),
    "rope_original_max_position_embeddings": (LLAMA3, "--rope-original-max-position-embeddings 64"),
    "yarn_rotary_scaling_factor": (YARN, "--rotary-scaling-factor 8"),
    "yarn_beta_fast": (YARN, "--yarn-beta-fast 16"),
    "yarn_beta_slow": (YARN, "--yarn-beta-slow 2"),
    "yarn_correction_range_round_to_int": (YARN, "--no-yarn-correction-range-round-to-int"),
    "yarn_mscale": (YARN, "--mscale 2"),
    "yarn_mscale_all_dim": (YARN, "--mscale-all-dim 2"),
    "yarn_attention_factor": (YARN, "--yarn-attention-factor 2"),
    "normalization": ("", "--normalization RMSNorm"),
    "norm_epsilon": ("", "--norm-epsilon 1e-6"),
    "apply_layernorm_1p": ("", "--apply-layernorm-1p"),
    "qk_layernorm": ("", "--qk-layernorm"),
    "hidden_act": ("", "--no-bias-gelu-fusion"),
    "add_bias_linear": ("--hidden-act gelu --qkv-has-bias --add-dense-bias", "--disable-bias-linear"),
    "qkv_has_bias": ("", "--no-qkv-has-bias"),
    "out_proj_has_bias": ("", "--no-add-dense-bias"),
    "untie_embeddings_and_output_weights": ("", "--untie-embeddings-and-output-weights"),
    "use_sandwich_norm": ("", "--use-sandwich-norm"),
    "apply_residual_connection_post_layernorm": ("", "--apply-residual-connection-post-layernorm"),
    "parallel_residual": ("", "--parallel-residual"),
    "embedding_multiplier": ("", "--embedding-multiplier 8"),
    "softmax_scale": ("", "--softmax-scale 1"),
    "scale_attn_by_inverse_layer_idx": ("", "--scale-attn-by-inverse-layer-idx"),
    "top_query_layer": ("", "--top-query-layer norm_after"),
    "bert.bert_head": ("--hidden-act gelu --no-mock-data --data-path x", "--bert-head masked_lm"),
    "bert.num_tokentypes": ("--bert-head masked_lm --no-mock-data --data-path x", "--num-tokentypes 3"),
    "num_labels": ("", "--num-labels 3"),
    "fa_config.pre_tokens": ("", WINDOW),
    "window_attn_skip_freq": (WINDOW, "--window-attn-skip-freq 2"),
    "mla.multi_latent_attention": (ROPE, LATENT.removeprefix(ROPE)),
    "mla.q_lora_rank": (LATENT, "--q-lora-rank 24"),
    "mla.kv_lora_rank": (LATENT, "--kv-lora-rank 16"),
    "mla.qk_head_dim": (LATENT, "--qk-head-dim 16"),
    "mla.qk_pos_emb_head_dim": (LATENT, "--qk-pos-emb-head-dim 8"),
    "mla.v_head_dim": (LATENT, "--v-head-dim 16"),
    "mtp.mtp_num_layers": (ROPE, "--mtp-num-layers 1"),
    "mla.rope_type": (LATENT.replace("--rope-type rope", ""), "--rope-type rope"),
    "moe.num_experts": (MOE, "--num-experts 8"),
    "moe.moe_layer_freq": (MOE, "--moe-layer-freq 2"),
    "moe.moe_ffn_hidden_size": (MOE, "--moe-ffn-hidden-size 32"),
    "moe.moe_router_topk": (MOE, "--moe-router-topk 3"),
    "moe.moe_router_score_function": (MOE, "--moe-router-score-function sigmoid"),
    "moe.moe_router_pre_softmax": (MOE, "--moe-router-pre-softmax"),
    "moe.moe_router_rounds": (MOE, "--moe-router-rounds"),
    "moe.moe_router_topk_scaling_factor": (MOE, "--moe-router-topk-scaling-factor 2.5"),
    "moe.moe_router_num_groups": (MOE + " --moe-router-group-topk 1 --moe-router-num-groups 2",
                                  "--num-experts 8 --moe-router-num-groups 4"),
    "moe.moe_router_group_topk": (MOE + " --moe-router-num-groups 2 --moe-router-group-topk 1",
                                  "--moe-router-group-topk 2"),
    "moe.moe_router_enable_expert_bias": (MOE + " --moe-router-score-function sigmoid",
                                          "--moe-router-enable-expert-bias"),
    "moe.moe_apply_probs_on_input": (MOE + " --moe-router-topk 1 --moe-router-pre-softmax",
                                     "--moe-apply-probs-on-input"),
    "moe.moe_shared_expert_intermediate_size": (MOE + " --disable-bias-linear --hidden-act gelu",
                                                "--moe-shared-expert-intermediate-size 32"),
    "moe.moe_shared_expert_gate": (MOE + " --disable-bias-linear --moe-shared-expert-intermediate-size 32",
                                   "--moe-shared-expert-gate"),
}
WORDS = [(field, f"{both} {change}", both) for field, (both, change) in CHANGES.items()]
NOT_IN_MEGATRON = {
    "rope_low_freq_factor", "rope_high_freq_factor", "rope_dynamic_factor", "rope_original_max_position_embeddings",
    "yarn_attention_factor", "use_sandwich_norm", "parallel_residual", "embedding_multiplier", "softmax_scale",
    "scale_attn_by_inverse_layer_idx", "top_query_layer", "qkv_has_bias", "out_proj_has_bias", "add_bias_linear",
    "moe.moe_router_rounds", "num_labels",
    "bert.bert_head", "bert.num_tokentypes",
}  # fmt: skip


def config_of(words: str) -> AllConfig:
    return load_config(f"{BASE} {words}".split()).config


def fields_of(kind: type, prefix: str = "") -> set[str]:
    found = set()
    for field in dataclasses.fields(kind):
        inner = getattr(schema, str(field.type), None)
        found |= fields_of(inner, f"{field.name}.") if dataclasses.is_dataclass(inner) else {prefix + field.name}
    return found


def test_every_field_is_defining_or_says_why_not():
    assert sorted([*DEFINING, *NOT_DEFINING]) == sorted(fields_of(schema.TransformerConfig))
    assert all(NOT_DEFINING.values())
    assert sorted(CHANGES) == sorted(set(DEFINING) - {"vocab_size"}), "a defining field without a case here"


@pytest.mark.parametrize(("field", "words", "both"), WORDS, ids=list(CHANGES))
def test_a_run_under_another_flag_is_refused(field, words, both):
    stored = json.loads(json.dumps({"model_config": stored_settings(config_of(words))}))
    _check(config_of(words), stored)
    with pytest.raises(CheckpointError, match=rf"holds another model:\n(.*\n)*  {NAME_OF[field]}: saved"):
        _check(config_of(both), stored)


def _check(config: AllConfig, common: dict[str, Any]) -> None:
    checkpointer = Checkpointer(config, SimpleNamespace(), SimpleNamespace(), print, print)  # type: ignore[arg-type]
    checkpointer.check_model(common, "somewhere")  # type: ignore[arg-type]


def test_what_changes_nothing_is_no_difference():
    for saved, asked in (
        ("--pre-tockens 65536", ""),  # a window that covers the sequence
        (f"{ROPE} --max-position-embeddings 4096", ROPE),  # there is no table
        ("--rotary-base 500", ""),  # nothing rotates
        ("--padded-vocab-size 384", ""),  # padding
        ("--seq-length 16 --max-position-embeddings 32", ""),
    ):
        _check(config_of(asked), {"model_config": stored_settings(config_of(saved))})


def test_older_checkpoints_are_compared_in_their_words():
    older = {"num_layers": 4, "swiglu": True, "add_qkv_bias": False}
    lines = "add_qkv_bias: saved False, asked True\n  swiglu: saved True, asked False"
    with pytest.raises(CheckpointError, match=lines):
        _check(config_of(""), {"model_config": older})


@pytest.mark.parametrize(("field", "words", "both"), WORDS, ids=list(CHANGES))
def test_stored_settings_are_the_model(field, words, both):
    model = config_of(words).model_config
    again = model_of_settings(json.loads(json.dumps(model_settings(model))))
    assert value_of(again, field) == value_of(model, field) != value_of(config_of(both).model_config, field)
    for other in DEFINING:
        assert not has_effect(model, other) or value_of(again, other) == value_of(model, other), other


@pytest.mark.parametrize(("field", "words", "both"), WORDS, ids=list(CHANGES))
def test_megatrons_arguments_say_the_same_or_the_setting_is_named(field, words, both):
    model = config_of(words).model_config
    if field in NOT_IN_MEGATRON:
        with pytest.raises(ConfigError, match=NAME_OF[field]):
            megatron_arguments(model_settings(model))
        return
    args = json.loads(json.dumps({**megatron_arguments(model_settings(model)), "seq_length": 32}))
    args["group_query_attention"] = model.num_query_groups != model.num_attention_heads
    assert not {"hidden_act", "qkv_has_bias", "add_dense_bias", "pre_tockens"} & args.keys()
    again = settings_of_megatron(args)
    assert {name: again.get(name) for name in model_settings(model)} == model_settings(model)


@pytest.mark.parametrize("field", CHANGES)
def test_use_checkpoint_args_gives_the_model_back(tmp_path, field):
    both, change = CHANGES[field]
    config = config_of(f"{both} {change} --attention-dropout 0.25")
    writer = CheckpointWriter(tmp_path, 3, 0, 1)
    writer.begin()
    shard = (TensorShard.full("x", (1,), "float32"), np.zeros(1, np.float32))
    common = {"iteration": 3, "model_config": stored_settings(config), "config": config.to_dict()}
    writer.commit([writer.write_rank_file({"x": shard})], common)
    words = ["--use-checkpoint-args", "--micro-batch-size", "1", "--data-path", "x"]
    loaded = load_config(["--load", str(tmp_path), *words])
    assert not any("not used" in note for note in loaded.notes)
    for other in DEFINING:
        assert value_of(loaded.config.model_config, other) == value_of(config.model_config, other), other
    assert loaded.config.model_config.attention_dropout_rate == 0.25
    assert loaded.config.model_config.seq_length == 32


def test_what_megatrons_arguments_do_not_speak_of_is_left_open():
    sizes = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
    told = settings_of_megatron({**sizes, "disable_bias_linear": True})
    assert told == {
        "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 256, "num_attention_heads": 4, "num_query_groups": 4,
        "kv_channels": 16, "add_bias_linear": False, "qkv_has_bias": False, "add_qkv_bias": False,
        "add_dense_bias": False, "pre_tockens": schema.UNLIMITED, "use_sandwich_norm": False,
        "parallel_residual": False, "embedding_multiplier": 1.0, "softmax_scale": 0.0,
        "scale_attn_by_inverse_layer_idx": False, "top_query_layer": "none", "bert_head": "none",
        "num_labels": 0,
    }  # fmt: skip
    with pytest.raises(ConfigError, match="position_embedding_type is 'mrope'"):
        settings_of_megatron({**told, "position_embedding_type": "mrope"})


@pytest.mark.parametrize(
    ("args", "named"),
    [({"moe_latent_size": 8}, "experts in a latent space"), ({"qk_l2_norm": True}, "this form of attention"),
     ({"softmax_type": "learnable"}, "softmax_type='learnable'"), ({"num_experts": None, "qk_l2_norm": False}, None),
     ({"no_rope_freq": 4}, "no_rope_freq=4")],
)  # fmt: skip
def test_models_of_megatron_that_are_not_built(args, named):
    reason = refused_by(args)
    assert reason is None if named is None else named in str(reason)
