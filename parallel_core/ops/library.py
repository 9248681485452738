"""The C functions of the compiled kernels with their argument types, and how they are started."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from ctypes import c_double, c_float, c_int, c_int64, c_uint64, c_void_p
from pathlib import Path
from typing import Any

from parallel_core.ops import build

P, L, I, F, U = c_void_p, c_int64, c_int, c_float, c_uint64

_SIGNATURES: dict[str, list[Any]] = {
    "pc_init": [I, P],
    "pc_keep_freed_memory": [L],
    "pc_linear": [P, P, P, P, L, L, L],
    "pc_linear_grad_input": [P, P, P, L, L, L],
    "pc_linear_grad_weight": [P, P, P, L, L, L, I],
    "pc_sum_rows": [P, P, L, L, I],
    "pc_layer_norm": [P, P, P, P, P, P, L, L, F],
    "pc_layer_norm_grad": [P, P, P, P, P, P, P, P, L, L],
    "pc_rms_norm": [P, P, P, P, L, L, F],
    "pc_rms_norm_grad": [P, P, P, P, P, P, L, L],
    "pc_activation": [P, P, P, L, L, I],
    "pc_activation_grad": [P, P, P, P, L, L, I],
    "pc_swiglu": [P, P, P, L, L],
    "pc_swiglu_grad": [P, P, P, P, L, L],
    "pc_rotary": [P, P, P, P, L, L, L, L, L, I, I, I, L],
    "pc_copy_rows": [P, L, P, L, L, L],
    "pc_bias_dropout_add": [P, P, P, P, L, L, F, U, U],
    "pc_vocab_statistics": [P, P, P, P, P, P, L, L, L],
    "pc_vocab_grad_logits": [P, P, P, P, P, L, L, L, F, F],
    "pc_embedding": [P, P, P, L, L, L, L],
    "pc_embedding_grad": [P, P, P, L, L, L, L, I],
    "pc_adam": [P, P, P, P, L, F, F, F, F, F, F, F, F, F],
    "pc_sum_of_squares": [P, L],
    "pc_add": [P, P, L],
    "pc_attention": [P, P, P, P, P, P, P, F, F, U, U],
    "pc_attention_grad": [P, P, P, P, P, P, P, P, P, P, P, F, F, U, U],
}

KEPT_MEMORY_BYTES = 1 << 28
"""Freed memory that stays in the process for the next step instead of returning to the system."""

_loaded: ctypes.CDLL | None = None
_threads = 1


def load() -> ctypes.CDLL:
    """Return the compiled kernels with argument types set; builds them on the first call.

    Raises:
        build.BuildError: if they cannot be built here.
    """
    global _loaded
    if _loaded is None:
        library = build.load()
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes = arguments
            function.restype = c_double if name == "pc_sum_of_squares" else None
        _loaded = library
    return _loaded


def start(num_threads: int) -> tuple[ctypes.CDLL, bool]:
    """Return the kernels, set to `num_threads` threads, and whether they have a matrix product for large operands."""
    global _threads
    library = load()
    sgemm = _onednn_sgemm()
    _threads = num_threads
    library.pc_init(num_threads, sgemm)
    library.pc_keep_freed_memory(KEPT_MEMORY_BYTES)
    return library, bool(sgemm)


def threads() -> int:
    """Return how many threads the kernels of this process use."""
    return _threads


def default_threads() -> int:
    """Return the threads of one rank: OMP_NUM_THREADS, else this host's cores shared by the job's workers."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = os.environ.get("MS_WORKER_NUM", "1")
    return max(1, cores // max(1, int(workers) if workers.isdigit() else 1))


def _onednn_sgemm() -> int | None:
    """Return the address of dnnl_sgemm in the oneDNN library inside MindSpore: about 110 GFLOP/s on one core."""
    spec = importlib.util.find_spec("mindspore")
    for folder in spec.submodule_search_locations or () if spec else ():
        for path in sorted((Path(folder) / "lib").glob("libdnnl.so*")):
            try:
                return ctypes.cast(ctypes.CDLL(str(path)).dnnl_sgemm, c_void_p).value
            except (OSError, AttributeError):
                continue
    return None
