"""Megatron-LM arguments without effect here, in groups with the reason; `argument.parse_rows` explains the lines."""

from __future__ import annotations

from parallel_core.config.argument import Argument, ignored_rows

IGNORED_ROWS: tuple[Argument, ...] = (
    *ignored_rows(
        "restarting a failed process is the launcher's business",
        """
        inprocess_restart flag
        inprocess_max_iterations int
        inprocess_monitor_thread_interval float = 1.0
        inprocess_monitor_process_interval float = 1.0
        inprocess_progress_watchdog_interval float = 1.0
        inprocess_heartbeat_interval float = 30
        inprocess_soft_timeout float = 60
        inprocess_hard_timeout float = 90
        inprocess_heartbeat_timeout float = 60
        inprocess_barrier_timeout float = 120
        inprocess_completion_timeout float = 120
        inprocess_last_call_wait float = 1
        inprocess_termination_grace_time float = 1
        inprocess_granularity = 'node'
        inprocess_active_world_size int = 1
        inprocess_empty_cuda_cache flag
        """,
    ),
    *ignored_rows(
        "random streams follow the layout's own rule",
        """
        te_rng_tracker flag
        inference_rng_tracker flag
        """,
    ),
    *ignored_rows(
        "belongs to NVIDIA's cluster scheduler",
        """
        adlr_autoresume flag
        adlr_autoresume_interval int = 1000
        """,
    ),
    *ignored_rows(
        "belongs to non-persistent checkpoints, which are refused themselves",
        """
        non_persistent_global_ckpt_dir
        non_persistent_local_ckpt_dir
        non_persistent_local_ckpt_algo = 'fully_parallel'
        """,
    ),
    *ignored_rows(
        "belongs to Megatron-LM's own checkpoint files; this program's format loads in any layout",
        """
        auto_detect_ckpt_format flag
        ckpt_fully_parallel_save off
        async_strategy = 'nvrx'
        use_persistent_ckpt_worker flag
        async_ckpt_cpu_priority int = 10
        async_ckpt_io_priority int = 3
        async_ckpt_use_cpu_shm flag
        ckpt_fully_parallel_load flag
        ckpt_fully_parallel_load_exchange_algo = 'broadcast'
        ckpt_fully_parallel_load_per_rank_objects flag
        ckpt_fully_parallel_save_process_group = 'dp'
        ckpt_fully_parallel_load_process_group = 'dp'
        ckpt_assume_constant_structure flag
        ckpt_pg_tensors_cache_path
        ckpt_pg_tensors_cache_create flag
        ckpt_load_validate_sharding_integrity off
        dist_ckpt_strictness = 'assume_ok_unexpected'
        dist_ckpt_save_pre_mcore_014 flag
        dist_ckpt_optim_fully_reshardable flag
        distrib_optim_fully_reshardable_mem_efficient flag
        save_tokenizer_assets off
        verify_integrity flag
        use_dist_ckpt_deprecated flag --use-dist-ckpt
        dist_ckpt_format_deprecated --dist-ckpt-format
        dist_ckpt_workers int = 1
        ckpt_fully_parallel_save_deprecated flag --ckpt-fully-parallel-save
        ckpt_drop_redundant_extra_state flag
        use_dist_ckpt flag
        dist_ckpt_format = 'torch_dist'
        """,
    ),
    *ignored_rows(
        "a service that watches runs from outside; training is the same without it",
        """
        config_logger_dir = ''
        enable_one_logger off --no-one-logger
        one_logger_project = 'megatron-lm'
        one_logger_run_name
        one_logger_async flag
        app_tag_run_name
        app_tag_run_version = '0.0.0'
        otel_enabled flag
        otel_service_name
        otel_span_groups
        run_workload_inspector_server flag
        """,
    ),
    *ignored_rows(
        "how data files are read ahead; the samples are the same",
        """
        dataloader_fast_cache_load flag
        dataloader_defer_npy_index_mmap flag
        create_attention_mask_in_dataloader off
        num_dataset_builder_threads int = 1
        mid_level_dataset_surplus float = 0.005
        """,
    ),
    *ignored_rows(
        "object storage is not used; paths are local files",
        """
        object_storage_cache_path
        s3_cache_path
        enable_msc toggle = True | False
        disable_msc_deprecated flag --disable-msc
        """,
    ),
    *ignored_rows(
        "a setting of NCCL, of CUDA streams or of process groups",
        """
        use_ring_exchange_p2p flag
        overlap_p2p_comm_warmup_flush flag --overlap-p2p-communication-warmup-flush
        local_rank int = 0 --local-rank --local_rank
        lazy_mpu_init flag
        nccl_communicator_config_path
        ddp_pad_buckets_for_high_nccl_busbw flag
        suggested_communication_unit_size int
        scatter_gather_tensors_in_pipeline off
        use_gloo_process_groups off --disable-gloo-process-groups
        use_sharp flag
        sharp_enabled_group
        high_priority_stream_groups strs = []
        distributed_timeout_seconds_after_init int
        flight_recorder_dump_path
        flight_recorder_trace_buffer_size int = 2000
        flight_recorder_dump_on_timeout off
        flight_recorder_include_stack_trace flag
        flight_recorder_include_only_active off
        flight_recorder_extra_dump_on_exec off
        use_layer_wise_param_layout off
        nccl_ub flag --use-nccl-ub
        disable_symmetric_registration flag
        fake_process_group flag
        pipeline_model_parallel_comm_backend
        tp_comm_overlap flag
        tp_comm_bulk_wgrad off
        tp_comm_bulk_dgrad off
        tp_comm_overlap_ag off
        tp_comm_overlap_rs off
        tp_comm_overlap_rs_dgrad flag
        tp_comm_split_ag off
        tp_comm_split_rs off
        tp_comm_bootstrap_backend = 'nccl'
        tp_comm_overlap_cfg
        enable_gloo_process_groups off --disable-gloo-process-groups
        async_tensor_model_parallel_allreduce off
        """,
    ),
    *ignored_rows(
        "when gradients or weights travel; the sums are the same",
        """
        defer_embedding_wgrad_compute flag
        wgrad_deferral_limit int = 0
        align_grad_reduce off
        ddp_num_buckets int
        overlap_param_gather_with_optimizer_step flag
        align_param_gather off
        gradient_reduce_div_fusion off
        delay_param_gather flag
        ddp_reduce_scatter_with_fp32_accumulation flag
        ddp_param_name_patterns_for_fp32_local_accumulation strs = []
        delay_wgrad_compute flag
        """,
    ),
    *ignored_rows(
        "first weights do not depend on the device or the layout",
        """
        init_model_with_meta_device flag
        use_cpu_initialization flag
        """,
    ),
    *ignored_rows(
        "copies of checkpoints on other nodes are not made",
        """
        replication flag
        replication_jump int
        replication_factor int = 2
        """,
    ),
    *ignored_rows(
        "a choice among kernels that compute the same; here the device decides",
        """
        disable_jit_fuser flag
        disable_bf16_reduced_precision_matmul flag
        onnx_safe
        cross_entropy_loss_fusion flag
        cross_entropy_fusion_impl = 'native'
        clone_scatter_output_in_embedding off
        masked_softmax_fusion off
        bias_dropout_fusion off
        no_persist_layer_norm flag
        gradient_accumulation_fusion off
        flash_attention_version int
        use_fused_weighted_squared_relu flag
        fused_residual_rmsnorm flag
        use_transformer_engine_op_fuser flag
        batch_invariant_mode flag
        batch_invariant_backend = 'te_native'
        use_te_activation_func flag
        mlp_chunks_for_training int = 1
        """,
    ),
    *ignored_rows(
        "there is one implementation here",
        """
        enable_experimental flag
        deprecated_use_mcore_models flag --use-mcore-models
        use_legacy_models flag
        """,
    ),
    *ignored_rows(
        "NVIDIA's fault-tolerance launcher is not used; a failed rank ends the job",
        """
        enable_ft_package flag
        calc_ft_timeouts flag
        ft_num_warmup_iters int = 5
        """,
    ),
    *ignored_rows(
        "CUDA graphs only save launch time",
        """
        enable_cuda_graph flag
        cuda_graph_warmup_steps int = 3
        cuda_graph_scope_deprecated strs --cuda-graph-scope
        optimizer_cuda_graph flag
        cuda_graph_impl = 'none'
        """,
    ),
    *ignored_rows(
        "the log has fixed contents; training is the same",
        """
        log_params_norm flag
        log_progress flag
        timing_log_level int = 0
        timing_log_option = 'minmax'
        log_memory_interval int
        log_device_memory_used flag
        log_num_zeros_in_grad flag
        log_max_attention_logit flag
        barrier_with_L1_time off --no-barrier-with-level-1-timing
        logging_level int
        log_energy flag
        moe_per_layer_logging flag
        """,
    ),
    *ignored_rows(
        "no TensorBoard or Weights & Biases writer; the log lines have the numbers",
        """
        tensorboard_log_interval int = 1
        tensorboard_queue_size int = 1000
        log_timers_to_tensorboard flag
        log_loss_scale_to_tensorboard off
        log_validation_ppl_to_tensorboard flag
        log_memory_to_tensorboard flag
        log_world_size_to_tensorboard flag
        wandb_project = ''
        wandb_exp_name = ''
        wandb_save_dir = ''
        wandb_entity = ''
        log_batch_size_to_tensorboard flag
        log_learning_rate_to_tensorboard off --no-log-learnig-rate-to-tensorboard
        tensorboard_dir
        """,
    ),
    *ignored_rows(
        "PyTorch's profiler; use --profile with the profile-* arguments of this program",
        """
        pytorch_profiler_collect_shapes flag
        pytorch_profiler_collect_callstack flag
        pytorch_profiler_collect_chakra flag
        record_shapes flag
        nvtx_ranges flag
        use_pytorch_profiler flag
        profile_ranks ints = [0] | []
        record_memory_history flag
        memory_snapshot_path = 'snapshot.pickle'
        """,
    ),
    *ignored_rows(
        "results are not recomputed to find hardware faults; training is the same",
        """
        rerun_mode = 'disabled' | 'validate_results'
        check_weight_hash_across_dp_replicas_interval int
        gpu_sniff_test_interval int
        check_for_large_grads flag
        result_rejected_tracker_filename
        check_for_spiky_loss flag
        """,
    ),
    *ignored_rows(
        "straggling GPUs are not measured",
        """
        log_straggler flag
        straggler_ctrlr_port int = 65535
        straggler_minmax_count int = 1
        disable_straggler_on_startup flag
        """,
    ),
    *ignored_rows(
        "no code is fetched from anywhere",
        """
        trust_remote_code flag
        """,
    ),
    *ignored_rows(
        "tokenizers are read by this program's own code",
        """
        use_gigatoken flag
        """,
    ),
    *ignored_rows(
        "Hugging Face tokenizers are the fast ones",
        """
        tokenizer_hf_use_fast flag
        """,
    ),
    *ignored_rows(
        "training reads token ids; tools/preprocess_data.py, which makes them, has these",
        """
        tokenizer_hf_include_special_tokens flag
        tokenizer_hf_no_include_special_tokens flag
        """,
    ),
    *ignored_rows(
        "it lets special_tokens be added to a SentencePiece model, and those are refused; ids are the same without it",
        """
        tokenizer_sentencepiece_legacy flag
        """,
    ),
    *ignored_rows(
        "memory and garbage collection of the process; training is the same",
        """
        empty_unused_memory_level int = 0
        train_sync_interval int
        manual_gc flag
        manual_gc_interval int = 0
        manual_gc_eval off
        """,
    ),
    *ignored_rows(
        "SIGTERM and SIGINT always end the run after a checkpoint",
        """
        exit_signal_handler flag
        exit_signal = 'SIGTERM'
        exit_signal_handler_for_dataloader flag
        exit_signal_handler_for_training flag
        """,
    ),
    *ignored_rows(
        "belongs to keeping states or activations in host memory, which is refused itself",
        """
        optimizer_offload_fraction float = 1.0
        use_torch_optimizer_for_cpu_offload flag
        overlap_cpu_optimizer_d2h_h2d flag
        pin_cpu_grads off
        pin_cpu_params off
        cpu_offloading_retain_pinned_cpu_buffers flag
        min_offloaded_tensor_size int = 1048576
        delay_offload_until_cuda_graph flag
        delta_offload_bytes_across_pp_ranks int = 0
        activation_offload_fraction float = 1.0
        fine_grained_offloading_max_inflight_offloads int
        """,
    ),
    *ignored_rows(
        "prints or tests something in Megatron-LM only",
        """
        dump_param_to_param_group_map
        test_mode flag
        """,
    ),
)
