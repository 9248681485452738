"""Each named rule: what it derives or accepts, and what it refuses, in the user's terms."""

from __future__ import annotations

from pathlib import Path

import pytest
from config_helpers import load, problems

from parallel_core.config.checks import CHECKS
from parallel_core.config.derivations import DERIVATIONS
from parallel_core.config.dump import field_value
from parallel_core.errors import ConfigError
from parallel_core.layout.stages import decoder_layers, parse_layout

M, P, T, D, O = (f"{name}_config." for name in ("model", "parallel", "training", "dataset", "optimizer"))
PP4 = ["--num-layers", "8", "--pipeline-model-parallel-size", "4", "--global-batch-size", "16"]
VPP = ["--num-layers", "8", "--pipeline-model-parallel-size", "2", "--global-batch-size", "8"]
GIVEN = "--num-layers-per-virtual-pipeline-stage"

# rule, flags, {field: value}
_BPE = Path(__file__).parents[2] / "golden/data/bpe"
TALKS = f"--tokenizer-type GPT2BPETokenizer --vocab-file {_BPE}/vocab.json --merge-file {_BPE}/merges.txt"
TALKS += " --sft-tokenizer-prompt-format plain"
CP2 = "--context-parallel-size 2 "
QA = "--bert-head question_answering --data-path x --tokenizer-type BertWordPieceLowerCase --vocab-file x"
QA += " --max-query-length 8 --doc-stride 4"
MTP = "--num-layers 8 --pipeline-model-parallel-size 2 --mtp-num-layers 1 --position-embedding-type rope"
LATENT = "--multi-latent-attention --position-embedding-type rope"
DERIVED = [
    ("recompute_activations", "--recompute-activations", {M + "recompute_granularity": "selective"}),
    ("recompute_activations", "", {M + "recompute_granularity": "none"}),
    ("positions", "--use-rotary-position-embeddings", {M + "position_embedding_type": "rope"}),
    ("positions", "--position-embedding-type rope --no-position-embedding", {M + "apply_rope_fusion": True}),
    ("positions", "", {M + "position_embedding_type": "learned_absolute", M + "apply_rope_fusion": False}),
    ("positions", "--position-embedding-type rope --rotary-interleaved", {M + "apply_rope_fusion": False}),
    ("activation", "", {M + "hidden_act": "gelu_tanh"}),
    ("activation", "--no-bias-gelu-fusion", {M + "hidden_act": "gelu"}),
    ("activation", "--disable-bias-linear", {M + "hidden_act": "gelu"}),
    ("activation", "--swiglu", {M + "hidden_act": "swiglu"}),
    ("activation", "--squared-relu", {M + "hidden_act": "squared_relu"}),
    ("activation", "--openai-gelu", {M + "hidden_act": "openai_gelu"}),
    ("activation", "--hidden-act silu --gated-linear-unit", {M + "hidden_act": "swiglu"}),
    ("conversations", "--sft --data-path x --sft-tokenizer-prompt-format plain", {
        "dataset_config.tokenizer_type": "SentencePieceTokenizer"}),
    ("conversations", f"--sft --data-path x {TALKS}", {
        "dataset_config.reset_attention_mask": True, "dataset_config.reset_position_ids": True}),
    ("adapters", "--use-lora --load x", {"training_config.lora.rank": 8}),
    ("adapters", "--no-use-lora --lora-rank 8 --lora-alpha 4", {"training_config.lora.rank": 0}),
    ("query_layer", "", {M + "top_query_layer": "none"}),
    ("query_layer", "--top-query-layer norm_after", {M + "top_query_layer": "norm_after"}),
    ("encoder", "", {M + "bert.bert_head": "none"}),
    ("encoder", "--bert-head pretraining --bert-no-binary-head", {M + "bert.bert_head": "masked_lm"}),
    ("encoder", "--bert-head masked_lm", {M + "bert.bert_head": "masked_lm", M + "hidden_act": "gelu"}),
    ("activation", "--bert-head masked_lm --bias-gelu-fusion", {M + "hidden_act": "gelu_tanh"}),
    ("activation", "--hidden-act relu", {M + "hidden_act": "relu"}),
    ("activation", "--hidden-act gelu --gated-linear-unit", {M + "hidden_act": "geglu"}),
    ("positions", "--position-embedding-type yarn", {M + "yarn_beta_fast": 32.0, M + "apply_rope_fusion": True}),
    ("attention_window_layers", "--window-size 8 0 --window-attn-skip-freq 2 --num-layers 5",
     {M + "window_attn_skip_freq": (1, 0, 1, 0, 1)}),
    ("attention_window_layers", "--window-size 8 0 --window-attn-skip-freq ([1]+[0]*2)+[1] --num-layers 4",
     {M + "window_attn_skip_freq": (1, 0, 0, 1)}),
    ("attention_window_layers", "--window-size 8 0 --window-attn-skip-freq [1]*4 --num-layers 4",
     {M + "window_attn_skip_freq": ()}),
    ("biases", "", {M + "qkv_has_bias": True, M + "out_proj_has_bias": True, M + "add_bias_linear": True}),
    ("biases", "--disable-bias-linear", {M + "qkv_has_bias": False, M + "out_proj_has_bias": False}),
    ("biases", "--disable-bias-linear --add-qkv-bias", {M + "qkv_has_bias": True, M + "out_proj_has_bias": False}),
    ("biases", "--no-qkv-has-bias --no-add-dense-bias", {M + "qkv_has_bias": False, M + "add_bias_linear": True}),
    ("virtual_pipeline", f"{MTP} --pipeline-model-parallel-layout Et*5|tttmL", {P + "num_layer_list": ((5,), (3,))}),
    ("latent_attention", LATENT, {
        M + "mla.rope_type": "yarn", M + "kv_channels": 192, M + "qkv_has_bias": False, M + "out_proj_has_bias": True,
        M + "yarn_mscale": 1.0, M + "rope_original_max_position_embeddings": 4096}),
    ("latent_attention", f"{LATENT} --qk-head-dim 16 --rope-type rope",
     {M + "mla.rope_type": "rope", M + "kv_channels": 80}),
    ("softmax_type", "--apply-query-key-layer-scaling", {M + "attention_softmax_in_fp32": True}),
    ("softmax_type", "", {M + "attention_softmax_in_fp32": False}),
    ("sequence_length", "--max-position-embeddings 64", {M + "max_position_embeddings": 64, M + "seq_length": 32}),
    ("sequence_length", "--seq-length null --max-position-embeddings 48", {M + "seq_length": 48}),
    ("sequence_length", "", {M + "max_position_embeddings": 32}),
    ("widths", "", {M + "ffn_hidden_size": 256, M + "kv_channels": 16, M + "num_query_groups": 4}),
    ("widths", "--swiglu", {M + "ffn_hidden_size": 128}),
    ("widths", "--swiglu --hidden-size 4096", {M + "ffn_hidden_size": 10880}),
    ("widths", "--ffn-hidden-size 100 --kv-channels 24", {M + "ffn_hidden_size": 100, M + "kv_channels": 24}),
    ("widths", "--group-query-attention", {M + "num_query_groups": 1}),
    ("widths", "--group-query-attention --num-query-groups 2", {M + "num_query_groups": 2}),
    ("vocabulary", "--padded-vocab-size 1000 --vocab-size 999", {M + "vocab_size": 1000}),
    ("vocabulary", "--padded-vocab-size null --vocab-size 50257", {M + "vocab_size": 50304}),
    ("vocabulary", "--padded-vocab-size null --vocab-size 50257 --tensor-model-parallel-size 4",
     {M + "vocab_size": 50688, D + "unpadded_vocab_size": 50257}),
    ("vocabulary", "--padded-vocab-size null --vocab-size 100 --make-vocab-size-divisible-by 8",
     {M + "vocab_size": 104}),
    ("vocabulary", "--padded-vocab-size null --vocab-size 101 --no-pad-vocab-size", {M + "vocab_size": 101}),
    ("vocabulary", "--padded-vocab-size null --vocab-size 255 --tokenizer-type NullTokenizer", {M + "vocab_size": 256}),
    ("vocabulary", "--padded-vocab-size null --vocab-size 256 --tokenizer-type NullTokenizer", {M + "vocab_size": 384}),
    ("precision", "", {M + "params_dtype": "float32", M + "compute_dtype": "float32", T + "bf16": False}),
    ("precision", "--bf16", {M + "params_dtype": "bfloat16", M + "compute_dtype": "bfloat16", T + "bf16": True}),
    ("precision", "--bf16 --params-dtype fp32", {M + "params_dtype": "float32", M + "compute_dtype": "bfloat16"}),
    ("precision", "--compute-dtype torch.bfloat16", {M + "params_dtype": "float32", T + "bf16": True}),
    ("precision", "--fp16", {M + "compute_dtype": "float16", T + "fp16": True, M + "embedding_init_dtype": "float16"}),
    ("gradient_type", "--bf16", {T + "accumulate_allreduce_grads_in_fp32": True}),
    ("gradient_type", "--bf16 --grad-reduce-in-bf16", {T + "accumulate_allreduce_grads_in_fp32": False}),
    ("gradient_type", "--fp16", {T + "accumulate_allreduce_grads_in_fp32": False}),
    ("overflow_check", "--fp16", {T + "check_for_nan_in_loss_and_grad": False}),
    ("overflow_check", "--fp16 --loss-scale 0.5", {T + "check_for_nan_in_loss_and_grad": True, T + "loss_scale": 0.5}),
    ("sequence_parallel", "--sequence-parallel --tensor-model-parallel-size 1", {P + "sequence_parallel": False}),
    ("sequence_parallel", "--sequence-parallel --tensor-model-parallel-size 2", {P + "sequence_parallel": True}),
    ("flash_attention", "--attention-backend flash", {M + "use_flash_attention": True}),
    ("flash_attention", "--attention-backend unfused", {M + "use_flash_attention": False}),
    ("attention_window", "--window-size 8 0", {M + "fa_config.pre_tokens": 8}),
    ("attention_window", "--window-size (8,0)", {M + "fa_config.pre_tokens": 8}),
    ("attention_window", "--window-size -1 0", {M + "fa_config.pre_tokens": 2**31 - 1}),
    ("virtual_pipeline", " ".join([*VPP, GIVEN, "2"]), {P + "virtual_pipeline_model_parallel_size": 2}),
    ("virtual_pipeline", " ".join([*VPP, "--num-virtual-stages-per-pipeline-rank", "4"]),
     {P + "virtual_pipeline_model_parallel_size": 4}),
    ("virtual_pipeline", " ".join([*VPP, "--num-layer-list", "[[3,1],[2,2]]"]),
     {P + "virtual_pipeline_model_parallel_size": 2, P + "num_layer_list": ((3, 1), (2, 2))}),
    ("virtual_pipeline", " ".join([*VPP, "--num-layer-list", "5,3"]), {P + "num_layer_list": ((5,), (3,))}),
    ("virtual_pipeline", " ".join([*VPP, "--pipeline-model-parallel-layout", "Ett|ttt|t|ttL"]),
     {P + "num_layer_list": ((2, 1), (3, 2)), P + "virtual_pipeline_model_parallel_size": 2}),
    ("context_parallel", "--context-parallel-size 2 --cp-comm-type allgather", {P + "cp_comm_type": ("all_gather",)}),
    ("context_parallel", "--context-parallel-size 2", {P + "cp_comm_type": ("p2p",)}),
    ("context_parallel", "--cp-comm-type a2a", {P + "cp_comm_type": ("p2p",)}),
    ("context_parallel", CP2 + "--context-parallel-algo megatron_cp_algo", {P + "cp_comm_type": ("p2p",)}),
    ("context_parallel", CP2 + "--context-parallel-algo kvallgather_cp_algo", {P + "cp_comm_type": ("all_gather",)}),
    ("context_parallel", CP2 + "--context-parallel-algo ulysses_cp_algo", {P + "cp_comm_type": ("a2a",)}),
    ("context_parallel", "--context-parallel-size 4 --context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp 2",
     {P + "cp_comm_type": ("a2a+p2p",), P + "hierarchical_context_parallel_sizes": (2, 2)}),
    ("virtual_pipeline", "", {P + "virtual_pipeline_model_parallel_size": 1}),
    ("pipeline_schedule", " ".join([*VPP, "--enable-zero-bubble"]), {P + "pipeline_schedule": "zero-bubble"}),
    ("pipeline_schedule", " ".join([*VPP, "--pipeline-parallel-schedule", "InterleavedZeroBubble"]),
     {P + "pipeline_schedule": "zero-bubble"}),
    ("pipeline_schedule", " ".join(VPP), {P + "pipeline_schedule": "auto"}),
    ("batches", "", {D + "global_batch_size": 2, D + "micro_batch_num": 1}),
    ("batches", "--global-batch-size 8", {D + "micro_batch_num": 4}),
    ("batches", "--micro-batch-num 3", {D + "global_batch_size": 6}),
    ("experts", "--num-experts 4 --moe-layer-freq 2", {M + "moe.moe_layer_freq": (1, 0, 1, 0)}),
    ("experts", "--num-experts 4 --ffn-hidden-size 96", {M + "moe.moe_ffn_hidden_size": 96}),
    ("experts", "--num-experts 4 --moe-expert-capacity-factor -1", {M + "moe.moe_expert_capacity_factor": 0.0}),
    ("experts", "--num-experts 0 --moe-router-topk 4", {M + "moe.num_experts": 0, M + "moe.moe_router_topk": 2}),
    ("run_length", "--train-iters null --train-samples 101", {T + "training_iters": 50, T + "train_samples": 101}),
    # 4 (start) to 8 in one step of 4 over 10 samples: 4, 4, 4 (12 > 10 consumed), then 88/8 = 11 more.
    ("run_length", "--train-iters null --train-samples 100 --global-batch-size 8 --rampup-batch-size 4 4 10",
     {T + "training_iters": 14}),
    ("schedule", "--weight-decay 0.1", {O + "start_weight_decay": 0.1, O + "end_weight_decay": 0.1}),
    ("schedule", "--betas 0.8 0.9", {O + "betas": (0.8, 0.9)}),
    ("schedule", "--adam-beta2 0.95 --init-method-std 0.01",
     {O + "betas": (0.9, 0.95), M + "embedding_init_std": 0.01}),
    ("schedule", "", {D + "split": "969, 30, 1", D + "dataloader_type": "single"}),
    ("pretrained", "--pretrained-checkpoint x", {T + "load_checkpoint": "x", T + "finetune": True}),
    ("pretrained", "--load x", {T + "load_checkpoint": "x", T + "finetune": False}),
]


def replaced(words):
    """The base's values that `words` give another value, train_iters by train_samples."""
    names = {w[2:].replace("-", "_") for w in words if w.startswith("--") and not w.startswith("--no-")}
    return tuple(names | ({"train_iters"} if "train_samples" in names and "--train-iters" in words else set()))


@pytest.mark.parametrize(("rule", "flags", "expected"), DERIVED)
def test_derived(rule, flags, expected):
    assert rule in DERIVATIONS
    config = load(*flags.split(), without=replaced(flags.split())).config
    assert {path: field_value(config, path) for path in expected} == expected


def test_every_derivation_has_a_case():
    assert {rule for rule, _, _ in DERIVED} == set(DERIVATIONS)


MOE = "--num-experts 4"
SELECTIVE = "--recompute-granularity selective --recompute-modules"
SIGMOID = f"{MOE} --moe-router-score-function sigmoid"
# rule, flags, what the message says
REFUSED = [
    ("recompute_activations", "--recompute-activations --recompute-granularity full", "ask for two different things"),
    ("positions", "--use-rotary-position-embeddings --position-embedding-type none", "two kinds of positions"),
    ("positions", "--no-position-embedding", "--no-position-embedding: write position_embedding_type none"),
    ("activation", "--swiglu --squared-relu", "--swiglu, --squared-relu: ask for several activations"),
    ("activation", "--swiglu --hidden-act gelu", "--swiglu, --hidden-act gelu: ask for several"),
    ("activation", "--gated-linear-unit", "name one with hidden_act; the gated"),
    ("widths", "--hidden-size 66", "--hidden-size 66, --num-attention-heads 4: 66 is not a multiple of 4"),
    ("vocabulary", "--padded-vocab-size null --mock-data", "give padded_vocab_size, vocab_size, or a tokenizer"),
    ("vocabulary", "--padded-vocab-size null --tokenizer-type GPT2BPETokenizer", "needs --vocab-file and --merge-file"),
    ("vocabulary", "--padded-vocab-size null --tokenizer-type Llama2Tokenizer --tokenizer-model nowhere.model",
     "give padded_vocab_size to describe the model without its tokenizer"),
    ("virtual_pipeline", " ".join([*VPP, GIVEN, "3"]), "8 layers are not a whole number of chunks of 3 on each of 2"),
    ("virtual_pipeline", " ".join([*VPP, "--pipeline-model-parallel-layout", "Ett|t"]), "L once, at the end"),
    ("batches", "--global-batch-size 7", "--global-batch-size 7, --micro-batch-size 2: 7 is not a multiple of micro"),
    ("schedule", "--betas 0.8 0.9 --adam-beta1 0.7", "--betas 0.8 0.9, --adam-beta1 0.7: disagree"),
    ("pretrained", "--pretrained-checkpoint x --load y", "both name weights to start from"),
    ("required", "--num-layers null", "num_layers: required, and not given; add num_layers to the file or"),
    ("required", "--lr null", "lr: required to train"),
    ("required", "--micro-batch-size null", "--micro-batch-size N"),
    ("ranges", "--hidden-size 0", "--hidden-size 0: must be above zero"),
    ("ranges", "--hidden-dropout 1.0", "--hidden-dropout 1.0: must be at least 0 and below 1"),
    ("ranges", "--weight-decay -1", "--weight-decay -1: must not be negative"),
    ("ranges", "--rotary-percent 0", "--rotary-percent 0: must be above 0 and at most 1"),
    ("ranges", "--lr-warmup-fraction 1.5", "must be from 0 to 1"),
    ("ranges", "--betas 0.9", "takes two numbers"),
    ("ranges", "--profile-aicore-metrics 7", "must be from -1 to 6"),
    ("ranges", "--max-device-memory 58", "is a size above zero; write for example 58GB"),
    ("positions", "--max-position-embeddings 16", "there must be a position for every token"),
    ("positions", "--position-embedding-type rope --rotary-percent 0.2", "rotates 3 channels of each head"),
    ("heads", "--tensor-model-parallel-size 8", "--num-attention-heads 4, --tensor-model-parallel-size 8: 4 is not"),
    ("heads", "--group-query-attention --num-query-groups 3", "heads must be a multiple of groups"),
    ("heads", "--group-query-attention --tensor-model-parallel-size 2", "1 is not a multiple of 2"),
    ("attention_window", "--window-size 8 1", "--window-size 8 1: the second number must be 0, causal attention"),
    ("attention_window", "--window-attn-skip-freq 2", "says in which layers there is a window, and there is none"),
    ("attention_window", "--window-size 8 0 --window-attn-skip-freq [1,0]*9", "has 18 entries"),
    ("attention_window", "--window-size 8 0 --window-attn-skip-freq [1]*99999999999", "takes a number N above zero"),
    ("attention_window", "--window-size 8 0 --window-attn-skip-freq __import__('os')", "takes a number N above zero"),
    ("rotary_scaling", "--use-rope-scaling", "scales the frequencies of rope, and of nothing else"),
    ("rotary_scaling", "--rope-dynamic-factor 2 --position-embedding-type yarn", "of rope, and of nothing else"),
    ("rotary_scaling", "--rope-dynamic-factor 2 --use-rope-scaling --position-embedding-type rope", "give one"),
    ("rotary_scaling", "--rope-dynamic-factor 0.5 --position-embedding-type rope", "must be at least 1"),
    ("rotary_scaling", "--rope-dynamic-factor 2 --position-embedding-type rope --kv-channels 2", "at least 4 rotated"),
    ("rotary_scaling", "--rotary-scaling-factor 40", "--rotary-scaling-factor 40: belongs to position_embedding_type"),
    ("rotary_scaling", "--rope-low-freq-factor 2", "belongs to use_rope_scaling"),
    ("rotary_scaling", "--yarn-original-max-position-embeddings 64", "belongs to use_rope_scaling, rope_dynamic"),
    ("rotary_scaling", "--rope-low-freq-factor 4 --use-rope-scaling --position-embedding-type rope", "below the"),
    ("rotary_scaling", "--yarn-beta-slow 40 --position-embedding-type yarn", "the first must not be below"),
    ("rotary_scaling", "--rotary-base 1 --position-embedding-type yarn", "must be above 1"),
    ("adapters", "--lora-rank 4", "adapts a model: give load"),
    ("conversations", "--sft --tokenizer-type NullTokenizer", "conversations are texts; name their tokenizer"),
    ("conversations", "--sft", "needs conversations: give data_path FILE.jsonl"),
    ("conversations", "--sft --mock-data", "conversations are read from files"),
    ("conversations", "--chat-template x", "is how conversations are written; give sft"),
    ("conversations", "--sft --legacy-tokenizer", "a legacy class may put tokens around texts"),
    ("expert_adapters", "--lora-rank 4 --load x --num-experts 4 --lora-dropout 0.1", "where the layout puts them"),
    ("adapter_targets", "--lora-rank 4 --load x --lora-target-modules o_proj", "is called linear_proj here"),
    ("query_layer", "--top-query-layer norm_before --position-embedding-type rope", "asks by learned positions"),
    ("residuals", "--parallel-residual --apply-residual-connection-post-layernorm", "place the residual twice"),
    ("replayed_iteration", "--replay -1", "the number of an iteration, from 1"),
    ("replayed_iteration", "--replay 0", "the number of an iteration, from 1"),
    ("replayed_iteration", "--replay 11 --train-iters 10", "the run has iterations 1 to 10"),
    ("replayed_iteration", "--replay 3 --skip-train --load x", "has no iteration to replay"),
    ("replayed_iteration", "--replay 3 --dataloader-type external", "cannot be brought to an iteration"),
    ("results_that_are_validated", "--error-injection-rate -1", "must not be negative"),
    ("results_that_are_validated", "--error-injection-rate 5", "give --rerun-mode validate_results"),
    ("results_that_are_validated", "--result-rejected-tracker-filename x", "no result is checked"),
    ("micro_batch_interleave", "--micro-batch-interleave-num 0", "at least 1"),
    ("classes", "--num-labels -1", "above zero"),
    ("classes", "--num-labels 2 --top-query-layer norm_before", "predicts the next word"),
    ("classes", "--num-labels 2 --bert-head masked_lm --no-mock-data --data-path x", "heads of two models"),
    ("classes", "--num-labels 2 --reset-attention-mask", "have no form of it"),
    ("classes", "--num-labels 2 --context-parallel-size 2", "whole on every rank"),
    ("micro_batch_interleave", "--micro-batch-interleave-num 3 --micro-batch-size 4", "a multiple of the first"),
    ("micro_batch_interleave", "--micro-batch-interleave-num 2 --micro-batch-size 2 --num-experts 4", "experts choose"),
    ("micro_batch_interleave", "--micro-batch-interleave-num 2 --micro-batch-size 2 --lora-rank 4 --load x",
     "a finished sum"),
    ("micro_batch_interleave", "--micro-batch-interleave-num 2 --micro-batch-size 2 --recompute-granularity selective "
     "--recompute-modules mlp", "not computed again in parts"),
    ("encoders", "--num-tokentypes 3", "belongs to bert_head"),
    ("encoders", "--bert-no-binary-head", "bash pretrain_bert.sh does"),
    ("encoders", "--bert-head masked_lm --mask-prob 0", "between 0 and 1"),
    ("encoders", "--bert-head masked_lm --short-seq-prob 2", "in 0 to 1"),
    ("encoders", "--bert-head masked_lm --mock-data", "no sentences"),
    ("encoders", "--bert-head pretraining --num-tokentypes 1", "two segments"),
    ("encoders", "--bert-head masked_lm --num-tokentypes 0", "must be at least 1"),
    ("encoders", "--bert-head encoder", "has no task to be trained for"),
    ("question_answering", QA.replace("--data-path x", ""), "needs questions"),
    ("question_answering", QA + " --train-data-path a b", "from one file"),
    ("question_answering", QA + " --num-tokentypes 1", "two segments"),
    ("question_answering", QA.replace("BertWordPieceLowerCase", "NullTokenizer"), "write BertWordPieceLowerCase"),
    ("question_answering", QA + " --doc-stride 0", "must be at least 1"),
    ("question_answering", QA + " --doc-stride 30", "must not be shorter than the stride"),
    ("encoders", "--bert-head masked_lm --position-embedding-type rope", "an encoder has learned_absolute"),
    ("encoders", "--bert-head masked_lm --normalization RMSNorm", "an encoder has LayerNorm"),
    ("encoders", "--bert-head masked_lm --top-query-layer norm_after", "are of two models"),
    ("encoders", "--bert-head masked_lm --embedding-multiplier 2", "embeddings are normed"),
    ("encoders", "--bert-head masked_lm --reset-attention-mask", "an encoder has no form of it"),
    ("encoders", "--bert-head masked_lm --window-size 8 0", "an encoder sees all positions"),
    ("encoders", "--bert-head masked_lm --context-parallel-size 2", "whole on every rank"),
    ("multi_token_prediction", "--mtp-num-layers 1", "write position_embedding_type rope or none"),
    ("multi_token_prediction", "--mtp-loss-scaling-factor 0.5", "belongs to mtp_num_layers; give that too"),
    ("multi_token_prediction", "--mtp-num-layers 32 --position-embedding-type rope", "no token of a sample is so far"),
    ("multi_token_prediction", "--mtp-num-layers -1 --position-embedding-type rope", "must not be negative"),
    ("multi_token_prediction", "--mtp-num-layers 1 --mtp-loss-scaling-factor -1", "must not be negative"),
    ("multi_token_placement", f"{MTP} --pipeline-model-parallel-layout Et*5|tttL",
     "has m 0 times, for 1 layers of multi-token prediction"),
    ("multi_token_placement", f"{MTP} --pipeline-model-parallel-layout Et*8m|L", "has m before the last stage"),
    ("multi_token_placement", f"{MTP} --pipeline-model-parallel-layout Et*5|tttmmL", "has m 2 times, for 1 layers"),
    ("latent_sizes", "--v-head-dim 16", "--v-head-dim 16: belongs to multi_latent_attention; give that too, or"),
    ("latent_sizes", "--rope-type yarn", "belongs to multi_latent_attention; write position_embedding_type yarn"),
    ("latent_sizes", f"{LATENT} --qk-pos-emb-head-dim 7", "--qk-pos-emb-head-dim 7: channels turn in pairs"),
    ("latent_sizes", f"{LATENT} --kv-lora-rank 0", "--kv-lora-rank 0: must be above zero"),
    ("latent_attention", "--multi-latent-attention", "of kind rope_type; write position_embedding_type rope"),
    ("latent_attention", "--multi-latent-attention --position-embedding-type yarn",
     "write position_embedding_type rope"),
    ("latent_attention", f"{LATENT} --group-query-attention", "every head has keys of its own; leave the groups out"),
    ("latent_attention", f"{LATENT} --add-qkv-bias", "its projections have no biases; leave it out"),
    ("latent_attention", f"{LATENT} --rotary-percent 0.5", "its frequencies are rope's or yarn's as they are"),
    ("latent_attention", f"{LATENT} --rotary-scaling-factor 4 --mscale 0", "0 cannot be told from the default, 1"),
    ("rotary_scaling", f"{LATENT} --rope-type rope --rotary-scaling-factor 4", "belongs to rope_type yarn"),
    ("attention_window", "--window-size 8", "takes two numbers: positions before"),
    ("attention_window", "--window-size 8 0 --pre-tockens 9", "give two windows; write one of them"),
    ("tensor_parallel", "--padded-vocab-size 255 --tensor-model-parallel-size 2", "255 is not a multiple of 2"),
    ("tensor_parallel", "--ffn-hidden-size 33 --tensor-model-parallel-size 2", "33 is not a multiple of 2"),
    ("sequence_parallel", "--sequence-parallel", "tensor_model_parallel_size=1 (default): splits the sequence over"),
    ("tensor_parallel", "--seq-length 31 --tensor-model-parallel-size 2 --sequence-parallel", "31 is not a multiple"),
    ("tensor_parallel", "--vocab-size 300", "the padded vocabulary is smaller than the vocabulary"),
    ("microbatches", "--global-batch-size 8 --micro-batch-num 3", "= 6, not 8; leave out micro_batch_num"),
    ("microbatches", "--global-batch-size 8 --rampup-batch-size 3 2 10", "does not arrive at 8"),
    ("microbatches", "--global-batch-size 8 --rampup-batch-size 1 1 10", "not a multiple of micro_batch_size=2"),
    ("microbatches", "--global-batch-size 8 --rampup-batch-size 4 4", "takes three numbers above zero"),
    ("layers", "--pipeline-model-parallel-size 3", "Use 3 or 6 layers, or give num_layer_list"),
    ("context_parallel", "--context-parallel-size 3", "32 is not a multiple of 6; write 30 or 36"),
    ("context_parallel", "--context-parallel-size 8 --attention-dropout 0.1",
     "chunks of four positions, by which dropout draws: 32 is not a multiple of 64; write 64"),
    ("context_parallel", "--context-parallel-size 8 --tensor-model-parallel-size 4 --sequence-parallel --seq-length 48",
     "48 is not a multiple of 32; write 32 or 64"),
    ("context_parallel", CP2 + "--cp-comm-type ring", "--cp-comm-type ring: takes one word, or one for each"),
    ("context_parallel", CP2 + "--cp-comm-type p2p a2a p2p", "one word, or one for each of 4 layers"),
    ("context_parallel", "--context-parallel-size 4 --cp-comm-type a2a+p2p", "two numbers whose product is 4"),
    ("context_parallel", "--context-parallel-size 4 --hierarchical-context-parallel-sizes 2 2", "belong to a2a"),
    ("context_parallel", "--context-parallel-size 8 --cp-comm-type a2a", "a2a deals 4 heads out to 8 ranks"),
    ("context_parallel", "--context-parallel-size 2 --context-parallel-algo adaptive_cp_algo", "adaptive ones reorder"),
    ("context_parallel", "--context-parallel-size 2 --context-parallel-algo ulysses_cp_algo --cp-comm-type p2p",
     "ask for a2a and p2p; give one"),
    ("context_parallel", "--context-parallel-size 4 --context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp 3",
     "the degree must divide 4; write 2 or 4"),
    ("context_parallel", CP2 + "--hybrid-context-parallel", "sizes that differ from sample to sample"),
    ("layers", "--virtual-pipeline-model-parallel-size 2", "several chunks per rank need at least two pipeline stages"),
    ("layers", " ".join([*PP4, "--num-layer-list", "1,2,2,2"]), "adds up to 7, not num_layers=8"),
    ("layers", " ".join([*VPP, GIVEN, "2", "--virtual-pipeline-model-parallel-size", "4"]), "2 layers x 2 ranks x 4"),
    ("layers", " ".join([*VPP, GIVEN, "1", "--num-layer-list", "[[2,2],[2,2]]"]), "largest chunk of the list has 2"),
    ("layers", " ".join([*PP4, "--decoder-first-pipeline-num-layers", "1",
                         "--account-for-loss-in-pipeline-split"]), "cannot be combined"),
    ("layers", " ".join([*PP4, "--decoder-first-pipeline-num-layers", "1"]), "leaves 7 layers for 3 stages"),
    ("layers", " ".join([*PP4, "--decoder-first-pipeline-num-layers", "1", "--num-layer-list", "2,2,2,2"]),
     "--num-layer-list 2,2,2,2, --decoder-first-pipeline-num-layers 1: cannot be combined"),
    ("layers", " ".join([*PP4, "--standalone-embedding-stage", "--account-for-loss-in-pipeline-split"]),
     "cannot be combined"),
    ("layers", "--standalone-embedding-stage", "a stage of its own needs a second one"),
    ("layers", " ".join([*PP4, "--decoder-first-pipeline-num-layers", "2", "--decoder-last-pipeline-num-layers", "2",
                         GIVEN, "1"]), "give the number of chunks, virtual_pipeline_model_parallel_size, in place of"),
    ("layers", "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 1 "
               "--decoder-last-pipeline-num-layers 2",
     "num_layers=4 is not what decoder_first_pipeline_num_layers=1 and decoder_last_pipeline_num_layers=2 hold on "
     "pipeline_model_parallel_size=2, which has no other stage; give 3 layers"),
    ("layers", "--decoder-last-pipeline-num-layers 2", "decoder_last_pipeline_num_layers=2 holds on"),
    ("tensor_parallel", "--tensor-model-parallel-size 3 --sequence-parallel",
     "--tensor-model-parallel-size 3: does not divide --num-attention-heads 4, ffn_hidden_size=256 (widths), "
     "--padded-vocab-size 256, --seq-length 32; write 2 or 4, or change them"),
    ("learning_rate", "--use-checkpoint-opt_param-scheduler --no-load-optim", "give one of them"),
    ("learning_rate", "--use-checkpoint-opt_param-scheduler --finetune", "give one of them"),
    ("learning_rate", "--use-checkpoint-opt_param-scheduler --no-resume-training", "give one of them"),
    ("layers", " ".join([*PP4, "--recompute", "[1,1]"]), "needs one row for each of the 4 pipeline ranks"),
    ("layers", "--noop-layers 4", "layers are numbered from 0 to 3"),
    ("pipeline_schedule", " ".join([*VPP, GIVEN, "2", "--pipeline-schedule", "1f1b"]), "interleaved or zero-bubble"),
    ("pipeline_schedule", " ".join([*VPP, "--pipeline-schedule", "interleaved"]), "takes several chunks on each rank"),
    ("deterministic_mode", " ".join([*VPP, "--deterministic-mode", "--enable-zero-bubble"]), "use auto"),
    ("pipeline_schedule", "--pipeline-schedule zero-bubble", "one rank has none; use auto"),
    ("pipeline_schedule", "--enable-zero-bubble --pipeline-schedule 1f1b", "name two schedules"),
    ("interleaving", " ".join([*VPP, GIVEN, "2", "--global-batch-size", "6"]), "3 do not fit"),
    ("interleaving", " ".join([*VPP, "--microbatch-group-size-per-virtual-pipeline-stage", "2"]), "belongs to several"),
    ("interleaving", " ".join([*VPP, GIVEN, "2", "--microbatch-group-size-per-virtual-pipeline-stage", "1"]),
     "must be at least 2"),
    ("precision", "--bf16 --fp16", "--bf16, --fp16: give one of them"),
    ("precision", "--bf16 --compute-dtype float32", "bf16 computes in bfloat16"),
    ("precision", "--fp16-lm-cross-entropy", "--fp16-lm-cross-entropy: needs fp16"),
    ("precision", "--fp32-residual-connection", "needs fp16 or bf16"),
    ("precision", "--grad-reduce-in-bf16", "needs bf16"),
    ("precision", "--apply-query-key-layer-scaling --attention-backend flash", "cannot scale by layer"),
    ("shared_expert", f"{MOE} --moe-shared-expert-overlap", "there is no shared expert to compute"),
    ("shared_expert", f"{MOE} --moe-shared-expert-overlap --moe-shared-expert-intermediate-size 8 "
     "--disable-bias-linear", "only rows that go to the ranks of their experts go ahead"),
    ("recomputed_modules", "--recompute-modules mlp", "add --recompute-granularity selective"),
    ("recomputed_modules", f"{SELECTIVE} layernorm", "its output is kept by what reads it, so nothing would be freed"),
    ("recomputed_modules", f"{SELECTIVE} mla_up_proj", "mla_up_proj is a part of multi-latent attention"),
    ("recomputed_modules", f"{LATENT} {SELECTIVE} mla_up_proj", "nothing would be freed; add core_attn"),
    ("recomputed_modules", f"{SELECTIVE} everything", "knows no 'everything'; choose of core_attn, mlp, mla_up_proj"),
    ("recomputed_modules", f"{SELECTIVE} moe_act", "moe_act is a part of layers with experts; leave it out"),
    ("recomputed_modules", f"{MOE} {SELECTIVE} shared_experts", "there is no shared expert; leave it out"),
    ("recomputation", "--recompute-granularity full", "full needs recompute_method (uniform or block)"),
    ("recomputation", "--recompute-granularity selective --recompute-method block", "belongs to recompute_granularity"),
    ("recomputation", "--recompute-num-layers 1", "belongs to recompute_granularity full, which is none"),
    ("recomputation", "--recompute-granularity full --recompute-method block --recompute-num-layers 5",
     "there are not so many layers"),
    ("run_length", "--train-samples 100", "--train-iters 10, --train-samples 100: give one of them"),
    ("run_length", "--lr-decay-samples 5", "the run does not count samples"),
    ("run_length", "--train-iters null --train-samples 100 --lr-warmup-iters 5", "does not count iterations"),
    ("run_length", "--global-batch-size 8 --rampup-batch-size 4 4 10", "needs train_samples instead of train_iters"),
    (
        "precision", "--fp16 --initial-loss-scale 8 --min-loss-scale 16",
        "--min-loss-scale 16, --initial-loss-scale 8: min_loss_scale must not be above initial_loss_scale",
    ),  # fmt: skip
    ("learning_rate", "--min-lr 1", "--min-lr 1, --lr 1e-3: min_lr must not be above lr"),
    ("learning_rate", "--decoupled-lr 1 --decoupled-min-lr 2", "must not be above decoupled_lr"),
    ("learning_rate", "--lr-warmup-fraction 0.1 --lr-warmup-iters 2", "--lr-warmup-fraction 0.1, --lr-warmup-iters 2"),
    ("learning_rate", "--lr-warmup-iters 10", "the warm-up must be shorter than the decay"),
    ("learning_rate", "--train-iters null --train-samples 9 --lr-warmup-samples 9", "must be shorter than the decay"),
    ("learning_rate", "--lr-decay-style WSD", "WSD needs lr_wsd_decay_iters"),
    ("learning_rate", "--use-checkpoint-opt_param-scheduler --override-opt-param-scheduler", "give one of them"),
    ("weight_decay", "--start-weight-decay 0.5", "a constant weight decay has one value"),
    ("weight_decay", "--weight-decay-incr-style linear --start-weight-decay 0", "needs start_weight_decay and end"),
    ("overlap", "--overlap-param-gather", "--overlap-param-gather: needs use_distributed_optimizer"),
    ("overlap", "--overlap-param-gather --use-distributed-optimizer", "needs overlap_grad_reduce"),
    ("overlap", "--delay-grad-reduce", "--delay-grad-reduce: needs overlap_grad_reduce"),
    ("overlap", "--no-wrap-with-ddp --overlap-grad-reduce", "overlap_grad_reduce needs gradient buckets"),
    ("data_sources", "--data-path a --mock-data", "--data-path a, --mock-data: give one of them"),
    ("data_sources", "--data-path a --train-data-path b", "give one of them"),
    ("data_sources", "--train-data-path b --split 1,1,1", "does not apply"),
    ("expert_sizes", f"{MOE} --moe-router-topk 5", "a token cannot go to more experts than there are"),
    ("expert_sizes", f"{MOE} --moe-ffn-hidden-size -1", "--moe-ffn-hidden-size -1: must be above zero"),
    ("expert_sizes", f"{MOE} --moe-input-jitter-eps 1", "at least 0 and below 1"),
    ("expert_sizes", f"{MOE} --moe-layer-freq [1,0]", "has 2 entries, one for every layer"),
    ("expert_sizes", f"{MOE} --moe-layer-freq [0]*4", "no layer has experts"),
    ("expert_choice", f"{MOE} --moe-router-topk 1", "add --moe-router-pre-softmax"),
    ("expert_choice", f"{SIGMOID} --moe-router-pre-softmax", "there is no softmax"),
    ("expert_choice", f"{MOE} --moe-router-enable-expert-bias", "add --moe-router-score-function sigmoid"),
    ("expert_choice", f"{MOE} --moe-apply-probs-on-input", "needs one expert per token"),
    ("expert_choice", f"{MOE} --moe-router-num-groups 2", "belong together; give both"),
    ("expert_choice", f"{MOE} --moe-router-num-groups 3 --moe-router-group-topk 1", "not 3 equal groups"),
    ("expert_choice", f"{MOE} --moe-router-num-groups 4 --moe-router-group-topk 4", "which would be none"),
    ("expert_choice", f"{MOE} --moe-router-num-groups 4 --moe-router-group-topk 1", "have not so many"),
    ("expert_choice", f"{MOE} --moe-router-num-groups 2 --moe-router-group-topk 3", "there are not so many groups"),
    ("expert_balance", f"{MOE} --moe-router-load-balancing-type quantile_balancing", "takes different words of"),
    ("expert_balance", f"{MOE} --moe-router-load-balancing-type aux_loss none --moe-aux-loss-coeff 1 1", "stand alone"),
    ("expert_balance", f"{MOE} --moe-router-load-balancing-type aux_loss seq_aux_loss", "2 kinds and 1 coefficients"),
    ("expert_balance", f"{MOE} --moe-aux-loss-coeff -1", "must not be negative"),
    ("expert_balance", f"{MOE} --moe-router-load-balancing-type none --moe-aux-loss-coeff 1", "none has no loss"),
    ("expert_balance", f"{MOE} --moe-router-load-balancing-type sinkhorn --moe-expert-capacity-factor 1",
     "does not go with sinkhorn"),
    ("expert_rounds", f"{MOE} --moe-router-rounds --moe-router-score-function sigmoid", "rounds choose and weigh in a"),
    ("expert_rounds", f"{MOE} --moe-router-rounds --moe-router-pre-softmax", "rounds choose and weigh in a way"),
    ("expert_rounds", f"{MOE} --moe-router-rounds --moe-router-load-balancing-type seq_aux_loss", "choose and weigh"),
    ("expert_rounds", f"{MOE} --moe-router-rounds --moe-router-topk-scaling-factor 2", "rounds choose and weigh"),
    ("expert_rounds", f"{MOE} --moe-router-rounds --moe-expert-capacity-factor 1 --moe-token-drop-policy probs",
     "rounds keep the first tokens"),
    ("expert_sizes", f"{MOE} --top-query-layer norm_before --moe-layer-freq [1]*4", "has an MLP; write 0 for it"),
    ("expert_capacity", f"{MOE} --moe-pad-expert-input-to-capacity", "give the capacity to pad to"),
    ("expert_capacity", f"{MOE} --moe-token-drop-policy position", "nothing is dropped without a capacity"),
    ("shared_expert", f"{MOE} --moe-shared-expert-gate", "gates an expert that is not there"),
    ("shared_expert", f"{MOE} --moe-shared-expert-intermediate-size 8", "add --disable-bias-linear"),
    ("expert_layout", "--expert-model-parallel-size 2", "there are no experts to share out"),
    ("expert_layout", f"{MOE} --expert-model-parallel-size 3", "4 is not a multiple of 3; write 3 or 6"),
    ("expert_layout", f"{MOE} --expert-model-parallel-size -1", "must be above zero"),
    ("expert_layout", f"{MOE} --tensor-model-parallel-size 2", "add --sequence-parallel"),
    ("expert_layout", f"{MOE} --tensor-model-parallel-size 2 --sequence-parallel", "added by each rank of an expert"),
    ("expert_layout", f"{MOE} --disable-bias-linear --moe-ffn-hidden-size 7 --expert-tensor-parallel-size 2",
     "7 is not a multiple of 2"),
    ("expert_layout", f"{MOE} --expert-model-parallel-size 2 --moe-expert-capacity-factor 1 "
     "--moe-pad-expert-input-to-capacity", "write moe_token_dispatcher_type alltoall"),
    ("expert_layout", f"{MOE} --moe-layer-recompute --recompute-granularity full --recompute-method uniform "
     "--recompute-num-layers 1", "full recomputes them already"),
    ("intervals_of_watching", "--timing-log-level 3", "--timing-log-level 3: must be 0, 1 or 2"),
    ("trackers", "--wandb-project a", "--wandb-project a, wandb_exp_name= (default): go together; give both or none"),
    ("trackers", "--wandb-entity a", "--wandb-entity a: belongs to wandb_project, which is not given"),
    ("trackers", "--mlflow-run-name a", "--mlflow-run-name a: belongs to mlflow_experiment, which is not given"),
    ("intervals_of_watching", "--tensorboard-log-interval 0", "--tensorboard-log-interval 0: must be above 0"),
    ("profiling", "--profile --profile-step-start 5 --profile-step-end 4", "the profile ends before it starts"),
]


@pytest.mark.parametrize(("rule", "flags", "message"), REFUSED)
def test_refused(rule, flags, message):
    assert rule in CHECKS or rule in DERIVATIONS
    words = flags.split()
    assert message in problems(*words, without=replaced(words))


def test_every_check_has_a_case():
    named = {rule for rule, _, _ in REFUSED} | {"world", "saving"}
    assert set(CHECKS) <= named


def test_world():
    assert load("--tensor-model-parallel-size", "2", world_size=6).args.data_parallel_size == 3
    text = problems("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2", world_size=6)
    assert "6 processes are not a multiple of 2 x 2 x 1 = 4; start 8" in text
    assert "start 4" in problems("--tensor-model-parallel-size", "4", world_size=0)


def test_batches_follow_the_world_size():
    config = load("--global-batch-size", "24", world_size=4).config
    assert config.dataset_config.micro_batch_num == 3
    assert "16 is not a multiple of micro batch size 2 x data parallel size 3 = 6 (world size 3)" in problems(
        "--global-batch-size", "16", world_size=3)
    assert load("--global-batch-size", "24", "--micro-batch-num", "3").world_size == 4


def test_saving_says_what_happens():
    assert "nothing is saved without save" in " ".join(load("--save-interval", "5").notes)
    unset = " ".join(load("--save", "", "--load", "").notes)  # "$DIR" of a shell that has none
    assert "--save  is empty: nothing is saved" in unset and "--load  is empty: nothing is loaded" in unset
    assert "at the end" not in unset
    with pytest.raises(ConfigError, match="--help: unknown argument; .*config explain NAME"):
        load("--help")
    assert "one checkpoint is written, at the end" in " ".join(load("--save", "x").notes)
    assert "nothing to train" in " ".join(load(without=("lr", "train_iters")).notes)
    assert not load("--save", "x", "--save-interval", "5").notes


def test_explicit_qkv_bias_off_is_explained():
    (note,) = load("--no-add-qkv-bias").notes
    assert "write qkv_has_bias: false" in note


@pytest.mark.parametrize(("text", "ranks", "layers"), [
    ("Et*3|(tt|)*29,L", 31, ((3,), *[(2,)] * 29, (0,))),
    ("Et|t|t|tL", 2, ((1, 1), (1, 1))), ("E|(t|)*3,L", 5, ((0,), (1,), (1,), (1,), (0,))),
])
def test_layout_strings(text, ranks, layers):
    assert decoder_layers(parse_layout(text, ranks)) == layers


@pytest.mark.parametrize(("text", "message"), [
    ("Ettm|tL", "t after m"), ("Etx|tL", "has 'x'"), ("Et|t|tL", "3 stages, not a multiple"), ("E(t|tL", "unclosed"),
    ("t|EtL", "E once"), ("Et)|tL", "without its"), ("Et|tL|", "3 stages.*makes a stage of its own"), ("", "1 stages"),
    ("Et*999999999999|tL", "more than 100000"), ("E((((t*99)*99)*99)*99)|L", "more than 100000"), ("|", "E once"),
    ("Et*\u0663|tL", "has"),
])
def test_bad_layout_strings(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_layout(text, 2)


@pytest.mark.parametrize("words", [
    [*PP4, "--num-layers", "7", GIVEN, "2"],
    ["--tensor-model-parallel-size", "3", "--sequence-parallel"],
    ["--decoder-first-pipeline-num-layers", "2", "--decoder-last-pipeline-num-layers", "2", *PP4, GIVEN, "1"],
    ["--virtual-pipeline-model-parallel-size", "2", GIVEN, "2"],
])
def test_one_mistake_is_one_line(words):
    assert "problems in the configuration" not in problems(*words, without=replaced(words))
