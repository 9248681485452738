"""Which implementation of each kernel runs: chosen once at start, logged once."""

from __future__ import annotations

import logging
import os

import mindspore as ms

from parallel_core.errors import ConfigError
from parallel_core.ops import (  # noqa: F401 - they register kernels
    ascend,
    ascend_kernels,
    ascend_products,
    build,
    experts,
    fused,
    fused_attention,
    fused_layer,
    library,
    raw,
    training_layer,
)
from parallel_core.ops.registry import KERNELS, log_fallback

logger = logging.getLogger(__name__)

ENVIRONMENT = "PARALLEL_CORE_KERNELS"
"""Environment variable that overrides the choice; `local` selects the plain MindSpore operators."""


PLAIN = "plain MindSpore operators"
"""How the sentence of `use_kernels` begins where no kernel is selected."""


def use_kernels(
    mode: str = "auto", num_threads: int | None = None, bf16_products: bool = False, for_any_threads: bool = False
) -> str:
    """Select the kernels for the whole process and return a sentence that says which and why.

    Args:
        mode: `auto` for the fused C++ kernels where they work, `local` for plain MindSpore operators.
        bf16_products: let linear layers, experts and attention round the operands of their products to bfloat16, with
            sums in float32, where the fused kernels run and this CPU has instructions for it; else products are of
            float32.
        num_threads: threads of the fused kernels; None: OMP_NUM_THREADS, else this host's cores over its workers.
        for_any_threads: the fused kernels give the same bits whatever `num_threads` is.

    Raises:
        ConfigError: if `mode` or the environment variable is neither `auto` nor `local`.
    """
    mode = os.environ.get(ENVIRONMENT) or mode
    if mode not in ("auto", "local"):
        raise ConfigError(f"kernels={mode} (or {ENVIRONMENT}) is unknown here; write auto or local")
    for entry in KERNELS.values():
        entry.selected = entry.reference
    log_fallback.cache_clear()
    if mode == "local":
        sentence = _plain("local was asked for")
    elif ms.get_context("device_target") == "CPU":
        sentence = _use_compiled(num_threads, bf16_products, for_any_threads)
    else:
        sentence = _use_device(ms.get_context("device_target"))
    if bf16_products and sentence.startswith(PLAIN):
        sentence += "; products of float32"
    logger.info("kernels: %s", sentence)
    return sentence


def are_compiled() -> bool:
    """Return whether the fused C++ kernels are selected, each of which is one `autograd.Function`."""
    entry = KERNELS["layer_norm"]
    return entry.selected is entry.implementations["CPU"]


def _plain(reason: str) -> str:
    return f"{PLAIN} ({reason})"


def _use_compiled(num_threads: int | None, bf16_products: bool, for_any_threads: bool) -> str:
    if not ms.get_context("pynative_synchronize"):
        return _plain("the fused C++ kernels need set_context(pynative_synchronize=True)")
    try:
        has_gemm = library.start(num_threads or library.default_threads())
    except build.BuildError as error:
        return _plain(str(error))
    library.share_alike(for_any_threads)
    for entry in KERNELS.values():
        if has_gemm or not entry.needs_gemm:
            entry.selected = entry.implementations.get("CPU", entry.reference)
    uses_bf16 = library.use_bf16_products(bf16_products and has_gemm)
    if uses_bf16:
        precision = "; products of bfloat16 operands with float32 sums"
    elif bf16_products:
        precision = "; products of float32: this CPU has neither AMX nor AVX-512 instructions for bfloat16"
    else:
        precision = ""
    missing = "" if has_gemm else "; matrix products by MindSpore (it ships no oneDNN here)"
    return f"fused C++, {library.threads()} thread(s) per rank{missing}{precision}"


def _use_device(device: str) -> str:
    chosen = {name: entry for name, entry in KERNELS.items() if device in entry.implementations}
    for entry in chosen.values():
        entry.selected = entry.implementations[device]
    if not chosen:
        return _plain(f"the fused C++ kernels are for CPU, not {device}")
    return f"{device} operators for {', '.join(sorted(chosen))}; plain MindSpore operators for the others"
