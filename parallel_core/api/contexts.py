"""MindFormers' `init_context`: joining the job, by its names."""

from __future__ import annotations

import os
from dataclasses import dataclass

from parallel_core.config.values import is_memory_size
from parallel_core.errors import ConfigError
from parallel_core.training.runtime import start_runtime

_MODES = {0: "graph", 1: "PyNative", "GRAPH_MODE": "graph", "PYNATIVE_MODE": "PyNative"}
_PARALLEL = ("STAND_ALONE", "DATA_PARALLEL", "SEMI_AUTO_PARALLEL", "AUTO_PARALLEL", "HYBRID_PARALLEL")


@dataclass(frozen=True)
class ContextConfig:
    """What a process is told.

    Attributes:
        mode: 0 or 1, or GRAPH_MODE or PYNATIVE_MODE; everything here runs in PyNative mode, whose results are the same.
        device_target: Ascend or CPU; the environment's DEVICE_TARGET stands over it.
        device_id: has no effect: a process takes the device that the launcher gives it.
        max_device_memory: what is taken of an NPU's memory at most, such as 58GB; empty: all of it.
        save_graphs: has no effect, as the next four: there are no graphs.
        save_graphs_path: has no effect.
        max_call_depth: has no effect.
        enable_graph_kernel: has no effect.
        graph_kernel_flags: has no effect.
    """

    mode: int | str = 1
    device_target: str = "Ascend"
    device_id: int = 0
    max_device_memory: str = ""
    save_graphs: bool = False
    save_graphs_path: str = "."
    max_call_depth: int = 10000
    enable_graph_kernel: bool = False
    graph_kernel_flags: str = ""

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise ConfigError(f"mode={self.mode!r}: give one of {', '.join(map(str, _MODES))}")
        if self.device_target not in ("Ascend", "CPU"):
            raise ConfigError(f"device_target={self.device_target!r}: give Ascend or CPU")
        if self.max_device_memory and not is_memory_size(self.max_device_memory):
            raise ConfigError(f"max_device_memory={self.max_device_memory!r}: give a size above zero, such as 58GB")


@dataclass(frozen=True)
class ParallelContextConfig:
    """How processes belong together; how a model is cut over them is a layout's matter, whatever is said here.

    Attributes:
        parallel_mode: a name, or its number from 0.
        device_num: ranks of the job; None: as many as there are.
        gradients_mean: has no effect: a loss is the mean over all samples.
        full_batch: has no effect: every rank reads its own samples.
        enable_parallel_optimizer: copies of the model share the optimizer's state in a Trainer's runs.
    """

    parallel_mode: str | int = "STAND_ALONE"
    device_num: int | None = None
    gradients_mean: bool = False
    full_batch: bool = False
    enable_parallel_optimizer: bool = False

    def __post_init__(self) -> None:
        if self.parallel_mode not in (*_PARALLEL, *range(4)):
            raise ConfigError(f"parallel_mode={self.parallel_mode!r}: give one of {', '.join(_PARALLEL)}")


_told = {"shards optimizer": False}


def shards_optimizer() -> bool:
    """Return whether the job was joined with `enable_parallel_optimizer`."""
    return _told["shards optimizer"]


def init_context(
    use_parallel: bool = False,
    context_config: ContextConfig | None = None,
    parallel_config: ParallelContextConfig | None = None,
) -> tuple[int, int]:
    """Set MindSpore up, join the job, and return (rank, number of ranks).

    Args:
        use_parallel: several ranks may run.
        context_config: the device.
        parallel_config: the job.

    Raises:
        ConfigError: several ranks run without `use_parallel`, or as many as nobody expected.
    """
    config = context_config or ContextConfig()
    rank, size = start_runtime(os.environ.get("DEVICE_TARGET") or config.device_target, config.max_device_memory)
    if size > 1 and not use_parallel:
        raise ConfigError(f"{size} ranks run; give use_parallel=True, or start one process")
    wanted = None if parallel_config is None else parallel_config.device_num
    if wanted is not None and wanted != size:
        raise ConfigError(f"device_num={wanted}, and {size} ranks run; start as many, or leave it out")
    _told["shards optimizer"] = bool(parallel_config and parallel_config.enable_parallel_optimizer)
    return rank, size
