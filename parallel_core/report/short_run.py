"""A few iterations of a configuration on random tokens, as a job of its own: what memory and time are measured on."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from parallel_core.config.schema import AllConfig
from parallel_core.errors import ConfigError

if TYPE_CHECKING:
    from parallel_core.training.step import TrainingStep


def run_on_ranks(script: str, arguments: Sequence[str], world_size: int, output: str, **variables: str) -> list[Any]:
    """Run a script on ranks of this host and return what each of them wrote.

    Args:
        script: the file; rank R of it writes `rank_R.json` into the folder that variable `output` names.
        arguments: of the script.
        world_size: ranks.
        output: name of an environment variable.
        variables: further ones.

    Raises:
        ConfigError: if the job fails; the message has its last lines.
    """
    root = str(Path(__file__).resolve().parents[2])
    with tempfile.TemporaryDirectory(prefix="parallel_core_run_") as folder:
        environment = {**os.environ, output: folder, "NPROC": str(world_size), "LOG_DIR": f"{folder}/logs", **variables}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "parallel_core.launch", "--plain", str(Path(script).resolve()), *arguments]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise ConfigError("the measured run failed; its last lines:\n" + "\n".join(done.stdout.splitlines()[-15:]))
        return [json.loads(Path(folder, f"rank_{rank}.json").read_text()) for rank in range(world_size)]


def write_report(output: str, rank: int, report: object) -> None:
    """Leave what a rank found where `run_on_ranks` reads it."""
    (Path(os.environ[output]) / f"rank_{rank}.json").write_text(json.dumps(report), encoding="utf-8")


class ShortRun:
    """This rank's part of a run on random tokens; the runtime is started, and the kernels are selected."""

    def __init__(self, config: AllConfig, rank: int, world_size: int) -> None:
        from parallel_core.optimizer.schedules import OptimizerParamScheduler
        from parallel_core.training.batches import make_batch_source
        from parallel_core.training.forward_step import forward_step
        from parallel_core.training.model import get_model
        from parallel_core.training.runtime import start_context
        from parallel_core.training.schedule import batch_sizes, loss_scaler, schedule_shape
        from parallel_core.training.step import TrainingStep
        from parallel_core.transformer import GPTModel, ModelStage

        def model_provider(pre_process: bool, post_process: bool, stage: ModelStage) -> GPTModel:
            return GPTModel(stage)

        self.context = start_context(config, rank, world_size)
        self._sizes = batch_sizes(config, self.context.dp.size)
        scheduler = OptimizerParamScheduler(schedule_shape(config, self._sizes, 3))
        model = get_model(model_provider, config, self.context)
        self.step: TrainingStep = TrainingStep(
            config, self.context, model, forward_step, scheduler, loss_scaler(config)
        )
        batches = _random_batches(config)
        self._data = make_batch_source(batches, 0, config, self.context, len(model.chunks), external=True)
        self._iteration = 0

    def iterate(self) -> None:
        """Run the next iteration."""
        self._iteration += 1
        self.step.train(self._data, self._iteration, self._sizes.num_microbatches(0), self._sizes.current(0))

    def close(self) -> None:
        """Wait for the other ranks, and give back the groups and what the run held: parts of it know each other."""
        self.context.destroy()
        del self.step, self._data
        gc.collect()


def _random_batches(config: AllConfig) -> Iterator[dict[str, np.ndarray]]:
    """Yield microbatches of random tokens without end."""
    generator = np.random.default_rng(0)
    shape = (config.dataset_config.batch_size, config.model_config.seq_length)
    while True:
        tokens = generator.integers(0, config.model_config.vocab_size, (2, *shape)).astype(np.int32)
        positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
        batch = {"tokens": tokens[0], "labels": tokens[1], "loss_mask": np.ones(shape, np.float32)}
        batch["position_ids"] = positions
        if config.dataset_config.reset_attention_mask:
            batch["document_start"] = np.zeros(shape, np.int32)
        yield batch
