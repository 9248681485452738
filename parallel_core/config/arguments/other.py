"""Rows that belong to no other file: renamed or removed flags, YAML-only names, and other frameworks' extras."""

from __future__ import annotations

from parallel_core.config.argument import REFUSED, Argument, build, ignored_rows, refused_rows

_SPEED = "MindSpeed-Core-MS"


def _field(name: str, kind: str, default: object, feature: str, field: str = "", **rest: object) -> Argument:
    fields = (field or f"parallel_config.{name}",)
    return build(REFUSED, name, kind, default, fields=fields, direct=True, reason=feature, **rest)  # type: ignore[arg-type]


OTHER_ROWS: tuple[Argument, ...] = (
    _field("context_parallel_size", "int", 1, "context parallelism"),
    _field("context_parallel_algo", "str", "megatron_cp_algo", "context parallelism", origin=_SPEED,
           harmless=("ulysses_cp_algo", "hybrid_cp_algo")),
    _field("ulysses_degree_in_cp", "int", 1, "context parallelism", origin=_SPEED),
    _field("expert_model_parallel_size", "int", 1, "mixture of experts"),
    _field("next_tockens", "int", 0, "attention to later positions", "model_config.fa_config.next_tokens",
           origin=_SPEED, aliases=("next_tokens",)),
    *ignored_rows("replicas start equal, and each draws its own dropout anyway", "data_parallel_random_init flag"),
    *ignored_rows("rope has no learned table anyway", "add_position_embedding off --no-position-embedding"),
    *refused_rows("removed from Megatron-LM; write micro_batch_size", "batch_size int"),
    *refused_rows("removed from Megatron-LM; write lr_warmup_fraction or lr_warmup_iters", "warmup int"),
    *refused_rows("removed from Megatron-LM; write tensor_model_parallel_size", "model_parallel_size int"),
    *refused_rows(
        "removed from Megatron-LM; write recompute_activations, or recompute_granularity full with "
        "recompute_method and recompute_num_layers",
        """
        checkpoint_activations flag
        activations_checkpoint_method
        activations_checkpoint_num_layers int
        """,
    ),
    # Names of Megatron-LM's YAML layout that its command line does not have.
    *ignored_rows(
        "set by Megatron-LM itself while it runs",
        """
        timers
        finalize_model_grads_func
        grad_scale_func
        no_sync_func
        grad_sync_func
        param_sync_func
        init_method
        output_layer_init_method
        pipeline_dtype
        autocast_dtype
        enable_autocast toggle
        variable_seq_lengths toggle
        """,
    ),
    *ignored_rows(
        "a choice among kernels that compute the same; here the device decides",
        """
        bias_activation_fusion toggle = True | False
        persist_layer_norm toggle = True | False
        memory_efficient_layer_norm toggle
        tp_comm_atomic_ag toggle
        tp_comm_atomic_rs toggle
        batch_p2p_comm toggle = True | False
        batch_p2p_sync toggle = True | False
        deallocate_pipeline_outputs toggle
        moe_token_dropping toggle
        """,
    ),
    *refused_rows("mixture of experts", "num_moe_experts int\nmoe_router_num_expert_groups int"),
    *refused_rows("optimizer states and activations kept in host memory",
                  "cpu_offloading toggle\ncpu_offloading_activations toggle = True | False\n"
                  "cpu_offloading_weights toggle = True | False"),
    *refused_rows("partial activation checkpoints", "num_microbatches_with_partial_activation_checkpoints int"),
    # MindSpeed, MindSpeed-Core-MS and MindFormers extras that launch scripts and YAML files carry.
    *ignored_rows(
        "a choice among kernels that compute the same; here the device decides",
        """
        use_fused_rmsnorm flag
        use_mc2 flag
        use_fused_ring_attention_update flag
        use_cp_send_recv_overlap flag
        sparse_mode int
        enable_flash_sp flag
        softmax_compute_dtype = 'float32'
        """,
        origin=_SPEED,
    ),
    *ignored_rows("graph compilation is not used", "enable_compile_cache flag\ncompile_cache_path", origin=_SPEED),
    *ignored_rows(
        "activations travel in the compute type and are laid out [sequence, batch, hidden]",
        "recv_dtype\ndata_layout\nresidual_connection_dtype",
        origin=_SPEED,
    ),
    *ignored_rows(
        "without effect in MindSpeed-Core-MS too",
        """
        parallel_position_embedding flag
        use_query_layer flag
        use_visual_encoder flag
        use_retriever flag
        head_skip_weight_param_allocation toggle
        flatten_labels_and_input_mask toggle
        attention_type
        mask_func_type
        bias_init
        model_type
        eval_metric
        best_metric_comparison
        model_customize_staged toggle
        loss_func_type
        """,
        origin=_SPEED,
    ),
    *ignored_rows("the launcher's DDP is the only one", "DDP_impl --DDP-impl"),
    *refused_rows("ZeRO levels by number; write use_distributed_optimizer", "zero_level\nzero_config", origin=_SPEED),
    *refused_rows("LoRA", "use_lora flag\nlora_rank int = 8\nlora_alpha int = 32\nlora_dropout float = 0.0\n"
                  "target_cells", origin=_SPEED),
    *refused_rows("losses other than the mean over tokens", "loss_reduction = 'mean'", origin=_SPEED),
    *refused_rows("runs counted in epochs; write train_iters", "epochs int", origin=_SPEED),
    *refused_rows("models without a final norm", "use_final_norm toggle = True", origin=_SPEED),
    *refused_rows("output layers of another width", "out_hidden_size int", origin=_SPEED),
    *refused_rows("shuffling inside the loader; write dataloader_type", "shuffle flag", origin=_SPEED),
    *refused_rows("MindRecord directories as a source; convert them with tools", "dataset_dir", origin=_SPEED),
    *refused_rows(
        "settings inside dictionaries; write the Megatron argument",
        "grad_clip_kwargs\nlearning_rate_scheduler_kwargs\nweight_decay_kwargs\nno_weight_decay_params",
        origin=_SPEED,
    ),
    *refused_rows("attention masks other than causal", "cp_attention_mask_type = 'causal'", origin=_SPEED),
)
