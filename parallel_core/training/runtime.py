"""The process: device, MindSpore's settings, joining the other ranks."""

from __future__ import annotations

import functools
import os
from dataclasses import replace

import mindspore as ms
import numpy as np

from parallel_core import startup
from parallel_core.comm.meeting import meeting
from parallel_core.config.schema import AllConfig
from parallel_core.context import ParallelContext
from parallel_core.environment import MEMORY_VARIABLE
from parallel_core.ops import use_kernels
from parallel_core.ops.library import default_threads, keep_freed_memory
from parallel_core.ops.selection import PLAIN
from parallel_core.ops.thread_pool import limit_threads


def start_runtime(
    device_target: str | None = None, max_device_memory: str = "", limit: bool = True
) -> tuple[int, int]:
    """Choose the device, set MindSpore up for it, join the job, and return (rank, world size).

    Ranks that meet in memory (`comm.meeting`) join MindSpore's own communication, which takes seconds, only when a
    group needs it.

    On CPU operators run synchronously: MindSpore's asynchronous pipeline costs about 2 ms at every host
    synchronisation there and makes a step three times slower.

    Args:
        device_target: CPU or Ascend; default: the environment's DEVICE_TARGET, else CPU.
        max_device_memory: see `limit_device_memory`; empty: what the environment says.
        limit: on CPU, limit MindSpore's own threads; else `start_context` does it, when the configuration is known.
    """
    startup.note("script", begins=True)
    target = device_target or os.environ.get("DEVICE_TARGET", "CPU")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    if ms.get_context("device_target") != target or target != "CPU":
        ms.set_device(target)
    limit_device_memory(max_device_memory or os.environ.get(MEMORY_VARIABLE, ""))
    if target == "CPU":
        ms.set_context(pynative_synchronize=True)
        keep_freed_memory()
    size = int(os.environ.get("MS_WORKER_NUM", "1"))
    if target == "CPU" and (size == 1 or meeting() is not None):
        if limit:  # without a meeting, joining does it
            limit_threads(default_threads())
        return (int(os.environ["RANK_ID"]), size) if size > 1 else (0, 1)
    if size == 1:
        return 0, 1
    from parallel_core.comm.mindspore_comm import start_communication

    return start_communication()


def limit_device_memory(size: str) -> str | None:
    """Let MindSpore take no more of an NPU's memory than `size`, such as 58GB; empty: what it has. Not verified.

    Returns:
        A sentence where nothing was limited.
    """
    if not size:
        return None
    if ms.get_context("device_target") == "CPU":
        return f"max_device_memory={size}: the memory of a CPU has no such limit; nothing changes"
    _set_memory(size)
    return None


@functools.cache  # MindSpore takes it once
def _set_memory(size: str) -> None:
    ms.runtime.set_memory(max_size=size)


def start_context(config: AllConfig, rank: int, world_size: int) -> ParallelContext:
    """Create the groups of this rank and seed NumPy for the user's own draws."""
    startup.note("device and configuration")
    if ms.get_context("device_target") == "CPU":
        # MindSpore's sums depend on how many threads share them.
        limit_threads(1 if config.training_config.deterministic_mode else default_threads())
    context = ParallelContext.create(config.parallel_config, rank, world_size)
    np.random.seed(config.training_config.seed)
    startup.note("groups")
    return context


def select_kernels(config: AllConfig) -> str:
    """Select the kernels that a run asks for; return a sentence that says which and why."""
    model = config.model_config
    bf16 = config.training_config.bf16 or model.fp32_matmul_precision == "high"
    alike = config.training_config.deterministic_mode
    sentence = use_kernels(model.kernels, bf16_products=bf16, for_any_threads=alike)
    startup.note("kernels")
    cost = "; a step takes several times as long as with fused ones" if sentence.startswith(PLAIN) else ""
    return sentence + cost


def supported_precision(config: AllConfig) -> tuple[AllConfig, str | None]:
    """Return the configuration with a compute type that this device has, and what was changed.

    On the CPU activations are float32, whose kernels are the fast ones; parameters keep their 16 bits and are read as
    float32, of which both 16-bit types are a part.
    """
    model = config.model_config
    if ms.get_context("device_target") != "CPU" or model.compute_dtype == "float32":
        return config, None
    note = (
        f"compute_dtype={model.compute_dtype}: the CPU has no kernels for activations of that type; they are float32 "
        f"instead, parameters stay {model.params_dtype}"
    )
    return replace(config, model_config=replace(model, compute_dtype="float32", fp16_lm_cross_entropy=False)), note
