"""Run `pretrain()` several times in one process or job: `several_runs.py PLAN`.

PLAN is JSON: {"directory": ..., "runs": {NAME: {"argv": [...], "probe": [iterations]}}}. Each run leaves
DIRECTORY/NAME/metrics.jsonl and outcome.json; `probe` adds what the model computed at those iterations, see `Probe`.
The model and the forward step are those of pretrain_gpt.py.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import sys
import traceback
from pathlib import Path

import numpy as np

REPO = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(REPO))

import pretrain_gpt  # noqa: E402
from parallel_core.errors import ParallelCoreError  # noqa: E402
from parallel_core.launch.entry import run_as_rank  # noqa: E402
from parallel_core.launch.report import LOG_DIR_VARIABLE  # noqa: E402
from parallel_core.layout.shard import shard_of  # noqa: E402
from parallel_core.optimizer.optimizer import Optimizer  # noqa: E402
from parallel_core.training import pretrain, runtime  # noqa: E402
from parallel_core.training.step import TrainingStep  # noqa: E402
from parallel_core.transformer import GPTModel  # noqa: E402


class Probe:
    """Writes `probe_ITERATION_RANK.npz`: logits, token losses and labels of each microbatch, every gradient.

    Gradients are those the update uses, of this rank's parts of this rank's shards; what another rank keeps is NaN.
    """

    def __init__(self, folder: Path, iterations: list[int]) -> None:
        self.folder, self.iterations, self.now = folder, iterations, 0
        self.arrays: dict[str, list[np.ndarray]] = {}

    def note(self, key: str, value: np.ndarray) -> None:
        if self.now in self.iterations:
            self.arrays.setdefault(key, []).append(np.array(value))

    def gradients(self, optimizer: Optimizer, factor: float) -> None:
        if self.now not in self.iterations:
            return
        rank = int(os.environ.get("RANK_ID", "0"))
        out = {key: np.stack(values) for key, values in self.arrays.items()}
        places = {}
        for parameter, segments in optimizer.segments_by_parameter():
            spec = shard_of(parameter)
            name = spec.name + (" (copy)" if spec.is_copy else "")
            local = np.full(int(np.prod(parameter.shape)), np.nan, np.float32)
            for s in segments:
                part = optimizer.ddp.buffers[s.buffer].grads.part(s.start, s.end).numpy()
                local[s.offset : s.offset + s.end - s.start] = part * (factor / optimizer.scaler.scale)
            out[f"grad/{name}"] = local.reshape(parameter.shape)
            boxes = [[list(box.local), list(box.globe)] for box in spec.boxes]
            places[name] = {"global_shape": spec.global_shape, "boxes": boxes}
        out["places"] = np.array(json.dumps(places))
        np.savez(self.folder / f"probe_{self.now}_{rank}.npz", **out)
        self.arrays.clear()


PROBE = Probe(Path(), [])


def install_probe() -> None:
    """Let the step, the loss and the update pass by the probe."""
    train, loss, update = TrainingStep.train, GPTModel.loss_of, Optimizer.step
    calls = itertools.count(1)

    @functools.wraps(train)
    def probed_train(self, data, iteration, *rest):
        PROBE.now = iteration
        return train(self, data, iteration, *rest)

    @functools.wraps(loss)
    def probed_loss(self, logits, labels):
        depths = self.config.mtp.mtp_num_layers if self.mtp is not None and self.mtp.streams.training else 0
        if next(calls) % (1 + depths):  # of tokens beyond the next one, which come first
            return loss(self, logits, labels)
        PROBE.note("logits", logits.asnumpy())
        PROBE.note("labels", labels.asnumpy())
        result = loss(self, logits, labels)
        PROBE.note("token_loss", result.asnumpy())
        return result

    @functools.wraps(update)
    def probed_update(self, scheduler, squares, gradient_factor=1.0):
        PROBE.gradients(self, gradient_factor)
        return update(self, scheduler, squares, gradient_factor)

    TrainingStep.train, GPTModel.loss_of, Optimizer.step = probed_train, probed_loss, probed_update


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    install_probe()
    rank, world_size = runtime.start_runtime()
    for name, entry in plan["runs"].items():
        folder = Path(plan["directory"]) / name
        folder.mkdir(parents=True, exist_ok=True)
        os.environ[LOG_DIR_VARIABLE] = str(folder)
        PROBE.folder, PROBE.iterations, PROBE.now = folder, entry.get("probe", []), 0
        status, text = 0, ""
        try:
            with (folder / f"console_{rank}.txt").open("w") as console, contextlib.redirect_stdout(console):
                pretrain(
                    None,
                    pretrain_gpt.model_provider_func,
                    forward_step_func=pretrain_gpt.model_forward_step,
                    argv=entry["argv"],
                )
        except (ParallelCoreError, Exception) as error:
            status = 1
            text = f"{error}" if isinstance(error, ParallelCoreError) else traceback.format_exc()
            if world_size > 1:
                raise
        finally:
            if rank == 0:
                (folder / "outcome.json").write_text(json.dumps({"status": status, "text": text}))


if __name__ == "__main__":
    run_dir = os.environ.get(LOG_DIR_VARIABLE)

    def ended() -> None:
        try:
            main()
        finally:
            if run_dir is not None:
                os.environ[LOG_DIR_VARIABLE] = run_dir  # where the launcher looks for this rank's report

    run_as_rank(ended)
