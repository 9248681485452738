"""The writers, each with its package where that is installed, and what is asked for without it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading

import pytest

from parallel_core.config.schema import TrackingConfig
from parallel_core.errors import ConfigError
from parallel_core.launch.layout import check_configuration
from parallel_core.tracking import writers
from parallel_core.tracking.board import Board
from tests.helpers.launching import REPO


class Notes:
    """A writer that keeps what it is told."""

    def __init__(self):
        self.over_iterations, self.over_samples, self.closed = {}, {}, False

    def scalar(self, tag, value, step):
        self.over_iterations[tag, step] = value

    def scalar_over_samples(self, tag, value, samples):
        self.over_samples[tag, samples] = value

    def close(self):
        self.closed = True


def test_every_number_has_megatrons_tag():
    notes = Notes()
    extra = {"log_timers_to_tensorboard": True, "log_world_size_to_tensorboard": True}
    asked = TrackingConfig(tensorboard_log_interval=2, **extra)
    board = Board(asked, [notes], 4)
    values = {"lm loss": 3.0, "lr": 0.1, "loss_scale": 8.0, "grad_norm": 2.0, "params_norm": 5.0,
              "num_zeros_in_grad": 6.0, "other": None}  # fmt: skip
    for iteration in (1, 2):
        board.iteration(iteration, 8 * iteration, values, batch_size=8, memory={}, times={"optimizer": [3.0, 4.0]})
    board.interval(2, 0.25, 1.5)
    board.evaluation("validation", 2, 16, {"lm loss": 1.0}, {"lm loss": 2.7})
    board.close()
    both = {"lm loss": 3.0, "learning-rate": 0.1, "loss-scale": 8.0, "grad-norm": 2.0, "params-norm": 5.0,
            "num-zeros": 6.0, "batch-size": 8.0, "world-size": 4.0, "lm loss validation": 1.0}  # fmt: skip
    assert notes.over_samples == {(tag, 16): value for tag, value in both.items()}
    alone = {"samples vs steps": 16.0, "optimizer-time": 0.004, "iteration-time": 0.25, "throughput": 1.5}
    assert notes.over_iterations == {(tag, 2): value for tag, value in {**both, **alone}.items()} and notes.closed


@pytest.mark.parametrize(("flags", "field"), [
    ("--tensorboard-dir x", "tensorboard_dir"), ("--wandb-project x --wandb-exp-name y", "wandb_project"),
    ("--mlflow-experiment x", "mlflow_experiment")])  # fmt: skip
def test_a_missing_package_is_named_before_anything_starts(monkeypatch, flags, field):
    monkeypatch.setattr(writers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"{field}=x: needs \w+, which is not installed; pip install"):
        check_configuration(["--config", str(REPO / "configs/gpt_tiny.yaml"), *flags.split()], 0)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    pytest.importorskip("tensorboardX")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=f"tensorboard_dir={tmp_path}/file cannot be written"):
        writers.make_writers(TrackingConfig(tensorboard_dir=str(tmp_path / "file")), {})


def test_a_writer_that_fails_neither_ends_a_run_nor_holds_it_up(tmp_path, monkeypatch, caplog):
    """Of tensorboardX a full disk ends the thread that writes; then its queue fills up, and putting waits for ever."""
    pytest.importorskip("tensorboardX")
    full = writers.make_writers(TrackingConfig(tensorboard_dir=str(tmp_path), tensorboard_queue_size=2), {})[0]

    def no_space(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(full.events.file_writer.event_writer._ev_writer, "write_event", no_space)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    others = Notes()
    board = Board(TrackingConfig(tensorboard_log_interval=1), [full, others], 1)

    def run():
        for iteration in range(1, 51):
            board.iteration(iteration, iteration, {"lm loss": 1.0}, batch_size=1, memory={}, times={})
        board.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert "TensorBoardWriter failed and is told nothing more" in caplog.text
    assert others.over_iterations["lm loss", 50] == 1.0 and others.closed


_TRACKED = """
import sys
import threading
from parallel_core.config.schema import TrackingConfig
from parallel_core.tracking.writers import make_writers

for writer in make_writers(TrackingConfig(**{field: value for field, value in zip(sys.argv[1::2], sys.argv[2::2])}),
                           {"model_config": {"num_layers": 2}}):
    for step in (1, 2):
        writer.scalar("lm loss", 3.0 / step, step)
        writer.scalar_over_samples("lm loss", 3.0 / step, 8 * step)
    writer.close()
"""


def tracked(folder, **fields):
    words = [word for pair in fields.items() for word in pair]
    environment = {**os.environ, "PYTHONPATH": str(REPO), "WANDB_MODE": "offline", "MLFLOW_ALLOW_FILE_STORE": "true"}
    done = subprocess.run([sys.executable, "-c", _TRACKED, *words], cwd=folder, env=environment, capture_output=True,
                          text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_weights_and_biases_offline(tmp_path):
    tracked(tmp_path, wandb_project="p", wandb_exp_name="n", wandb_save_dir=str(tmp_path / "w"))
    assert list((tmp_path / "w").rglob("run-*.wandb"))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed")
def test_mlflow_in_a_folder(tmp_path):
    tracked(tmp_path, mlflow_experiment="x", mlflow_run_name="y", mlflow_tracking_uri=f"file:{tmp_path}/m")
    (metric,) = (tmp_path / "m").rglob("metrics/lm loss")
    assert [float(line.split()[1]) for line in metric.read_text().splitlines()] == [3.0, 1.5]
    (parameter,) = (tmp_path / "m").rglob("params/model_config.num_layers")
    assert json.loads(parameter.read_text()) == 2
