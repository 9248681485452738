"""The command line of the launcher: check the configuration, claim the log directory, run the job."""

from __future__ import annotations

import fcntl
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from parallel_core.bundled import PROGRAMS
from parallel_core.config.bundled import describes_a_run
from parallel_core.config.handover import write_handover
from parallel_core.config.load import LoadedConfig
from parallel_core.environment import HANDOVER_VARIABLE
from parallel_core.errors import ConfigError
from parallel_core.launch.job import Job, JobSpec
from parallel_core.launch.layout import check_configuration, describe_layout
from parallel_core.launch.nodes import Wanted
from parallel_core.launch.plan import DEFAULT_LOG_DIR, integer, plan_job, prepare_log_dir
from parallel_core.launch.report import CONFIG_ERROR_STATUS
from parallel_core.launch.restart import Progress, check_restart, run_with_restarts
from parallel_core.launch.together import Course, Layout, run_together

_USAGE = (
    "usage: python -m parallel_core.launch [--plain | --bundled FILE] SCRIPT [--config FILE] "
    "[--megatron-flag value ...]"
)


FindLayouts = Callable[[list[str], LoadedConfig, int, str], Sequence[Layout]]
"""(arguments, configuration of all nodes, ranks, device target) -> layouts that fit on so many, the best first."""


def main(argv: list[str] | None = None, find_layouts: FindLayouts | None = None) -> int:
    """Run the launcher and return its exit status: 0, 2 for a wrong configuration, or that of the job.

    Args:
        argv: the words of the command; None: those of the process.
        find_layouts: what a job goes on in with fewer nodes.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _launch(arguments, find_layouts)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return CONFIG_ERROR_STATUS
    except BrokenPipeError:
        # Nobody reads the console any more (`| head`); the job has been ended, and so must be what is left to print.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _launch(arguments: list[str], find_layouts: FindLayouts | None) -> int:
    plain, bundled = arguments[:1] == ["--plain"], arguments[1] if arguments[:1] == ["--bundled"] else ""
    command = tuple(arguments[2 if bundled else int(plain):])
    if not command or command[0].startswith("-"):
        raise ConfigError(_USAGE)
    if bundled and not describes_a_run(command[1:]):
        print(f"INFO - no argument of the model, the layout or the data: --config {bundled} is used", flush=True)
        command = (command[0], "--config", bundled, *command[1:])
    num_ranks = integer(os.environ, "NPROC", 0)
    loaded, log_dir, options = None, DEFAULT_LOG_DIR, dict[str, Any]()
    if not plain:
        try:
            loaded = check_configuration(list(command[1:]), num_ranks)
        except ConfigError as error:
            raise ConfigError(f"{error}{_hint(command, str(error), bundled)}") from None
        num_ranks, config = loaded.world_size, loaded.config
        log_dir = config.training_config.log_dir
        options = {
            "comm_timeout_s": 60 * config.parallel_config.distributed_timeout_minutes,
            "deterministic": config.training_config.deterministic_mode,
            "max_device_memory": config.training_config.max_device_memory,
        }
    elif not num_ranks:
        raise ConfigError("NPROC is not set; with --plain it says how many ranks to start")
    log_path = Path(os.environ.get("LOG_DIR") or log_dir)
    restarts = integer(os.environ, "AUTO_RESTART", 0, minimum=0, example=3)

    def plan() -> JobSpec:
        return plan_job(command, num_ranks, log_path, os.environ, **options)

    def ready(spec: JobSpec) -> JobSpec:
        prepare_log_dir(spec.log_dir, spec.local_ranks if spec.num_nodes > 1 else None)
        layout = ""
        if loaded is not None:
            same = (spec.command, spec.num_ranks) == (command, num_ranks)
            own = loaded if same else check_configuration(list(spec.command[1:]), spec.num_ranks)
            spec = _handed_over(spec, own)
            layout = describe_layout(own.config, spec.num_ranks)
        ranks = f"{spec.num_ranks} rank{'s' if spec.num_ranks > 1 else ''}{layout and f' ({layout})'}"
        target = spec.environment["DEVICE_TARGET"]
        print(f"INFO - starting {ranks} on {target}; logs: {spec.log_dir}/worker_*.log", flush=True)
        return spec

    def layouts(ranks: int) -> Sequence[Layout]:
        if loaded is None or find_layouts is None:
            return ()
        return find_layouts(list(command[1:]), loaded, ranks, spec.environment["DEVICE_TARGET"])

    spec = plan()
    check_restart(restarts, loaded, spec.num_nodes)
    with _log_dir_claimed(spec.log_dir):
        if spec.num_nodes > 1:
            elastic = loaded is not None and loaded.config.training_config.elastic
            wanted = Wanted(spec.num_nodes, num_ranks, restarts, elastic)
            progress = Progress(restarts, loaded)
            return run_together(Course(spec, wanted, spec.cluster_timeout_s, ready, layouts, progress, _say))
        if restarts and loaded is not None:
            return run_with_restarts(restarts, loaded, lambda: ready(plan()), _say)
        return Job(ready(spec)).run()


def _say(text: str, level: str) -> None:
    print(f"{level} - {text}", flush=True)


def _handed_over(spec: JobSpec, loaded: LoadedConfig) -> JobSpec:
    """Return `spec` with the ranks told where the resolved configuration stands: in the log directory, per node."""
    file = spec.log_dir.resolve() / f"resolved_config_{spec.node_rank}.json"
    write_handover(loaded, spec.command[1:], file)
    return replace(spec, environment={**spec.environment, HANDOVER_VARIABLE: str(file)})


def _hint(command: Sequence[str], error: str, bundled: str) -> str:
    """Return what to do if the arguments are unknown here and known to the script, or meant to change `bundled`."""
    script = command[0]
    if bundled and bundled not in command and ": required, and not given" in error:
        return f"\nTo change the small model that runs without arguments, add --config {shlex.quote(bundled)}"
    if ": unknown argument" not in error or Path(script).name in PROGRAMS:
        return ""
    return (
        f"\nIf {script} itself adds arguments (extra_args_provider), leave the check to it: "
        f"NPROC=N python -m parallel_core.launch --plain {shlex.quote(script)} ..."
    )


@contextmanager
def _log_dir_claimed(log_dir: Path) -> Iterator[None]:
    """Hold `log_dir` for this run, so that a second run cannot remove the logs under the first."""
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        handle = os.open(log_dir, os.O_RDONLY)
    except (OSError, ValueError) as error:
        raise ConfigError(f"LOG_DIR={log_dir} cannot be used: {error}; give a directory that can be written") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise ConfigError(
            f"LOG_DIR={log_dir} belongs to a run that is still going; give this one another LOG_DIR"
        ) from None
    try:
        yield
    finally:
        os.close(handle)
