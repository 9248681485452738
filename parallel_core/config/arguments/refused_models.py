"""Megatron-LM arguments of models and layers that are not built; `argument.parse_rows` explains the lines."""

from __future__ import annotations

from parallel_core.config.argument import Argument, refused_rows

REFUSED_MODEL_ROWS: tuple[Argument, ...] = (
    *refused_rows(
        "FP8 and FP4 arithmetic",
        """
        fp8 --fp8-format
        fp8_recipe = 'delayed'
        fp8_margin int = 0
        fp8_interval int = 1
        fp8_amax_history_len int = 1
        fp8_amax_compute_algo = 'most_recent'
        fp8_wgrad off
        first_last_layers_bf16 flag
        num_layers_at_start_in_bf16 int = 1
        num_layers_at_end_in_bf16 int = 1
        fp4_param_gather flag
        fp8_param_gather flag
        te_precision_config_file
        fp4_param flag --fp4-param-gather
        keep_fp8_transpose_cache_when_using_custom_fsdp flag
        keep_fp8_transpose_cache flag
        kitchen_config_file
        kitchen_recipe_number int
        reuse_grad_buf_for_mxfp8_param_ag flag
        fp8_quantizer_factory
        fp8_output_proj flag
        use_kitchen_attention flag
        kitchen_attention_backend = 'sdpa'
        fp4 --fp4-format
        fp4_recipe = 'nvfp4'
        fp4_quantizer_factory
        moe_router_padding_for_fp8 flag
        """,
    ),
    *refused_rows(
        "encoder-decoder models",
        """
        decoder_seq_length int
        encoder_tensor_model_parallel_size int = 0
        encoder_pipeline_model_parallel_size int = 0
        pipeline_model_parallel_split_rank int
        decoder_num_layers int
        """,
    ),
    *refused_rows(
        "context parallelism",
        """
        hierarchical_context_parallel_sizes ints
        cp_comm_type strs = ['p2p']
        max_seqlen_per_dp_cp_rank int
        hybrid_context_parallel flag
        """,
    ),
    *refused_rows(
        "Mamba, hybrid and linear-attention layers",
        """
        is_hybrid_model flag
        mamba_state_dim int = 128
        mamba_head_dim int = 64
        mamba_num_groups int = 8
        hybrid_layer_pattern
        hybrid_override_pattern
        hybrid_attention_ratio float = 0.0
        hybrid_mlp_ratio float = 0.0
        disable_mamba_mem_eff_path flag
        linear_attention_freq
        inference_dynamic_batching_mamba_memory_ratio float
        inference_dynamic_batching_prefix_caching_mamba_gb float
        mamba_inference_conv_states_dtype = 'bf16'
        mamba_inference_ssm_states_dtype = 'bf16'
        mamba_training_ssm_states_dtype
        experimental_attention_variant
        linear_conv_kernel_dim int = 4
        linear_key_head_dim int = 128
        linear_value_head_dim int = 128
        linear_num_key_heads int = 16
        linear_num_value_heads int = 32
        mamba_num_heads int
        gdp_num_householder int = 3
        use_mamba_mem_eff_path off --disable-mamba-mem-eff-path
        gdp_cutedsl_kernel flag
        gdp_num_chunk_states_to_recompute int = 2
        """,
    ),
    *refused_rows(
        "layer specifications from Python modules",
        """
        spec strs
        """,
    ),
    *refused_rows(
        "layers that differ from each other (heterogeneous models)",
        """
        heterogeneous_layers_config_path
        heterogeneous_layers_config_encoded_json
        """,
    ),
    *refused_rows(
        "mixture of experts",
        """
        moe_routing_trace_path
        moe_routing_trace_max_training_iters int
        moe_routing_trace_capture_logits flag
        moe_routing_trace_capture_hidden_states flag
        moe_routing_trace_dump_weights flag
        expert_tensor_parallel_size int
        moe_shared_expert_intermediate_size int
        moe_shared_expert_overlap flag
        moe_ffn_hidden_size int
        moe_router_topk int = 2
        moe_router_num_groups int
        moe_router_group_topk int
        moe_router_pre_softmax flag
        moe_router_topk_scaling_factor float
        moe_router_score_function = 'softmax'
        moe_router_dtype
        moe_router_enable_expert_bias flag
        moe_router_bias_update_rate float = 0.001
        moe_grouped_gemm flag
        moe_z_loss_coeff float
        moe_input_jitter_eps float
        moe_token_dispatcher_type = 'allgather'
        moe_enable_deepep flag
        moe_expert_capacity_factor float
        moe_pad_expert_input_to_capacity flag
        moe_token_drop_policy = 'probs'
        moe_layer_recompute flag
        moe_permute_fusion flag
        num_experts int
        moe_layer_freq = 1
        moe_use_upcycling flag
        moe_router_load_balancing_type strs = 'aux_loss'
        moe_aux_loss_coeff floats = 0.0
        moe_upcycling_granularity int = 1
        moe_use_legacy_grouped_gemm flag
        moe_extended_tp flag
        expert_tensor_parallel_num_weight_shards int
        overlap_moe_expert_parallel_comm flag
        overlap_dispatch_backward_with_experts_wgrad flag
        ep_overlap_early_attn_memory_release flag
        high_priority_a2a_comm_stream flag
        moe_shared_expert_gate flag
        use_grouped_gemm_for_shared_expert flag
        moe_shared_expert_glu_interleave_size int
        moe_enable_routing_replay flag
        moe_router_padding_for_quantization flag
        moe_router_quantile_balancing_ema float = 0.0
        moe_router_force_load_balancing flag
        moe_router_force_biased float
        use_grouped_gemm_for_dense_mlp flag
        moe_use_grouped_tensor flag
        moe_single_grouped_weight flag
        moe_single_grouped_bias flag
        moe_flex_dispatcher_backend = 'deepep'
        moe_permute_fusion_into_hybridep flag
        moe_hybridep_pad_uneven_dispatch_inputs flag
        moe_pad_experts_for_cuda_graph_inference flag
        moe_router_fusion flag
        moe_apply_probs_on_input flag
        moe_latent_size int
        moe_flex_dispatcher_num_sms int
        moe_deepep_num_sms int = 20
        moe_hybridep_num_sms int
        moe_hybridep_num_blocks_permute int
        moe_hybridep_num_blocks_unpermute int
        moe_hybridep_num_sms_preprocessing int = 108
        moe_ncclep_zero_copy flag
        moe_dispatch_fwd_dtype = 'bf16'
        moe_combine_bwd_dtype = 'bf16'
        moe_mlp_glu_interleave_size int
        moe_expert_rank_capacity_factor float
        moe_paged_stash flag
        moe_paged_stash_page_size int = 64
        moe_paged_stash_buffer_size_factor_cuda float = 1.1
        moe_paged_stash_buffer_size_factor_cpu float = 0.0
        """,
    ),
    *refused_rows(
        "MLA (multi-latent attention)",
        """
        q_lora_rank int
        kv_lora_rank int = 32
        qk_head_dim int = 128
        qk_pos_emb_head_dim int = 64
        v_head_dim int = 128
        cache_mla_latents flag
        mla_down_proj_fusion flag
        multi_latent_attention flag
        """,
    ),
    *refused_rows(
        "multi-token prediction",
        """
        mtp_num_layers int
        mtp_loss_scaling_factor float = 0.1
        mtp_standalone flag
        mtp_use_repeated_layer flag
        mtp_detach_heads flag
        mtp_hsm flag
        mtp_hybrid_override_pattern
        """,
    ),
    *refused_rows(
        "rotary embeddings of several axes, in some layers only, or of multi-latent attention",
        """
        mrope_section ints
        no_rope_freq
        rope_type = None | 'rope'
        """,
    ),
    *refused_rows(
        "relative position embeddings",
        """
        relative_attention_num_buckets int = 32
        relative_attention_max_distance int = 128
        """,
    ),
    *refused_rows(
        "this activation",
        """
        quick_geglu flag
        glu_linear_offset float = 0.0
        activation_func_clamp_value float
        """,
    ),
    *refused_rows(
        "this form of attention",
        """
        softmax_type = 'vanilla'
        qk_l2_norm flag
        qk_clip flag
        qk_clip_alpha float = 0.5
        qk_clip_threshold float = 100
        attention_output_gate flag
        """,
    ),
    *refused_rows(
        "sparse attention (DSA)",
        """
        dsa_indexer_n_heads int
        dsa_indexer_head_dim int
        dsa_indexer_topk int
        dsa_indexer_topk_freq int = 1
        dsa_indexer_skip_topk_offset int = 0
        dsa_indexer_loss_coeff float
        dsa_indexer_use_sparse_loss flag
        dsa_kernel_backend = 'none'
        dsa_indexer_rope_interleaved flag
        dsa_indexer_rotate_activation off
        dsa_indexer_scoring_relu off
        dsa_indexer_k_norm_epsilon float
        dsa_indexer_k_norm_fp32 flag
        """,
    ),
    *refused_rows(
        "maximal update parametrization (muP)",
        """
        use_mup flag
        mup_width_mult float = 1.0
        mup_base_hidden_size int
        mup_embedding_mult float = 1.0
        mup_output_mult float = 1.0
        mup_base_head_dim float
        mup_attn_scale_power float = 1.0
        """,
    ),
    *refused_rows(
        "hyper-connections",
        """
        enable_mhc_connections flag
        mhc_num_residual_streams int = 4
        mhc_sinkhorn_iterations int = 20
        mhc_init_gating_factor float = 0.01
        mhc_recompute_layer_num int
        """,
    ),
)
