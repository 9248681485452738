"""Every mapped argument, set to something else than its default, changes the configuration it names."""

from __future__ import annotations

from pathlib import Path

import pytest
from config_helpers import load

from parallel_core.config import table
from parallel_core.config.argument import MAPPED, Argument
from parallel_core.config.dump import field_value

PIPE = "--num-layers 8 --pipeline-model-parallel-size 2 --global-batch-size 8"
VPP = PIPE + " --num-layers-per-virtual-pipeline-stage 2"
DIST = "--use-distributed-optimizer --overlap-grad-reduce"
ROPE = "--position-embedding-type rope"
YARN = "--position-embedding-type yarn"
SAMPLES = "--train-samples 100"
CP = "--context-parallel-size 4"
LATENT = f"{ROPE} --multi-latent-attention"
QA = "--bert-head question_answering --data-path x --tokenizer-type BertWordPieceLowerCase --vocab-file x"
QA += " --max-query-length 8 --doc-stride 4"
WANDB = "--wandb-project a --wandb-exp-name b"

# argument -> (what else must be there, the words that set it); the others are set by their kind.
SPECIAL: dict[str, tuple[str, str]] = {
    "num_layers": ("", "6"), "hidden_size": ("", "128"), "num_attention_heads": ("", "8"), "seq_length": ("", "64"),
    "num_query_groups": ("--group-query-attention", "2"), "max_position_embeddings": ("", "99"),
    "padded_vocab_size": ("", "512"), "vocab_size": ("", "200"), "position_embedding_type": ("", "rope"),
    "top_query_layer": ("", "norm_after"), "num_labels": ("", "3"), "bert_head": ("", "masked_lm"),
    "num_tokentypes": ("--bert-head masked_lm", "3"), "mask_prob": ("--bert-head masked_lm", "0.3"),
    "short_seq_prob": ("--bert-head masked_lm", "0.3"), "doc_stride": (QA, "9"),
    "max_query_length": (QA, "9"), "bert_binary_head": ("--bert-head pretraining", ""),
    "make_vocab_size_divisible_by": ("", "7"), "pad_vocab_size": ("--padded-vocab-size null --vocab-size 200", ""),
    "rotary_percent": ("", "0.5"), "normalization": ("", "RMSNorm"), "hidden_act": ("", "relu"),
    "gated_linear_unit": ("--hidden-act silu", ""), "add_qkv_bias": ("--disable-bias-linear", ""),
    "qkv_has_bias": ("--disable-bias-linear", ""), "add_dense_bias": ("--disable-bias-linear", ""),
    "params_dtype": ("", "bf16"), "compute_dtype": ("", "bf16"), "embedding_dtype": ("", "fp16"),
    "fp16_lm_cross_entropy": ("--fp16", ""), "fp32_residual_connection": ("--bf16", ""),
    "fp32_matmul_precision": ("", "high"), "kernels": ("", "local"),
    "attention_backend": ("", "unfused"), "shape_order": ("", "BNSD"),
    "apply_rope_fusion": ("--position-embedding-type rope", ""), "recompute_granularity": ("", "selective"),
    "recompute_method": ("--recompute-granularity full --recompute-num-layers 1", "block"),
    "recompute_num_layers": ("--recompute-granularity full --recompute-method block", "2"),
    "recompute_modules": ("--recompute-granularity selective", "core_attn mlp"),
    "pre_tockens": ("", "100"), "window_size": ("", "8 0"),
    "use_rope_scaling": (ROPE, ""), "window_attn_skip_freq": ("--pre-tockens 8", "[1,0]*2"),
    "rope_scaling_factor": (ROPE + " --use-rope-scaling", "4"),
    "rope_low_freq_factor": (ROPE + " --use-rope-scaling", "2"),
    "rope_high_freq_factor": (ROPE + " --use-rope-scaling", "2"),
    "rope_original_max_position_embeddings": (ROPE + " --use-rope-scaling", "64"),
    "rope_dynamic_factor": (ROPE, "2"), "yarn_beta_slow": (YARN, "2"),
    "yarn_rotary_scaling_factor": (YARN, ""), "yarn_correction_range_round_to_int": (YARN, ""),
    "yarn_mscale": (YARN, ""), "yarn_mscale_all_dim": (YARN, ""), "yarn_attention_factor": (YARN, ""),
    "yarn_beta_fast": (YARN, "16"),
    "multi_latent_attention": (ROPE, ""), "q_lora_rank": (LATENT, "7"), "kv_lora_rank": (LATENT, "7"),
    "qk_head_dim": (LATENT, "7"), "qk_pos_emb_head_dim": (LATENT, "8"), "v_head_dim": (LATENT, "7"),
    "rope_type": (LATENT, "rope"),
    "mtp_num_layers": (ROPE, "1"), "mtp_loss_scaling_factor": (f"{ROPE} --mtp-num-layers 1", "0.5"),
    "context_parallel_size": ("", "2"), "cp_comm_type": (CP, "all_gather"),
    "context_parallel_algo": (CP, "ulysses_cp_algo"),
    "hierarchical_context_parallel_sizes": (CP + " --cp-comm-type a2a+p2p", "2 2"),
    "ulysses_degree_in_cp": (CP + " --context-parallel-algo hybrid_cp_algo", "2"),
    "tensor_model_parallel_size": ("", "2"), "pipeline_model_parallel_size": ("", "2"),
    "virtual_pipeline_model_parallel_size": (PIPE, "2"), "num_layers_per_virtual_pipeline_stage": (PIPE, "2"),
    "micro_batch_interleave_num": ("--micro-batch-size 2 --global-batch-size 2", "2"),
    "pipeline_schedule": (PIPE, "zero-bubble"), "enable_zero_bubble": (PIPE, ""),
    "microbatch_group_size_per_vp_stage": (VPP, "4"), "sequence_parallel": ("--tensor-model-parallel-size 2", ""),
    "num_layer_list": (PIPE, "[5,3]"), "pipeline_model_parallel_layout": (PIPE, "Et*5|tttL"),
    "decoder_first_pipeline_num_layers": (PIPE, "3"), "decoder_last_pipeline_num_layers": (PIPE, "3"),
    "account_for_embedding_in_pipeline_split": (PIPE.replace("8", "7", 1), ""),
    "account_for_loss_in_pipeline_split": (PIPE.replace("8", "7", 1), ""),
    "noop_layers": ("", "1 3"),
    "standalone_embedding_stage": (PIPE, ""),
    "recompute": (PIPE, "[2,1]"), "select_recompute": (PIPE, "[2,1]"), "select_comm_recompute": (PIPE, "[2,1]"),
    "distributed_backend": ("", "shm"), "overlap_param_gather": (DIST, ""), "delay_grad_reduce": (DIST, ""),
    "grad_reduce_in_bf16": ("--bf16", ""), "wrap_with_ddp": ("", ""), "train_samples": ("", "100"),
    "replay": ("", "2"), "rerun_mode": ("", "report_stats"),
    "error_injection_rate": ("--rerun-mode validate_results", "7"), "error_injection_type": ("", "correct_result"),
    "result_rejected_tracker_filename": ("--check-for-spiky-loss", "there"),
    "timing_log_level": ("", "2"), "timing_log_option": ("", "all"),
    "wandb_project": ("--wandb-exp-name a", "mine"), "wandb_exp_name": ("--wandb-project a", "mine"),
    "wandb_save_dir": (WANDB, "there"), "wandb_entity": (WANDB, "we"),
    "mlflow_run_name": ("--mlflow-experiment a", "b"), "mlflow_tracking_uri": ("--mlflow-experiment a", "b"),
    "profile_level": ("", "level1"), "profile_framework": ("", "time"), "optimizer": ("", "sgd"),
    "betas": ("", "0.5 0.6"), "adam_beta1": ("", "0.5"), "adam_beta2": ("", "0.6"), "sgd_momentum": ("", "0.5"),
    "start_weight_decay": ("--weight-decay-incr-style linear --end-weight-decay 0.5", "0.25"),
    "end_weight_decay": ("--weight-decay-incr-style linear --start-weight-decay 0.5", "0.75"),
    "weight_decay_incr_style": ("--start-weight-decay 0.01 --end-weight-decay 0.01", "cosine"),
    "lr_decay_style": ("", "cosine"), "lr_wsd_decay_style": ("", "linear"), "lr_decay_samples": (SAMPLES, "50"),
    "lr_wsd_decay_samples": (SAMPLES, "50"), "lr_warmup_samples": (SAMPLES, "50"), "lr_warmup_iters": ("", "3"),
    "global_batch_size": ("", "8"), "rampup_batch_size": (SAMPLES + " --global-batch-size 8", "4 4 10"),
    "dataloader_type": ("", "cyclic"), "split": ("", "90,5,5"), "lr": ("", "0.5"), "min_lr": ("", "1e-4"),
    "lr_warmup_init": ("", "1e-5"), "lr_warmup_fraction": ("", "0.25"), "hidden_dropout": ("", "0.25"),
    "attention_dropout": ("", "0.25"), "label_smoothing": ("", "0.25"), "decoupled_min_lr": ("", "1e-5"),
    "max_device_memory": ("", "58GB"),
    "profile_aicore_metrics": ("", "1"), "profile_step_end": ("", "20"), "profile_step_start": ("", "5"),
    "ckpt_format": ("", "ckpt"), "data_path": ("", "1 a 2 b"), "pretrained_checkpoint": ("", "x"),
}
LORA = "--load x --lora-rank 4"
BPE = Path(__file__).parents[2] / "golden/data/bpe"
TALKS = f"--data-path x --tokenizer-type GPT2BPETokenizer --vocab-file {BPE}/vocab.json --merge-file {BPE}/merges.txt"
SFT = TALKS + " --sft --sft-tokenizer-prompt-format"
MOE = "--num-experts 4"
SIGMOID = MOE + " --moe-router-score-function sigmoid"
SHARED = MOE + " --disable-bias-linear"
SPECIAL |= {
    "lora_rank": ("--load x", "7"), "lora_alpha": (LORA, "16"), "lora_dropout": (LORA, "0.25"),
    "lora_target_modules": (LORA, "linear_proj"), "lora_target_ranks": (LORA, "linear_proj=2"),
    "lora_base": (LORA, "base"), "use_lora": ("--load x", ""),
    "sft": (f"{TALKS} --sft-tokenizer-prompt-format plain", ""), "chat_template": (f"{TALKS} --sft", __file__),
    "sft_tokenizer_prompt_format": (f"{SFT} plain", "identity"),
    "num_experts": ("", "4"), "moe_layer_freq": (MOE, "[1,0]*2"), "moe_ffn_hidden_size": (MOE, "32"),
    "moe_router_topk": (MOE, "3"), "moe_router_score_function": (MOE, "sigmoid"), "moe_router_pre_softmax": (MOE, ""),
    "moe_router_topk_scaling_factor": (MOE, "2.5"), "moe_router_dtype": (MOE, "fp32"),
    "moe_router_rounds": (MOE, ""),
    "moe_router_num_groups": (MOE + " --moe-router-group-topk 1", "2"),
    "moe_router_group_topk": (MOE + " --moe-router-num-groups 2", "2"),
    "moe_router_enable_expert_bias": (SIGMOID, ""), "moe_router_bias_update_rate": (MOE, "0.5"),
    "moe_input_jitter_eps": (MOE, "0.1"), "moe_z_loss_coeff": (MOE, "0.1"),
    "moe_router_load_balancing_type": (MOE, "seq_aux_loss"), "moe_aux_loss_coeff": (MOE, "0.1"),
    "moe_global_aux_loss_form": (MOE, "megatron"), "moe_expert_capacity_factor": (MOE, "1.5"),
    "moe_pad_expert_input_to_capacity": (MOE + " --moe-expert-capacity-factor 1.5", ""),
    "moe_token_drop_policy": (MOE + " --moe-expert-capacity-factor 1.5", "position"),
    "moe_apply_probs_on_input": (MOE + " --moe-router-topk 1 --moe-router-pre-softmax", ""),
    "moe_shared_expert_intermediate_size": (SHARED, "32"),
    "moe_shared_expert_gate": (SHARED + " --moe-shared-expert-intermediate-size 32", ""),
    "moe_token_dispatcher_type": (MOE, "alltoall"), "moe_layer_recompute": (MOE, ""),
    "moe_shared_expert_overlap": (
        f"{MOE} --moe-shared-expert-intermediate-size 8 --disable-bias-linear --moe-token-dispatcher-type alltoall", ""
    ),
    "moe_router_force_load_balancing": (MOE, ""), "moe_per_layer_logging": (MOE, ""),
    "expert_model_parallel_size": (MOE, "2"),
    "expert_tensor_parallel_size": (SHARED + " --tensor-model-parallel-size 2 --sequence-parallel", "1"),
}
# What the run without the argument has, where the context alone is not a legal run.
WITHOUT = {
    "sft": TALKS, "chat_template": f"{SFT} plain",
    "wandb_project": "", "wandb_exp_name": "",
    "recompute_method": "--recompute-granularity full --recompute-num-layers 1 --recompute-method uniform",
    "recompute_num_layers": "--recompute-granularity full --recompute-method block --recompute-num-layers 1",
    "account_for_embedding_in_pipeline_split": PIPE, "account_for_loss_in_pipeline_split": PIPE,
    "start_weight_decay": "", "end_weight_decay": "", "moe_router_num_groups": MOE, "moe_router_group_topk": MOE
    + " --moe-router-num-groups 2 --moe-router-group-topk 1",
    "hierarchical_context_parallel_sizes": CP, "ulysses_degree_in_cp": CP,
}
# Arguments with one legal value, and those that say where arguments are read from: tested on their own.
ELSEWHERE = {"yaml_cfg", "use_checkpoint_args", "use_mp_args_from_checkpoint_args",
             "use_tokenizer_model_from_checkpoint_args"}
ROWS = [argument for argument in table.TABLE if argument.status == MAPPED and argument.name not in ELSEWHERE]


def setting(argument: Argument) -> list[str]:
    if argument.is_switch:
        on = argument.default is not True and argument.name != "qkv_has_bias"
        return [argument.flags[0] if on or argument.default is None else argument.off_flags[0]]
    _, words = SPECIAL.get(argument.name, ("", ""))
    if words:
        return [argument.flags[0], *words.split()]
    default = {"int": "7", "float": "0.125"}.get(argument.kind, "word")
    return [argument.flags[0], default]


def variation(words: list[str]):
    names = {w[2:].replace("-", "_") for w in words if w.startswith("--")}
    return load(*words, without=tuple(names | ({"train_iters"} if "train_samples" in names else set())))


@pytest.mark.parametrize("argument", ROWS, ids=lambda argument: argument.name)
def test_mapped_argument_changes_its_fields(argument):
    context = SPECIAL.get(argument.name, ("", ""))[0]
    if argument.name == "make_vocab_size_divisible_by":
        context = "--padded-vocab-size null --vocab-size 200"
    base = variation(WITHOUT.get(argument.name, context).split())
    changed = variation([*context.split(), *setting(argument)])
    differing = [f for f in argument.fields if field_value(base.config, f) != field_value(changed.config, f)]
    assert differing, f"{setting(argument)} changes none of {argument.fields}"
    if argument.direct:
        assert argument.fields[0] in differing


def test_the_rest_is_named():
    assert {a.name for a in table.TABLE if a.status == MAPPED} - {a.name for a in ROWS} == ELSEWHERE
