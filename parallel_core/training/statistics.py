"""Numbers about the whole model, asked for by name: norm of the parameters, zeros among the gradients, memory."""

from __future__ import annotations

import math
import os
import resource
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor

from parallel_core.context import ParallelContext
from parallel_core.layout.shard import shard_of
from parallel_core.optimizer.optimizer import Optimizer


def model_statistics(
    optimizer: Optimizer, context: ParallelContext, *, params_norm: bool, num_zeros: bool
) -> dict[str, float]:
    """Return what is asked for, the same on every rank, by its name in the metrics; collective over the world.

    Every element of the model counts once, however many ranks hold it. The norm is that of the float32 masters where
    there are some; frozen parameters belong to it. Zeros are counted in the complete gradients, before clipping.

    Args:
        optimizer: parameters, and the gradients of the last iteration.
        context: this rank's groups.
        params_norm: give `params_norm`.
        num_zeros: give `num_zeros_in_grad`.

    Communication: one all-reduce of four float32.
    """
    squares = zeros = 0.0
    if params_norm:
        squares = sum(optimizer.master(s).sum_of_squares() for s in optimizer.segments if s.counts)
        if context.dp_cp.rank == 0:
            for parameter, _ in optimizer.ddp.frozen:
                if shard_of(parameter).is_first_copy(context.coordinates):
                    squares += float(np.square(parameter.asnumpy().astype(np.float64)).sum())
    if num_zeros:
        for segment in optimizer.segments:
            if segment.counts:
                gradient = optimizer.ddp.buffers[segment.buffer].grads.part(segment.start, segment.end).numpy()
                zeros += gradient.size - np.count_nonzero(gradient)
    # Counts go beyond what float32 holds exactly, so they travel in two parts.
    high, low = divmod(zeros, _PART)
    total = context.world.all_reduce_(Tensor(np.array([squares, high, low], np.float32))).asnumpy().astype(np.float64)
    found = {}
    if params_norm:
        found["params_norm"] = math.sqrt(total[0])
    if num_zeros:
        found["num_zeros_in_grad"] = float(total[1] * _PART + total[2])
    return found


_PART = 4096.0


def memory_values() -> dict[str, float]:
    """Return Megatron-LM's tags of memory and this rank's bytes: the device's on Ascend, the process's on CPU."""
    if ms.get_context("device_target") == "Ascend":  # not verified
        return {
            "mem-reserved-bytes": float(ms.runtime.memory_reserved()),
            "mem-allocated-bytes": float(ms.runtime.memory_allocated()),
            "mem-max-allocated-bytes": float(ms.runtime.max_memory_allocated()),
        }
    mapped, resident = Path("/proc/self/statm").read_text(encoding="ascii").split()[:2]
    page = os.sysconf("SC_PAGE_SIZE")
    return {
        "mem-reserved-bytes": float(mapped) * page,
        "mem-allocated-bytes": float(resident) * page,
        "mem-max-allocated-bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0,
    }
