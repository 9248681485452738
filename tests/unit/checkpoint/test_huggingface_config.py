"""Every key of a `config.json` is mapped, changes nothing, or is refused by name; damaged ones are refused in time."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from parallel_core.checkpoint import open_checkpoint
from parallel_core.checkpoint.huggingface.tables import ARCHITECTURES
from parallel_core.checkpoint.huggingface.values import Wrong
from parallel_core.config.model_keys import DEFINING, has_effect, value_of
from parallel_core.config.schema import UNLIMITED, TransformerConfig
from parallel_core.errors import CheckpointError

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "hf"
SIZES = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
GPT2 = {"vocab_size": 320, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 256}
NEOX = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
PANGU = {"vocab_size": 320, "hidden_size": 64, "num_layers": 4, "num_heads": 4, "max_position_embeddings": 256}
BERT = {**NEOX, "architectures": ["BertForMaskedLM"]}


def sizes_of(model_type: str) -> dict[str, Any]:
    if model_type.startswith("deepseek"):  # every head has keys, of a size that is told otherwise
        own = {name: value for name, value in SIZES.items() if name not in ("num_key_value_heads", "head_dim")}
        return {**own, "first_k_dense_replace": 1, "q_lora_rank": 24}
    return {"gpt2": GPT2, "gpt_neox": NEOX, "gpt_pangu": PANGU, "bert": BERT}.get(model_type, SIZES)


def read(model_type: str, **keys: Any) -> TransformerConfig:
    return ARCHITECTURES[model_type].read({"model_type": model_type, **sizes_of(model_type), **keys})


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("model_type", "keys", "fields"),
    [
        ("llama", {}, {"hidden_act": "swiglu", "num_query_groups": 2, "kv_channels": 16, "norm_epsilon": 1e-6,
                       "rotary_base": 10000.0, "untie_embeddings_and_output_weights": True, "qkv_has_bias": False}),
        ("llama", {"num_key_value_heads": None, "head_dim": None}, {"num_query_groups": 4, "kv_channels": 16}),
        ("llama", {"rope_theta": 5e5}, {"rotary_base": 5e5}),
        ("llama", {"rope_parameters": {"rope_theta": 5e5}}, {"rotary_base": 5e5}),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2}}, {"rotary_seq_len_interpolation_factor": 2.0}),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
         {"rope_dynamic_factor": 2.0, "rope_original_max_position_embeddings": 256}),
        ("llama", {"rope_scaling": YARN}, {"position_embedding_type": "yarn", "yarn_rotary_scaling_factor": 4.0,
                                           "rope_original_max_position_embeddings": 64, "yarn_beta_fast": 32.0,
                                           "yarn_mscale": 0.0, "yarn_attention_factor": 0.0}),
        ("llama", {"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5, "beta_fast": 16, "truncate": False}},
         {"yarn_mscale": 1.0, "yarn_mscale_all_dim": 0.5, "yarn_beta_fast": 16.0,
          "yarn_correction_range_round_to_int": False}),
        ("llama", {"rope_scaling": {**YARN, "factor": None}}, {"yarn_rotary_scaling_factor": 4.0}),
        ("llama", {"rope_scaling": {**YARN, "attention_factor": 1.25}}, {"yarn_attention_factor": 1.25}),
        ("phi3", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, {"rope_original_max_position_embeddings": 4096}),
        ("phi3", {"partial_rotary_factor": 0.5}, {"rotary_percent": 0.5}),
        ("llama", {"hidden_act": "gelu"}, {"hidden_act": "geglu"}),
        ("llama", {"attention_bias": True},
         {"qkv_has_bias": True, "out_proj_has_bias": True, "add_bias_linear": False}),
        ("llama", {"mlp_bias": True}, {"qkv_has_bias": False, "out_proj_has_bias": False, "add_bias_linear": True}),
        ("mistral", {}, {"fa_config.pre_tokens": 4095}),
        ("mistral", {"sliding_window": None}, {"fa_config.pre_tokens": UNLIMITED}),
        ("qwen2", {}, {"qkv_has_bias": True, "out_proj_has_bias": False, "fa_config.pre_tokens": UNLIMITED}),
        ("qwen2", {"sliding_window": 8, "max_window_layers": 1}, {"fa_config.pre_tokens": UNLIMITED}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
         {"fa_config.pre_tokens": 7, "window_attn_skip_freq": (0, 1, 1, 1)}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
         {"fa_config.pre_tokens": 7, "window_attn_skip_freq": ()}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 28},
         {"fa_config.pre_tokens": UNLIMITED}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8,
                   "layer_types": ["full_attention", "sliding_attention"] * 2},
         {"fa_config.pre_tokens": 7, "window_attn_skip_freq": (0, 1, 0, 1), "qk_layernorm": True}),
        ("gemma", {}, {"embedding_multiplier": 8.0, "apply_layernorm_1p": True, "hidden_act": "geglu_tanh",
                       "kv_channels": 256, "untie_embeddings_and_output_weights": False}),
        ("gpt2", {}, {"hidden_act": "gelu_tanh", "ffn_hidden_size": 256, "softmax_scale": 0.0,
                      "untie_embeddings_and_output_weights": False}),
        ("gpt2", {"n_inner": 100, "activation_function": "gelu"}, {"hidden_act": "gelu", "ffn_hidden_size": 100}),
        ("gpt2", {"scale_attn_weights": False}, {"softmax_scale": 1.0}),
        ("gpt2", {"tie_word_embeddings": False}, {"untie_embeddings_and_output_weights": True}),
        ("gpt_neox", {}, {"rotary_percent": 0.25, "parallel_residual": True, "hidden_act": "gelu"}),
        ("gpt_neox", {"rotary_pct": 1.0, "rotary_emb_base": 500, "use_parallel_residual": False},
         {"rotary_percent": 1.0, "rotary_base": 500.0, "parallel_residual": False}),
    ],
)  # fmt: skip
def test_keys_are_read_as_transformers_reads_them(model_type, keys, fields):
    model = read(model_type, **keys)
    assert {field: value_of(model, field) for field in fields} == fields


@pytest.mark.parametrize(
    ("model_type", "keys", "named"),
    [
        ("llama", {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, "short_factor"),
        ("llama", {"rope_scaling": {"rope_type": "su"}}, "rope_type='su' is not built"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "rope_type='linear' needs factor"),
        ("llama", {"rope_scaling": {"rope_type": "default", "factor": 8.0}}, "does not have factor=8.0"),
        ("llama", {"rope_scaling": {**YARN, "finetuned": True}}, "does not have finetuned=True"),
        ("llama", {"rope_scaling": "yarn"}, "rope_scaling='yarn' takes an object"),
        ("llama", {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e4}}, "disagree"),
        ("llama", {"rope_theta": float("inf")}, "rope_theta=inf takes a number above zero"),
        ("llama", {"rope_theta": "1e6"}, "rope_theta='1e6' takes a number"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "several kinds of rotary positions"),
        ("llama", {"partial_rotary_factor": 2.0}, "is above 1"),
        ("llama", {"partial_rotary_factor": 0.05}, "rotates 0 channels"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 8}},
         "counts from max_position_embeddings=256"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
         "high_freq_factor must be above"),
        ("llama", {"hidden_act": "quick_gelu"}, "hidden_act='quick_gelu' is not built"),
        ("llama", {"sliding_window": 8}, "sliding_window=8 is not built"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4} is not built"),
        ("llama", {"logit_scale": 0.5}, "logit_scale=0.5 is unknown"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "is not LlamaForCausalLM or LlamaModel"),
        ("llama", {"architectures": "bool"}, "architectures='bool'"),
        ("llama", {"vocab_size": None}, "vocab_size is missing"),
        ("llama", {"num_attention_heads": True}, "num_attention_heads=True takes a whole number"),
        ("llama", {"num_key_value_heads": 3}, "is not a multiple of num_key_value_heads=3"),
        ("llama", {"num_attention_heads": 5, "num_key_value_heads": 5}, "hidden_size=64 is not a multiple"),
        ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes' takes true or false"),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 takes at most 10000"),
        ("mistral", {"attention_bias": True}, "attention_bias=True is not built"),
        ("mistral", {"layer_types": ["full_attention"] * 4}, "layer_types and sliding_window=4096 disagree"),
        ("mistral", {"sliding_window": 0}, "sliding_window=0 takes a whole number"),
        ("qwen2", {"use_sliding_window": True, "layer_types": ["chunked_attention"] * 4}, "'chunked_attention', which"),
        ("qwen2", {"use_sliding_window": True, "layer_types": ["full_attention"]}, "a list of 4"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 4}, "use_sliding_window is false"),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": {}}, "max_window_layers={} takes"),
        ("gemma", {"hidden_activation": "relu"}, "hidden_activation='relu' is not built"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True is not built; False is"),
        ("gpt2", {"scale_attn_weights": "no"}, "scale_attn_weights='no' takes true or false"),
        ("gpt2", {"hidden_size": 32}, "n_embd=64 and hidden_size=32 disagree"),
        ("gpt2", {"activation_function": "tanh"}, "activation_function='tanh' is not built"),
    ],
)  # fmt: skip
def test_what_is_not_built_is_named(model_type, keys, named):
    with pytest.raises(Wrong) as error:
        read(model_type, **keys)
    assert named in str(error.value)


def test_all_problems_come_at_once():
    with pytest.raises(Wrong) as error:
        read("llama", hidden_act="tanh", sliding_window=8, logit_scale=1)
    assert len(str(error.value).splitlines()) == 3


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_what_is_read_is_written(model_type):
    """Random settings of every architecture come back from the config.json that is written of them."""
    architecture, rng = ARCHITECTURES[model_type], random.Random(0)
    different = set()
    for _ in range(60):
        model = architecture.read({"model_type": model_type, **sizes_of(model_type), **_random_keys(model_type, rng)})
        again = architecture.read(json.loads(json.dumps(architecture.write(model))))
        for field in DEFINING:
            assert not has_effect(model, field) or value_of(again, field) == value_of(model, field), field
        different.add(str(model))
    assert len(different) > 10


def _random_keys(model_type: str, rng: random.Random) -> dict[str, Any]:
    """Return values for some of an architecture's optional keys."""
    flags = ("attention_bias", "mlp_bias", "tie_word_embeddings", "use_parallel_residual",
             "scale_attn_by_inverse_layer_idx")  # fmt: skip
    choices: dict[str, list[Any]] = {
        **{name: [True, False] for name in flags},
        "hidden_act": ["gelu", "gelu_pytorch_tanh", "silu"],
        "activation_function": ["gelu_new", "gelu", "relu"],
        "rms_norm_eps": [1e-5, 1e-6],
        "layer_norm_epsilon": [1e-5, 1e-6],
        "layer_norm_eps": [1e-5, 1e-12],
        "head_dim": [8, 16, 32],
    }
    keys = {name: rng.choice(choices[name]) for name in ARCHITECTURES[model_type].keys & choices.keys()}
    for group in ARCHITECTURES[model_type].groups:
        if "rope_scaling" in group.keys:
            keys["rope_theta"] = rng.choice([1e4, 5e5])
            keys["rope_scaling"] = rng.choice(
                [None, YARN, {**YARN, "attention_factor": 1.5}, {"type": "linear", "factor": 3.0},
                 {"type": "dynamic", "factor": 3.0}, {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                                      "high_freq_factor": 4.0}])  # fmt: skip
        if "qk_rope_head_dim" in group.keys:
            keys.update(q_lora_rank=rng.choice([None, 16]), v_head_dim=rng.choice([8, 16]))
    if "q_lora_rank" in keys:
        both = {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}
        keys["rope_scaling"] = rng.choice([None, YARN, {**YARN, "attention_factor": 1.5}, both])
    for group in ARCHITECTURES[model_type].groups:
        if "sliding_window" in group.keys:
            keys["sliding_window"] = rng.choice([None, 8])
        if "use_sliding_window" in group.keys and keys["sliding_window"]:
            keys.update(use_sliding_window=rng.choice([True, False]), max_window_layers=rng.choice([0, 1, 3]))
    return keys


def test_the_guide_names_every_mapped_key():
    text = (Path(__file__).resolve().parents[3] / "docs" / "checkpoints.md").read_text()
    keys = {key for architecture in ARCHITECTURES.values() for key in architecture.keys}
    keys |= {key for architecture in ARCHITECTURES.values() for group in architecture.groups for key in group.keys}
    assert {name for name in (*keys, *ARCHITECTURES) if f"`{name}`" not in text} == set()


# ---- damaged directories --------------------------------------------------------------------------------------------
def directory(folder: Path, config: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(config)
    if not (folder / "model.safetensors").exists():
        save_file({"model.norm.weight": np.zeros(64, np.float32)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("file", sorted((GOLDEN / "damaged").iterdir()), ids=lambda file: file.stem)
def test_found_inputs_are_refused(tmp_path, file):
    with pytest.raises(CheckpointError):
        open_checkpoint(directory(tmp_path, file.read_bytes()))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[" * 100_000, "maximum recursion depth"),
        ('{"model_type": "llama", "rope_theta": Infinity}', "Infinity is no number"),
        ('{"model_type": "llama", "vocab_size": 1, "vocab_size": 2}', "the key 'vocab_size' stands twice"),
        ("[]", "holds list, not a JSON object"),
        ('{"model_type": ["llama"]}', "is not known here"),
        ("{}", "model_type None is not known here"),
        ("\\xff", "cannot be read"),
    ],
)
def test_json_that_is_none_is_named(tmp_path, text, named):
    with pytest.raises(CheckpointError, match=named):
        open_checkpoint(directory(tmp_path, text.encode()))


def test_sizes_that_no_tensor_has_are_named_before_anything_is_laid_out(tmp_path):
    for key in ("num_attention_heads", "num_key_value_heads", "vocab_size", "hidden_size", "head_dim"):
        config = {"model_type": "llama", **SIZES, "head_dim": 16, "num_hidden_layers": 1, key: 2**30}
        with pytest.raises(CheckpointError, match="the longest stored dim 64|is not a multiple of"):
            open_checkpoint(directory(tmp_path, json.dumps(config).encode()))
    save_file({"model.norm.weight": np.zeros((), np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="the longest stored dim 0"):
        config = {"model_type": "llama", **SIZES, "num_hidden_layers": 1}
        open_checkpoint(directory(tmp_path, json.dumps(config).encode()))


VALUES = (None, True, False, 0, 1, -1, 7, 64, 320, 2**31, 10**30, 0.5, 1e308, -0.0, "", "a", "silu", "yarn", [], [0],
          ["full_attention"] * 3, {}, {"rope_type": "yarn"}, {"type": "linear", "factor": "a"}, [[[]]])  # fmt: skip


def mutate(tmp_path: Path, rounds: int) -> None:
    rng = random.Random(rounds)
    configs = [json.loads(file.read_text()) for file in sorted((GOLDEN / "configs").iterdir())]
    folder = tmp_path / "m"
    for _ in range(rounds):
        config = dict(rng.choice(configs))
        for _ in range(rng.randint(1, 4)):
            key = rng.choice(sorted(config))
            if rng.random() < 0.2:
                config.pop(key)
            elif isinstance(config[key], dict) and config[key] and rng.random() < 0.7:
                inner = dict(config[key])
                inner[rng.choice(sorted(inner))] = rng.choice(VALUES)
                config[key] = inner
            else:
                config[key] = rng.choice(VALUES)
        if config:
            with pytest.raises(CheckpointError):
                open_checkpoint(directory(folder, json.dumps(config).encode()))


def test_changed_configurations_are_refused_by_name(tmp_path):
    mutate(tmp_path, 400)


@pytest.mark.slow
def test_many_changed_configurations_are_refused_by_name(tmp_path):
    mutate(tmp_path, 30_000)
