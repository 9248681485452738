"""Models of Hugging Face give here what `transformers` computes from them, and come back bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from hf_models import continued, loaded, logits_of, loss_and_norm
from safetensors.numpy import load_file, save_file

from parallel_core import ops
from parallel_core.checkpoint import find_checkpoint, open_checkpoint
from parallel_core.config import load_config
from parallel_core.config.model_keys import model_of_settings
from parallel_core.convert.cli import main
from parallel_core.errors import CheckpointError

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "hf"
ATOL = 2e-6
"""Of the largest logit: float32 sums in another order, through three layers."""
COMPUTED = sorted(file.stem for file in (GOLDEN / "computed").iterdir())


@pytest.fixture(autouse=True, scope="module")
def _kernels():
    ms.set_context(mode=ms.PYNATIVE_MODE, device_target="CPU", pynative_synchronize=True)
    ops.use_kernels("auto")


def weights_of(name: str) -> dict[str, np.ndarray]:
    own = GOLDEN / "weights" / f"{name}.safetensors"
    tensors = load_file(
        own if own.exists() else GOLDEN / "weights" / f"{'gpt2' if 'gpt2' in name else 'llama'}.safetensors"
    )
    more = {"qwen3": "qwen3_norms", "gpt2_untied": "gpt2_head"}.get(name)
    if more:
        tensors.update(load_file(GOLDEN / "weights" / f"{more}.safetensors"))
    if name == "llama_tied":
        del tensors["lm_head.weight"]
    return tensors


def config_of(name: str) -> dict:
    return json.loads((GOLDEN / "configs" / f"{name}.json").read_text())


def make(folder: Path, config: dict, tensors: dict[str, np.ndarray]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def check(folder: Path, computed: str, gradient: bool = True) -> None:
    values = np.load(GOLDEN / "computed" / f"{computed}.npz")
    model = loaded(open_checkpoint(folder))
    tokens = values["tokens"].astype(np.int64)
    largest = np.abs(values["logits"]).max()
    logits = logits_of(model, tokens)[:, values["positions"]]
    np.testing.assert_allclose(logits, values["logits"], rtol=0, atol=ATOL * largest)
    loss, norm = loss_and_norm(model, tokens)
    np.testing.assert_allclose(loss, values["loss"], rtol=1e-6)
    if gradient:
        np.testing.assert_allclose(norm, values["grad_norm"], rtol=1e-6)
    np.testing.assert_array_equal(continued(model, tokens[:, :12], 24), values["greedy"])


@pytest.mark.parametrize("name", COMPUTED)
def test_logits_loss_gradient_and_continuation(tmp_path, name):
    check(make(tmp_path / "m", config_of(name), weights_of(name)), name)


OLDER = {
    # transformers 4's spelling of the same model
    "llama_theta500k": {"rope_theta": 500000.0},
    "llama_linear": {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 10000.0},
    "llama_llama3": {
        "rope_theta": 500000,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 32},
    },
    "gpt_neox": {"rotary_pct": 0.25, "rotary_emb_base": 10000},
}  # fmt: skip


@pytest.mark.parametrize("name", OLDER)
def test_both_spellings_are_one_model(tmp_path, name):
    config = config_of(name)
    newer = open_checkpoint(make(tmp_path / "5", config, weights_of(name)))
    del config["rope_parameters"]
    older = open_checkpoint(make(tmp_path / "4", {**config, **OLDER[name]}, weights_of(name)))
    assert older.common["model_config"] == newer.common["model_config"]


@pytest.mark.parametrize("name", [*COMPUTED, "mistral", "qwen2"])
def test_round_trip_is_bitwise(tmp_path, name):
    tensors = weights_of(name) if name != "qwen2" else with_zero_biases(weights_of("llama"))
    there = make(tmp_path / "there", config_of(name), tensors)
    (there / "tokenizer.json").write_text("{}")
    assert main(["--load", str(there), "--save", str(tmp_path / "native"), "--quiet"]) == 0
    assert main(["--to", "hf", "--load", str(tmp_path / "native"), "--save", str(tmp_path / "back"), "--quiet"]) == 0
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == tensors.keys()
    for key, value in tensors.items():
        assert back[key].dtype == value.dtype and back[key].tobytes() == np.ascontiguousarray(value).tobytes(), key
    first, second = (json.loads((folder / "config.json").read_text()) for folder in (there, tmp_path / "back"))
    # written resolved where the original says "as usual", and settings that only have one value
    resolved = {"n_inner", "max_window_layers", "add_cross_attention", "is_decoder", "transformers_version"}
    assert {key for key in first if first[key] != second.get(key)} <= resolved
    models = [open_checkpoint(folder).common["model_config"] for folder in (there, tmp_path / "back")]
    assert models[0] == models[1]
    assert main(["--to", "hf", "--load", str(there), "--save", str(tmp_path / "again"), "--quiet"]) == 0
    assert (tmp_path / "again" / "tokenizer.json").read_text() == "{}"


def with_zero_biases(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    rows = {f"model.layers.{i}.self_attn.{x}_proj": tensors[f"model.layers.{i}.self_attn.{x}_proj.weight"].shape[0]
            for i in range(3) for x in "qkv"}  # fmt: skip
    return {**tensors, **{f"{name}.bias": np.zeros(count, np.float32) for name, count in rows.items()}}


def test_phi3_is_a_llama_with_fused_matrices(tmp_path):
    tensors = weights_of("llama")
    for i in range(3):
        layer = f"model.layers.{i}"
        parts = [tensors.pop(f"{layer}.self_attn.{x}_proj.weight") for x in "qkv"]
        tensors[f"{layer}.self_attn.qkv_proj.weight"] = np.concatenate(parts)
        parts = [tensors.pop(f"{layer}.mlp.{x}_proj.weight") for x in ("gate", "up")]
        tensors[f"{layer}.mlp.gate_up_proj.weight"] = np.concatenate(parts)
    check(make(tmp_path, {**config_of("phi3"), "rms_norm_eps": 1e-6}, tensors), "llama")


def test_qwen2_has_its_biases_where_llama_has_them(tmp_path):
    tensors = with_zero_biases(weights_of("llama"))
    check(make(tmp_path / "zero", config_of("qwen2"), tensors), "llama", gradient=False)  # biases have one too
    shifted = {key: value + 0.5 if key.endswith("v_proj.bias") else value for key, value in tensors.items()}
    make(tmp_path / "half", config_of("qwen2"), shifted)
    qkv = loaded(open_checkpoint(tmp_path / "half")).decoder.layers[2].self_attention.linear_qkv.bias.asnumpy()
    np.testing.assert_array_equal(
        qkv.reshape(2, 4, 16), np.array([0, 0, 0, 0.5])[None, :, None].repeat(16, 2).repeat(2, 0)
    )


def test_models_that_are_not_built_are_named(tmp_path):
    make(tmp_path, {"model_type": "roberta"}, {"x": np.zeros(1, np.float32)})
    with pytest.raises(CheckpointError, match="model_type 'roberta' needs an encoder"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name", ["qwen3", "gemma", "mistral_window16", "llama_llama3", "gpt2_inverse_layer", "gpt_neox"]
)
def test_a_run_takes_the_model_from_the_directory(tmp_path, name):
    folder = make(tmp_path / "m", config_of(name), weights_of(name))
    words = ["--load", str(folder), "--use-checkpoint-args", "--seq-length", "32", "--micro-batch-size", "1"]
    loaded_config = load_config([*words, "--no-load-optim", "--no-bias-gelu-fusion"])
    model, stored = loaded_config.config.model_config, open_checkpoint(folder).common["model_config"]
    wanted = model_of_settings(stored)
    for field in ("num_query_groups", "hidden_act", "norm_epsilon", "qk_layernorm", "use_rope_scaling", "rotary_base",
                  "rope_original_max_position_embeddings", "scale_attn_by_inverse_layer_idx", "parallel_residual",
                  "embedding_multiplier", "apply_layernorm_1p", "fa_config", "qkv_has_bias", "vocab_size"):  # fmt: skip
        assert getattr(model, field) == getattr(wanted, field), field
    assert any("--no-bias-gelu-fusion: not used, the checkpoint has hidden_act" in note for note in loaded_config.notes)
    assert model.attention_dropout_rate == 0.0, "what the directory says of dropout counts too"


def test_shards_are_read_as_the_index_says(tmp_path):
    tensors, whole = weights_of("llama"), make(tmp_path / "whole", config_of("llama"), weights_of("llama"))
    names = sorted(tensors)
    shards = {f"model-0000{i + 1}-of-00003.safetensors": names[i::3] for i in range(3)}
    folder = tmp_path / "sharded"
    shutil.copytree(whole, folder)
    (folder / "model.safetensors").unlink()
    for file, members in shards.items():
        save_file({name: tensors[name] for name in members}, folder / file)
    where = {name: file for file, members in shards.items() for name in members}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    stale = {name: np.zeros_like(value) for name, value in tensors.items()}
    save_file(stale, folder / "consolidated.safetensors")
    save_file(stale, folder / "zz_adapter.safetensors")
    save_file(stale, folder / "model-00003-of-00004.safetensors")
    check(folder, "llama")
    save_file(stale, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="model.safetensors and model.safetensors.index.json"):
        open_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    index.unlink()
    with pytest.raises(CheckpointError, match="shards of several saves"):
        open_checkpoint(folder)
    (folder / "model-00003-of-00004.safetensors").unlink()
    open_checkpoint(folder)  # a complete set
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="1 of 00003 shards are missing:\n  model-00002-of-00003.safetensors"):
        open_checkpoint(folder)
    index.write_text(json.dumps({"weight_map": where}))
    with pytest.raises(CheckpointError, match="1 of 3 shards are missing:\n  model-00002-of-00003.safetensors"):
        open_checkpoint(folder)
    where["model.norm.weight"] = "../elsewhere.safetensors"
    index.write_text(json.dumps({"weight_map": where}))
    with pytest.raises(CheckpointError, match="is not the name of a safetensors file beside it"):
        open_checkpoint(folder)


def test_a_stray_file_beside_the_model_is_left_alone(tmp_path):
    folder = make(tmp_path, config_of("llama"), weights_of("llama"))
    save_file({"model.norm.weight": np.full(64, 777, np.float32)}, folder / "zz_adapter.safetensors")
    check(folder, "llama")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="names no base model"):
        open_checkpoint(folder)


def test_pickles_of_pytorch_are_told_how_to_convert(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_of("llama")))
    with pytest.raises(CheckpointError, match="holds neither model.safetensors nor model.safetensors.index.json$"):
        open_checkpoint(find_checkpoint(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(
        CheckpointError, match="PyTorch pickles .pytorch_model.bin., which are not read; .*save_pretrained"
    ):
        open_checkpoint(find_checkpoint(tmp_path))


def test_a_stored_head_of_a_tied_model_must_be_the_embedding(tmp_path):
    tensors, config = weights_of("llama_tied"), config_of("llama_tied")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    check(make(tmp_path / "same", config, tensors), "llama_tied")
    tensors["lm_head.weight"][300, 5] += 1
    with pytest.raises(CheckpointError, match="set tie_word_embeddings to false"):
        open_checkpoint(make(tmp_path / "other", config, tensors))
