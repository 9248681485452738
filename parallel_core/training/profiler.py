"""Profiles of a range of iterations: the timeline, and what `mindspore.profiler` records.

The timeline (`training/timeline.py`) is cheap and always there. MindSpore's profiler makes a step on CPU several times
longer and is asked from level1 on there; it records the operators of the host. Options of the device (stacks, memory,
AI cores, caches, bandwidths, parallel strategy) are handed on; an NPU is needed for them to record something.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mindspore as ms
from mindspore import profiler

from parallel_core.config.schema import ProfileConfig, TrainingConfig
from parallel_core.context import ParallelContext
from parallel_core.errors import ConfigError
from parallel_core.training.timeline import Timeline

_LEVELS = {
    "level0": profiler.ProfilerLevel.Level0,
    "level1": profiler.ProfilerLevel.Level1,
    "level2": profiler.ProfilerLevel.Level2,
}
_AICORE_METRICS = {
    -1: profiler.AicoreMetrics.AiCoreNone,
    0: profiler.AicoreMetrics.ArithmeticUtilization,
    1: profiler.AicoreMetrics.PipeUtilization,
    2: profiler.AicoreMetrics.Memory,
    3: profiler.AicoreMetrics.MemoryL0,
    4: profiler.AicoreMetrics.ResourceConflictRatio,
    5: profiler.AicoreMetrics.MemoryUB,
    6: profiler.AicoreMetrics.L2Cache,
}
"""By the numbers that MindSpore's profiler took before it had names for them."""


class StepProfiler:
    """Records iterations step_start to step_end, both included.

    The timeline goes to `<save_path>/timeline_rank_<rank>.json`, MindSpore's records to `<save_path>/rank_<rank>`.

    Args:
        training: the profile's options, and the directories that stand in for an empty save_path.
        context: this rank's groups.

    Raises:
        ConfigError: if the options leave nothing to record.
    """

    def __init__(self, training: TrainingConfig, context: ParallelContext) -> None:
        config = training.profile
        folder = Path(config.save_path or Path(training.output_dir or training.log_dir) / "profile")
        self.folder = folder / f"rank_{context.rank}"
        self._first, self._last = config.step_start, config.step_end
        detailed = ms.get_context("device_target") != "CPU" or config.level != "level0"
        self._options = profile_options(config, self.folder) if config.enabled and detailed else None
        self._timeline = Timeline(folder / f"timeline_rank_{context.rank}.json", context) if config.enabled else None
        self._recording = False
        self._running: Any = None
        self._dynamic: Any = None
        if config.dynamic_profiler_config_path:
            self._dynamic = profiler.DynamicProfilerMonitor(
                cfg_path=config.dynamic_profiler_config_path, output_path=str(self.folder)
            )

    def before_step(self, iteration: int) -> None:
        """Start recording if `iteration` is the first to be recorded (or the first after a resume in the range)."""
        if self._timeline is not None and self._first <= iteration <= self._last and not self._recording:
            self._recording = True
            self._timeline.start()
        if self._options is not None and self._first <= iteration <= self._last and self._running is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._running = profiler.profile(**self._options)
            self._running.start()
        if self._dynamic is not None:
            self._dynamic.step_begin(_Step(iteration))

    def after_step(self, iteration: int) -> None:
        """Stop recording if `iteration` is the last to be recorded."""
        if iteration >= self._last:
            self.stop()
        if self._dynamic is not None:
            self._dynamic.step_end(_Step(iteration))

    def stop(self) -> None:
        """Stop a recording under way and write its files; a timeline that cannot be written costs a warning."""
        if self._timeline is not None and self._recording:
            self._recording, timeline, self._timeline = False, self._timeline, None
            try:
                timeline.stop()
            except OSError as error:
                print(f"WARNING - the timeline cannot be written: {error}", flush=True)
        if self._running is not None:
            self._running.stop()
            self._running = None


class _Step:
    """What MindSpore's callbacks ask for the number of the step."""

    def __init__(self, iteration: int) -> None:
        self._params = SimpleNamespace(cur_step_num=iteration)

    def original_args(self) -> SimpleNamespace:
        """Return the parameters of the step."""
        return self._params


def profile_options(config: ProfileConfig, folder: Path) -> dict[str, Any]:
    """Return the arguments of `mindspore.profiler.profile` for a profile that is written to `folder`.

    Raises:
        ConfigError: if the options leave nothing to record.
    """
    on_cpu = ms.get_context("device_target") == "CPU"
    activities = []
    if config.framework != "none" or (on_cpu and config.op_time):
        activities.append(profiler.ProfilerActivity.CPU)
    if config.op_time and not on_cpu:
        activities.append(profiler.ProfilerActivity.NPU)
    if not activities:
        raise ConfigError("profile_framework=none and profile_op_time=false leave nothing to profile; change one")
    level = "level1" if config.communication and config.level == "level0" else config.level
    has_metrics = config.op_time and level != "level0"  # MindSpore takes them from level1 on
    return {
        "activities": activities,
        "start_profile": False,
        "with_stack": config.with_stack,
        "profile_memory": config.memory and config.framework != "time",
        "data_process": config.data_process,
        "parallel_strategy": config.parallel_strategy,
        "hbm_ddr": config.hbm_ddr,
        "pcie": config.pcie,
        "on_trace_ready": profiler.tensorboard_trace_handler(
            dir_name=str(folder), analyse_flag=not config.offline_analyse
        ),
        "experimental_config": profiler._ExperimentalConfig(
            profiler_level=_LEVELS[level],
            aic_metrics=_AICORE_METRICS[config.aicore_metrics if has_metrics else -1],
            l2_cache=config.l2_cache,
            data_simplification=config.data_simplification,
        ),
    }
