"""What is exported is the same model, or refused by the name of the setting; never another model."""

from __future__ import annotations

import json
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
import sentencepiece
from hf_models import loaded, logits_of
from own_models import LLAMA, config_of, model_of, save
from safetensors.numpy import load_file

from parallel_core import ops
from parallel_core.checkpoint import open_checkpoint
from parallel_core.convert.cli import main
from parallel_core.data import bundled_tokenizer_model

TOKENS = np.random.default_rng(1).integers(0, 90, (2, 16))
BPE = Path(__file__).resolve().parents[2] / "golden" / "data" / "bpe"
YARN = "--position-embedding-type yarn --rotary-scaling-factor 4 --rope-original-max-position-embeddings 8"


@pytest.fixture(autouse=True, scope="module")
def _plain_operators():
    ms.set_context(mode=ms.PYNATIVE_MODE, device_target="CPU", pynative_synchronize=True)
    ops.use_kernels("local")


def export(tmp_path: Path, words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, np.ndarray]:
    """Return the exit status, what was said, and the logits of the model that was exported."""
    config = config_of(words)
    model = model_of(config)
    native = save(tmp_path / "native", config, model)
    status = main(["--to", "hf", "--load", str(native), "--save", str(tmp_path / "hf"), "--quiet"])
    return status, capsys.readouterr().err, logits_of(model, TOKENS)[..., :90]


@pytest.mark.parametrize(
    ("words", "model_type"),
    [
        ("", "gpt2"),
        ("--no-bias-gelu-fusion", "gpt2"),
        ("--hidden-act relu", "gpt2"),
        ("--squared-relu", "gpt2"),
        ("--openai-gelu", "gpt2"),
        ("--hidden-act silu", "gpt2"),
        ("--untie-embeddings-and-output-weights", "gpt2"),
        ("--softmax-scale 1", "gpt2"),
        ("--scale-attn-by-inverse-layer-idx", "gpt2"),
        ("--apply-layernorm-1p", "gpt2"),
        ("--apply-query-key-layer-scaling", "gpt2"),
        ("--position-embedding-type rope", "gpt_neox"),
        ("--position-embedding-type rope --rotary-percent 0.5 --parallel-residual", "gpt_neox"),
        (LLAMA, "llama"),
        (f"{LLAMA} --apply-layernorm-1p", "llama"),
        (f"{LLAMA} --kv-channels 16", "llama"),
        (f"{LLAMA} --no-swiglu --hidden-act geglu", "llama"),
        (f"{LLAMA} --add-bias-linear", "llama"),
        (f"{LLAMA} --qkv-has-bias --add-dense-bias", "llama"),
        (f"{LLAMA} --add-qkv-bias", "qwen2"),
        (f"{LLAMA} --qk-layernorm", "qwen3"),
        (f"{LLAMA} --window-size 5 0", "mistral"),
        (f"{LLAMA} --window-size 5 0 --add-qkv-bias", "qwen2"),
        (f"{LLAMA} --window-size 5 0 --add-qkv-bias --window-attn-skip-freq [0,1]", "qwen2"),
        (f"{LLAMA} --window-size 5 0 --qk-layernorm --window-attn-skip-freq [1,0]", "qwen3"),
        (f"{LLAMA} --rotary-base 500", "llama"),
        (f"{LLAMA} --rotary-percent 0.5", "llama"),
        (f"{LLAMA} --rotary-seq-len-interpolation-factor 4", "llama"),
        (f"{LLAMA} --use-rope-scaling --rope-original-max-position-embeddings 64", "llama"),
        (f"{LLAMA} --use-rope-scaling --rope-low-freq-factor 2 --rope-high-freq-factor 9", "llama"),
        (f"{LLAMA} --rope-dynamic-factor 2", "llama"),
        (f"{LLAMA} --rope-dynamic-factor 2 --rope-original-max-position-embeddings 8", "llama"),
        (f"{LLAMA} {YARN}", "llama"),
        (f"{LLAMA} {YARN} --mscale 2 --mscale-all-dim 0.5 --yarn-beta-fast 9", "llama"),
        (f"{LLAMA} {YARN} --yarn-attention-factor 1.5 --no-yarn-correction-range-round-to-int", "llama"),
    ],
)  # fmt: skip
def test_the_exported_model_computes_the_same(tmp_path, capsys, words, model_type):
    status, said, logits = export(tmp_path, words, capsys)
    assert status == 0, said
    again = open_checkpoint(tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == model_type
    np.testing.assert_allclose(logits_of(loaded(again), TOKENS), logits, atol=2e-5)  # folding 1 into a norm rounds


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--group-query-attention --num-query-groups 2", "num_query_groups=2, as many as heads (4) there"),
        ("--kv-channels 16", "kv_channels=16"),
        ("--apply-residual-connection-post-layernorm", "apply_residual_connection_post_layernorm=True, False there"),
        ("--window-size 5 0", "pre_tockens=5"),
        ("--softmax-scale 0.3", "softmax_scale=0.3"),
        ("--embedding-multiplier 2", "embedding_multiplier=2.0, 1.0 there"),
        ("--parallel-residual", "parallel_residual=True, False there"),
        ("--position-embedding-type none", "position_embedding_type='none'"),
        ("--no-qkv-has-bias", "qkv_has_bias=False, True there"),
        ("--hidden-act geglu", "hidden_act='geglu' has no word there"),
        ("--use-sandwich-norm", "use_sandwich_norm=True, False there"),
        (f"{LLAMA} --apply-residual-connection-post-layernorm", "apply_residual_connection_post_layernorm=True"),
        (f"{LLAMA} --rotary-interleaved", "rotary_interleaved=True, False there"),
        (f"{LLAMA} --hidden-act relu --no-swiglu", "hidden_act='relu' has no word there"),
        (f"{LLAMA} --add-dense-bias", "qkv_has_bias=False, add_dense_bias=True has one switch there"),
        (f"{LLAMA} --window-size 5 0 --window-attn-skip-freq [1,0]", "qwen2 is nearest, but for: qkv_has_bias"),
        (f"{LLAMA} --window-size 5 0 --add-bias-linear", "pre_tockens=5"),
        (f"{LLAMA} --embedding-multiplier 2", "embedding_multiplier=2.0, 1.0 there"),
        (f"{LLAMA} --scale-attn-by-inverse-layer-idx", "scale_attn_by_inverse_layer_idx=True, False there"),
        (f"{LLAMA} --use-rope-scaling --rotary-seq-len-interpolation-factor 2", "in several ways (llama3, linear)"),
    ],
)  # fmt: skip
def test_what_has_no_place_there_is_named(tmp_path, capsys, words, named):
    status, said, _ = export(tmp_path, words, capsys)
    assert status == 2 and named in said, said
    assert not (tmp_path / "hf").exists()


def test_the_row_of_the_null_tokenizers_end_of_document_is_kept(tmp_path, capsys):
    status, said, _ = export(tmp_path, "--tokenizer-type NullTokenizer", capsys)
    assert status == 0 and not said
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["vocab_size"] == 91 and config["eos_token_id"] == 90
    assert load_file(tmp_path / "hf" / "model.safetensors")["transformer.wte.weight"].shape == (91, 32)


def test_a_sentence_piece_model_goes_along(tmp_path, capsys):
    kind = "--tokenizer-type GPTSentencePieceTokenizer"
    words = f"{kind} --tokenizer-model {bundled_tokenizer_model()} --vocab-size null"
    status, said, _ = export(tmp_path, words, capsys)
    assert status == 0 and not said
    written = tmp_path / "hf"
    config = json.loads((written / "config.json").read_text())
    assert (written / "tokenizer.model").read_bytes() == Path(bundled_tokenizer_model()).read_bytes()
    model = sentencepiece.SentencePieceProcessor(model_file=str(written / "tokenizer.model"))
    assert config["eos_token_id"] == model.eos_id() and config["vocab_size"] == model.get_piece_size()
    told = json.loads((written / "tokenizer_config.json").read_text())
    assert told["eos_token"] == model.id_to_piece(model.eos_id()) and told["add_bos_token"] is False


def test_gpt2s_files_go_along_and_missing_ones_are_told(tmp_path, capsys):
    for file in BPE.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    files = f"--vocab-file {tmp_path}/vocab.json --merge-file {tmp_path}/merges.txt"
    words = f"--tokenizer-type GPT2BPETokenizer {files} --vocab-size null"
    config = config_of(words)
    native = save(tmp_path / "native", config, model_of(config))
    assert main(["--to", "hf", "--load", str(native), "--save", str(tmp_path / "hf"), "--quiet"]) == 0
    assert (tmp_path / "hf" / "merges.txt").read_bytes() == (BPE / "merges.txt").read_bytes()
    ids = json.loads((BPE / "vocab.json").read_text())
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert written["eos_token_id"] == ids["<|endoftext|>"] and written["vocab_size"] == max(ids.values()) + 1
    (tmp_path / "vocab.json").unlink()
    capsys.readouterr()
    assert main(["--to", "hf", "--load", str(native), "--save", str(tmp_path / "again"), "--quiet"]) == 0
    assert "no tokenizer is written: vocab_file" in capsys.readouterr().err
