"""PEFT directories in and out: the same adapters, merged wherever a checkpoint is read, others refused by name."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from hf_models import loaded, logits_of
from own_models import LLAMA, config_of, model_of, save
from safetensors.numpy import load_file, save_file

from parallel_core import ops
from parallel_core.checkpoint import CheckpointWriter, TensorShard, open_checkpoint, read_tensor
from parallel_core.checkpoint.dtypes import convert
from parallel_core.checkpoint.lora import KEY, MergedAdapter, fingerprint
from parallel_core.convert.cli import main
from parallel_core.errors import CheckpointError

TOKENS = np.random.default_rng(1).integers(0, 90, (2, 16))
PEER = os.environ.get("PARALLEL_CORE_PEER_PYTHON", "")
RANK, ALPHA = 3, 6.0


@pytest.fixture(autouse=True, scope="module")
def _plain_operators():
    ms.set_context(mode=ms.PYNATIVE_MODE, device_target="CPU", pynative_synchronize=True)
    ops.use_kernels("local")


def made(
    root: Path, words: str = LLAMA, targets: str = ".*linear_.*", dtype: str = "float32", own: bool = False
) -> tuple[Path, Path]:
    """Write a model, and adapters on those of its linear layers that `targets` matches; return both.

    With `own` some have another rank and alpha than the others.
    """
    config = config_of(words)
    base = save(root / "base", config, model_of(config))
    if dtype != "float32":
        base = stored_as(base, root / dtype, dtype)
    source, rng = open_checkpoint(base), np.random.default_rng(2)
    arrays = {}
    for key in source.keys():  # noqa: SIM118 - a method of the protocol
        name, shape = key.removesuffix(".weight"), source.info(key).shape
        if key.endswith(".weight") and re.fullmatch(rf"decoder.layers.{targets}", name):
            rank = 2 if own and name.endswith("1.mlp.linear_fc1") else RANK
            arrays[f"{name}.lora_A.weight"] = rng.normal(size=(rank, shape[1])).astype(np.float32)
            arrays[f"{name}.lora_B.weight"] = (0.1 * rng.normal(size=(shape[0], rank))).astype(np.float32)
    writer = CheckpointWriter(root / "adapter", 5, 0, 1)
    writer.begin()
    shards = {name: (TensorShard.full(name, value.shape, "float32"), value) for name, value in arrays.items()}
    told = {"rank": RANK, "alpha": ALPHA, "base": str(base), "fingerprint": fingerprint(source)}
    if own:
        told["alphas"] = {"decoder.layers.1.mlp.linear_fc1": 5.0, "decoder.layers.0.self_attention.linear_qkv": 1.5}
    common = {"iteration": 5, "model_config": source.common["model_config"], KEY: told}
    return base, writer.commit([writer.write_rank_file(shards)], common)


def stored_as(base: Path, root: Path, dtype: str) -> Path:
    """Write a checkpoint's tensors in another type."""
    source, writer = open_checkpoint(base), CheckpointWriter(root, 3, 0, 1)
    writer.begin()
    shards = {}
    for key in source.keys():  # noqa: SIM118 - a method of the protocol
        values = convert(read_tensor(source, key), "float32", dtype)
        shards[key] = (TensorShard.full(key, values.shape, dtype), values)
    return writer.commit([writer.write_rank_file(shards)], source.common)


def adapted(path: Path) -> MergedAdapter:
    source = open_checkpoint(path)
    assert isinstance(source, MergedAdapter)
    return source


def test_adapters_open_as_the_model_with_them_in_its_weights(tmp_path):
    base, adapter = made(tmp_path)
    plain, source = open_checkpoint(base), adapted(adapter)
    assert sorted(source.keys()) == sorted(plain.keys()) and len(source.adapted()) == 8
    raw = load_file(next(adapter.glob("*.safetensors")))
    for key in source.keys():  # noqa: SIM118 - a method of the protocol
        want, name = read_tensor(plain, key).astype(np.float64), key.removesuffix(".weight")
        if key in source.adapted():
            want = want + ALPHA / RANK * raw[f"{name}.lora_B.weight"].astype(np.float64) @ raw[f"{name}.lora_A.weight"]
        np.testing.assert_allclose(read_tensor(source, key), want, atol=1e-6)
        assert (key in source.adapted()) == ("linear" in key)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_base_of_16_bits_is_summed_in_float32_and_rounded_once(tmp_path, dtype):
    base, adapter = made(tmp_path, dtype=dtype)
    plain, raw = open_checkpoint(base), load_file(next(adapter.glob("*.safetensors")))
    assert main(["--load", str(adapter), "--save", str(tmp_path / "out"), "--quiet"]) == 0
    merged = open_checkpoint(tmp_path / "out" / "iter_0000005")
    for key in adapted(adapter).adapted():
        name = key.removesuffix(".weight")
        product = raw[f"{name}.lora_B.weight"] @ raw[f"{name}.lora_A.weight"]
        want = convert(read_tensor(plain, key), dtype, "float32") + np.float32(ALPHA / RANK) * product
        rounded = convert(convert(want, "float32", dtype), dtype, "float32")
        got = convert(read_tensor(merged, key), merged.info(key).dtype, "float32")
        assert merged.info(key).dtype == dtype
        # where a sum lies in the middle between two numbers, its last bit in float32 decides
        assert (got != rounded).mean() < 0.01
        spacing = 2.0 ** (-8 if dtype == "bfloat16" else -11)
        np.testing.assert_allclose(got, want, rtol=1.01 * spacing, atol=1e-7)


@pytest.mark.parametrize("to", ["native", "hf"])
def test_merging_on_export_gives_the_model_with_adapters(tmp_path, to):
    base, adapter = made(tmp_path)
    want = logits_of(loaded(open_checkpoint(adapter)), TOKENS)
    assert main(["--to", to, "--load", str(adapter), "--save", str(tmp_path / "out"), "--quiet"]) == 0
    made_of = tmp_path / "out" / ("iter_0000005" if to == "native" else ".")
    got = logits_of(loaded(open_checkpoint(made_of)), TOKENS)
    np.testing.assert_allclose(got[..., :90], want[..., :90], atol=1e-6)
    assert not isinstance(open_checkpoint(made_of), MergedAdapter)
    assert np.abs(want - logits_of(loaded(open_checkpoint(base)), TOKENS)).max() > 1e-2


@pytest.mark.parametrize("words", [LLAMA, "", LLAMA + " --add-qkv-bias"])
@pytest.mark.parametrize("targets", [".*linear_.*", ".*linear_.* own", ".*linear_qkv", "1.*linear_fc[12]"])
def test_a_peft_directory_read_again_is_the_same_adapters(tmp_path, words, targets):
    base, adapter = made(tmp_path, words, targets.removesuffix(" own"), own=targets.endswith(" own"))
    assert main(["--to", "peft", "--load", str(adapter), "--save", str(tmp_path / "peft")]) == 0
    there, again = adapted(adapter), adapted(tmp_path / "peft")
    assert again.adapted() == there.adapted() and again.layers == there.layers
    assert [again.adapter.common[KEY][name] for name in ("rank", "alpha")] == [RANK, ALPHA]
    assert sorted(again.adapter.keys()) == sorted(there.adapter.keys())
    for key in there.adapter.keys():  # noqa: SIM118 - a method of the protocol
        np.testing.assert_array_equal(read_tensor(again.adapter, key), read_tensor(there.adapter, key), err_msg=key)


def peft_directory(root: Path, base: str, tensors: dict[str, np.ndarray], **config: object) -> Path:
    root.mkdir()
    named = {f"base_model.model.{name}": value for name, value in tensors.items()}
    save_file(named, root / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "base_model_name_or_path": base, "r": 2, "lora_alpha": 5, "bias": "none", **config}
    (root / "adapter_config.json").write_text(json.dumps(told))
    return root


def separate(layer: str = "model.layers.0.self_attn") -> dict[str, np.ndarray]:
    """Return adapters of q, k and v with factors of their own, for the small LLaMA-like model."""
    rng, found = np.random.default_rng(3), {}
    for module, rows in (("q_proj", 32), ("k_proj", 16), ("v_proj", 16)):
        found[f"{layer}.{module}.lora_A.weight"] = rng.normal(size=(2, 32)).astype(np.float32)
        found[f"{layer}.{module}.lora_B.weight"] = rng.normal(size=(rows, 2)).astype(np.float32)
    return found


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"alpha_pattern": {"k_proj": 9}}])
def test_peft_adapters_of_q_k_and_v_with_factors_of_their_own_become_one_of_the_fused_layer(tmp_path, config):
    base, _ = made(tmp_path)
    assert main(["--to", "hf", "--load", str(base), "--save", str(tmp_path / "hf"), "--quiet"]) == 0
    tensors = separate()
    source = adapted(peft_directory(tmp_path / "peft", str(tmp_path / "hf"), tensors, **config))
    assert source.adapter.common[KEY]["rank"] == 6
    assert main(["--to", "hf", "--load", str(tmp_path / "peft"), "--save", str(tmp_path / "out"), "--quiet"]) == 0
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "out"))
    for name, values in before.items():
        module, want = name.removesuffix(".weight"), values
        if f"{module}.lora_A.weight" in tensors:
            alpha = 9 if "alpha_pattern" in config and "k_proj" in name else 5
            scale = alpha / (2**0.5 if "use_rslora" in config else 2)
            want = values + scale * tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
        np.testing.assert_allclose(after[name], want, atol=2e-5, err_msg=name)


@pytest.mark.parametrize(
    ("config", "tensors", "said"),
    [
        ({"use_dora": True}, {}, "use_dora"),
        ({"peft_type": "IA3"}, {}, "IA3"),
        ({"modules_to_save": ["lm_head"]}, {}, "modules_to_save"),
        ({}, {"lm_head.lora_A.weight": (2, 32), "lm_head.lora_B.weight": (96, 2)}, "embeddings and output layers"),
        ({}, {"model.layers.7.self_attn.q_proj.lora_A.weight": (2, 32)}, "no known place"),
        ({}, {"model.layers.1.self_attn.o_proj.lora_A.weight": (2, 32)}, "o_proj.lora_B.weight is missing"),
        ({"base_model_name_or_path": "meta/llama"}, {}, "which is no directory here"),
    ],
)
def test_peft_directories_that_say_something_else_are_refused_by_name(tmp_path, config, tensors, said):
    base, _ = made(tmp_path)
    more = {name: np.ones(shape, np.float32) for name, shape in tensors.items()}
    peft = peft_directory(tmp_path / "peft", str(base), {**separate(), **more}, **config)
    with pytest.raises(CheckpointError, match=re.escape(said)):
        open_checkpoint(peft)


def test_peft_is_written_of_adapters_alone(tmp_path, capsys):
    base, _ = made(tmp_path)
    assert main(["--to", "peft", "--load", str(base), "--save", str(tmp_path / "x")]) == 2
    assert "no adapters" in capsys.readouterr().err


_LOGITS = """
import sys, numpy as np, torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
base, peft, tokens, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), peft).eval()
with torch.no_grad():
    np.save(out, model(torch.tensor(np.load(tokens))).logits.numpy())
"""


@pytest.mark.slow
@pytest.mark.skipif(not PEER, reason="PARALLEL_CORE_PEER_PYTHON names no python with torch, transformers and peft")
@pytest.mark.parametrize("words", [LLAMA, ""])
@pytest.mark.parametrize("own", [False, True])
def test_peft_itself_loads_what_is_written_and_has_the_same_logits(tmp_path, words, own):
    base, adapter = made(tmp_path, words, own=own)
    assert main(["--to", "hf", "--load", str(base), "--save", str(tmp_path / "hf"), "--quiet"]) == 0
    assert main(["--to", "peft", "--load", str(adapter), "--save", str(tmp_path / "peft")]) == 0
    np.save(tmp_path / "tokens.npy", TOKENS)
    files = [tmp_path / name for name in ("hf", "peft", "tokens.npy", "logits.npy")]
    done = subprocess.run([PEER, "-c", _LOGITS, *map(str, files)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    want = logits_of(loaded(open_checkpoint(adapter)), TOKENS)[..., :90]
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), want, rtol=0, atol=1e-5 * np.abs(want).max())
