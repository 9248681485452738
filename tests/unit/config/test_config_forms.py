"""Every input form leads to the same configuration, and what is wrong in one is said with file and line."""

from __future__ import annotations

import argparse
import math

import pytest
from config_helpers import GOLDEN, argv, load, problems

from parallel_core.config import load_config
from parallel_core.errors import ConfigError

FLAT = """
num-layers: 4
hidden_size: 64
num_attention_heads: 4
seq_length: 32
padded_vocab_size: 256
micro_batch_size: 2
lr: 1e-3
train_iters: 10
tensor_model_parallel_size: 2
swiglu: true
disable_bias_linear: true
norm_epsilon: 1e-6
bf16: yes
"""
FLAGS = ["--tensor-model-parallel-size", "2", "--swiglu", "--disable-bias-linear", "--norm-epsilon", "1e-6", "--bf16"]
MEGATRON = """
language_model:
  num_layers: 4
  hidden_size: 64
  num_attention_heads: 4
  layernorm_epsilon: 1e-6
  activation_func: swiglu
  gated_linear_unit: true
  add_bias_linear: False
  num_moe_experts: null
  bias_activation_fusion: False
  init_method: xavier
model_parallel:
  tensor_model_parallel_size: 2
  pipeline_model_parallel_size: 1
  bf16: True
  timers: null
seq_length: 32
padded_vocab_size: 256
micro_batch_size: 2
lr: 1e-3
train_iters: 10
"""
SECTIONS = """
model_config: {num_layers: 4, hidden_size: 64, num_attention_heads: 4, seq_length: 32, vocab_size: 256,
  hidden_act: swiglu, add_bias_linear: false, norm_epsilon: 1e-6, qkv_has_bias: false, out_proj_has_bias: false}
parallel_config: {tensor_model_parallel_size: 2}
training_config: {training_iters: 10, bf16: true}
dataset_config: {batch_size: 2}
optimizer_config: {learning_rate: 1e-3}
"""
NESTED = """
accelerate_config:
  parallelization: {tensor_parallel: 2}
  precision: {compute_dtype: bfloat16, param_init_dtype: bfloat16}
model_config:
  llm:
    tokenizer: {padded_size: 256}
    embedding: {hidden_size: 64}
    position: {type: learned_absolute, max_size: 32}
    blocks:
      num_layers: 4
      layernorm: {epsilon: 1e-6}
      attention: {attention_type: MHA, head_num: 4}
      ffn: {activation: swiglu, mlp_bias: false}
train_config:
  ms_training_config: {micro_batch_size: 2, train_iters: 10}
lr: 1e-3
"""


def from_text(tmp_path, text, *words, **keywords):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    return load_config(["--config", str(file), *words], **keywords)


@pytest.mark.parametrize("text", [FLAT, MEGATRON, SECTIONS, NESTED], ids=["flat", "megatron", "sections", "nested"])
def test_every_form_gives_the_same_config(tmp_path, text):
    assert from_text(tmp_path, text).config == load_config(argv(*FLAGS)).config


def test_yaml_cfg_is_config(tmp_path):
    (tmp_path / "c.yaml").write_text(FLAT)
    assert load_config(["--yaml-cfg", str(tmp_path / "c.yaml")]).config == load_config(argv(*FLAGS)).config


def test_flags_override_the_file_and_null_takes_back(tmp_path):
    loaded = from_text(tmp_path, FLAT, "--lr", "2", "--no-bf16", "--train-iters", "null", "--train-samples", "64")
    assert loaded.config.optimizer_config.learning_rate == 2.0
    assert loaded.config.model_config.compute_dtype == "float32"
    assert loaded.config.training_config.training_iters == 64 // 2
    assert loaded.provenance["optimizer_config.learning_rate"] == "--lr"
    assert loaded.provenance["model_config.hidden_size"].endswith("c.yaml:3")
    assert loaded.provenance["model_config.kv_channels"] == "derived: widths"
    assert loaded.provenance["optimizer_config.eps"] == "default"


def test_flags_take_equals_signs_and_underscores():
    loaded = load("--min_lr=1e-5", "--adam_beta2=0.95")
    assert loaded.config.optimizer_config.min_lr == 1e-5 and loaded.config.optimizer_config.betas == (0.9, 0.95)


def test_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("WIDTH", "64")
    monkeypatch.setenv("STEM", "/data/x")
    text = FLAT.replace("hidden_size: 64", "hidden_size: ${WIDTH}").replace("lr: 1e-3", "lr: ${LR:-2e-3}")
    loaded = from_text(tmp_path, text + "data_path: [0.3, '${STEM}_a', 0.7, '${STEM}_b']\n")
    assert loaded.config.model_config.hidden_size == 64 and loaded.config.optimizer_config.learning_rate == 2e-3
    assert loaded.config.dataset_config.data_path == ("0.3", "/data/x_a", "0.7", "/data/x_b")
    with pytest.raises(ConfigError, match=r"c.yaml:3: hidden_size: the environment has no variable NOPE"):
        from_text(tmp_path, FLAT.replace("hidden_size: 64", "hidden_size: ${NOPE}"))


def test_yaml_1_1_numbers_are_numbers(tmp_path):
    for word, value in (("1e-5", 1e-5), ("1.0e-5", 1e-5), ("1E-5", 1e-5), ("'1e-5'", 1e-5), ("5", 5.0)):
        loaded = from_text(tmp_path, FLAT.replace("norm_epsilon: 1e-6", f"norm_epsilon: {word}"))
        assert loaded.config.model_config.norm_epsilon == value


SEED_EXPECTED = {
    "num_layers": 62, "hidden_size": 6144, "num_attention_heads": 48, "num_query_groups": 8,
    "untie_embeddings_and_output_weights": True, "params_dtype": "float32", "compute_dtype": "bfloat16",
    "vocab_size": 165664, "norm_epsilon": 1e-5, "use_sandwich_norm": True, "attn_post_norm_scale": 0.0447,
    "ffn_post_norm_scale": 0.0825, "hidden_act": "swiglu", "ffn_hidden_size": 27648, "normalization": "RMSNorm",
    "position_embedding_type": "rope", "max_position_embeddings": 4096, "rotary_base": 10000.0,
    "embedding_init_std": 0.5, "init_method_std": 0.00884, "attention_dropout_rate": 0.0, "hidden_dropout_rate": 0.0,
    "add_bias_linear": False, "qkv_has_bias": False, "out_proj_has_bias": False, "attention_softmax_in_fp32": True,
    "use_flash_attention": True, "apply_rope_fusion": True, "apply_swiglu_fusion": True,
    "apply_rmsnorm_fusion": True,
    "fp16_lm_cross_entropy": False, "fp32_residual_connection": False,
}


def test_the_seeds_own_yaml():
    loaded = load_config(["--config", str(GOLDEN / "seed_001.yaml")])
    model, parallel = loaded.config.model_config, loaded.config.parallel_config
    assert {name: getattr(model, name) for name in SEED_EXPECTED} == SEED_EXPECTED
    assert [sum(row) for row in parallel.num_layer_list] == [16, 16, 16, 14]
    assert parallel.virtual_pipeline_model_parallel_size == 4 and parallel.pipeline_model_parallel_size == 4
    assert parallel.tensor_model_parallel_size == 8 and parallel.sequence_parallel
    training = loaded.config.training_config
    assert training.use_distributed_optimizer and training.bucket_size == 40000000 and not training.resume_training
    assert training.accumulate_allreduce_grads_in_fp32
    assert round(math.log(model.vocab_size), 4) == 12.0177
    assert loaded.world_size == 32


def test_the_seeds_operators_are_chosen_by_name(tmp_path):
    fields = {"flash_attention": "use_flash_attention", "rope": "apply_rope_fusion", "rmsnorm": "apply_rmsnorm_fusion",
              "swiglu": "apply_swiglu_fusion"}  # fmt: skip
    text = FLAT + "position_embedding_type: rope\naccelerate_config: {precision: {%s: %s}}\n"
    for key, chosen in (("fused_operators", True), ("nofused_operators", False)):
        for name, field in fields.items():
            model = from_text(tmp_path, text % (key, name)).config.model_config
            assert [getattr(model, f) is chosen for f in fields.values()] == [
                chosen or f == field for f in fields.values()
            ]
        with pytest.raises(ConfigError, match="no_such_operator .among the fused operators."):
            from_text(tmp_path, text % (key, "no_such_operator"))


def test_the_seeds_experts_in_megatrons_words(tmp_path):
    """`moe_config` of the older system: one expert there is no mixture, and a capacity keeps the first tokens."""
    block = "moe_config: {expert_num: 8, num_experts_chosen: 1, capacity_factor: 1.1, aux_loss_factor: 0.05}\n"
    moe = from_text(tmp_path, FLAT + block + "sequence_parallel: true\n").config.model_config.moe
    assert (moe.num_experts, moe.moe_router_topk, moe.moe_router_pre_softmax) == (8, 1, True)
    assert (moe.moe_expert_capacity_factor, moe.moe_token_drop_policy) == (1.1, "position")
    assert moe.moe_aux_loss_coeff == (0.05,) and moe.moe_router_load_balancing_type == ("aux_loss",)
    none = from_text(tmp_path, FLAT + block.replace("expert_num: 8", "expert_num: 1"))
    assert none.config.model_config.moe.num_experts == 0


def test_layer_list_of_a_wrong_shape_is_refused(tmp_path):
    text = (GOLDEN / "seed_001.yaml").read_text().replace(
        "[[4,4,4,4],[4,4,4,4],[4,4,4,4],[4,4,4,2]]", "[[16,16,16,14]]").replace(
        "virtual_pipeline_model_parallel_size: 4", "virtual_pipeline_model_parallel_size: 4 #").replace(
        "num_layers_per_vpp: 4", "num_layers_per_vpp:")
    with pytest.raises(ConfigError, match="one row for each of the pipeline_model_parallel_size=4 ranks"):
        from_text(tmp_path, text)


@pytest.mark.parametrize(("text", "message"), [
    ("num_layer: 4", r"c.yaml:1: num_layer: unknown argument; did you mean num_layers\?"),
    ("a_section: {num_layers: 4}", r"c.yaml:1: a_section: unknown section; there are model_config"),
    ("num_layers: 4\nnum_layers: 5", r"c.yaml:2: num_layers: given before, on line 1"),
    ("num_layers: four", r"c.yaml:1: num_layers is 'four'; it takes a whole number"),
    ("num_layers: 4.5", r"c.yaml:1: num_layers is 4.5; it takes a whole number"),
    ("lr: .nan", r"c.yaml:1: lr is nan; it takes a finite number"),
    ("lr: [1, 2]", r"c.yaml:1: lr is \[1, 2\]; it takes a number"),
    ("bf16: maybe", r"c.yaml:1: bf16 is 'maybe'; it takes true or false"),
    ("normalization: BatchNorm", r"normalization is 'BatchNorm'; it takes LayerNorm, RMSNorm"),
    ("num_experts: 4\nmoe_router_dtype: fp64", r"c.yaml:2: moe_router_dtype is 'fp64'; it takes fp32"),
    ("- 4", r"c.yaml:1: holds no keys"),
    ("num_layers: [", r"c.yaml:\d+: not YAML"),
    ("num_layers: 4\nencoder_num_layers: 5", r"two values for num_layers; give one"),
    ("model_config: {hidden_dropout_rat: 0.1}", r"c.yaml:1: model_config.hidden_dropout_rat: unknown argument; did"),
])
def test_mistakes_are_named_with_file_and_line(tmp_path, text, message):
    """A misspelled field is an error, in a nested section too."""
    with pytest.raises(ConfigError, match=message):
        from_text(tmp_path, text)


def test_all_mistakes_are_reported_together(tmp_path):
    """What is not built is refused by name, not trained as something else."""
    with pytest.raises(ConfigError) as error:
        from_text(tmp_path, FLAT + "moe_latent_size: 8\nclip_grads: 1\nweight_decay: -1\n", "--hidden-size", "65")
    text = str(error.value)
    for part in ("4 problems", "moe_latent_size: 8: not built: experts in a latent space", "did you mean clip_grad?",
                 "weight_decay: -1: must not be negative", "--hidden-size 65", ":4: num_attention_heads: 4"):
        assert part in text


def test_missing_files(tmp_path):
    (tmp_path / "right.yaml").write_text("")
    with pytest.raises(ConfigError, match="no such file; .* has right.yaml"):
        load_config(["--config", str(tmp_path / "wrong.yaml")])
    with pytest.raises(ConfigError, match="takes one file name"):
        load_config(["--config"])
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        load_config(["--config", str(tmp_path / "binary.yaml")])


@pytest.mark.parametrize(("words", "message"), [
    (["--lr"], "--lr: takes one value, got none"), (["--lr", "1", "2"], "--lr: takes one value, got 2: 1 2"),
    (["--swiglu", "4"], "--swiglu: takes no value, got '4'"), (["--hiden-size", "4"], "did you mean --hidden-size"),
    (["--rampup-batch-size", "a", "b", "c"], "--rampup-batch-size is"),
])
def test_mistakes_on_the_command_line(words, message):
    assert message in problems(*words)


def test_words_before_any_flag():
    with pytest.raises(ConfigError, match="stray: stands before any flag"):
        load_config(["stray", *argv()])


def test_ignored_arguments_are_said_with_the_reason():
    loaded = load("--use-mcore-models", "--log-energy", "--no-masked-softmax-fusion")
    assert "--log-energy: ignored; the log has fixed contents" in " ".join(loaded.notes) and len(loaded.notes) == 3


def test_refused_arguments_that_ask_for_nothing_pass():
    loaded = load("--context-parallel-size", "1", "--moe-router-topk", "2", "--fp8-margin", "0", "--mock-data",
                  "--recompute-modules", "core_attn")
    assert loaded.config.parallel_config.context_parallel_size == 1 and not loaded.notes


def provider(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    group = parser.add_argument_group("mine")
    group.add_argument("--my-rate", type=float, default=0.5)
    group.add_argument("--use-sandwich-norm", action="store_true")
    group.add_argument("--my-list", nargs="+", type=int)
    parser.set_defaults(clip_grad=0.25)
    return parser


def test_extra_args_provider(tmp_path):
    loaded = load_config(argv("--my-list", "1", "2", "--use-sandwich-norm"), extra_args_provider=provider)
    assert loaded.args.my_list == [1, 2] and loaded.args.my_rate == 0.5 and loaded.args.hidden_size == 64
    assert loaded.config.model_config.use_sandwich_norm and loaded.config.optimizer_config.clip_grad == 0.25
    assert from_text(tmp_path, FLAT + "my_rate: 0.75\n", extra_args_provider=provider).args.my_rate == 0.75
    with pytest.raises(ConfigError, match="--my-rate: argument --my-rate: invalid float value"):
        load_config(argv("--my-rate", "x"), extra_args_provider=provider)
    with pytest.raises(ConfigError, match="--my-rat: unknown argument; did you mean --my-rate"):
        load_config(argv("--my-rat", "1"), extra_args_provider=provider)


def test_args_defaults_fill_only_what_has_no_value():
    loaded = load_config(argv(), args_defaults={"ffn_hidden_size": 100, "lr_decay_style": "cosine", "lr": 5.0})
    assert loaded.config.model_config.ffn_hidden_size == 100
    assert loaded.config.optimizer_config.lr_decay_style == "linear"
    assert loaded.config.optimizer_config.learning_rate == 1e-3
    assert sum("not used" in note for note in loaded.notes) == 2
    with pytest.raises(ConfigError, match=r"args_defaults\['lrr'\]: unknown argument"):
        load_config(argv(), args_defaults={"lrr": 1})
