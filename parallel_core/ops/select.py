"""Which implementation of each kernel runs: chosen once at start, logged once."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

import mindspore as ms

from parallel_core.errors import ConfigError

logger = logging.getLogger(__name__)

ENVIRONMENT = "PARALLEL_CORE_KERNELS"
"""Environment variable that overrides the choice; `local` selects the plain MindSpore operators."""

_RAW = (
    "adam_",
    "add_",
    "embedding",
    "embedding_grad_table",
    "embedding_grad_table_",
    "linear",
    "linear_grad_bias",
    "linear_grad_input",
    "linear_grad_weight",
    "linear_grad_weight_",
    "sum_of_squares",
    "vocab_grad_logits",
    "vocab_statistics",
    "write_",
)
_FUSED = (
    "activation",
    "bias_dropout_add",
    "dropout",
    "layer_norm",
    "rms_norm",
    "rotary",
    "rotary_packed",
    "split_last_dim",
)
_ATTENTION = ("attention_block", "attention_block_grad", "causal_attention", "causal_attention_packed")
_NEED_GEMM = {"linear", "linear_grad_input", "linear_grad_weight", "linear_grad_weight_"}

_active: dict[str, Callable[..., Any]] = {}

F = TypeVar("F", bound=Callable[..., Any])


def selectable(reference: F) -> F:
    """Return a function that calls the selected implementation of `reference`, or `reference` itself."""
    name = reference.__name__

    @functools.wraps(reference)
    def call(*args: Any, **kwargs: Any) -> Any:
        return _active.get(name, reference)(*args, **kwargs)

    return cast(F, call)


def use_kernels(mode: str = "auto", num_threads: int | None = None) -> str:
    """Select the kernels for the whole process and return a sentence that says which and why.

    Args:
        mode: `auto` for the fused C++ kernels where they work, `local` for plain MindSpore operators.
        num_threads: threads of the fused kernels; None: OMP_NUM_THREADS, else this host's cores over its workers.

    Raises:
        ConfigError: if `mode` or the environment variable is neither `auto` nor `local`.
    """
    mode = os.environ.get(ENVIRONMENT) or mode
    if mode not in ("auto", "local"):
        raise ConfigError(f"transformer_impl={mode} (or {ENVIRONMENT}) is unknown here; write auto or local")
    _active.clear()
    reason = f"{mode} was asked for" if mode == "local" else _start_fused(num_threads)
    sentence = f"plain MindSpore operators ({reason})" if reason else _describe()
    logger.info("kernels: %s", sentence)
    return sentence


def _start_fused(num_threads: int | None) -> str:
    """Activate the fused kernels and return "", or return why they cannot be used."""
    from parallel_core.ops import build, fused, fused_attention, library, raw

    if ms.get_context("device_target") != "CPU":
        return f"the fused C++ kernels are for CPU, not {ms.get_context('device_target')}"
    if not ms.get_context("pynative_synchronize"):
        return "the fused C++ kernels need set_context(pynative_synchronize=True)"
    try:
        raw.lib, has_gemm = library.start(num_threads or library.default_threads())
    except build.BuildError as error:
        return str(error)
    for module, names in ((raw, _RAW), (fused, _FUSED), (fused_attention, _ATTENTION)):
        for name in names:
            if has_gemm or name not in _NEED_GEMM:
                _active[name] = getattr(module, name)
    return ""


def _describe() -> str:
    from parallel_core.ops import library

    missing = "" if "linear" in _active else "; matrix products by MindSpore (it ships no oneDNN here)"
    return f"fused C++, {library.threads()} thread(s) per rank{missing}"
