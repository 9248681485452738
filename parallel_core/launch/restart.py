"""`AUTO_RESTART=N`: a job that failed is started again from its newest checkpoint, as long as it gets anywhere."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

from parallel_core.checkpoint.layout_files import list_iterations
from parallel_core.config.load import LoadedConfig
from parallel_core.errors import ConfigError
from parallel_core.launch.crash import REPORT_NAME
from parallel_core.launch.job import Job, JobSpec
from parallel_core.launch.report import CONFIG_ERROR_STATUS


def check_restart(restarts: int, loaded: LoadedConfig | None, num_nodes: int) -> None:
    """Check that a job can be started again by the same command.

    Raises:
        ConfigError: if it would not go on from its own checkpoints.
    """
    if loaded is not None and loaded.config.training_config.elastic and not (restarts and num_nodes > 1):
        raise ConfigError(
            f"--elastic: a job goes on with fewer nodes when it starts again; AUTO_RESTART={restarts} and "
            f"NNODES={num_nodes} leave nothing to do, so give both, or leave --elastic out"
        )
    if not restarts:
        return
    if loaded is None:
        raise ConfigError(f"AUTO_RESTART={restarts}: with --plain the launcher does not know where checkpoints are")
    training = loaded.config.training_config
    if not training.output_dir or training.load_checkpoint != training.output_dir:
        raise ConfigError(
            f"AUTO_RESTART={restarts}: a job goes on from what it saved, so --save and --load name one directory; "
            f"they are {training.output_dir or 'not given'} and {training.load_checkpoint or 'not given'}"
        )
    if training.finetune:
        raise ConfigError(f"AUTO_RESTART={restarts}: with --finetune every start begins at iteration 0; leave one out")
    if not training.save_interval:
        raise ConfigError(f"AUTO_RESTART={restarts} needs --save-interval: without it nothing is saved before the end")


class Progress:
    """Counts how often a job has failed in a row without a new checkpoint in between.

    Args:
        restarts: how often it may start again so.
        loaded: the configuration; None where there are no checkpoints to go on from.
    """

    def __init__(self, restarts: int, loaded: LoadedConfig | None) -> None:
        self._restarts, self._failed = restarts, 0
        self._root = Path(loaded.config.training_config.output_dir) if loaded is not None and restarts else None
        self._newest = self._find_newest()

    def _find_newest(self) -> int | None:
        return None if self._root is None else max(list_iterations(self._root), default=None)

    def after_failure(self) -> str:
        """Count a failure, and return why the job stays down; empty when it may start again."""
        newest = self._find_newest()
        self._failed = 1 if newest != self._newest else self._failed + 1
        self._newest = newest
        if self._failed <= self._restarts:
            return ""
        return (
            f"AUTO_RESTART={self._restarts}: it failed {self._failed} times without a checkpoint in between; "
            "it stays down"
        )

    def next_start(self, number: int) -> str:
        """Return where start `number` begins, in words."""
        where = "the beginning" if self._newest is None else f"iteration {self._newest}"
        return f"start {number}, from {where} (AUTO_RESTART={self._restarts}, {self._failed} without progress)"


def keep_report(log_dir: Path, number: int) -> None:
    """Keep the report of the failure of start `number`: the next one clears the logs of this one away."""
    report = log_dir / REPORT_NAME
    if report.exists():
        report.rename(log_dir / f"crash_report_{number}.txt")


def run_with_restarts(
    restarts: int, loaded: LoadedConfig, plan: Callable[[], JobSpec], say: Callable[[str, str], None]
) -> int:
    """Run a job of one node until it ends well, is stopped, or has failed `restarts` + 1 times in a row in vain.

    Args:
        restarts: how often to start again without a new checkpoint.
        loaded: the configuration.
        plan: returns the job, ready to start; called for every start.
        say: prints a line at a level.

    Returns:
        The exit status of the last start.
    """
    progress = Progress(restarts, loaded)
    for number in itertools.count(1):
        spec = plan()
        job = Job(spec)
        status = job.run()
        if status in (0, CONFIG_ERROR_STATUS) or job.was_stopped:
            break
        if said := progress.after_failure():
            say(said, "WARNING")
            break
        keep_report(spec.log_dir, number)
        say(progress.next_start(number + 1), "WARNING")
    return status
