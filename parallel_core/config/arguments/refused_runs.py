"""Megatron-LM arguments of methods, data and services that are not built; `argument.parse_rows` explains the lines."""

from __future__ import annotations

from parallel_core.config.argument import Argument, refused_rows

REFUSED_RUN_ROWS: tuple[Argument, ...] = (
    *refused_rows(
        "distillation from logits",
        """
        logits_save_top_k int
        logits_save_top_p float
        logits_save_top_p_min_k int = 1
        logits_save_dir
        logits_save_dtype = 'fp16'
        logits_load_dir
        logits_load_decode_threads int = 4
        logits_load_prefetch_factor int = 3
        logits_load_msc_prefetch_depth int = 2
        logits_load_kd_loss_alpha float = 1.0
        logits_load_ignore_errors flag
        """,
    ),
    *refused_rows(
        "BERT, ICT and REALM models",
        """
        ict_head_size int
        biencoder_projection_dim int = 0
        biencoder_shared_query_context_model flag
        ict_load
        bert_load
        titles_data_path
        query_in_block_prob float = 0.1
        use_one_sent_docs flag
        evidence_data_path
        retriever_report_topk_accuracies ints = []
        retriever_score_scaling flag
        block_data_path
        embedding_path
        indexer_batch_size int = 128
        indexer_log_interval int = 1000
        sample_rate float = 1.0
        mask_prob float = 0.15
        short_seq_prob float = 0.1
        output_bert_embeddings flag
        bert_embedder_type = 'megatron'
        bert_binary_head off --bert-no-binary-head
        """,
    ),
    *refused_rows(
        "uninitialised weights",
        """
        perform_initialization off --no-initialization
        """,
    ),
    *refused_rows(
        "other ranks' or other iterations' checkpoints in this way",
        """
        save_params_interval int
        save_activations_interval int
        save_tokens_per_expert_interval int
        save_wgrads_interval int
        save_dgrads_interval int
        save_retain_interval int
        non_persistent_save_interval int
        non_persistent_ckpt_type
        override_ckpt_iteration int
        """,
    ),
    *refused_rows(
        "FSDP (sharded weights)",
        """
        load_main_params_from_ckpt flag
        strict_fsdp_dtensor_load off
        use_torch_fsdp2 flag
        data_parallel_sharding_strategy = 'no_shard' | 'optim_grads_params'
        num_distributed_optimizer_instances int = 1
        use_custom_fsdp flag
        use_megatron_fsdp flag
        gtp_remat_reduce_scatter_with_fp32_accumulation flag
        megatron_fsdp_version int = 1
        gtp_remat_nccl_ub flag
        gtp_expert_remat_nccl_ub flag
        fsdp_manual_registration flag
        create_all_gather_group flag
        outer_dp_sharding_strategy = 'no_shard'
        fsdp_double_buffer flag
        enable_full_sharding_in_hsdp flag
        torch_fsdp2_reshard_after_forward off --torch-fsdp2-no-reshard-after-forward
        megatron_fsdp_main_params_dtype = 'fp32'
        megatron_fsdp_main_grads_dtype = 'auto'
        megatron_fsdp_grad_comm_dtype = 'auto'
        megatron_fsdp_enable_fine_grained_param_gather flag
        megatron_fsdp_max_pool_double_buffer flag
        fsdp_db_use_persist_buf_on_alloc_fail flag
        tensor_parallel_num_weight_shards int
        gtp_remat_opt_in_modules strs = []
        """,
    ),
    *refused_rows(
        "checkpoint conversion inside the run; tools/convert_megatron does it",
        """
        ckpt_convert_format
        ckpt_convert_save
        ckpt_convert_update_legacy_dist_opt_format flag
        """,
    ),
    *refused_rows(
        "step-wise batch size schedules and changing batch sizes on the fly",
        """
        phase_transition_iterations
        step_batch_size_schedule
        decrease_batch_size_if_needed flag
        iterations_to_skip ints = []
        """,
    ),
    *refused_rows(
        "this choice of data",
        """
        per_split_data_args_path
        per_dataset_sequences_path
        dataloader_inter_document_masking flag
        start_eval_at_iter int
        eval_global_batch_size int
        eval_micro_batch_size int
        full_validation flag
        multiple_validation_sets flag
        validation_set_names strs
        """,
    ),
    *refused_rows(
        "this tokenizer option",
        """
        allow_ambiguous_pad_tokens flag
        metadata_path --tokenizer-metadata
        special_tokens strs --tokenizer-special-tokens
        tiktoken_pattern
        tiktoken_num_special_tokens int = 1000
        tokenizer_sentencepiece_ignore_extra_whitespaces off
        tokenizer_hf_no_use_fast flag
        null_tokenizer_eod_id int
        null_tokenizer_pad_id int = -1
        tokenizer_metadata
        tiktoken_special_tokens strs
        """,
    ),
    *refused_rows(
        "fill-in-the-middle data",
        """
        fim_data flag
        fim_rate float = 0.5
        fim_spm_rate float = 0.5
        fim_split_sample
        fim_fragment_rate float
        fim_no_prefix
        fim_prefix_token = '<fim_prefix>'
        fim_middle_token = '<fim_middle>'
        fim_suffix_token = '<fim_suffix>'
        fim_pad_token = '<fim_pad>'
        fim_eod_token = '<|endoftext|>'
        """,
    ),
    *refused_rows(
        "retro",
        """
        retriever_seq_length int = 256
        retro_project_dir
        retro_add_retriever flag
        retro_cyclic_train_iters int
        retro_encoder_layers int = 2
        retro_encoder_hidden_dropout float = 0.1
        retro_encoder_attention_dropout float = 0.1
        retro_num_neighbors int = 2
        retro_num_retrieved_chunks int = 2
        retro_attention_gate float = 1
        retro_verify_neighbor_count off --retro-no-verify-neighbor-count
        """,
    ),
    *refused_rows(
        "the order of ranks tp-pp-dp",
        """
        use_tp_pp_dp_mapping flag
        """,
    ),
    *refused_rows(
        "precision-aware optimizer states",
        """
        use_precision_aware_optimizer flag
        main_grads_dtype = 'fp32'
        main_params_dtype = 'fp32'
        exp_avg_dtype = 'fp32'
        exp_avg_sq_dtype = 'fp32'
        """,
    ),
    *refused_rows(
        "fault injection",
        """
        fault_injector_ranks
        fault_injector_num_ranks int
        fault_injector_fault_types
        fault_injector_fault_probabilities
        fault_injector_fault_delay float
        fault_injector_delay_start_iteration int
        fault_injector_mtti_seconds float
        fault_injector_offset_seconds float
        fault_injector_seed int
        error_injection_rate int = 0
        error_injection_type = 'transient_error'
        """,
    ),
    *refused_rows(
        "CUDA graphs, speculative decoding and the other inference engines",
        """
        external_cuda_graph flag
        flash_decode flag
        inference_batch_times_seqlen_threshold int = -1 | 512
        max_tokens_to_oom int = 12000
        cuda_graph_modules strs = []
        use_legacy_static_engine flag
        inference_max_requests int = 8
        inference_max_seq_length int = 2560
        inference_dynamic_batching flag
        inference_dynamic_batching_buffer_size_gb float = 40.0
        inference_dynamic_batching_paused_buffer_size_gb float
        inference_dynamic_batching_block_size int = 256
        inference_dynamic_batching_max_requests int
        inference_dynamic_batching_max_tokens int
        inference_dynamic_batching_num_cuda_graphs int = 16
        inference_dynamic_batching_track_paused_request_events flag
        inference_dynamic_batching_track_generated_token_events flag
        decode_only_cuda_graphs flag
        inference_cuda_graph_all_prefills flag
        inference_cuda_graph_max_tokens int = 512
        inference_dynamic_batching_unified_memory_level int = 0
        enable_chunked_prefill flag
        num_speculative_tokens int = 0
        inference_dynamic_batching_enable_prefix_caching toggle --inference-dynamic-batching-prefix-caching
        inference_dynamic_batching_prefix_caching_eviction_policy = 'ref_zero'
        inference_dynamic_batching_prefix_caching_coordinator_policy = 'load_balanced'
        inference_dynamic_batching_prefix_caching_routing_alpha float = 0.5
        inference_dynamic_batching_cuda_graph_mixed_prefill_count int = 16
        inference_dynamic_batching_cuda_graph_sizing_distribution = 'exponential'
        inference_dynamic_batching_sampling_backend = 'torch'
        offset_sampling_seed_by_dp_rank off --use-same-sampling-seed-across-dp-ranks
        inference_dynamic_batching_async_sched_mode = 'legacy'
        inference_dynamic_batching_logprobs_mode = 'raw_logprobs'
        inference_logging_step_interval int = 0
        inference_text_gen_server_logging toggle
        inference_wandb_logging toggle
        inference_coordinator_port int
        inference_use_synchronous_zmq_collectives toggle
        inference_disable_ep_consensus toggle
        inference_shards
        cuda_graph_scope = 'full'
        inference_max_batch_size int = 8 --inference-max-batch-size --inference-max-requests
        inference_dynamic_batching_buffer_guaranteed_fraction float = 0.2
        inference_dynamic_batching_buffer_overflow_factor float
        inference_dynamic_batching_max_requests_override int
        inference_dynamic_batching_max_tokens_override int
        disable_chunked_prefill flag
        inference_cuda_graph_scope
        symmetric_ar_type
        nccl_all_reduce_for_prefill flag
        inference_fuse_tp_communication flag
        inference_disable_triton_nvls_kernels flag
        inference_grouped_gemm_backend = 'vllm'
        inference_moe_disable_fused_quant_kernels flag
        inference_moe_token_dispatcher_type = 'nvls'
        mlp_chunks_for_prefill int = 1
        """,
    ),
    *refused_rows(
        "this treatment of weights",
        """
        freeze_all_layers flag
        logit_dtype --output-logit-dtype
        apply_wd_to_qk_layernorm flag
        no_weight_decay_cond_type
        """,
    ),
    *refused_rows(
        "optimizers other than adam and sgd",
        """
        muon_momentum float = 0.9
        muon_split_qkv off --muon-no-split-qkv
        muon_nesterov flag
        muon_scale_mode = 'spectral'
        muon_fp32_matmul_prec = 'medium'
        muon_coefficient_type = 'quintic'
        muon_num_ns_steps int = 5
        muon_tp_mode = 'duplicated'
        muon_use_syrk flag
        muon_extra_scale_factor float = 1.0
        muon_scalar_optimizer = 'adam'
        lion_beta1 float = 0.95
        lion_beta2 float = 0.98
        """,
    ),
    *refused_rows(
        "reinforcement learning",
        """
        perform_rl_step flag
        rl_prompts_per_eval int = 32
        grpo_prompts_per_step int = 32
        grpo_group_size int = 2
        rl_generation_lag float
        rl_max_inflight_requests int
        rl_submission_granularity = 'B'
        rl_consumption_granularity = 'B'
        rl_durable_rollout_bank flag
        rl_rollout_bank_dir
        rl_rollout_bank_max_bytes int = 0
        grpo_iterations int = 2
        grpo_clamp_eps_lower float = 0.01
        grpo_clamp_eps_upper float = 0.01
        grpo_kl_beta float = 0.001
        grpo_entropy_term_weight float = 0.0
        grpo_filter_groups_with_same_reward flag
        langrl_env_config
        rl_default_temperature float = 1.0
        rl_default_top_p float = 0
        rl_default_top_k int = -1
        rl_offload_optimizer_during_inference flag
        rl_kv_cache_management_mode = 'persist'
        rl_persist_cuda_graphs toggle
        rl_partial_rollouts toggle
        rl_inference_logprobs_is_correction toggle
        rl_importance_sampling_truncation_coef float
        rl_use_sequence_packing toggle
        rl_sequence_packing_max_sequences_per_bin int = 50
        rl_sequence_packing_algo = 'fifo'
        rl_training_cuda_graphs toggle
        rl_inference_tensor_model_parallel_size int
        rl_inference_pipeline_model_parallel_size int
        rl_inference_expert_model_parallel_size int
        rl_inference_expert_tensor_model_parallel_size int
        rl_inference_model_unified_memory_level int = 0
        rl_offload_inference_model_weights_when_idle toggle
        refit_method = 'gloo'
        rl_verify_model_weights_swap toggle
        rl_skip_bos_token toggle
        rl_profile flag
        rl_profile_dir
        rl_inference_parsers strs = []
        grpo_default_temperature float = 1.0
        grpo_default_top_p float = 0
        langrl_inference_server_type = 'inplace_megatron'
        langrl_inference_server_conversation_template
        langrl_external_server toggle
        rl_offload_kv_cache_during_training toggle
        rl_remove_kv_cache_during_training toggle
        rl_reset_cuda_graphs toggle
        rl_calculate_intra_group_similarity toggle
        rl_sequence_packing_bin_size int = 8192
        """,
    ),
    *refused_rows(
        "supervised fine-tuning on conversations",
        """
        sft flag
        sft_tokenizer_prompt_format = 'nemotron-h-aligned'
        chat_template
        """,
    ),
    *refused_rows(
        "splitting saved activations over tensor parallel ranks",
        """
        distribute_saved_activations flag
        """,
    ),
    *refused_rows(
        "recomputation of modules other than core_attn",
        """
        recompute_modules strs = None | ['core_attn']
        """,
    ),
    *refused_rows(
        "optimizer states and activations kept in host memory",
        """
        optimizer_cpu_offload flag
        cpu_offloading_num_layers int = 0
        fine_grained_activation_offloading flag
        offload_modules strs = []
        """,
    ),
    *refused_rows(
        "vision models",
        """
        num_classes int = 1000
        img_h int = 224
        img_w int = 224
        num_channels int = 3
        patch_dim int = 16
        classes_fraction float = 1.0
        data_per_class_fraction float = 1.0
        data_sharding off
        head_lr_mult float = 1.0
        vision_pretraining flag
        vision_pretraining_type = 'classify'
        vision_backbone_type = 'vit'
        swin_backbone_type = 'tiny'
        mask_type = 'random'
        mask_factor float = 1.0
        iter_per_epoch int = 1250
        dino_local_img_size int = 96
        dino_local_crops_number int = 10
        dino_head_hidden_size int = 2048
        dino_bottleneck_size int = 256
        dino_freeze_last_layer float = 1
        dino_norm_last_layer flag
        dino_warmup_teacher_temp float = 0.04
        dino_teacher_temp float = 0.07
        dino_warmup_teacher_temp_epochs int = 30
        """,
    ),
)
