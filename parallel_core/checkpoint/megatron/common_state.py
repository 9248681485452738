"""Everything in a Megatron checkpoint that is not a tensor, as plain JSON-able data under this project's keys."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

from parallel_core.checkpoint.megatron.safe_pickle import Inert, Symbol, TorchTensor
from parallel_core.errors import CheckpointError
from parallel_core.records import Record

MODEL_KEYS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "max_position_embeddings",
    "padded_vocab_size",
    "vocab_size",
    "position_embedding_type",
    "rotary_base",
    "rotary_percent",
    "rotary_interleaved",
    "normalization",
    "norm_epsilon",
    "swiglu",
    "add_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "untie_embeddings_and_output_weights",
)
"""Settings that decide what the tensors are, by Megatron's argument names."""

_SCHEDULER_ALIASES = {
    "start_lr": "max_lr",
    "warmup_iter": "lr_warmup_steps",
    "warmup_steps": "lr_warmup_steps",
    "end_iter": "lr_decay_steps",
    "decay_steps": "lr_decay_steps",
    "decay_style": "lr_decay_style",
    "num_iters": "num_steps",
}


def plain(value: Any) -> Any:
    """Return a value from a Megatron pickle as JSON can hold it; symbols and classes become their names."""
    if isinstance(value, Symbol):
        return str(value).removeprefix("torch.")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, SimpleNamespace):
        return plain(vars(value))
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, TorchTensor):
        return scalar(value) if value.shape == () else None
    if isinstance(value, Inert):
        return {"class": value.class_name, "args": plain(list(getattr(value, "args", ())))}
    if isinstance(value, bytes):
        return value.hex()
    return str(value)


def scalar(value: Any) -> float | int | None:
    """Return a number that may be stored as a tensor without dims."""
    if isinstance(value, TorchTensor):
        if math.prod(value.shape) != 1:
            return None
        number: float | int = value.blob.read().reshape(-1)[0].item()
        return number
    return value if isinstance(value, (int, float)) else None


def step_of(value: Any, where: str) -> int:
    """Return Adam's step count from a number that may be stored as a float.

    Raises:
        CheckpointError: it is no count.
    """
    return int(Record({"step": value}, where, CheckpointError).number("step", minimum=0))


def model_config_of(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that decide what the tensors are, from Megatron's arguments of any version.

    Args:
        args: `plain` arguments.
    """
    found = dict(args)
    if "add_bias_linear" not in found and "disable_bias_linear" in found:
        found["add_bias_linear"] = not found["disable_bias_linear"]
    found.setdefault("norm_epsilon", args.get("layernorm_epsilon"))
    heads = found.get("num_attention_heads")
    if not found.get("group_query_attention") or not found.get("num_query_groups"):
        found["num_query_groups"] = heads
    if not found.get("kv_channels") and heads and found.get("hidden_size"):
        found["kv_channels"] = found["hidden_size"] // heads
    if not found.get("ffn_hidden_size") and found.get("hidden_size"):
        found["ffn_hidden_size"] = 4 * found["hidden_size"]
    if found.get("add_bias_linear", True):
        found["add_qkv_bias"] = True  # Megatron: biases everywhere include qkv's
    if found.get("tokenizer_type") == "NullTokenizer" and found.get("vocab_size"):
        found["vocab_size"] += 1  # its end-of-document token comes after the vocabulary
    defaults = {"normalization": "LayerNorm", "position_embedding_type": "learned_absolute", "add_bias_linear": True}
    return {key: found.get(key) if found.get(key) is not None else defaults.get(key) for key in MODEL_KEYS}


def refuse_unsupported(args: Mapping[str, Any], where: str) -> None:
    """Raise for models this project has no counterpart of, by the argument that says so.

    Raises:
        CheckpointError: mixture of experts, multi-latent attention, multi-token prediction, a Mamba hybrid, or FSDP.
    """
    reasons = {
        "num_experts": "a mixture of experts",
        "multi_latent_attention": "multi-latent attention",
        "mtp_num_layers": "multi-token prediction",
        "hybrid_override_pattern": "a Mamba hybrid",
        "attention_output_gate": "attention output gates",
        "use_torch_fsdp2": "torch FSDP2",
        "use_megatron_fsdp": "Megatron-FSDP",
        "use_custom_fsdp": "Megatron-FSDP",
    }
    for key, what in reasons.items():
        if args.get(key):
            raise CheckpointError(f"{where} holds {what} ({key}={args[key]!r}), which cannot be read")


def common_of(state: Mapping[str, Any], args: Mapping[str, Any], iteration: int) -> dict[str, Any]:
    """Return the `common` mapping of a checkpoint, from Megatron's top-level state.

    Args:
        state: top-level dict of `model_optim_rng.pt` or `common.pt`.
        args: its `plain` arguments.
        iteration: iterations completed.
    """
    schedule = state.get("opt_param_scheduler") or state.get("lr_scheduler")
    common: dict[str, Any] = {
        "iteration": iteration,
        "consumed_train_samples": args.get("consumed_train_samples") or 0,
        "consumed_valid_samples": args.get("consumed_valid_samples") or 0,
        "model_config": model_config_of(args),
        "megatron_args": dict(args),
        "checkpoint_version": state.get("checkpoint_version", 0),
        "mesh": {
            "tensor_model_parallel_size": args.get("tensor_model_parallel_size") or 1,
            "pipeline_model_parallel_size": args.get("pipeline_model_parallel_size") or 1,
            "virtual_pipeline_model_parallel_size": args.get("virtual_pipeline_model_parallel_size") or 1,
            "data_parallel_size": args.get("data_parallel_size") or 1,
        },
    }
    if isinstance(schedule, Mapping):
        common["opt_param_scheduler"] = {
            _SCHEDULER_ALIASES.get(key, key): plain(value) for key, value in schedule.items() if value is not None
        }
    rng = state.get("rng_state") or [state]
    if isinstance(rng, list) and rng and isinstance(rng[0], Mapping) and "random_rng_state" in rng[0]:
        common["rng"] = {
            "python": plain(rng[0]["random_rng_state"]),
            "numpy": plain(rng[0].get("np_rng_state")),
        }
    return common


def loss_scaler_of(optimizer: Any) -> dict[str, float | int | None] | None:
    """Return Megatron's dynamic loss scaler state (`scale`, `growth_tracker`, `hysteresis_tracker`), or None."""
    scaler = optimizer.get("grad_scaler") if isinstance(optimizer, Mapping) else None
    if not isinstance(scaler, Mapping):
        return None
    return {str(name): scalar(value) for name, value in scaler.items()}
