"""Every mapped argument, set to something else than its default, changes what the program does, not only its field.

Three ways to show it: two command lines that differ in the argument and a probe that sees the difference; a whole run
in this process with a check of what it printed and wrote (`test_effects_on_runs.py`); a test elsewhere, by its name,
where several processes are needed. `test_no_mapped_argument_is_without_an_effect` keeps the three complete.
"""

from __future__ import annotations

import re

import effect_probes as see
import pytest
from config_helpers import ROOT
from test_effects_on_runs import RUNS

from parallel_core.config import table
from parallel_core.config.argument import MAPPED
from parallel_core.data.bundled import bundled_tokenizer_model

ROPE = "--position-embedding-type rope"
LLAMA3 = f"{ROPE} --use-rope-scaling --kv-channels 16 --rope-original-max-position-embeddings 32"
YARN = "--position-embedding-type yarn --rotary-scaling-factor 8 --kv-channels 16"
YARN = f"{YARN} --yarn-original-max-position-embeddings 4096"
LATENT = f"{ROPE} --multi-latent-attention --qk-head-dim 4 --qk-pos-emb-head-dim 4 --v-head-dim 4 --kv-lora-rank 8"
PIPE = "--num-layers 8 --pipeline-model-parallel-size 2 --global-batch-size 8 --sequence-parallel"
PIPE = PIPE.replace(" --sequence-parallel", "")
VPP = PIPE + " --num-layers-per-virtual-pipeline-stage 2 --global-batch-size 16"
LONG = "--train-iters 12"
SAMPLES = "--train-samples 48"
WSD = LONG + " --lr-decay-style WSD"
DYNAMIC = "--fp16 --initial-loss-scale 256"
BUCKETS = "--ddp-bucket-size 300"
OVERLAP = f"{BUCKETS} --overlap-grad-reduce"
DISTRIBUTED = f"{OVERLAP} --use-distributed-optimizer"
LEVEL1 = "--profile-level level1"
MOE = "--num-experts 4"
SIGMOID = f"{MOE} --moe-router-score-function sigmoid"

# probe -> lines of `argument | words that set it [| words of both command lines [| of the other one alone]]`
SEEN = {
    "shapes": f"""
        multi_latent_attention | --multi-latent-attention | {ROPE}
        q_lora_rank | --q-lora-rank 6 | {LATENT}
        kv_lora_rank | --kv-lora-rank 6 | {LATENT.replace("--kv-lora-rank 8", "")}
        qk_head_dim | --qk-head-dim 6 | {LATENT.replace("--qk-head-dim 4", "")}
        qk_pos_emb_head_dim | --qk-pos-emb-head-dim 6 | {LATENT.replace("--qk-pos-emb-head-dim 4", "")}
        mtp_num_layers | --mtp-num-layers 1 | {ROPE}
        v_head_dim | --v-head-dim 6 | {LATENT.replace("--v-head-dim 4", "")}
        num_layers | --num-layers 3
        hidden_size | --hidden-size 32
        num_attention_heads | --num-attention-heads 2 | --kv-channels 4
        ffn_hidden_size | --ffn-hidden-size 24
        kv_channels | --kv-channels 8
        group_query_attention | --group-query-attention
        num_query_groups | --num-query-groups 2 | --group-query-attention
        max_position_embeddings | --max-position-embeddings 12
        seq_length | --seq-length 6
        padded_vocab_size | --padded-vocab-size 48
        vocab_size | --vocab-size 200 | --padded-vocab-size null | --vocab-size 100
        make_vocab_size_divisible_by | --make-vocab-size-divisible-by 8 | --padded-vocab-size null --vocab-size 33
        pad_vocab_size | --no-pad-vocab-size | --padded-vocab-size null --vocab-size 33
        vocab_extra_ids | --vocab-extra-ids 9 | {{tokenizer}} --legacy-tokenizer
        position_embedding_type | --position-embedding-type none
        use_rotary_position_embeddings | --use-rotary-position-embeddings
        normalization | --normalization RMSNorm
        qk_layernorm | --qk-layernorm
        swiglu | --swiglu
        gated_linear_unit | --gated-linear-unit | --hidden-act silu
        add_bias_linear | --disable-bias-linear
        add_qkv_bias | --add-qkv-bias | --disable-bias-linear
        qkv_has_bias | --no-qkv-has-bias
        add_dense_bias | --no-add-dense-bias
        untie_embeddings_and_output_weights | --untie-embeddings-and-output-weights
        use_sandwich_norm | --use-sandwich-norm
        num_experts | --num-experts 4
        moe_layer_freq | --moe-layer-freq 2 | {MOE}
        moe_ffn_hidden_size | --moe-ffn-hidden-size 8 | {MOE}
        moe_shared_expert_intermediate_size | --moe-shared-expert-intermediate-size 8 | {MOE} --disable-bias-linear
        moe_shared_expert_gate | --moe-shared-expert-gate | {MOE} --disable-bias-linear \
            --moe-shared-expert-intermediate-size 8
    """,
    "dtypes": """
        params_dtype | --params-dtype bf16
        embedding_dtype | --embedding-dtype fp16
        bf16 | --bf16
        fp16 | --fp16 --loss-scale 1
    """,
    "first_values": """
        init_method_std | --init-method-std 0.1
        embedding_init_method_std | --embedding-init-method-std 0.1
        init_method_xavier_uniform | --init-method-xavier-uniform
        apply_layernorm_1p | --apply-layernorm-1p
        attn_post_norm_scale | --attn-post-norm-scale 0.5 | --use-sandwich-norm
        ffn_post_norm_scale | --ffn-post-norm-scale 0.5 | --use-sandwich-norm
        seed | --seed 7
    """,
    "loss": f"""
        rotary_base | --rotary-base 100 | {ROPE}
        rotary_percent | --rotary-percent 0.5 | {ROPE}
        rotary_interleaved | --rotary-interleaved | {ROPE}
        rotary_seq_len_interpolation_factor | --rotary-seq-len-interpolation-factor 2 | {ROPE}
        use_rope_scaling | --use-rope-scaling | {ROPE} --rotary-base 1e6
        rope_scaling_factor | --rope-scaling-factor 64 | {ROPE} --rotary-base 1e6 --use-rope-scaling
        rope_low_freq_factor | --rope-low-freq-factor 2 | {LLAMA3}
        rope_high_freq_factor | --rope-high-freq-factor 2 | {LLAMA3}
        rope_original_max_position_embeddings | --rope-original-max-position-embeddings 16 | {LLAMA3}
        rope_dynamic_factor | --rope-dynamic-factor 2 | {ROPE} --rope-original-max-position-embeddings 4 \
            | --rope-original-max-position-embeddings null
        yarn_rotary_scaling_factor | --rotary-scaling-factor 4 | {YARN}
        yarn_beta_fast | --yarn-beta-fast 4 | {YARN}
        yarn_beta_slow | --yarn-beta-slow 0.25 | {YARN}
        yarn_correction_range_round_to_int | --no-yarn-correction-range-round-to-int | {YARN}
        yarn_mscale | --mscale 2 | {YARN} --mscale-all-dim 1
        yarn_mscale_all_dim | --mscale-all-dim 2 | {YARN} --mscale 1
        yarn_attention_factor | --yarn-attention-factor 2 | {YARN}
        rope_type | --rope-type rope | {LATENT} | --rotary-scaling-factor 8
        parallel_residual | --parallel-residual
        embedding_multiplier | --embedding-multiplier 2
        top_query_layer | --top-query-layer norm_after | --top-query-layer norm_before
        softmax_scale | --softmax-scale 0.25
        scale_attn_by_inverse_layer_idx | --scale-attn-by-inverse-layer-idx
        window_attn_skip_freq | --window-attn-skip-freq 2 | --window-size 2 0
        norm_epsilon | --norm-epsilon 0.1
        squared_relu | --squared-relu
        openai_gelu | --openai-gelu | --init-method-std 2 | --hidden-act gelu
        bias_gelu_fusion | --no-bias-gelu-fusion | --init-method-std 2
        hidden_act | --hidden-act relu
        apply_residual_connection_post_layernorm | --apply-residual-connection-post-layernorm
        label_smoothing | --label-smoothing 0.25
        pre_tockens | --pre-tockens 2
        moe_router_topk | --moe-router-topk 3 | {MOE}
        moe_router_score_function | --moe-router-score-function sigmoid | {MOE}
        moe_router_pre_softmax | --moe-router-pre-softmax | {MOE}
        moe_router_rounds | --moe-router-rounds | {MOE} --moe-expert-capacity-factor 0.5
        moe_router_topk_scaling_factor | --moe-router-topk-scaling-factor 2 | {MOE}
        moe_router_num_groups | --moe-router-num-groups 2 --moe-router-group-topk 1 | {MOE}
        moe_router_group_topk | --moe-router-group-topk 2 | {MOE} --moe-router-num-groups 2 \
            | --moe-router-group-topk 1
        moe_router_dtype | --moe-router-dtype fp32 | {MOE} --fp16 --loss-scale 1
        moe_expert_capacity_factor | --moe-expert-capacity-factor 0.5 | {MOE}
        moe_token_drop_policy | --moe-token-drop-policy position | {MOE} --moe-expert-capacity-factor 0.5
        moe_apply_probs_on_input | --moe-apply-probs-on-input | {MOE} --moe-router-topk 1 --moe-router-pre-softmax
        window_size | --window-size 2 0
        compute_dtype | --compute-dtype fp16 --loss-scale 1
        attention_softmax_in_fp32 | --attention-softmax-in-fp32 | --fp16 --loss-scale 1
        apply_query_key_layer_scaling | --apply-query-key-layer-scaling | --fp16 --loss-scale 1
        fp32_residual_connection | --fp32-residual-connection | --fp16 --loss-scale 1
    """,
    "type_of_logits": "fp16_lm_cross_entropy | --fp16-lm-cross-entropy | --fp16 --loss-scale 1",
    "train_losses": """
        hidden_dropout | --hidden-dropout 0.5
        attention_dropout | --attention-dropout 0.5
    """,
    "gradient_norm": f"""
        calculate_per_token_loss | --calculate-per-token-loss
        mtp_loss_scaling_factor | --mtp-loss-scaling-factor 0.5 | {ROPE} --mtp-num-layers 1
    """,
    "weights": f"""
        moe_router_enable_expert_bias | --moe-router-enable-expert-bias | {SIGMOID} --moe-router-bias-update-rate 0.5
        moe_router_bias_update_rate | --moe-router-bias-update-rate 0.5 | {SIGMOID} --moe-router-enable-expert-bias
        moe_input_jitter_eps | --moe-input-jitter-eps 0.5 | {MOE}
        moe_z_loss_coeff | --moe-z-loss-coeff 0.1 | {MOE}
        moe_router_load_balancing_type | --moe-router-load-balancing-type seq_aux_loss | {MOE} --moe-aux-loss-coeff 1
        moe_aux_loss_coeff | --moe-aux-loss-coeff 1 | {MOE}
        optimizer | --optimizer sgd
        lr | --lr 1e-3
        adam_bias_correction | --no-adam-bias-correction
        adam_beta1 | --adam-beta1 0.5
        adam_beta2 | --adam-beta2 0.5
        betas | --betas 0.5 0.6
        adam_eps | --adam-eps 0.1
        sgd_momentum | --sgd-momentum 0.5 | --optimizer sgd
        weight_decay | --weight-decay 0.5
        clip_grad | --clip-grad 0.01 | --optimizer sgd
        decoupled_lr | --decoupled-lr 0.5
    """,
    "operators": f"""
        bias_swiglu_fusion | --no-bias-swiglu-fusion | --swiglu
        apply_rope_fusion | --no-rope-fusion | {ROPE}
        use_fused_rmsnorm | --no-use-fused-rmsnorm | --normalization RMSNorm
    """,
    "flash": """
        use_flash_attn | --no-use-flash-attn
        attention_backend | --attention-backend unfused
        shape_order | --shape-order BNSD
    """,
    "recomputed": f"""
        recompute_granularity | --recompute-granularity selective
        recompute_activations | --recompute-activations
        recompute_method | --recompute-method block | --recompute-granularity full --recompute-num-layers 1 \
            --num-layers 4 | --recompute-method uniform
        recompute_num_layers | --recompute-num-layers 2 | --recompute-granularity full --recompute-method block \
            | --recompute-num-layers 1
        recompute | --recompute [2,1] | {PIPE}
        select_recompute | --select-recompute [2,1] | {PIPE}
        select_comm_recompute | --select-comm-recompute [2,1] | {PIPE}
    """,
    "stages": f"""
        pipeline_model_parallel_size | --pipeline-model-parallel-size 2
        virtual_pipeline_model_parallel_size | --virtual-pipeline-model-parallel-size 2 | {PIPE}
        num_layers_per_virtual_pipeline_stage | --num-layers-per-virtual-pipeline-stage 2 | {PIPE}
        num_layer_list | --num-layer-list [5,3] | {PIPE}
        pipeline_model_parallel_layout | --pipeline-model-parallel-layout Et*5|tttL | {PIPE}
        decoder_first_pipeline_num_layers | --decoder-first-pipeline-num-layers 3 | {PIPE}
        decoder_last_pipeline_num_layers | --decoder-last-pipeline-num-layers 3 | {PIPE}
        account_for_embedding_in_pipeline_split | --account-for-embedding-in-pipeline-split --num-layers 7 | {PIPE}
        account_for_loss_in_pipeline_split | --account-for-loss-in-pipeline-split --num-layers 7 | {PIPE}
        standalone_embedding_stage | --standalone-embedding-stage | {PIPE}
        noop_layers | --noop-layers 1
    """,
    "steps": f"""
        microbatch_group_size_per_vp_stage | --microbatch-group-size-per-vp-stage 4 | {VPP}
        pipeline_schedule | --pipeline-schedule zero-bubble | {PIPE}
        enable_zero_bubble | --enable-zero-bubble | {PIPE}
    """,
    "traffic": f"""
        ddp_bucket_size | --ddp-bucket-size 300
        overlap_grad_reduce | --overlap-grad-reduce | {BUCKETS}
        wrap_with_ddp | --no-wrap-with-ddp
        use_distributed_optimizer | --use-distributed-optimizer
        enable_mem_align | --no-enable-mem-align | {DISTRIBUTED}
        overlap_param_gather | --overlap-param-gather | {DISTRIBUTED}
        ddp_average_in_collective | --ddp-average-in-collective
        accumulate_allreduce_grads_in_fp32 | --no-accumulate-allreduce-grads-in-fp32 | --bf16
        grad_reduce_in_bf16 | --grad-reduce-in-bf16 | --bf16
    """,
    "schedules": f"""
        train_iters | --train-iters 6
        train_samples | --train-samples 48
        min_lr | --min-lr 1e-3
        decoupled_min_lr | --decoupled-min-lr 1e-3 | --decoupled-lr 0.1
        start_weight_decay | --start-weight-decay 0.25 | --weight-decay-incr-style linear --end-weight-decay 0.5 \
            | --start-weight-decay 0.125
        end_weight_decay | --end-weight-decay 0.75 | --weight-decay-incr-style linear --start-weight-decay 0.25 \
            | --end-weight-decay 0.5
        weight_decay_incr_style | --weight-decay-incr-style cosine | --start-weight-decay 0.1 --end-weight-decay 0.5 \
            {LONG} | --weight-decay-incr-style linear
        lr_decay_style | --lr-decay-style cosine | {LONG}
        lr_decay_iters | --lr-decay-iters 6 | {LONG}
        lr_decay_samples | --lr-decay-samples 24 | {SAMPLES}
        lr_wsd_decay_style | --lr-wsd-decay-style linear | {WSD} --lr-wsd-decay-iters 6
        lr_wsd_decay_iters | --lr-wsd-decay-iters 6 | {WSD} | --lr-wsd-decay-iters 3
        lr_wsd_decay_samples | --lr-wsd-decay-samples 24 | {SAMPLES} --lr-decay-style WSD \
            | --lr-wsd-decay-samples 12
        lr_warmup_fraction | --lr-warmup-fraction 0.25 | {LONG}
        lr_warmup_iters | --lr-warmup-iters 3 | {LONG}
        lr_warmup_samples | --lr-warmup-samples 12 | {SAMPLES}
        lr_warmup_init | --lr-warmup-init 1e-3 | {LONG} --lr-warmup-iters 3
    """,
    "scales": f"""
        loss_scale | --loss-scale 8
        initial_loss_scale | --initial-loss-scale 64 | --fp16
        min_loss_scale | --min-loss-scale 128 | {DYNAMIC}
        loss_scale_window | --loss-scale-window 3 | {DYNAMIC}
        hysteresis | --hysteresis 4 | {DYNAMIC}
    """,
    "batch_plan": f"""
        micro_batch_size | --micro-batch-size 4
        global_batch_size | --global-batch-size 8
        micro_batch_num | --micro-batch-num 3 | --global-batch-size null
        rampup_batch_size | --rampup-batch-size 4 4 16 | {SAMPLES} --global-batch-size 12
    """,
    "microbatches": """
        dataloader_type | --dataloader-type cyclic
        num_workers | --num-workers 1
        drop_remainder | --no-drop-remainder
    """,
    "tokenizer": """
        tokenizer_type | --tokenizer-type NullTokenizer --padded-vocab-size 300 | --mock-data --padded-vocab-size 300 \
            | {tokenizer}
        tokenizer_model | {tokenizer} | --mock-data --padded-vocab-size 4096 \
            | --tokenizer-type NullTokenizer --vocab-size 100
        legacy_tokenizer | --legacy-tokenizer | {tokenizer}
        vocab_file | --vocab-file {golden}/bpe/vocab.json --tokenizer-type GPT2BPETokenizer {merges} \
            | --mock-data --padded-vocab-size 99999 | --tokenizer-type NullTokenizer
        merge_file | --merge-file {golden}/bpe/merges.txt --tokenizer-type GPT2BPETokenizer {vocab} \
            | --mock-data --padded-vocab-size 99999 | --tokenizer-type NullTokenizer
    """,
    "samples": """
        data_path | --data-path DATA/corpus_b {null} | {split} | --data-path DATA/corpus_a {null}
        train_data_path | --train-data-path DATA/corpus_b {null} | | --train-data-path DATA/corpus_a {null}
        valid_data_path | --valid-data-path DATA/corpus_b {null} | --train-data-path DATA/corpus_a
        test_data_path | --test-data-path DATA/corpus_b {null} | --train-data-path DATA/corpus_a
        split | --split 50,30,20 | --data-path DATA/corpus_a {null} | --split 90,5,5
        mock_data | --mock-data {null} | | --data-path DATA/corpus_a {null}
        reset_position_ids | --reset-position-ids | {one} --eos-token-id 147
        reset_attention_mask | --reset-attention-mask | {one}
        eod_mask_loss | --eod-mask-loss | {one} --eos-token-id 147
        eos_token_id | --eos-token-id 147 | {one} --eod-mask-loss
        pad_token_id | --pad-token-id 147 | {one}
    """,
    "profile": f"""
        profile_level | --profile-level level2
        profile_with_stack | --profile-with-stack
        profile_memory | --profile-memory
        profile_framework | --profile-framework time | --profile-memory
        profile_communication | --profile-communication
        profile_parallel_strategy | --profile-parallel-strategy
        profile_aicore_metrics | --profile-aicore-metrics 1 | {LEVEL1}
        profile_l2_cache | --profile-l2-cache
        profile_hbm_ddr | --profile-hbm-ddr
        profile_pcie | --profile-pcie
        profile_data_process | --profile-data-process
        profile_data_simplification | --no-profile-data-simplification
        profile_op_time | --no-profile-op-time
        profile_offline_analyse | --profile-offline-analyse
    """,
    "dynamic_profile": "profile_dynamic_profiler_config_path | --profile-dynamic-profiler-config-path somewhere",
}
_NULL = "--tokenizer-type NullTokenizer --vocab-size 1000"
WORDS = {
    "{null}": _NULL,
    "{one}": f"--data-path DATA/corpus_a {_NULL}",
    "{split}": "--split 90,5,5",
    "{golden}": str(see.DATA),
    "{vocab}": f"--vocab-file {see.DATA}/bpe/vocab.json",
    "{merges}": f"--merge-file {see.DATA}/bpe/merges.txt",
    "{tokenizer}": "--tokenizer-type SentencePieceTokenizer --padded-vocab-size null "
    f"--tokenizer-model {bundled_tokenizer_model()}",
}

# Arguments whose effect needs several processes, or is what other tests are about: the tests that show it.
ELSEWHERE = {
    "replay": "tests/unit/training/test_replay.py::test_a_run_that_stops_is_replayed_from_the_checkpoint_before",
    "check_for_spiky_loss": "tests/unit/training/test_replay.py::test_a_spike_is_told_and_training_goes_on",
    "check_for_large_grads": "tests/unit/training/test_replay.py::test_a_spike_is_told_and_training_goes_on",
    "rerun_mode":
        "tests/unit/training/test_replay.py::test_a_result_that_is_another_the_second_time_ends_the_run_with_17",
    "error_injection_rate": "tests/unit/training/test_replay.py::test_injected_errors_end_as_their_kind_does",
    "error_injection_type": "tests/unit/training/test_replay.py::test_injected_errors_end_as_their_kind_does",
    "result_rejected_tracker_filename":
        "tests/unit/training/test_replay.py::test_injected_errors_end_as_their_kind_does",
    "elastic": "tests/e2e/test_hosts.py::test_a_job_goes_on_with_the_hosts_that_are_left",
    "sft": "tests/unit/data/test_conversations.py::test_a_resumed_run_goes_on_with_the_next_sample",
    "sft_tokenizer_prompt_format":
        "tests/unit/data/test_conversations.py::test_answers_are_what_the_assistant_has_written",
    "chat_template": "tests/unit/data/test_conversations.py::test_a_file_of_a_template_stands_over_the_tokenizers",
    "lora_rank": "tests/ranks/cases_lora.py::test_adapters_train_as_on_one_rank_and_the_base_stays",
    "lora_alpha": "tests/unit/adapt/test_lora_runs.py::test_merged_is_the_adapter",
    "lora_dropout": "tests/ranks/cases_lora.py::test_dropout_of_an_adapters_input_does_not_depend_on_the_layout",
    "lora_target_modules": "tests/unit/adapt/test_lora_runs.py::test_some_modules_alone_by_name_and_by_expression",
    "lora_target_ranks": "tests/unit/adapt/test_lora_runs.py::test_some_layers_have_another_rank_and_alpha",
    "lora_base": "tests/unit/adapt/test_lora_runs.py::test_another_base_or_none_or_another_adapter_is_refused",
    "num_labels": "tests/unit/transformer/test_text_classifier.py::test_the_program_trains_classes_and_evaluates_them",
    "bert_head": "tests/unit/checkpoint/test_bert_checkpoints.py::test_logits_loss_and_gradient",
    "num_tokentypes": "tests/ranks/cases_bert.py::test_two_ranks_train_an_encoder_like_one",
    "mask_prob": "tests/unit/data/test_masked_words.py::test_shares_of_masked_words_and_of_short_samples",
    "short_seq_prob": "tests/unit/data/test_masked_words.py::test_shares_of_masked_words_and_of_short_samples",
    "doc_stride": "tests/unit/question_answering/test_squad.py::test_features_are_those_of_transformers",
    "max_query_length": "tests/unit/question_answering/test_squad.py::test_features_are_those_of_transformers",
    "bert_binary_head": "tests/unit/training/test_pretrain_bert.py::test_a_small_one_learns_words_and_their_order",
    "use_lora": "tests/unit/adapt/test_lora_runs.py::test_the_seeds_words_ask_for_the_same",
    "moe_global_aux_loss_form":
        "tests/ranks/cases_experts.py::test_a_microbatch_is_compared_with_those_before_it_in_every_layout",
    "moe_router_force_load_balancing":
        "tests/unit/transformer/test_experts.py::test_forced_loads_are_random_and_gradients_pass_through",
    "moe_shared_expert_overlap":
        "tests/unit/transformer/test_experts.py::test_the_shared_expert_is_computed_while_rows_are_on_their_way",
    "moe_per_layer_logging": "tests/unit/transformer/test_experts.py::test_losses_of_each_layer_are_told_on_request",
    "moe_pad_expert_input_to_capacity":
        "tests/unit/transformer/test_experts.py::test_padding_gives_every_expert_its_rows",
    "recompute_modules": "tests/unit/transformer/test_experts.py::test_parts_that_are_computed_again",
    "moe_layer_recompute": "tests/unit/transformer/test_experts.py::test_parts_that_are_computed_again",
    "moe_token_dispatcher_type": "tests/ranks/cases_experts.py::test_experts_on_two_ranks_train_like_one",
    "expert_model_parallel_size": "tests/ranks/cases_experts.py::test_experts_on_two_ranks_train_like_one",
    "expert_tensor_parallel_size": "tests/ranks/cases_experts.py::test_experts_on_two_ranks_train_like_one",
    "micro_batch_interleave_num":
        "tests/ranks/cases_interleaved.py::test_a_parts_sum_goes_on_while_another_part_computes",
    "tensor_model_parallel_size": "tests/ranks/cases_layouts.py::test_two_ranks_train_like_one",
    "sequence_parallel": "tests/ranks/cases_tensor_parallel.py::test_column_parallel_linear_equals_the_unsharded_layer",
    "context_parallel_size": "tests/ranks/cases_context_parallel.py::test_two_parts_of_a_sequence_train_like_one",
    "cp_comm_type": "tests/ranks/cases_context_parallel.py::test_every_exchange_computes_what_one_rank_does",
    "hierarchical_context_parallel_sizes":
        "tests/ranks/cases_context_parallel.py::test_every_exchange_computes_what_one_rank_does",
    "context_parallel_algo":
        "tests/unit/config/test_config_context.py::test_mindspeeds_algorithms_are_megatrons_exchanges",
    "ulysses_degree_in_cp":
        "tests/unit/config/test_config_context.py::test_mindspeeds_algorithms_are_megatrons_exchanges",
    "overlap_p2p_comm": "tests/ranks/cases_layouts.py::test_waiting_late_changes_nothing",
    "distributed_backend": "tests/ranks/cases_comm.py::test_all_reduce",
    "distributed_timeout_minutes": "tests/ranks/cases_comm.py::test_time_limit",
    "delay_grad_reduce": "tests/ranks/cases_training.py::test_delayed_reduction_changes_no_gradient",
    "data_args_path": "tests/unit/data/test_data_config.py",
    "yaml_cfg": "tests/unit/config/test_config_forms.py",
    "use_checkpoint_args": "tests/unit/config/test_config_megatron_api.py::test_arguments_from_a_megatron_checkpoint",
    "use_mp_args_from_checkpoint_args":
        "tests/unit/config/test_config_megatron_api.py::test_arguments_from_a_megatron_checkpoint",
    "use_tokenizer_model_from_checkpoint_args":
        "tests/unit/config/test_config_megatron_api.py::test_the_tokenizer_of_a_megatron_checkpoint",
}


def _rows() -> list[tuple[str, str, str, str, str]]:
    rows = []
    for probe, text in SEEN.items():
        for line in text.replace("\\\n", " ").strip().splitlines():
            for name, words in WORDS.items():
                line = line.replace(name, words)
            cells = [" ".join(cell.split()) for cell in re.split(r"(?<=\s)\|(?=\s|$)", line.strip())]
            rows.append((probe, *cells, *[""] * (4 - len(cells))))
    return rows


ROWS = _rows()


@pytest.mark.parametrize(("probe", "name", "change", "both", "other"), ROWS, ids=[row[1] for row in ROWS])
def test_effect(probe, name, change, both, other, tmp_path):
    extra = (tmp_path,) if probe == "samples" else ()
    flags = [word for word in change.split() if word.startswith("--")]
    assert any(table.find(flag)[0].name == name for flag in flags), f"{change} does not set {name}"
    look = getattr(see, probe)
    with_it = look(tuple(f"{both} {change}".split()), *extra)
    without = look(tuple(f"{both} {other}".split()), *extra)
    assert with_it != without, f"{change} changes nothing of {probe}"


@pytest.mark.parametrize("name", ELSEWHERE)
def test_effect_is_tested_elsewhere(name):
    file, _, test = ELSEWHERE[name].partition("::")
    text = (ROOT / file).read_text(encoding="utf-8")
    assert f"def {test}(" in text if test else name in text


def test_no_mapped_argument_is_without_an_effect():
    shown = [row[1] for row in ROWS] + list(RUNS) + list(ELSEWHERE)
    assert sorted(shown) == sorted(a.name for a in table.TABLE if a.status == MAPPED)
