"""Argument lists of public launch scripts load as they are, or are refused for exactly what is not built."""

from __future__ import annotations

import shlex

import pytest
from config_helpers import GOLDEN

from parallel_core.config import load_config
from parallel_core.errors import ConfigError

SCRIPTS = {file.stem: shlex.split(file.read_text()) for file in (GOLDEN / "launch_scripts").glob("*.txt")}
LOADS = {
    "gpt3_1.3b_samples_0.8": {"hidden_size": 2048, "hidden_act": "gelu_tanh"},
    "gpt3_345m_distributed_0.8": {"hidden_size": 1024, "compute_dtype": "float16"},
    "llama2_7b": {"ffn_hidden_size": 11008, "hidden_act": "swiglu", "normalization": "RMSNorm", "rotary_base": 10000.0},
    "llama2_70b": {"num_query_groups": 8, "recompute_granularity": "selective"},
    "llama3_8b": {"vocab_size": 128512, "apply_layernorm_1p": True, "kv_channels": 128},
    "mixtral_8x7b": {"hidden_size": 4096, "ffn_hidden_size": 14336, "num_query_groups": 8},
    "qwen3_30b_a3b": {"hidden_size": 2048, "kv_channels": 128, "qk_layernorm": True},
    "deepseek_v3_like": {"hidden_size": 7168, "kv_channels": 192, "position_embedding_type": "rope"},
    "qwen2.5_7b": {"qkv_has_bias": True, "out_proj_has_bias": False, "add_bias_linear": False, "norm_epsilon": 1e-6},
}
REFUSED = {
    "llama3_8b_fp8": ["FP8 and FP4 arithmetic"],
    # Megatron-LM 0.12 refuses its own example for the same reason.
    "gpt3_175b_megatron_0.12": [],
}


def test_every_script_is_judged():
    assert set(SCRIPTS) == {*LOADS, *REFUSED} and len(SCRIPTS) >= 10


@pytest.mark.parametrize("name", LOADS)
def test_loads(name):
    loaded = load_config(SCRIPTS[name])
    model = loaded.config.model_config
    assert {key: getattr(model, key) for key in LOADS[name]} == LOADS[name]
    given = {word for word in SCRIPTS[name] if word.startswith("--")}
    told = " ".join(loaded.notes)
    for flag in given & {"--use-mcore-models", "--exit-signal-handler"}:
        assert flag in told


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_for_what_is_missing(name):
    with pytest.raises(ConfigError) as error:
        load_config(SCRIPTS[name])
    text = str(error.value)
    missing = [line.split("not built: ")[1] for line in text.splitlines() if "not built: " in line]
    assert missing == REFUSED[name]
    if name == "gpt3_175b_megatron_0.12":
        assert text == "--rampup-batch-size 16 16 5859375, --train-iters 500000: " \
                       "a ramp-up needs train_samples instead of train_iters"


@pytest.mark.parametrize(
    ("name", "experts", "width", "chosen", "ranks"),
    [("mixtral_8x7b", 8, 14336, 2, 32), ("qwen3_30b_a3b", 128, 768, 8, 16)],
)
def test_experts_of_public_models(name, experts, width, chosen, ranks):
    """As many ranks as their layout needs: two of tensor or four of pipeline parallelism times those of experts."""
    loaded = load_config(SCRIPTS[name])
    moe = loaded.config.model_config.moe
    assert (moe.num_experts, moe.moe_ffn_hidden_size, moe.moe_router_topk) == (experts, width, chosen)
    assert loaded.world_size == ranks
