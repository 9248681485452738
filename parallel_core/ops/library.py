"""The library of compiled kernels: its C functions are declared where they are called, and loaded and started here."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from ctypes import c_float, c_int, c_int64, c_uint64, c_void_p
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from parallel_core.ops import build

KINDS = {"float32": 0, "bfloat16": 1, "float16": 2}
"""Numbers by which csrc/half.h knows types."""


@functools.cache
def kind_of(dtype: Any) -> int:
    """Return the number of one of NumPy's types, which take as long as a small kernel to tell their names."""
    return KINDS[dtype.name]


@functools.cache
def bits_of(number: float) -> int:
    """Return the bits of a double as an integer, for a C struct that is made of integers of eight bytes."""
    bits: int = struct.unpack("q", struct.pack("d", number))[0]
    return bits


_TYPES = {"P": c_void_p, "L": c_int64, "I": c_int, "F": c_float, "U": c_uint64}

_declared: dict[str, tuple[list[Any], Any]] = {}
"""Argument types and result type of C functions."""

lib: Any = SimpleNamespace()
"""The declared C functions as attributes, from `load` on."""

_loaded: ctypes.CDLL | None = None
_threads = 1


def declare(name: str, arguments: str, returns: Any = None) -> None:
    """Say how a C function is called; `lib` has it once the library is loaded.

    Args:
        name: the function's name.
        arguments: a letter for each: P pointer, L int64, I int, F float, U uint64.
        returns: ctypes type of the result; None: nothing.
    """
    _declared[name] = [_TYPES[letter] for letter in arguments], returns


declare("pc_init", "IP")
declare("pc_open_onednn", "PI", returns=c_int)
declare("pc_use_bf16_products", "I", returns=c_int)
declare("pc_fix_shares", "I")


def load() -> None:
    """Make the declared C functions callable in `lib`; builds the library on the first call.

    Raises:
        build.BuildError: if it cannot be built here.
    """
    global _loaded
    if _loaded is None:
        _loaded = build.load()
    for name in _declared.keys() - vars(lib).keys():
        function = getattr(_loaded, name)
        function.argtypes, function.restype = _declared[name]
        setattr(lib, name, function)


def start(num_threads: int) -> bool:
    """Start the kernels with `num_threads` threads; return whether they have a matrix product for large operands."""
    global _threads
    load()
    path = _onednn_path()
    sgemm = None if path is None else ctypes.cast(ctypes.CDLL(str(path)).dnnl_sgemm, c_void_p).value
    _threads = num_threads
    lib.pc_init(num_threads, sgemm)
    _opens_onednn("float32")
    keep_freed_memory()
    return bool(sgemm)


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
"""Option numbers of glibc's mallopt."""

KEPT_MEMORY_BYTES = 1 << 30
"""Freed memory that stays in the process for the next step instead of returning to the system."""


def keep_freed_memory() -> None:
    """Make the C allocator reuse what tensors free instead of returning it to the kernel at once.

    With glibc's defaults every large activation is mapped and unmapped anew: a page fault for every page of it, and its
    zeros to write, which takes a twentieth of a step where logits have 200 MB.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # another C library: only slower
    for option, value in ((_M_MMAP_THRESHOLD, KEPT_MEMORY_BYTES), (_M_TRIM_THRESHOLD, KEPT_MEMORY_BYTES)):
        mallopt(option, value)
    mallopt(_M_TOP_PAD, 1 << 24)


def give_back_freed_memory() -> None:
    """Give the kernel what was freed before, as of the values that parameters were made with.

    What `keep_freed_memory` keeps serves arrays of before, while large ones have memory of their own (`ops.memory`).
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def share_alike(alike: bool) -> None:
    """Divide the kernels' work alike for every number of threads, or not: then the bits of results are the same too."""
    lib.pc_fix_shares(_SHARES if alike else 0)


_SHARES = 4
"""Enough for the threads that a rank of a host with several ranks has; more would cut products into slivers."""


def use_bf16_products(use: bool) -> bool:
    """Let linear layers, experts and attention round operands of products to bfloat16, or not; return whether they do.

    They do where the CPU multiplies such numbers faster than float32 ones, and oneDNN does it.
    """
    use = use and _multiplies_bf16() and _opens_onednn("bfloat16")
    lib.pc_use_bf16_products(use)
    return use


@contextmanager
def exact_products() -> Iterator[None]:
    """Compute products in float32 in the block, whatever `use_bf16_products` has set."""
    if not vars(lib):
        yield
        return
    before = lib.pc_use_bf16_products(0)
    try:
        yield
    finally:
        lib.pc_use_bf16_products(before)


_AS_EVERYWHERE = nullcontext()


def product_precision(weight: Any) -> AbstractContextManager[None]:
    """Return the block in which products with a weight run: its `exact_product`, where it has one, keeps them exact."""
    return exact_products() if getattr(weight, "exact_product", False) else _AS_EVERYWHERE


def _multiplies_bf16() -> bool:
    flags = build.cpu_flags().split()
    return b"amx_bf16" in flags or b"avx512_bf16" in flags


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


def _opens_onednn(kind: str) -> bool:
    """Open oneDNN's matmul primitive; return whether it multiplies numbers of a kind."""
    path = _onednn_path()
    return path is not None and bool(lib.pc_open_onednn(os.fsencode(path), KINDS[kind]))


@functools.cache
def _onednn_path() -> Path | None:
    """Return the oneDNN library inside MindSpore."""
    spec = importlib.util.find_spec("mindspore")
    for folder in spec.submodule_search_locations or () if spec else ():
        for path in sorted((Path(folder) / "lib").glob("libdnnl.so*")):
            try:
                if hasattr(ctypes.CDLL(str(path)), "dnnl_sgemm"):
                    return path
            except OSError:
                continue
    return None
