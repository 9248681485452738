"""The configuration tree: five frozen sections, one value each for everything the program can be told.

Field names are the ones the five mapping tables of the MindSpeed-Core-MS pretraining guide give; the Megatron name of
each stands in `arguments/*.txt`. Values here are resolved: what Megatron derives (ffn size, kv channels, ...) is
filled in by `__post_init__`, where 0, an empty string or None means "derive it". Rules across fields live in
`checks.py`, so that all violations can be reported together.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from parallel_core.config.bert import BertConfig
from parallel_core.config.diagnosis import DiagnosisConfig
from parallel_core.config.experts import MoEConfig
from parallel_core.config.latent_attention import TRAINED_LENGTH, MLAConfig
from parallel_core.config.lora import LoraConfig
from parallel_core.config.multi_token import MTPConfig
from parallel_core.layout import derived
from parallel_core.layout.derived import ROTARY


def _follows() -> Any:
    """Return the default of a switch whose value follows from other fields unless it is given."""
    return field(default=None)

UNLIMITED = 2**31 - 1
"""A window that hides nothing."""
GATED = ("swiglu", "geglu", "geglu_tanh")
"""Activations whose first linear has two halves, gate and up."""


def _fill(section: object, **derived: object) -> None:
    for name, value in derived.items():
        object.__setattr__(section, name, value)


@dataclass(frozen=True, kw_only=True)
class FlashAttentionConfig:
    """Window and tensor layout of the fused attention kernel (Ascend `flash_attention_score`)."""

    pre_tokens: int = UNLIMITED
    """How many positions before its own a query sees, whichever kernel computes it."""
    next_tokens: int = 0
    """How many positions after its own a query sees: 0, causal."""
    input_layout: str = "SBH"
    """Order of the tensor axes handed to the kernel: SBH or BNSD."""


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The model: sizes, positions, norms, activations, precision and recomputation."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    vocab_size: int
    """Rows of the word embedding, padding included (Megatron's padded_vocab_size)."""
    seq_length: int
    max_position_embeddings: int = 0
    """Rows of the learned position embedding; 0: seq_length."""
    ffn_hidden_size: int = 0
    """Width of the MLP; 0: 4 x hidden_size, or for swiglu two thirds of it rounded down to a multiple of 64."""
    kv_channels: int = 0
    """Size of one attention head; 0: hidden_size / num_attention_heads. Multi-latent attention: of a query or key."""
    group_query_attention: bool = False
    num_query_groups: int = 0
    """Number of key/value heads; 0: num_attention_heads (or 1 with group_query_attention, as in Megatron)."""
    position_embedding_type: str = "learned_absolute"
    """learned_absolute, rope, yarn (rotary with YaRN's frequencies) or none."""
    rotary_base: float = 10000.0
    rotary_percent: float = 1.0
    rotary_interleaved: bool = False
    rotary_seq_len_interpolation_factor: float = 1.0
    use_rope_scaling: bool = False
    """Llama 3.1's frequencies: the slow ones are divided by rope_scaling_factor."""
    rope_scaling_factor: float = 8.0
    rope_low_freq_factor: float = 1.0
    """Frequencies with fewer turns than this in the first training's positions are slow (use_rope_scaling)."""
    rope_high_freq_factor: float = 4.0
    """Frequencies with more turns than this are fast, and kept; between the two they are blended."""
    rope_dynamic_factor: float = 1.0
    """Dynamic NTK: sequences longer than the first training's raise rotary_base with this factor; 1: off."""
    rope_original_max_position_embeddings: int = 0
    """Positions of the first training, from which scaled frequencies count; 0: 8192 with use_rope_scaling, with YaRN
    and dynamic scaling max_position_embeddings."""
    yarn_rotary_scaling_factor: float = 1.0
    """YaRN: divisor of slow frequencies."""
    yarn_beta_fast: float = 32.0
    """YaRN: frequencies with more turns than this in the first training's positions are kept."""
    yarn_beta_slow: float = 1.0
    """YaRN: frequencies with fewer turns than this are divided by the factor."""
    yarn_correction_range_round_to_int: bool = True
    """YaRN: the blend begins and ends at whole channels."""
    yarn_mscale: float = 0.0
    """YaRN: with yarn_mscale_all_dim, cosines and sines are multiplied by (0.1 yarn_mscale ln(factor) + 1) / (the same
    of yarn_mscale_all_dim); where one is 0, by 0.1 ln(factor) + 1."""
    yarn_mscale_all_dim: float = 0.0
    yarn_attention_factor: float = 0.0
    """YaRN: what cosines and sines are multiplied by, instead; 0: as yarn_mscale says."""
    normalization: str = "LayerNorm"
    """LayerNorm or RMSNorm."""
    norm_epsilon: float = 1e-5
    apply_layernorm_1p: bool = False
    """The norm's stored weight is its scale minus one."""
    qk_layernorm: bool = False
    hidden_act: str = ""
    """gelu (erf), gelu_tanh (Megatron's fused bias-GELU), swiglu, geglu, geglu_tanh (gated by GELU), squared_relu,
    openai_gelu, fast_gelu (x sigmoid(1.702 x)), silu or relu; empty: gelu_tanh with add_bias_linear, else and of an
    encoder gelu."""
    add_bias_linear: bool = True
    """Biases in the MLP's linears."""
    qkv_has_bias: bool = _follows()
    """None: add_bias_linear."""
    out_proj_has_bias: bool = _follows()
    """None: add_bias_linear."""
    untie_embeddings_and_output_weights: bool = False
    use_sandwich_norm: bool = False
    attn_post_norm_scale: float = 1.0
    """Initial weight of the norm after attention (sandwich norm)."""
    ffn_post_norm_scale: float = 1.0
    """Initial weight of the norm after the MLP (sandwich norm)."""
    apply_residual_connection_post_layernorm: bool = False
    parallel_residual: bool = False
    """Attention and MLP both read the layer's input, and both are added to it."""
    embedding_multiplier: float = 1.0
    """Word embeddings are multiplied by this before the first layer."""
    num_labels: int = 0
    """Classes of a head for whole texts, which stands in place of the output layer; 0: words are predicted."""
    top_query_layer: str = "none"
    """PanGu-alpha's query layer as the last of num_layers: none, or with the final norm before it (norm_before) or
    after it (norm_after)."""
    fp32_residual_connection: bool = False
    attention_dropout_rate: float = 0.1
    hidden_dropout_rate: float = 0.1
    attention_softmax_in_fp32: bool = False
    apply_query_key_layer_scaling: bool = False
    softmax_scale: float = 0.0
    """Factor of the attention scores; 0: 1 / sqrt(kv_channels)."""
    scale_attn_by_inverse_layer_idx: bool = False
    """Attention scores are divided by the layer's number, from 1."""
    window_attn_skip_freq: tuple[int, ...] = ()
    """For every layer 1 where the window of fa_config.pre_tokens applies, 0 where it does not; empty: in all."""
    fp16_lm_cross_entropy: bool = False
    label_smoothing: float = 0.0
    init_method_std: float = 0.02
    embedding_init_std: float = 0.0
    """Standard deviation of the embeddings' initial values; 0: init_method_std."""
    init_method_xavier_uniform: bool = False
    params_dtype: str = "float32"
    compute_dtype: str = "float32"
    """Type of activations and of matrix products; on CPU activations are float32 whatever this says."""
    embedding_init_dtype: str = ""
    """Type in which the embedding tables are kept; empty: params_dtype."""
    fp32_matmul_precision: str = "highest"
    """Products of float32 tensors: highest, or high, of operands rounded to bfloat16 where the CPU is faster at it."""
    kernels: str = "auto"
    """local: plain MindSpore operators only; auto: fused kernels where this device has them."""
    use_flash_attention: bool = True
    fa_config: FlashAttentionConfig = field(default_factory=FlashAttentionConfig)
    apply_swiglu_fusion: bool = True
    apply_rope_fusion: bool = True
    apply_rmsnorm_fusion: bool = True
    mla: MLAConfig = field(default_factory=MLAConfig)
    """Multi-latent attention."""
    moe: MoEConfig = field(default_factory=MoEConfig)
    """Experts in place of the MLP."""
    mtp: MTPConfig = field(default_factory=MTPConfig)
    """Multi-token prediction."""
    bert: BertConfig = field(default_factory=BertConfig)
    """Encoders."""
    recompute_granularity: str = "none"
    """none, selective (core attention) or full (whole layers)."""
    recompute_method: str = "none"
    """For full: uniform (every recompute_num_layers layers one segment) or block (only the first ones)."""
    recompute_num_layers: int = 0
    recompute_modules: tuple[str, ...] = ("core_attn",)
    """For selective: the parts of each layer that are computed again, of core_attn, mlp, mla_up_proj, moe, moe_act,
    shared_experts."""

    def __post_init__(self) -> None:
        has_bias = self.add_bias_linear
        if self.mla.multi_latent_attention:
            _fill(self, kv_channels=self.mla.head_size, qkv_has_bias=False)
            _fill(self, mla=dataclasses.replace(self.mla, rope_type=self.mla.rope_type or "yarn"))
            _fill(self, yarn_mscale=self.yarn_mscale or float(self.has_yarn))
        fusable = derived.rotary_fusion_applies(self.position_embedding_type, self.rotary_interleaved)
        _fill(
            self,
            max_position_embeddings=self.max_position_embeddings or self.seq_length,
            ffn_hidden_size=self.ffn_hidden_size or derived.feed_forward_width(self.hidden_size, self.is_gated),
            kv_channels=self.kv_channels or derived.head_size(self.hidden_size, self.num_attention_heads),
            num_query_groups=derived.key_value_heads(
                self.num_attention_heads, self.num_query_groups, self.group_query_attention
            ),
            hidden_act=self.hidden_act or derived.default_activation(has_bias, not self.bert.is_encoder),
            qkv_has_bias=has_bias if self.qkv_has_bias is None else self.qkv_has_bias,
            out_proj_has_bias=has_bias if self.out_proj_has_bias is None else self.out_proj_has_bias,
            apply_rope_fusion=self.apply_rope_fusion and fusable,
            attention_softmax_in_fp32=self.attention_softmax_in_fp32 or self.apply_query_key_layer_scaling,
            rope_original_max_position_embeddings=self.rope_original_max_position_embeddings
            or self._default_trained_length(),
            window_attn_skip_freq=() if all(self.window_attn_skip_freq) else tuple(self.window_attn_skip_freq),
            embedding_init_std=self.embedding_init_std or self.init_method_std,
            embedding_init_dtype=self.embedding_init_dtype or self.params_dtype,
        )
        if self.moe.num_experts and not self.moe.moe_ffn_hidden_size:
            _fill(self, moe=dataclasses.replace(self.moe, moe_ffn_hidden_size=self.ffn_hidden_size))
        if self.moe.num_experts and not self.moe.moe_layer_freq and self.top_query_layer != "none":
            pattern = derived.layers_below_query(self.num_layers)
            _fill(self, moe=dataclasses.replace(self.moe, moe_layer_freq=pattern))

    def _default_trained_length(self) -> int:
        if self.use_rope_scaling:
            return 8192
        if self.mla.multi_latent_attention:
            return TRAINED_LENGTH if self.has_yarn else 0
        scaled = self.position_embedding_type == "yarn" or self.rope_dynamic_factor != 1.0
        return (self.max_position_embeddings or self.seq_length) if scaled else 0

    @property
    def is_gated(self) -> bool:
        """Whether the MLP's first linear has two halves, gate and up."""
        return self.hidden_act in GATED

    @property
    def is_rotary(self) -> bool:
        """Whether positions enter by turning queries and keys."""
        return self.position_embedding_type in ROTARY

    def recomputes(self, module: str) -> bool:
        """Tell whether a part of a layer is computed again by itself in backward; within another one that is, not."""
        chosen = self.recompute_modules if self.recompute_granularity == "selective" else ()
        all_of_it = "moe" in chosen or self.moe.moe_layer_recompute
        if module in ("moe_act", "shared_experts"):
            return module in chosen and not all_of_it
        return all_of_it if module == "moe" else module in chosen

    @property
    def has_yarn(self) -> bool:
        """Whether the frequencies of rotary positions are YaRN's."""
        latent = self.mla.multi_latent_attention and self.is_rotary
        return self.mla.rope_type == "yarn" if latent else self.position_embedding_type == "yarn"

    @property
    def rotary_channels(self) -> int:
        """How many channels of a head turn with the position."""
        if self.mla.multi_latent_attention:
            return self.mla.qk_pos_emb_head_dim
        return int(self.kv_channels * self.rotary_percent)

    @property
    def attention_scale(self) -> float:
        """Factor of the attention scores; in multi-latent attention YaRN's concentration is in it."""
        scale = self.softmax_scale or 1.0 / math.sqrt(self.kv_channels)
        if self.mla.multi_latent_attention and not self.softmax_scale:
            scale *= derived.yarn_concentration(self.yarn_rotary_scaling_factor, self.yarn_mscale_all_dim) ** 2
        return scale

    @property
    def shares_word_embeddings(self) -> bool:
        """Whether the last stage uses the word embeddings too: as output layer, or to predict further tokens."""
        if not self.predicts_words:
            return False
        return not self.untie_embeddings_and_output_weights or self.mtp.mtp_num_layers > 0

    @property
    def predicts_words(self) -> bool:
        """Whether there is an output layer over the vocabulary."""
        return not self.num_labels and (not self.bert.is_encoder or self.bert.predicts_words)

    def layer_name(self, layer_number: int) -> str:
        """Return the global name of a layer; those that follow the model's last one predict further tokens."""
        beyond = layer_number - self.num_layers
        return f"decoder.layers.{layer_number}" if beyond < 0 else f"mtp.layers.{beyond}.transformer_layer"

    def window_of(self, layer_number: int) -> int:
        """Return how many positions before its own a query of a layer (from 0; beyond the last as there) sees."""
        windowed = not self.window_attn_skip_freq or self.window_attn_skip_freq[min(layer_number, self.num_layers - 1)]
        return self.fa_config.pre_tokens if windowed else UNLIMITED


@dataclass(frozen=True, kw_only=True)
class ModelParallelConfig:
    """The layout: how many ways each axis is cut, and which layers go where."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    cp_comm_type: tuple[str, ...] = ("p2p",)
    """How attention sees the keys of other context parallel ranks: p2p, all_gather, a2a or a2a+p2p; one word for all
    layers, or one for each."""
    hierarchical_context_parallel_sizes: tuple[int, ...] = ()
    """For a2a+p2p: ranks that exchange heads, ranks of a ring; their product is context_parallel_size."""
    expert_model_parallel_size: int = 1
    """Ranks that share the experts of a layer."""
    expert_tensor_parallel_size: int = 0
    """Ranks that share each expert; 0: tensor_model_parallel_size."""
    virtual_pipeline_model_parallel_size: int = 0
    """Model chunks on each pipeline rank; 0: as num_layer_list or num_layers_per_virtual_pipeline_stage say, else 1."""
    num_layers_per_virtual_pipeline_stage: int = 0
    """0: follows from the other sizes."""
    microbatch_group_size_per_virtual_pipeline_stage: int = 0
    """Microbatches run on one chunk before the next; 0: pipeline_model_parallel_size."""
    micro_batch_interleave_num: int = 1
    """Parts of each microbatch: layers compute one while the tensor parallel sum of another is under way."""
    pipeline_schedule: str = "auto"
    """The order of passes: 1f1b, interleaved, zero-bubble; auto is 1f1b, interleaved with several chunks on a rank."""
    sequence_parallel: bool = False
    num_layer_list: tuple[tuple[int, ...], ...] = ()
    """Layers of [pipeline rank][chunk]; empty: an even split."""
    decoder_first_pipeline_num_layers: int = 0
    decoder_last_pipeline_num_layers: int = 0
    account_for_embedding_in_pipeline_split: bool = False
    account_for_loss_in_pipeline_split: bool = False
    standalone_embedding_stage: bool = False
    """The first stage holds the embedding and no layer."""
    noop_layers: tuple[int, ...] = ()
    """Global numbers of layers that do nothing; they count in num_layers."""
    overlap_p2p_comm: bool = True
    """Wait for a received activation when it is used, not when it is announced."""
    recompute: tuple[tuple[int, ...], ...] = ()
    """Fully recomputed leading layers of [pipeline rank][chunk]; empty: as recompute_granularity says."""
    select_recompute: tuple[tuple[int, ...], ...] = ()
    """Leading layers of [pipeline rank][chunk] whose core attention is recomputed."""
    select_comm_recompute: tuple[tuple[int, ...], ...] = ()
    """Leading layers of [pipeline rank][chunk] whose sequence-parallel all-gather is repeated in backward."""
    distributed_backend: str = "auto"
    """auto, shm (shared memory, ranks of one host), mccl or hccl."""
    distributed_timeout_minutes: float = 10.0

    def __post_init__(self) -> None:
        _fill(self, sequence_parallel=self.sequence_parallel and self.tensor_model_parallel_size > 1)
        if not self.virtual_pipeline_model_parallel_size:
            _fill(self, virtual_pipeline_model_parallel_size=len(self.num_layer_list[0]) if self.num_layer_list else 1)

    @property
    def expert_tensor_size(self) -> int:
        """Ranks that share each expert."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """The data: files, batch sizes, tokenizer and masks."""

    batch_size: int = 1
    """Samples in one microbatch (Megatron's micro_batch_size)."""
    global_batch_size: int = 0
    """Samples in one iteration over all ranks; 0: batch_size x data parallel size x micro_batch_num."""
    micro_batch_num: int = 1
    """Microbatches of each data parallel rank in one iteration."""
    rampup_batch_size: tuple[int, ...] = ()
    """(start, increment, samples) of the batch-size ramp-up; empty: none."""
    data_path: tuple[str, ...] = ()
    """One prefix, or weights and prefixes in turn; empty with no other source: the bundled corpus."""
    mask_prob: float = 0.15
    """Share of an encoder's tokens that are asked for."""
    short_seq_prob: float = 0.1
    """Share of an encoder's samples that are cut short at random."""
    doc_stride: int = 128
    """Question answering: pieces between the beginnings of two windows over a context."""
    max_query_length: int = 64
    """Question answering: pieces of a question that are kept."""
    train_data_path: tuple[str, ...] = ()
    valid_data_path: tuple[str, ...] = ()
    test_data_path: tuple[str, ...] = ()
    data_args_path: str = ""
    split: str = "969, 30, 1"
    data_cache_path: str = ""
    mock_data: bool = False
    mmap_bin_files: bool = True
    dataloader_type: str = "single"
    num_workers: int = 2
    drop_remainder: bool = True
    reset_position_ids: bool = False
    reset_attention_mask: bool = False
    eod_mask_loss: bool = False
    eos_token_id: int = -1
    """End-of-document token; -1: the tokenizer's."""
    pad_token_id: int = -1
    """Padding token, left out of the loss; -1: the tokenizer's, where it has one of its own."""
    tokenizer_type: str = ""
    tokenizer_model: str = ""
    legacy_tokenizer: bool = False
    """Megatron's legacy tokenizer classes: SentencePieceTokenizer with special tokens of its own."""
    vocab_extra_ids: int = 0
    """Tokens <extra_id_i> added to a legacy SentencePieceTokenizer's vocabulary."""
    vocab_file: str = ""
    merge_file: str = ""
    unpadded_vocab_size: int = 0
    """Vocabulary of the tokenizer before padding (Megatron's vocab_size); 0: what the tokenizer has."""
    make_vocab_size_divisible_by: int = 128
    sft: bool = False
    """Data are conversations: each is a document of its own, and the loss is on the assistant's tokens."""
    sft_tokenizer_prompt_format: str = "default"
    """Name of the template that writes conversations; default: the tokenizer's own."""
    chat_template: str = ""
    """File of a template, in place of the tokenizer's own."""

    def __post_init__(self) -> None:
        if self.sft:  # packed conversations do not see each other
            _fill(self, reset_attention_mask=True, reset_position_ids=True)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer and its schedules."""

    optimizer_type: str = "adam"
    learning_rate: float = 1e-4
    min_lr: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    sgd_momentum: float = 0.9
    weight_decay: float = 0.01
    start_weight_decay: float = -1.0
    """-1: weight_decay."""
    end_weight_decay: float = -1.0
    """-1: weight_decay."""
    weight_decay_incr_style: str = "constant"
    clip_grad: float = 1.0
    """Largest global gradient norm; 0: no clipping."""
    adam_bias_correction: bool = True
    """Off: Adam's moments are used as they are, small at first."""
    lr_decay_style: str = "linear"
    """constant, linear, cosine, cosine-from-zero (counted from the first sample, not from the end of the warm-up),
    inverse-square-root or WSD."""
    lr_wsd_decay_style: str = "exponential"
    lr_decay_iters: int = 0
    """0: train_iters."""
    lr_decay_samples: int = 0
    lr_wsd_decay_iters: int = 0
    lr_wsd_decay_samples: int = 0
    lr_warmup_iters: int = 0
    lr_warmup_samples: int = 0
    lr_warmup_fraction: float = 0.0
    """Share of the decay length that is warm-up; 0: use the counts."""
    lr_warmup_init: float = 0.0
    decoupled_lr: float = 0.0
    """Learning rate of the embedding and the output layer; 0: learning_rate."""
    decoupled_min_lr: float = -1.0
    """-1: min_lr."""
    use_checkpoint_opt_param_scheduler: bool = False
    override_opt_param_scheduler: bool = False
    overlap_param_gather: bool = False

    def __post_init__(self) -> None:
        given = (None if value < 0 else value for value in (self.start_weight_decay, self.end_weight_decay))
        start, end = derived.weight_decay_range(self.weight_decay, *given)
        _fill(
            self,
            start_weight_decay=start,
            end_weight_decay=end,
            decoupled_min_lr=self.min_lr if self.decoupled_min_lr < 0 else self.decoupled_min_lr,
        )


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """What the MindSpore profiler records, and when."""

    enabled: bool = False
    save_path: str = ""
    """Empty: `profile` under output_dir, or under the log directory without one."""
    step_start: int = 10
    """First recorded step."""
    step_end: int = 12
    """Last recorded step."""
    level: str = "level0"
    with_stack: bool = False
    memory: bool = False
    framework: str = "all"
    """Host activities: all, time (without memory) or none."""
    communication: bool = False
    """Communication operators in detail: raises level0 to level1."""
    parallel_strategy: bool = False
    aicore_metrics: int = 0
    l2_cache: bool = False
    hbm_ddr: bool = False
    pcie: bool = False
    data_process: bool = False
    data_simplification: bool = True
    op_time: bool = True
    """Operator times of the device."""
    offline_analyse: bool = False
    """Keep the raw records, to be analysed later."""
    dynamic_profiler_config_path: str = ""
    """Directory whose profiler_config.json starts and stops profiles while the run goes on."""


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """What a run tells of itself beside loss, learning rate and speed, and whom."""

    log_params_norm: bool = False
    log_num_zeros_in_grad: bool = False
    timing_log_level: int = 0
    """0: no timers, 1: the parts of an iteration, 2: also what happens within them."""
    timing_log_option: str = "minmax"
    """max, minmax or all: which ranks' times the log shows."""
    barrier_with_L1_time: bool = True  # noqa: N815 - Megatron-LM's word
    """All ranks begin a timed part of the iteration together."""
    tensorboard_dir: str = ""
    tensorboard_log_interval: int = 1
    tensorboard_queue_size: int = 1000
    log_timers_to_tensorboard: bool = False
    log_loss_scale_to_tensorboard: bool = True
    log_learning_rate_to_tensorboard: bool = True
    log_validation_ppl_to_tensorboard: bool = False
    log_memory_to_tensorboard: bool = False
    log_world_size_to_tensorboard: bool = False
    wandb_project: str = ""
    wandb_exp_name: str = ""
    wandb_save_dir: str = ""
    wandb_entity: str = ""
    mlflow_experiment: str = ""
    mlflow_run_name: str = ""
    mlflow_tracking_uri: str = ""
    """Server or folder; empty: what MLFLOW_TRACKING_URI says."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The run: length, precision of updates, data parallelism, checkpoints, logging."""

    seed: int = 1234
    training_iters: int = 0
    train_samples: int = 0
    log_interval: int = 100
    eval_interval: int = 1000
    eval_iters: int = 100
    save_interval: int = 0
    """Iterations between checkpoints; 0: only at the end, when there is an output_dir."""
    exit_interval: int = 0
    elastic: bool = False
    """The launcher starts a job again with fewer nodes, in a layout that fits."""
    exit_duration_in_mins: float = 0.0
    skip_train: bool = False
    bf16: bool = False
    fp16: bool = False
    loss_scale: float = 0.0
    """Static loss scale; 0: dynamic for float16, 1 otherwise."""
    loss_scale_value: float = 2.0**32
    """First dynamic loss scale."""
    min_loss_scale: float = 1.0
    loss_scale_window: int = 1000
    """Overflow-free updates after which the dynamic scale doubles."""
    hysteresis: int = 2
    """Overflows tolerated before the dynamic scale halves."""
    calculate_per_token_loss: bool = False
    check_for_nan_in_loss_and_grad: bool = True
    wrap_with_ddp: bool = True
    bucket_size: int = 0
    """Elements in one gradient bucket; 0: max(40e6, 1e6 x data parallel size) with overlap, else one bucket."""
    enable_mem_align: bool = True
    """With the distributed optimizer, parameters start at 512-byte boundaries; off: at every 64th element."""
    overlap_grad_reduce: bool = False
    delay_grad_reduce: bool = False
    accumulate_allreduce_grads_in_fp32: bool = _follows()
    """Gradients of 16-bit parameters are summed in float32; None: with bf16."""
    average_in_collective: bool = False
    use_distributed_optimizer: bool = False
    output_dir: str = ""
    """Where checkpoints go (Megatron's --save); empty: none are written."""
    load_checkpoint: str = ""
    exit_on_missing_checkpoint: bool = False
    """A load_checkpoint that holds none yet is an error; off: the run starts from random weights."""
    ckpt_step: int = 0
    """Iteration to load; 0: the latest."""
    ckpt_format: str = "safetensors"
    prefix: str = "network"
    """First part of checkpoint file names."""
    keep_checkpoint_max: int = 5
    async_save: bool = False
    crc_check: bool = True
    resume_training: bool = True
    """Go on with the loaded run; off: take its weights, as finetune."""
    finetune: bool = False
    no_load_optim: bool = False
    no_load_rng: bool = False
    no_save_optim: bool = False
    no_save_rng: bool = False
    new_dataset: bool = False
    log_dir: str = "msrun_log"
    log_throughput: bool = False
    """Report TFLOP/s of each device, by the model's formula."""
    print_schedule: bool = False
    time_startup: bool = False
    """Say where the seconds from the command to the first step went."""
    deterministic_mode: bool = False
    max_device_memory: str = ""
    """What MindSpore takes of an NPU's memory at most, such as 58GB; empty: all of it."""
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    diagnosis: DiagnosisConfig = field(default_factory=DiagnosisConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        handles_overflow = self.fp16 and not self.loss_scale  # A NaN is an overflow then, and the step is skipped.
        _fill(self, check_for_nan_in_loss_and_grad=self.check_for_nan_in_loss_and_grad and not handles_overflow)
        if self.bf16 and self.accumulate_allreduce_grads_in_fp32 is None:
            _fill(self, accumulate_allreduce_grads_in_fp32=True)



@dataclass(frozen=True, kw_only=True)
class AllConfig:
    """Everything one run is told."""

    model_config: TransformerConfig
    parallel_config: ModelParallelConfig = field(default_factory=ModelParallelConfig)
    training_config: TrainingConfig = field(default_factory=TrainingConfig)
    dataset_config: DatasetConfig = field(default_factory=DatasetConfig)
    optimizer_config: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        """Fill in what follows from fields of several sections.

        Raises:
            ConfigError: the layers are not a whole number of the chunks that the layout asks for.
        """
        for name, filled in (("training_config", self._training()), ("parallel_config", self._parallel())):
            if filled != getattr(self, name):
                _fill(self, **{name: filled})

    def _training(self) -> TrainingConfig:
        """Return the run's section with the flag of a 16-bit type, and the iterations of a run counted in samples."""
        training, data = self.training_config, self.dataset_config
        computes_in = self.model_config.compute_dtype
        training = dataclasses.replace(
            training, bf16=training.bf16 or computes_in == "bfloat16", fp16=training.fp16 or computes_in == "float16"
        )
        if training.accumulate_allreduce_grads_in_fp32 is None:  # only now is it known that bfloat16 is not in play
            training = dataclasses.replace(training, accumulate_allreduce_grads_in_fp32=False)
        if training.train_samples and not training.training_iters and data.global_batch_size:
            sizes = derived.BatchSizes(data.global_batch_size, 1, 1, data.rampup_batch_size)
            training = dataclasses.replace(training, training_iters=sizes.iterations_of(training.train_samples))
        return training

    def _parallel(self) -> ModelParallelConfig:
        """Return the layout's section with the chunks that `num_layers_per_virtual_pipeline_stage` makes."""
        parallel = self.parallel_config
        per_chunk = parallel.num_layers_per_virtual_pipeline_stage
        if not per_chunk or parallel.virtual_pipeline_model_parallel_size > 1 or parallel.num_layer_list:
            return parallel
        to_place = derived.layers_to_place(
            self.model_config.num_layers,
            parallel.account_for_embedding_in_pipeline_split,
            parallel.account_for_loss_in_pipeline_split,
        )
        ranks = parallel.pipeline_model_parallel_size
        chunks = derived.chunks_per_rank(to_place, ranks, per_chunk)
        return dataclasses.replace(parallel, virtual_pipeline_model_parallel_size=chunks)

    def to_dict(self) -> dict[str, dict[str, object]]:
        """Return the tree as plain nested dictionaries, ready for JSON or YAML."""
        return dataclasses.asdict(self)


def _defaults(kind: type, prefix: str) -> dict[str, object]:
    found: dict[str, object] = {}
    for item in dataclasses.fields(kind):
        if item.default is not dataclasses.MISSING:
            found[prefix + item.name] = item.default
        elif item.default_factory is not dataclasses.MISSING:
            found.update(_defaults(item.default_factory, f"{prefix}{item.name}."))  # type: ignore[arg-type]
        elif item.name == "model_config":
            found.update(_defaults(TransformerConfig, "model_config."))
    return found


DEFAULTS: dict[str, object] = _defaults(AllConfig, "")
"""Field path -> the value it has when nothing is said."""

NOTHING: tuple[object, ...] = (0, -1, "", "none", ())
"""Values by which a field says "derive it" or "none"; an argument says the same by not being given."""
