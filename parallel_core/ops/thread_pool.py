"""MindSpore's own threads on CPU, kept from taking the cores that the ranks compute on.

MindSpore 2.10 starts a pool of at least two threads for its CPU operators, whatever OMP_NUM_THREADS says. After every
operator that uses the pool its threads spin up to 300,000 times, so a rank keeps up to two more cores busy while it
computes elsewhere, and operators are split between threads that have no core: a step of two ranks on two cores takes
up to twice as long, in one run and not in the next. MindSpore has no setting for either. Its C++ library creates the
pool once, on first use, and takes what it finds: so the pool is created here first, with as many threads as the rank
may use, and told not to spin.
"""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path

import mindspore as ms

logger = logging.getLogger(__name__)

_MANAGER = "_ZN9mindspore8ActorMgr8actorMgrE"
_INITIALIZE = "_ZN9mindspore8ActorMgr10InitializeEbmmmRKSt6vectorIiSaIiEE"
_SPIN_LEAST = "_ZN9mindspore10ThreadPool20SetSpinCountMinValueEv"
_KERNEL_THREADS_SPIN = "_ZN9mindspore10ThreadPool27SetKernelThreadMaxSpinCountEi"
_QUEUE_SIZE = 8192
"""kMaxHqueueSize in MindSpore's threadpool.h."""


class _ActorManager(ctypes.Structure):
    """The beginning of `mindspore::ActorMgr`, as in include/mindspore/core/mindrt/include/actor/actormgr.h."""

    _fields_ = [("initialized", ctypes.c_bool), ("pool", ctypes.c_void_p)]


def limit_threads(number: int) -> bool:
    """Let MindSpore compute on `number` threads (the calling one among them) that sleep when there is nothing to do.

    Call it before the first operator. Does nothing on another version of MindSpore than 2.10, whose layout is not
    known, or when the pool exists.

    Returns:
        Whether the pool is as asked.
    """
    if not ms.__version__.startswith("2.10."):
        return False
    try:
        library = ctypes.CDLL(str(Path(ms.__file__).parent / "lib" / "libmindspore_core.so"))
        manager = _ActorManager.in_dll(library, _MANAGER)
        initialize, spin_least = library[_INITIALIZE], library[_SPIN_LEAST]
        kernel_threads_spin = library[_KERNEL_THREADS_SPIN]
    except (OSError, ValueError, AttributeError) as error:
        logger.debug("MindSpore's threads are as MindSpore makes them: %s", error)
        return False
    if manager.initialized or manager.pool:
        return False
    initialize.argtypes = [ctypes.c_void_p, ctypes.c_bool, *[ctypes.c_size_t] * 3, ctypes.c_void_p]
    initialize.restype = ctypes.c_int
    spin_least.argtypes, spin_least.restype = [ctypes.c_void_p], None
    kernel_threads_spin.argtypes, kernel_threads_spin.restype = [ctypes.c_void_p, ctypes.c_int], None
    no_cores = (ctypes.c_void_p * 3)()  # an empty std::vector: threads are not bound to cores
    failed = initialize(ctypes.addressof(manager), True, 1, number, _QUEUE_SIZE, ctypes.addressof(no_cores))
    if failed or not manager.pool:
        return False
    kernel_threads_spin(manager.pool, 1)
    spin_least(manager.pool)
    return True
