"""`AUTO_RESTART=N`: a job that failed is started again from its newest checkpoint, as long as it gets anywhere."""

from __future__ import annotations

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
    if not restarts:
        return
    if loaded is None:
        raise ConfigError(f"AUTO_RESTART={restarts}: with --plain the launcher does not know where checkpoints are")
    if num_nodes > 1:
        raise ConfigError(
            f"AUTO_RESTART={restarts}: one node alone cannot start a job of NNODES={num_nodes} again; leave it to what "
            "starts the nodes"
        )
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


def run_with_restarts(
    restarts: int, loaded: LoadedConfig, plan: Callable[[], JobSpec], say: Callable[[str], None]
) -> int:
    """Run a job until it ends well, is stopped, or has failed `restarts` + 1 times in a row without a new checkpoint.

    Args:
        restarts: how often to start again without progress.
        loaded: the configuration.
        plan: returns the job, ready to start; called for every start.
        say: prints a line.

    Returns:
        The exit status of the last start.
    """
    root = Path(loaded.config.training_config.output_dir)
    failed, number, before = 0, 0, max(list_iterations(root), default=None)
    while True:
        spec = plan()
        job = Job(spec)
        status = job.run()
        if status in (0, CONFIG_ERROR_STATUS) or job.was_stopped:
            return status
        now = max(list_iterations(root), default=None)
        failed = 1 if now != before else failed + 1
        before = now
        if failed > restarts:
            say(f"AUTO_RESTART={restarts}: it failed {failed} times without a checkpoint in between; it stays down")
            return status
        number += 1
        report = spec.log_dir / REPORT_NAME
        if report.exists():  # the next start clears the logs of this one away
            report.rename(spec.log_dir / f"crash_report_{number}.txt")
        where = "the beginning" if now is None else f"iteration {now}"
        say(f"start {number + 1}, from {where} (AUTO_RESTART={restarts}, {failed} without progress)")
