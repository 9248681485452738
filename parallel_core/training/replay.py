"""`--replay N`: iteration N once more, from the newest checkpoint before it, with every layer looked at.

The iterations between are trained as they were: data, dropout and the learning rate follow from the checkpoint and the
seed. Nothing is written but what the ranks say.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from parallel_core.checkpoint.layout_files import list_iterations
from parallel_core.config.diagnosis import DiagnosisConfig
from parallel_core.config.schema import AllConfig, ProfileConfig, TrackingConfig
from parallel_core.context import ParallelContext
from parallel_core.diagnose.finite import FiniteWatch, Found
from parallel_core.errors import ConfigError, ResultError, bullet_list
from parallel_core.training.checkpointing import Checkpointer, Progress
from parallel_core.training.log import RunLog, Stopwatch, log_folder
from parallel_core.training.next_commands import Invocation, command_again
from parallel_core.training.results import RejectedResult
from parallel_core.training.step import StepReport, TrainingStep

_MOST_ROWS = 8


class Run(Protocol):
    """What is asked of a `TrainingRun`."""

    config: AllConfig
    context: ParallelContext
    step: TrainingStep
    progress: Progress
    checkpointer: Checkpointer
    invocation: Invocation | None
    log: RunLog

    def run_iteration(self, watch: Stopwatch) -> StepReport:
        """Run the next iteration, and tell of it."""

    def close(self) -> None:
        """End what goes on beside the loop."""


def until_replay(config: AllConfig) -> AllConfig:
    """Return the configuration of a run that leads to the iteration to replay, and writes nothing.

    Its checkpoints are those that the run has saved, else those that it began from. Without a replay: as it is.
    """
    training = config.training_config
    number = training.diagnosis.replay
    if not number:
        return config
    changes: dict[str, Any] = {"output_dir": "", "async_save": False}
    if training.output_dir and any(i < number for i in list_iterations(Path(training.output_dir))):
        changes |= {"load_checkpoint": training.output_dir, "ckpt_step": 0, "finetune": False, "resume_training": True}
        changes |= {"no_load_optim": False, "no_load_rng": False, "new_dataset": False}
    elif training.load_checkpoint == training.output_dir:
        changes["load_checkpoint"] = ""  # the run began from random weights
    changes |= {"tracking": TrackingConfig(), "profile": ProfileConfig(), "diagnosis": DiagnosisConfig(replay=number)}
    return dataclasses.replace(config, training_config=dataclasses.replace(training, **changes))


def replay(run: Run) -> None:
    """Train up to the iteration to replay, run it with every layer looked at, and say what was found; collective.

    Raises:
        ResultError: a value was not finite: the first one by layer and tensor, on whichever rank it was.
        ConfigError: the run is past the iteration already.
    """
    number, begun = run.config.training_config.diagnosis.replay, run.progress.iteration
    if begun >= number:
        raise ConfigError(f"--replay {number}: the checkpoint that is loaded is of iteration {begun}; give one before")
    run.log.info(f"Replay of iteration {number}, from {f'iteration {begun}' if begun else 'the beginning'}")
    watch, before = Stopwatch(), {}
    while run.progress.iteration < number - 1:
        if run.progress.iteration == number - 2:  # what is usual, to compare with
            with watch_of(run.step, run.context) as usual:
                run.run_iteration(watch)
            before = usual.largest
        else:
            run.run_iteration(watch)
    failure: ResultError | None = None
    with watch_of(run.step, run.context) as looked:
        try:
            run.run_iteration(watch)
        except ResultError as error:
            failure = error
    record = None if looked.first is None else looked.first.to_record()
    found = [Found.of_record(one) for one in run.context.world.all_gather_object(record) if one is not None]
    found.sort(key=lambda one: one.order)
    if found:
        raise ResultError(_told(run, number, found))
    if failure is not None:
        raise ResultError(f"{failure}\nreplay of iteration {number}: every parameter, every layer's output and every "
                          "gradient was finite on every rank; what is not comes after them, in loss_func")  # fmt: skip
    for line in _largest(run, number, looked.largest, before):
        run.log.info(line)
    run.close()


def watch_of(step: TrainingStep, context: ParallelContext) -> FiniteWatch:
    """Return what looks at a rank's model chunks while they run."""
    placement, chunks = step.model.layout.placement, step.model.chunks

    def gradients() -> Iterator[tuple[str, np.ndarray]]:
        for buffer in step.ddp.buffers:
            for index in buffer.slots:
                gradient = buffer.main_grad(index)
                if not np.isfinite(gradient.sum_of_squares()):
                    yield buffer.names[index], gradient.numpy()

    stages = [placement.stage(context.pp.rank, chunk) for chunk in range(len(chunks))]
    size, own = context.dp.size, context.dp.rank
    return FiniteWatch(chunks, stages, context.rank, lambda microbatch: microbatch * size + own, gradients)


def _told(run: Run, number: int, found: list[Found]) -> str:
    first, *others = found
    where = run.context.mesh.coordinates(first.rank)
    place = ", ".join(f"{axis} {index}" for axis, index in where.items() if run.context.mesh.size(axis) > 1)
    lines = [
        f"replay of iteration {number}: the first value that is not finite is on rank {first.rank}"
        f"{f' ({place})' if place else ''}:",
        f"  {first.what}: {first.values}",
        f"  {first.when}",
        *(f"  {line}" for line in first.beside),
    ]
    if others:
        lines.append("the first on other ranks, which follow from it or stand beside it:")
        lines.append(bullet_list([f"rank {one.rank}: {one.what}, {one.values}, {one.when}" for one in others]))
    return "\n".join(lines)


def _largest(run: Run, number: int, now: Mapping[str, float], before: Mapping[str, float]) -> list[str]:
    """Return lines about the values that grew most since the iteration before, or are largest; collective."""
    growth = {name: value / before[name] if before.get(name) else 0.0 for name, value in now.items()}
    key = growth if before else now
    mine = sorted(now, key=lambda name: key[name], reverse=True)[:_MOST_ROWS]
    rows = [(key[name], name, now[name], before.get(name)) for name in mine]
    told = [(rank, *row) for rank, rows in enumerate(run.context.world.all_gather_object(rows)) for row in rows]
    told.sort(key=lambda row: row[1], reverse=True)
    lines = [f"Replay of iteration {number}: every parameter, output and gradient is finite on every rank; "
             + ("what grew most since the iteration before:" if before else "the largest values:")]  # fmt: skip
    for rank, _, name, value, was in told[:_MOST_ROWS]:
        since = f", {was:.4g} before" if was is not None else ""
        lines.append(f"  rank {rank}: {name}: {value:.4g}{since}")
    return lines


def explained(run: Run, error: ResultError) -> ResultError:
    """Return an error of the running iteration with what to do next; collective.

    What has to be computed again on another machine is saved first: the state before the iteration.
    """
    number, training = run.progress.iteration + 1, run.config.training_config
    text = str(error)
    if isinstance(error, RejectedResult) and error.saves:
        if training.output_dir and run.progress.iteration:
            run.checkpointer.save(dataclasses.replace(run.progress, rerun=error.rerun))
            run.checkpointer.finish()
            text += f"\nthe state before iteration {number} is saved in {training.output_dir}"
        else:
            text += f"\nnothing is saved: {'there is no --save' if run.progress.iteration else 'no update was made'}"
    if not training.diagnosis.replay:
        words = _command(run, number)
        text += f"\nWhich layer it comes from: {words}"
    elif number != training.diagnosis.replay:
        text += f"\nThe iteration on the way, {number}, fails already: replay that one"
    explained = type(error)(text)
    explained.exit_status = error.exit_status
    return explained


def _command(run: Run, number: int) -> str:
    again = None if run.invocation is None else command_again(
        run.invocation,
        ["--replay", str(number)],
        run.context.mesh.world_size,
        log_dir=str(log_folder(run.config.training_config.log_dir) / f"replay_{number}"),
    )  # fmt: skip
    return again or f"run it again with training_config.diagnosis.replay={number} (--replay {number})"
