"""The writers behind one interface; each needs a package that is an extra of this one."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import Any, Protocol

from parallel_core.config.schema import TrackingConfig
from parallel_core.errors import ConfigError

_PACKAGES = {
    "tensorboard_dir": ("tensorboardX", "tensorboard"),
    "wandb_project": ("wandb", "wandb"),
    "mlflow_experiment": ("mlflow", "mlflow"),
}
"""Field that asks for a writer -> module it needs, extra that brings it."""


class Writer(Protocol):
    """Takes numbers by their names."""

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Take a number that is told over iterations."""

    def scalar_over_samples(self, tag: str, value: float, samples: int) -> None:
        """Take the same number over the samples trained on, where a tag can have an axis of its own."""

    def close(self) -> None:
        """Write what is left."""


def require_packages(config: TrackingConfig) -> None:
    """Refuse writers whose package is not installed.

    Raises:
        ConfigError: with what to install, for all of them.
    """
    problems = []
    for field, (module, extra) in _PACKAGES.items():
        value = getattr(config, field)
        if value and importlib.util.find_spec(module) is None:
            problems.append(
                f"{field}={value}: needs {module}, which is not installed; pip install 'parallel_core[{extra}]', or "
                f"leave out --{field.replace('_', '-')}"
            )
    if problems:
        raise ConfigError("\n".join(problems))


def make_writers(config: TrackingConfig, run: Mapping[str, Any]) -> list[Writer]:
    """Return the writers that a configuration asks for.

    Args:
        config: what is asked for.
        run: the whole configuration, told to those that keep one.

    Raises:
        ConfigError: a folder cannot be written, or a service refuses.
    """
    writers: list[Writer] = []
    if config.tensorboard_dir:
        writers.append(TensorBoardWriter(config.tensorboard_dir, config.tensorboard_queue_size))
    if config.wandb_project:
        writers.append(WandbWriter(config, run))
    if config.mlflow_experiment:
        writers.append(MlflowWriter(config, run))
    return writers


class TensorBoardWriter:
    """Event files through tensorboardX, which needs no torch; `events` is Megatron-LM's SummaryWriter."""

    def __init__(self, folder: str, queue_size: int) -> None:
        from tensorboardX import SummaryWriter

        try:
            os.makedirs(folder, exist_ok=True)
            self.events = SummaryWriter(folder, max_queue=queue_size)
        except OSError as error:
            raise ConfigError(f"tensorboard_dir={folder} cannot be written: {error.strerror or error}") from None

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Add a value over iterations.

        Raises:
            OSError: nothing is written any more, as on a full disk; tensorboardX would wait for it for ever.
        """
        if not self.events.file_writer.event_writer._worker.is_alive():
            self._abandon()
            raise OSError("its event file cannot be written")
        # `add_scalar` would put an underscore in place of every blank, and Megatron-LM's tags have blanks.
        from tensorboardX.proto.summary_pb2 import Summary

        self.events.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, simple_value=value)]), step)

    def scalar_over_samples(self, tag: str, value: float, samples: int) -> None:
        """Add a value over samples, under the tag that Megatron-LM gives it."""
        self.scalar(f"{tag} vs samples", value, samples)

    def close(self) -> None:
        """Flush and close the file.

        Raises:
            OSError: it cannot be written.
        """
        try:
            self.events.close()
        except OSError:
            self._abandon()
            raise

    def _abandon(self) -> None:
        """Leave what is not written: at the end of the process two threads would wait until it is."""
        writer = self.events.file_writer.event_writer
        writer._closed = True
        writer._event_queue.cancel_join_thread()
        if writer._worker.is_alive():
            writer._worker.stop()


class WandbWriter:
    """A run of Weights & Biases; what it sends where is set by its own variables (`WANDB_MODE=offline`)."""

    def __init__(self, config: TrackingConfig, run: Mapping[str, Any]) -> None:
        import wandb

        try:
            if config.wandb_save_dir:
                os.makedirs(config.wandb_save_dir, exist_ok=True)
            self._run = wandb.init(
                dir=config.wandb_save_dir or None,
                project=config.wandb_project,
                name=config.wandb_exp_name,
                entity=config.wandb_entity or None,
                config=dict(run),
            )
        except Exception as error:  # its own errors, or the network's
            raise ConfigError(
                f"wandb_project={config.wandb_project}: Weights & Biases cannot be used: {error}; set "
                "WANDB_MODE=offline to keep the run here"
            ) from None

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Log a value."""
        self._run.log({tag: value}, step=step)

    def scalar_over_samples(self, tag: str, value: float, samples: int) -> None:
        """Do nothing: W&B draws any value over any other, and `samples vs steps` is among them."""

    def close(self) -> None:
        """End the run."""
        self._run.finish()


class MlflowWriter:
    """A run of MLflow, at `mlflow_tracking_uri` or where MLFLOW_TRACKING_URI says."""

    def __init__(self, config: TrackingConfig, run: Mapping[str, Any]) -> None:
        import mlflow

        self._mlflow = mlflow
        try:
            if config.mlflow_tracking_uri:
                mlflow.set_tracking_uri(config.mlflow_tracking_uri)
            mlflow.set_experiment(config.mlflow_experiment)
            mlflow.start_run(run_name=config.mlflow_run_name or None)
            flat = {name: str(value)[:500] for name, value in _flat(run)}
            for start in range(0, len(flat), 100):  # as many as a server takes at once
                mlflow.log_params(dict(list(flat.items())[start : start + 100]))
        except Exception as error:
            raise ConfigError(f"mlflow_experiment={config.mlflow_experiment}: MLflow cannot be used: {error}") from None

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Log a metric."""
        self._mlflow.log_metric(tag, value, step=step)

    def scalar_over_samples(self, tag: str, value: float, samples: int) -> None:
        """Do nothing: `samples vs steps` is among the metrics."""

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in tree.items():
        found += _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(prefix + name, value)]
    return found
