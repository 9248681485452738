"""DeepSeek-V2 and -V3 in Hugging Face's words: what they mean here, what they become again, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from own_models import config_of, model_of, save
from safetensors.numpy import load_file, save_file

from parallel_core.checkpoint import open_checkpoint
from parallel_core.checkpoint.huggingface.tables import ARCHITECTURES
from parallel_core.checkpoint.huggingface.values import Wrong
from parallel_core.config import load_config
from parallel_core.convert.cli import main
from parallel_core.convert.comparison import compare
from parallel_core.errors import CheckpointError

REPO = Path(__file__).resolve().parents[3]
V3 = json.loads((REPO / "tests/golden/hf/experts/deepseek_v3/config.json").read_text())
YARN = {
    "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
    "mscale": 0.707, "mscale_all_dim": 0.707,
}  # fmt: skip
V2_LITE = {
    "model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], "vocab_size": 102400, "hidden_size": 2048,
    "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 27, "num_attention_heads": 16,
    "num_key_value_heads": 16, "n_shared_experts": 2, "n_routed_experts": 64, "routed_scaling_factor": 1.0,
    "kv_lora_rank": 512, "q_lora_rank": None, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128,
    "topk_method": "greedy", "n_group": 1, "topk_group": 1, "num_experts_per_tok": 6, "moe_layer_freq": 1,
    "first_k_dense_replace": 1, "norm_topk_prob": False, "scoring_func": "softmax", "aux_loss_alpha": 0.001,
    "seq_aux": True, "hidden_act": "silu", "max_position_embeddings": 163840, "rms_norm_eps": 1e-6,
    "rope_theta": 10000, "rope_scaling": YARN, "attention_bias": False, "tie_word_embeddings": False,
}  # fmt: skip


def test_the_published_v2_lite_is_the_configuration_of_this_name():
    model = ARCHITECTURES["deepseek_v2"].read(V2_LITE)
    own = load_config(["--config", str(REPO / "configs/deepseek_v2_lite.yaml")]).config.model_config
    assert (model.mla, model.attention_scale) == (own.mla, own.attention_scale)
    assert model.moe.moe_layer_freq == own.moe.moe_layer_freq == (0, *(1,) * 26)
    for name in ("num_experts", "moe_ffn_hidden_size", "moe_router_topk", "moe_router_pre_softmax",
                 "moe_shared_expert_intermediate_size", "moe_router_score_function"):  # fmt: skip
        assert getattr(model.moe, name) == getattr(own.moe, name), name
    for name in ("yarn_rotary_scaling_factor", "yarn_mscale", "yarn_mscale_all_dim", "qk_layernorm", "kv_channels",
                 "rope_original_max_position_embeddings", "ffn_hidden_size", "norm_epsilon"):  # fmt: skip
        assert getattr(model, name) == getattr(own, name), name


@pytest.mark.parametrize("found", [V3, V2_LITE], ids=["v3", "v2"])
def test_what_is_written_is_read_as_the_same_model(found):
    architecture = ARCHITECTURES[found["model_type"]]
    model = architecture.read(found)
    assert architecture.read(architecture.write(model)) == model


@pytest.mark.parametrize(
    ("found", "change", "message"),
    [
        (V3, {"topk_method": "greedy"}, "topk_method='greedy' is not built; 'noaux_tc' is"),
        (V3, {"norm_topk_prob": False}, "norm_topk_prob=False is not built; True is"),
        (V3, {"num_key_value_heads": 2}, "num_key_value_heads=2 is not built; 4 is"),
        (V3, {"rope_interleave": False}, "rope_interleave=False is not built; True is"),
        (V3, {"num_experts_per_tok": 4}, "groups are chosen by their two best"),
        (V3, {"first_k_dense_replace": 3}, "takes a whole number below num_hidden_layers"),
        (V3, {"kv_lora_rank": -1}, "kv_lora_rank=-1 takes a whole number"),
        (V2_LITE, {"topk_method": "group_limited_greedy", "n_group": 8}, "is not built; 'greedy' is"),
        (V2_LITE, {"rope_scaling": {**YARN, "mscale": None}}, "has mscale_all_dim without mscale; give both"),
        (V3, {"quantization_config": {"fmt": "e4m3"}}, "quantization_config="),
    ],
)
def test_what_is_not_built_is_refused(found, change, message):
    with pytest.raises(Wrong) as refused:
        ARCHITECTURES[found["model_type"]].read({**found, **change})
    assert message in str(refused.value)


DEEPSEEK = """
    --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear --rope-type rope
    --untie-embeddings-and-output-weights --num-experts 4 --moe-ffn-hidden-size 8 --moe-router-score-function sigmoid
    --moe-router-enable-expert-bias --moe-layer-freq [0,1] --moe-shared-expert-intermediate-size 8 --qk-layernorm
    --multi-latent-attention --q-lora-rank 6 --kv-lora-rank 5 --qk-head-dim 4 --qk-pos-emb-head-dim 2 --v-head-dim 3
    --mtp-num-layers 2
"""


@pytest.fixture(scope="module")
def predicting(tmp_path_factory) -> tuple[Path, Path]:
    """Return a model with two layers that predict further tokens, and what it is there."""
    path, config = tmp_path_factory.mktemp("predicting"), config_of(DEEPSEEK)
    native = save(path / "native", config, model_of(config))
    assert main(["--to", "hf", "--load", str(native), "--save", str(path / "hf"), "--quiet"]) == 0
    return native, path / "hf"


def test_layers_that_predict_further_tokens_follow_the_last_and_come_back(predicting, tmp_path):
    native, there = predicting
    found = load_file(there / "model.safetensors")
    assert json.loads((there / "config.json").read_text())["num_nextn_predict_layers"] == 2
    depth = {name.removeprefix("model.layers.3.") for name in found if name.startswith("model.layers.3.")}
    assert {"enorm.weight", "eh_proj.weight", "shared_head.norm.weight", "mlp.experts.3.up_proj.weight"} < depth
    np.testing.assert_array_equal(found["model.layers.3.embed_tokens.weight"], found["model.embed_tokens.weight"])
    np.testing.assert_array_equal(found["model.layers.2.shared_head.head.weight"], found["lm_head.weight"])
    assert main(["--load", str(there), "--save", str(tmp_path / "back"), "--quiet"]) == 0
    result = compare(open_checkpoint(native), open_checkpoint(tmp_path / "back" / "iter_0000000"))
    assert result.same, result.text()


def test_files_without_those_layers_are_the_model_alone(predicting, tmp_path):
    """`transformers` keeps the number in config.json and leaves the layers out."""
    _, there = predicting
    found = load_file(there / "model.safetensors")
    kept = {name: value for name, value in found.items() if not re.match(r"model\.layers\.[23]\.", name)}
    save_file(kept, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((there / "config.json").read_text())
    source = open_checkpoint(tmp_path)
    assert not [name for name in source.keys() if name.startswith("mtp.")]  # noqa: SIM118 - a method of the protocol
    assert source.common["model_config"]["mtp_num_layers"] == 0


def test_a_copy_that_is_none_is_refused(predicting, tmp_path):
    _, there = predicting
    found = load_file(there / "model.safetensors")
    save_file({**found, "model.layers.2.embed_tokens.weight": found["lm_head.weight"]}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((there / "config.json").read_text())
    with pytest.raises(CheckpointError, match="embed_tokens.weight is another than model.embed_tokens.weight"):
        open_checkpoint(tmp_path)
