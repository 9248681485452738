"""What may stand in `common`, the part of a checkpoint that is no tensor: types and ranges, checked when it is opened.

Every source's `common` comes through here (`source.PieceSource`), whatever its format, so the code that resumes,
converts or prints can rely on it.
"""

from __future__ import annotations

from typing import Any

from parallel_core.errors import CheckpointError
from parallel_core.records import Record, check_tree

MAX_ITERATION = 10**12
"""Far beyond any run; names of directories stay short."""
MAX_RANKS = 1 << 20
MAX_LAYERS = 1 << 16
MAX_PADDING = 1 << 16
"""Rows a vocabulary may be padded to the next multiple of."""
_COUNTERS = ("consumed_train_samples", "consumed_valid_samples", "adam_step")
_SIZES = (
    *("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "vocab_size"),
    *("padded_vocab_size", "max_position_embeddings", "seq_length"),
    *("ddp_bucket_size", "ddp_num_buckets"),
)
_PARALLEL_SIZES = (
    *("tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"),
    *("data_parallel_size", "context_parallel_size", "expert_model_parallel_size", "model_parallel_size"),
    "expert_tensor_parallel_size",
)
_STAGE_LAYERS = ("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")
_NUMBERS = ("norm_epsilon", "layernorm_epsilon", "rotary_base", "rotary_percent")
_TRAINING_NUMBERS = ("lr", "min_lr", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps")
_TEXTS = ("normalization", "position_embedding_type", "tokenizer_type", "transformer_impl")
_FLAGS = (
    *("swiglu", "add_bias_linear", "disable_bias_linear", "add_qkv_bias", "qk_layernorm", "rotary_interleaved"),
    *("untie_embeddings_and_output_weights", "group_query_attention", "use_distributed_optimizer"),
    *("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split", "overlap_grad_reduce"),
)


def checked_common(common: Any, where: str) -> dict[str, Any]:
    """Return `common` when every key this project knows holds what belongs there; other keys are kept as they are.

    A key whose value is null is left out: it says nothing.

    Args:
        common: what the checkpoint says.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: a value is of another type or outside its range.
    """
    record = Record(common, f"{where}: `common`", CheckpointError)
    check_tree(common, record.where, CheckpointError)
    said = {key: value for key, value in record.values.items() if value is not None}
    record = Record(said, record.where, CheckpointError)
    record.integer("iteration", 0, maximum=MAX_ITERATION)
    for key in _COUNTERS:
        record.integer(key, 0)
    for key in ("model_config", "megatron_args"):
        _check_settings(record.record(key, {}))
    mesh = record.record("mesh", {})
    for key in _PARALLEL_SIZES:
        mesh.integer(key, None, maximum=MAX_RANKS)
    _check_scheduler(record.record("opt_param_scheduler", {}))
    scaler = record.record("loss_scaler", {})
    if scaler.values:
        scaler.number("scale", minimum=0)
    for key in {"growth_tracker", "hysteresis_tracker"} & scaler.values.keys():
        scaler.number(key)
    _check_generators(record.record("rng", {}))
    record.record("data_order", {})
    record.record("rerun", {})
    return dict(record.values)


def checked_args(args: Any, where: str) -> dict[str, Any]:
    """Return Megatron's arguments when those this project reads hold what belongs there.

    Args:
        args: plain arguments.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: they are no mapping, or a value is of another type or outside its range.
    """
    record = Record(args, f"{where}: `args`", CheckpointError)
    check_tree(args, record.where, CheckpointError)
    _check_settings(record)
    return dict(record.values)


def _check_settings(record: Record) -> None:
    for key in _SIZES:
        record.integer(key, None)
    record.integer("make_vocab_size_divisible_by", None, maximum=MAX_PADDING)
    for key in ("num_layers", *_STAGE_LAYERS):
        record.integer(key, None, maximum=MAX_LAYERS)
    sizes = {key: record.integer(key, None, maximum=MAX_RANKS) or 1 for key in _PARALLEL_SIZES}
    if sizes["pipeline_model_parallel_size"] * sizes["virtual_pipeline_model_parallel_size"] > MAX_RANKS:
        record.refuse("virtual_pipeline_model_parallel_size", f"a number that makes up to {MAX_RANKS} stages")
    for key in (*_NUMBERS, *_TRAINING_NUMBERS):
        record.number(key, None)
    for key in _TEXTS:
        record.text(key, None)
    for key in _FLAGS:
        record.flag(key, None)
    for key in ("consumed_train_samples", "consumed_valid_samples"):
        record.integer(key, None)


def _check_scheduler(record: Record) -> None:
    for key, value in record.values.items():
        if key.endswith("_style"):
            record.text(key)
        elif not isinstance(value, bool):
            record.number(key)
    if record.values:
        record.integer("num_steps")


def _check_generators(record: Record) -> None:
    if "seed" in record.values:
        record.integer("seed")
        _check_mersenne_twister(record.values.get("numpy"), record, "numpy")
    elif record.values.get("numpy") is not None:
        _check_mersenne_twister(record.values["numpy"], record, "numpy")


def _check_mersenne_twister(value: Any, record: Record, key: str) -> None:
    # NumPy takes a state unread and would go past the end of a short one, at the first draw.
    parts = list(value) if isinstance(value, (list, tuple)) else []
    fits = (
        len(parts) in (3, 5)
        and parts[0] == "MT19937"
        and isinstance(parts[1], (list, tuple))
        and len(parts[1]) == 624
        and all(type(n) is int and 0 <= n < 1 << 32 for n in parts[1])
        and type(parts[2]) is int
        and 0 <= parts[2] <= 624
    )
    if not fits:
        record.refuse(key, 'a state of NumPy\'s generator ["MT19937", 624 words, position up to 624]')
