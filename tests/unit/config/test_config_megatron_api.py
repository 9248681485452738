"""Megatron's script API: arguments are read once, turned into the config, and left alone."""

from __future__ import annotations

import argparse
import copy
import sys

import pytest
from config_helpers import GOLDEN, ROOT, argv, load

import parallel_core.config.megatron_api as api
from parallel_core.config import (
    get_args,
    init_configs_from_args,
    init_configs_from_yaml,
    initialize_megatron,
    load_config,
)
from parallel_core.errors import ConfigError


def pangu_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    group = parser.add_argument_group("pangu")
    group.add_argument("--attn-post-norm-scale", type=float, default=0.0447)
    group.add_argument("--use-sandwich-norm", action="store_true")
    group.add_argument("--my-own", default="x")
    return parser


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(api, "_state", {})
    for name in ("MS_WORKER_NUM", "WORLD_SIZE", "RANK_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("words", ["", "--swiglu --bf16", "--train-samples 100", "--no-bias-gelu-fusion",
                                   "--disable-bias-linear --add-qkv-bias", "--mock-data --vocab-size 99",
                                   "--weight-decay-incr-style linear --start-weight-decay 0 --end-weight-decay 1"])
def test_args_lead_to_the_same_config_and_stay_as_they_are(words):
    without = ("train_iters",) if "samples" in words else ()
    loaded = initialize_megatron(argv=argv(*words.split(), without=without))
    args = get_args()
    before = copy.deepcopy(vars(args))
    assert init_configs_from_args(args) == loaded.config
    assert vars(args) == before


def test_the_seeds_calls(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *argv("--use-sandwich-norm")])
    initialize_megatron(extra_args_provider=pangu_arguments)
    args = get_args()
    config = init_configs_from_args(args)
    assert args.my_own == "x" and args.hidden_size == 64 and args.adam_beta1 == 0.9
    assert config.model_config.attn_post_norm_scale == 0.0447 and config.model_config.use_sandwich_norm
    args.lr = 0.25
    assert init_configs_from_args(args).optimizer_config.learning_rate == 0.25


def test_args_before_they_are_read():
    with pytest.raises(ConfigError, match="call initialize_megatron first"):
        get_args()


def test_world_size_of_the_job(monkeypatch):
    monkeypatch.setenv("MS_WORKER_NUM", "4")
    assert initialize_megatron(argv=argv("--global-batch-size", "16")).config.dataset_config.micro_batch_num == 2


def test_a_namespace_of_megatrons_own(tmp_path):
    class Dtype:
        def __str__(self) -> str:
            return "torch.bfloat16"

    args = argparse.Namespace(
        num_layers=4, hidden_size=64, num_attention_heads=4, seq_length=32, encoder_seq_length=32,
        max_position_embeddings=32, padded_vocab_size=256, micro_batch_size=2, global_batch_size=8, lr=1e-3,
        train_iters=10,
        bf16=True, fp16=False, params_dtype=Dtype(), add_bias_linear=True, add_qkv_bias=True, swiglu=False,
        num_query_groups=1, start_weight_decay=0.01, end_weight_decay=0.01, world_size=2, data_parallel_size=2, rank=0,
        consumed_train_samples=0, cp_comm_type=["p2p"], num_experts=None, ffn_hidden_size=256, kv_channels=16,
        data_parallel_sharding_strategy="no_shard", transformer_impl="transformer_engine", split="969, 30, 1",
    )
    config = init_configs_from_args(args)
    expected = load("--bf16", "--global-batch-size", "8", world_size=2).config
    assert config == expected
    args.moe_latent_size = 8
    with pytest.raises(ConfigError, match="moe_latent_size: 8: not built: experts in a latent space"):
        init_configs_from_args(args)


def test_configs_from_yaml():
    file = ROOT / "configs" / "pangu_38b.yaml"
    assert init_configs_from_yaml(str(file)) == load_config(["--config", str(file)]).config


CHECKPOINT = ROOT / "tests" / "golden" / "checkpoint" / "llama" / "ckpt_torch_tp1pp2"


@pytest.mark.skipif(not CHECKPOINT.exists(), reason="the golden checkpoint is not in this checkout")
def test_arguments_from_a_megatron_checkpoint():
    words = ["--load", str(CHECKPOINT), "--use-checkpoint-args", "--micro-batch-size", "2", "--num-layers", "9"]
    loaded = load_config(words)
    model = loaded.config.model_config
    assert (model.num_layers, model.hidden_size, model.hidden_act, model.num_query_groups) == (4, 64, "swiglu", 2)
    assert model.vocab_size == 256 and model.normalization == "RMSNorm" and not model.add_bias_linear
    assert loaded.provenance["model_config.hidden_size"].startswith("checkpoint ")
    assert "--num-layers 9: not used, the checkpoint has num_layers=4" in loaded.notes
    assert loaded.config.parallel_config.pipeline_model_parallel_size == 1
    layout = load_config([*words, "--use-mp-args-from-checkpoint-args"])
    assert layout.config.parallel_config.pipeline_model_parallel_size == 2


def test_the_tokenizer_of_a_megatron_checkpoint():
    words = ["--load", str(CHECKPOINT), "--use-checkpoint-args", "--micro-batch-size", "2"]
    words += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", "x.model"]
    loaded = load_config(words)
    assert loaded.config.dataset_config.tokenizer_type == "NullTokenizer"
    assert "--tokenizer-type SentencePieceTokenizer: not used, the checkpoint has tokenizer_type=NullTokenizer" in (
        loaded.notes
    )
    own = load_config([*words, "--no-use-tokenizer-model-from-checkpoint-args"])
    assert own.config.dataset_config.tokenizer_type == "SentencePieceTokenizer"


def test_checkpoint_arguments_need_a_checkpoint(tmp_path):
    with pytest.raises(ConfigError, match="--use-checkpoint-args: needs load"):
        load_config(["--use-checkpoint-args", "--micro-batch-size", "2"])
    with pytest.raises(ConfigError) as error:
        load_config(["--use-checkpoint-args", "--micro-batch-size", "2", "--load", str(tmp_path / "none")])
    none = tmp_path / "none"
    assert str(error.value) == f"--load {none}: holds no checkpoint to take the model's arguments from; give them too"


def test_the_golden_readme_names_its_files():
    named = (GOLDEN / "README.md").read_text()
    assert all(file.name in named for file in GOLDEN.iterdir() if file.name != "README.md")
