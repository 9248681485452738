"""Which implementation of each kernel runs: chosen once at start, logged once."""

from __future__ import annotations

import logging
import os

import mindspore as ms

from parallel_core.errors import ConfigError
from parallel_core.ops import ascend, build, experts, fused, fused_attention, library, raw  # noqa: F401 - they register kernels
from parallel_core.ops.registry import KERNELS, log_fallback

logger = logging.getLogger(__name__)

ENVIRONMENT = "PARALLEL_CORE_KERNELS"
"""Environment variable that overrides the choice; `local` selects the plain MindSpore operators."""


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
    for entry in KERNELS.values():
        entry.selected = entry.reference
    log_fallback.cache_clear()
    if mode == "local":
        sentence = _plain("local was asked for")
    elif ms.get_context("device_target") == "CPU":
        sentence = _use_compiled(num_threads)
    else:
        sentence = _use_device(ms.get_context("device_target"))
    logger.info("kernels: %s", sentence)
    return sentence


def _plain(reason: str) -> str:
    return f"plain MindSpore operators ({reason})"


def _use_compiled(num_threads: int | None) -> str:
    if not ms.get_context("pynative_synchronize"):
        return _plain("the fused C++ kernels need set_context(pynative_synchronize=True)")
    try:
        has_gemm = library.start(num_threads or library.default_threads())
    except build.BuildError as error:
        return _plain(str(error))
    for entry in KERNELS.values():
        if has_gemm or not entry.needs_gemm:
            entry.selected = entry.implementations.get("CPU", entry.reference)
    missing = "" if has_gemm else "; matrix products by MindSpore (it ships no oneDNN here)"
    return f"fused C++, {library.threads()} thread(s) per rank{missing}"


def _use_device(device: str) -> str:
    chosen = {name: entry for name, entry in KERNELS.items() if device in entry.implementations}
    for entry in chosen.values():
        entry.selected = entry.implementations[device]
    if not chosen:
        return _plain(f"the fused C++ kernels are for CPU, not {device}")
    return f"{device} operators for {', '.join(sorted(chosen))}; plain MindSpore operators for the others"
