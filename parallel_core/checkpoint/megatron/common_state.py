"""Everything in a Megatron checkpoint that is not a tensor, as plain JSON-able data under this project's keys."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

from parallel_core.checkpoint.megatron.safe_pickle import Inert, Symbol, TorchTensor
from parallel_core.config.megatron_model import refused_by, settings_of_megatron
from parallel_core.errors import CheckpointError, ConfigError
from parallel_core.records import Record

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
    """Return the settings that define the model, from Megatron's arguments of any version.

    Args:
        args: `plain` arguments.

    Raises:
        CheckpointError: an argument has a value that cannot be read.
    """
    try:
        settings = settings_of_megatron(args)
    except ConfigError as error:
        raise CheckpointError(f"the arguments in the checkpoint: {error}") from None
    true_size = args.get("vocab_size")
    if isinstance(true_size, int) and args.get("tokenizer_type") == "NullTokenizer":
        true_size += 1  # its end-of-document token comes after the vocabulary
    return {**settings, "vocab_size": true_size}


def refuse_unsupported(args: Mapping[str, Any], where: str) -> None:
    """Raise for models this project has no counterpart of, by the argument that says so.

    Raises:
        CheckpointError: the model is not built (a mixture of experts, multi-latent attention, ...), or FSDP wrote it.
    """
    reason = refused_by(args)
    for key in ("use_torch_fsdp2", "use_megatron_fsdp", "use_custom_fsdp"):
        reason = reason or (f"the format of FSDP ({key}={args[key]!r})" if args.get(key) else None)
    if reason:
        raise CheckpointError(f"{where} holds {reason}, which cannot be read")


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
