"""Hugging Face directories: both ways, and against the layout written out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from parallel_core.checkpoint import find_checkpoint, open_checkpoint, read_tensor
from parallel_core.checkpoint.huggingface import write_hugging_face
from parallel_core.convert.cli import main
from parallel_core.convert.comparison import compare
from parallel_core.errors import CheckpointError

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "checkpoint"


@pytest.mark.parametrize("name", ["gpt2/ckpt_torch_tp2pp2", "llama/ckpt_torch_tp2pp1"])
def test_there_and_back(tmp_path, name):
    assert main(["--to", "hf", "--load", str(GOLDEN / name), "--save", str(tmp_path / "hf"), "--quiet"]) == 0
    assert main(["--load", str(tmp_path / "hf"), "--save", str(tmp_path / "native"), "--quiet"]) == 0
    result = compare(open_checkpoint(find_checkpoint(GOLDEN / name)),
                     open_checkpoint(find_checkpoint(tmp_path / "native")), with_optimizer=False)  # fmt: skip
    assert result.same, result.text()
    assert not [line for line in result.settings if not line.startswith(("iteration", "consumed"))]


def test_llama_rows_are_where_transformers_looks_for_them(tmp_path):
    source = open_checkpoint(find_checkpoint(GOLDEN / "llama/ckpt_torch_tp1pp2"))
    (tmp_path / "hf").mkdir()
    write_hugging_face(source, tmp_path / "hf", lambda count: None, max_file_bytes=100_000)
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    tensors = {k: v for file in files for k, v in load_file(file).items()}
    assert len(files) > 3 and index["weight_map"].keys() == tensors.keys()
    qkv = read_tensor(source, "decoder.layers.1.self_attention.linear_qkv.weight").reshape(2, 4, 16, 64)
    np.testing.assert_array_equal(tensors["model.layers.1.self_attn.q_proj.weight"], qkv[:, :2].reshape(64, 64))
    np.testing.assert_array_equal(tensors["model.layers.1.self_attn.k_proj.weight"], qkv[:, 2].reshape(32, 64))
    np.testing.assert_array_equal(tensors["model.layers.1.self_attn.v_proj.weight"], qkv[:, 3].reshape(32, 64))
    fc1 = read_tensor(source, "decoder.layers.1.mlp.linear_fc1.weight")
    np.testing.assert_array_equal(tensors["model.layers.1.mlp.up_proj.weight"], fc1[176:])
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["num_key_value_heads"] == 2 and config["rms_norm_eps"] == 1e-5 and config["vocab_size"] == 256


def test_gpt2_matrices_are_stored_the_other_way_round(tmp_path):
    source = open_checkpoint(find_checkpoint(GOLDEN / "gpt2/ckpt_torch_tp1pp1"))
    (tmp_path / "hf").mkdir()
    write_hugging_face(source, tmp_path / "hf", lambda count: None)
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    qkv = read_tensor(source, "decoder.layers.0.self_attention.linear_qkv.weight").reshape(4, 3, 16, 64)
    theirs = qkv.transpose(1, 0, 2, 3).reshape(192, 64).T  # all queries, all keys, all values; [in, out]
    np.testing.assert_array_equal(tensors["transformer.h.0.attn.c_attn.weight"], theirs)
    fc1 = read_tensor(source, "decoder.layers.0.mlp.linear_fc1.weight")
    np.testing.assert_array_equal(tensors["transformer.h.0.mlp.c_fc.weight"], fc1.T)


def test_prefixes_buffers_and_surprises(tmp_path):
    source = open_checkpoint(find_checkpoint(GOLDEN / "gpt2/ckpt_torch_tp1pp1"))
    (tmp_path / "hf").mkdir()
    write_hugging_face(source, tmp_path / "hf", lambda count: None)
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    bare = {k.removeprefix("transformer."): v for k, v in tensors.items()}  # as the model without its head saves it
    save_file(bare, file)
    assert compare(source, open_checkpoint(tmp_path / "hf"), with_optimizer=False).same
    save_file({**bare, "transformer.ln_f.bias": bare["ln_f.bias"]}, file)
    with pytest.raises(CheckpointError, match="transformer.ln_f.bias is stored twice"):
        open_checkpoint(tmp_path / "hf")
    tensors["transformer.h.0.attn.bias"] = np.zeros((1, 1, 4, 4), np.float32)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    save_file(tensors, file)
    assert compare(source, open_checkpoint(tmp_path / "hf"), with_optimizer=False).same
    save_file({**tensors, "transformer.h.0.surprise": np.zeros(2, np.float32)}, file)
    with pytest.raises(CheckpointError, match="h.0.surprise"):
        open_checkpoint(tmp_path / "hf")
    del tensors["transformer.h.2.mlp.c_proj.weight"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="missing transformer.h.2.mlp.c_proj.weight"):
        open_checkpoint(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "roberta"}')
    with pytest.raises(CheckpointError, match="'roberta' needs an encoder of another form, which is not built"):
        open_checkpoint(tmp_path / "hf")
