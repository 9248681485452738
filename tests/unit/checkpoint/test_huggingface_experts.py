"""Mixtures of experts of Hugging Face: logits that transformers computed, and directories to the bit there and back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from parallel_core import ops
from parallel_core.checkpoint import open_checkpoint, read_tensor
from parallel_core.checkpoint.huggingface.files import stored_tensors
from parallel_core.checkpoint.huggingface.tables import ARCHITECTURES
from parallel_core.checkpoint.huggingface.tensors import our_shapes
from parallel_core.checkpoint.huggingface.values import Wrong
from parallel_core.checkpoint.huggingface.writer import write_hugging_face
from parallel_core.checkpoint.safetensors_file import StreamTensor, write_safetensors
from parallel_core.config.model_keys import model_of_settings
from parallel_core.config.schema import TransformerConfig
from parallel_core.layout.shard import shard_of
from parallel_core.transformer import GPTModel, ModelStage

ms.set_context(mode=ms.PYNATIVE_MODE, device_target="CPU", pynative_synchronize=True)

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "hf" / "experts"
TOLERANCE = 1e-5


def model_of(path: Path) -> TransformerConfig:
    settings = dict(open_checkpoint(path).common["model_config"])
    model = model_of_settings({**settings, "padded_vocab_size": settings["vocab_size"]})
    return dataclasses.replace(model, attention_dropout_rate=0.0, hidden_dropout_rate=0.0)


def there_and_back(path: Path, back: Path) -> None:
    back.mkdir()
    write_hugging_face(open_checkpoint(path), back, lambda size: None)
    again, before = stored_tensors(back), stored_tensors(path)
    assert sorted(again) == sorted(before)
    for name, blob in before.items():
        np.testing.assert_array_equal(again[name].read(), blob.read(), err_msg=name)
    assert model_of(back) == model_of(path)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_logits_are_those_of_transformers(name, tmp_path):
    source = open_checkpoint(GOLDEN / name)
    ops.use_kernels("local")
    made = GPTModel(ModelStage(model_of(GOLDEN / name)), parallel_output=False)
    for parameter in made.get_parameters():
        parameter.set_data(Tensor(read_tensor(source, shard_of(parameter).name)))
    with np.load(GOLDEN / name / "computed.npz") as computed:
        tokens, want = computed["tokens"], computed["logits"]
    got = made(Tensor(tokens.astype(np.int32))).asnumpy()
    assert np.abs(got - want).max() < TOLERANCE * np.abs(want).max()
    there_and_back(GOLDEN / name, tmp_path / "back")


QWEN2 = {
    "model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"], "vocab_size": 32, "hidden_size": 16,
    "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 12,
    "norm_topk_prob": False, "decoder_sparse_step": 2, "mlp_only_layers": [3],
}  # fmt: skip


def test_qwen2s_shared_expert_and_its_dense_layers(tmp_path):
    """Experts in every second layer without one of them: in the second alone."""
    model = ARCHITECTURES["qwen2_moe"].read(QWEN2)
    assert model.moe.moe_layer_freq == (0, 1, 0, 0) and model.moe.moe_router_pre_softmax
    assert model.moe.moe_shared_expert_gate and model.qkv_has_bias and not model.add_bias_linear
    rng, path = np.random.default_rng(0), tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(QWEN2))
    shapes = {}
    ours = our_shapes(model)
    for name, parts in ARCHITECTURES["qwen2_moe"].tensors.parts(model).items():
        for part in parts:
            below = ours[name][2 if part.expert is not None else 1 :]
            shapes[part.name] = (shapes.get(part.name, (0,))[0] + part.rows, *below)
    assert shapes["model.layers.1.mlp.shared_expert_gate.weight"] == (1, 16)
    assert shapes["model.layers.1.mlp.experts.3.up_proj.weight"] == (8, 16)
    assert "model.layers.0.mlp.gate_proj.weight" in shapes and "model.layers.3.mlp.down_proj.weight" in shapes
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    tensors = {name: StreamTensor.of(array, "float32") for name, array in arrays.items()}
    write_safetensors(path / "model.safetensors", tensors, {"format": "pt"})
    source = open_checkpoint(path)
    fc1 = read_tensor(source, "decoder.layers.1.mlp.experts.experts.linear_fc1.weight")
    base = "model.layers.1.mlp.experts.2"
    gate, up = (arrays[f"{base}.{which}_proj.weight"] for which in ("gate", "up"))
    np.testing.assert_array_equal(fc1[2], np.concatenate([gate, up]))
    there_and_back(path, tmp_path / "back")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts_per_tok": 5}, "there are 4 experts"),
        ({"decoder_sparse_step": 0}, "takes a whole number above zero"),
        ({"mlp_only_layers": [1, 3]}, "leave no layer with experts"),
        ({"mlp_only_layers": "all"}, "takes a list of layers"),
    ],
)
def test_what_is_no_mixture_of_experts(change, message):
    with pytest.raises(Wrong, match=message):
        ARCHITECTURES["qwen2_moe"].read({**QWEN2, **change})


def test_what_no_architecture_has(tmp_path):
    """A dense model is not written as one with experts, and experts with a bias for the choice not at all."""
    dense = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=2, vocab_size=32, seq_length=8)
    with pytest.raises(Wrong, match="num_experts=0"):
        ARCHITECTURES["mixtral"].write(dense)
    mixtral = model_of(GOLDEN / "mixtral")
    biased = dataclasses.replace(mixtral.moe, moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True)
    with pytest.raises(Wrong, match="moe_router_score_function='sigmoid'"):
        ARCHITECTURES["mixtral"].write(dataclasses.replace(mixtral, moe=biased))
    with pytest.raises(Wrong, match="num_experts=4"):
        ARCHITECTURES["llama"].write(mixtral)
