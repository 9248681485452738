"""Iterations whose results cannot be right, computed twice before their update (`--rerun-mode`)."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from typing import Any

import mindspore as ms
import numpy as np

from parallel_core.config.schema import AllConfig
from parallel_core.context import ParallelContext
from parallel_core.diagnose.results import GRADIENT_NORM, Differences, Rejection, Validation, difference, injected
from parallel_core.errors import CheckpointError, ConfigError, ResultError
from parallel_core.optimizer.loss_scaler import DynamicLossScaler
from parallel_core.records import Record
from parallel_core.training.batches import BatchSource, TensorBatch
from parallel_core.training.log import RunLog
from parallel_core.training.scalars import Scalars
from parallel_core.training.step import Attempts, TrainingStep

RESUME_TO_DISAMBIGUATE = 16
"""Exit status of a run that is to go on, from what it has saved, on another machine (Megatron-LM's)."""
FAILED_ON_RESULT_VALIDATION = 17
"""Exit status of a run with a result that cannot be right, and all is known that can be (Megatron-LM's)."""

Compute = Callable[[BatchSource], Scalars]


class RejectedResult(ResultError):
    """A result that cannot be right, and what computing it again has said.

    Attributes:
        saves: the state before the iteration is to be saved.
        rerun: what a run on another machine compares with, if there is to be one.
    """

    saves = False
    rerun: dict[str, Any] | None = None

    @classmethod
    def of(cls, text: str, status: int, *, saves: bool, rerun: dict[str, Any] | None = None) -> RejectedResult:
        """Return one with what follows from it."""
        error = cls(text)
        error.exit_status, error.saves, error.rerun = status, saves, rerun
        return error


def make_attempts(
    config: AllConfig, context: ParallelContext, step: TrainingStep, log: RunLog, pending: dict[str, Any] | None
) -> Attempts:
    """Return how often an iteration is computed, as the configuration says.

    Args:
        config: the run.
        context: this rank's groups.
        step: what runs iterations.
        log: is told of reruns.
        pending: what the loaded checkpoint says of a result that is to be computed on another machine.

    Raises:
        ConfigError: the file for rejected results cannot be written.
    """
    asked = config.training_config.diagnosis
    if pending is not None and asked.rerun_mode != "validate_results":
        log.warn("the checkpoint is of a run that ended by a result to be computed again on another machine; "
                 "--rerun-mode validate_results does that")  # fmt: skip
    checks = asked.check_for_spiky_loss or asked.check_for_large_grads
    if asked.rerun_mode == "disabled" and not checks:
        return step.attempts
    rerunner = Rerunner(config, context, step, log)
    if asked.rerun_mode == "disabled":
        return rerunner.tell
    if asked.rerun_mode == "report_stats":
        return rerunner.compare_always
    if pending is not None:
        rerunner.expect(pending)
    return rerunner.validate


class _Recorded(BatchSource):
    """Microbatches of one iteration, which can be had again."""

    def __init__(self, data: BatchSource) -> None:
        self._data = data
        self._kept: dict[int, list[TensorBatch]] = {}
        self._again = False

    def iterator(self, chunk: int) -> Iterator[TensorBatch]:
        """Return the microbatches of one chunk."""
        kept = self._kept.setdefault(chunk, [])
        if self._again:
            yield from kept
            return
        for batch in self._data.iterator(chunk):
            kept.append(batch)
            yield batch

    def rewind(self) -> None:
        """Begin again with the first microbatch."""
        self._again = True


class Rerunner:
    """Computes iterations, looks at each rank's own results, and computes again what cannot be right.

    A rank's results are the losses of its microbatches, each a mean over its tokens, and the gradient norm of the
    parameters that count on it, after reduction over data parallel ranks.

    Args:
        config: the run.
        context: this rank's groups.
        step: what runs iterations.
        log: is told of reruns.
    """

    def __init__(self, config: AllConfig, context: ParallelContext, step: TrainingStep, log: RunLog) -> None:
        training = config.training_config
        self._asked, self._context, self._step, self._log = training.diagnosis, context, step, log
        self._interval, self._seed = training.log_interval, training.seed
        finite = training.check_for_nan_in_loss_and_grad and not isinstance(step.scaler, DynamicLossScaler)
        self._place = _place()
        self._validation = Validation(
            finite and self._asked.rerun_mode == "validate_results",
            self._asked.check_for_spiky_loss,
            self._asked.check_for_large_grads,
            self._place,
        )
        self._differences = {True: Differences(), False: Differences()}
        self._expected: tuple[int, dict[int, Rejection]] | None = None
        if self._asked.result_rejected_tracker_filename:
            self._note(0, "started", None)

    # ---- the modes --------------------------------------------------------------------------------------------------
    def tell(self, iteration: int, data: BatchSource, compute: Compute) -> Scalars:
        """Compute once, and tell of what is unexpected."""
        found = compute(data)
        for rejection in self._validation.rejections(self._results()):
            self._note(iteration, "rerun_disabled", rejection)
            words = f"iteration {iteration}, rank {self._context.rank}: {_words(rejection)}"
            print(f"WARNING - {words}; --replay {iteration} shows what it comes from", flush=True)
        return found

    def compare_always(self, iteration: int, data: BatchSource, compute: Compute) -> Scalars:
        """Compute every iteration twice, and count the differences."""
        source, state = _Recorded(data), self._state()
        compute(source)
        first = self._results()
        found = self._again(source, state, compute)
        for result, value in self._results().items():
            self._differences[result != GRADIENT_NORM].add(difference(first[result], value))
        if self._interval and iteration % self._interval == 0:
            self._tell_differences(iteration)
        return found

    def validate(self, iteration: int, data: BatchSource, compute: Compute) -> Scalars:
        """Compute, and compute again where a rank's result cannot be right.

        Raises:
            RejectedResult: such a result, if it is one to end the run by.
        """
        source, state = _Recorded(data), self._state()
        found = compute(source)
        results = self._results()
        if self._expected is not None and self._expected[0] == iteration:
            return self._judge_elsewhere(iteration, results, found, state)
        rejection = next(iter(self._validation.rejections(results)), None) or injected(
            results, self._asked.error_injection_rate, self._asked.error_injection_type, self._place,
            (self._seed, iteration, self._context.rank),
        )  # fmt: skip
        rejected = self._of_ranks(rejection)
        if not rejected:
            return found
        for rank, one in rejected.items():
            self._log.warn(f"iteration {iteration}, rank {rank} on {one.place}: {_words(one)}; it is computed again")
        if rejection is not None:
            self._note(iteration, "initial_run", rejection)
        found = self._again(source, state, compute)
        return self._judge(iteration, rejection, rejected, found, state)

    # ---- what they say ----------------------------------------------------------------------------------------------
    def _judge(
        self, iteration: int, mine: Rejection | None, rejected: dict[int, Rejection], found: Scalars, state: Any
    ) -> Scalars:
        """Tell what the second run in place says; return it where the run goes on."""
        value = None if mine is None else self._results().get(mine.result)
        same = mine is not None and mine.is_reproduced_by(value, elsewhere=False)
        if mine is not None:
            self._note(iteration, f"first_rerun_{'' if same else 'not_'}reproducible", mine)
        answers = self._context.world.all_gather_object(None if mine is None else [same, repr(value)])
        fatal, lines = any(one.fatal for one in rejected.values()), []
        for rank, one in rejected.items():
            reproduced, value = answers[rank]
            says = "the same again" if reproduced else f"now {value}"
            verdict = "" if reproduced else ": possibly a passing error of the hardware"
            lines.append(f"iteration {iteration}, rank {rank} on {one.place}: {_words(one)}; {says}{verdict}")
        if not fatal:
            for line in lines:
                self._log.warn(f"{line}; training goes on")
            return found
        self._restore(state)
        passing = not all(answers[rank][0] for rank in rejected)
        if passing or iteration == 1:
            raise RejectedResult.of("\n".join(lines), FAILED_ON_RESULT_VALIDATION, saves=True)
        lines.append("Resume the run from what it saves, on other machines, to see whether the result is another there")
        sizes = [self._context.mesh.size(axis) for axis in ("tp", "pp", "cp", "dp")]
        rerun = {
            "iteration": iteration,
            "layout": sizes,
            "ranks": {str(rank): one.to_record() for rank, one in rejected.items()},
        }
        raise RejectedResult.of("\n".join(lines), RESUME_TO_DISAMBIGUATE, saves=True, rerun=rerun)

    def expect(self, pending: dict[str, Any]) -> None:
        """Take what a checkpoint says of the result to compute again; in another layout its ranks are others."""
        said = Record(pending, "the checkpoint's rerun", CheckpointError)
        sizes = [self._context.mesh.size(axis) for axis in ("tp", "pp", "cp", "dp")]
        if said.values.get("layout") != sizes:
            self._log.warn("the checkpoint has a result to compute again, but of another layout: it is not compared")
            return
        ranks = said.record("ranks")
        found = {}
        for key, values in ranks.values.items():
            if not (key.isdigit() and int(key) < self._context.world.size):
                ranks.refuse(key, "the number of a rank")
            found[int(key)] = Rejection.of_record(values, f"the checkpoint's rerun: rank {key}")
        self._expected = said.integer("iteration", 1), found

    def _judge_elsewhere(self, iteration: int, results: dict[str, float], found: Scalars, state: Any) -> Scalars:
        """Tell what a run from the checkpoint says of the result that it was saved for."""
        expected = self._expected[1] if self._expected is not None else {}
        self._expected = None
        mine = expected.get(self._context.rank)
        answer = None
        if mine is not None:
            value = results.get(mine.result)
            same = mine.is_reproduced_by(value, elsewhere=True)
            answer = [same, repr(value), self._place]
            if self._place != mine.place:
                self._note(iteration, f"second_rerun_{'' if same else 'not_'}reproducible", mine)
        answers = self._context.world.all_gather_object(answer)
        lines, here_again = [], False
        for rank, one in expected.items():
            reproduced, value, place = answers[rank]
            if place == one.place:
                here_again = True
                verdict = "it is on the same machine again: resume the same checkpoint on another"
            elif reproduced:
                verdict = f"the same on {place}: the machine is right; look at the model, the data and the settings"
            else:
                verdict = f"on {place} it is {value}: possibly a lasting error of {one.place}"
            lines.append(f"iteration {iteration}, rank {rank}: {_words(one)} on {one.place}; {verdict}")
        if not any(one.fatal for one in expected.values()):
            for line in lines:
                self._log.warn(f"{line}; training goes on")
            return found
        self._restore(state)
        status = RESUME_TO_DISAMBIGUATE if here_again else FAILED_ON_RESULT_VALIDATION
        raise RejectedResult.of("\n".join(lines), status, saves=False)

    def _tell_differences(self, iteration: int) -> None:
        for of_loss, name in ((True, "losses"), (False, "gradient norms")):
            mine = self._differences[of_loss]
            total = Differences()
            for values in self._context.world.all_gather_object(vars(mine)):
                total.combine(Differences(**values))
            self._log.info(f"Rerun, up to iteration {iteration}: {name}: {total.text()}")

    # ---- a rank's own -----------------------------------------------------------------------------------------------
    def _results(self) -> dict[str, float]:
        found = {}
        speaks = self._context.tp.rank == 0  # the loss is one number of the tensor parallel group
        for microbatch, (_, report) in enumerate(self._step.reports if speaks else ()):
            name = "lm loss" if "lm loss" in report else next(iter(report), "")
            if name:
                total, number = (float(value) for value in report[name])
                if number:
                    found[f"loss of its microbatch {microbatch}"] = total / number
        squares = float(self._step.optimizer.local_squares())
        norm = math.sqrt(squares) if squares >= 0 else math.nan
        scale = self._step.scaler.scale
        return {**found, GRADIENT_NORM: norm / scale}

    def _state(self) -> tuple[Any, ...]:
        """Return what an iteration changes before its update."""
        return np.random.get_state(), ms.get_rng_state(), self._step.model.ledger.biases()

    def _restore(self, state: tuple[Any, ...]) -> None:
        np.random.set_state(state[0])
        ms.set_rng_state(state[1])
        self._step.model.ledger.set_biases(state[2])

    def _again(self, source: _Recorded, state: tuple[Any, ...], compute: Compute) -> Scalars:
        self._restore(state)
        source.rewind()
        return compute(source)

    def _of_ranks(self, rejection: Rejection | None) -> dict[int, Rejection]:
        """Return what the ranks have rejected; collective."""
        answers = self._context.world.all_gather_object(None if rejection is None else rejection.to_record())
        where = "what a rank rejects"
        return {rank: Rejection.of_record(one, where) for rank, one in enumerate(answers) if one is not None}

    def _note(self, iteration: int, status: str, rejection: Rejection | None) -> None:
        """Add a line to the file of rejected results, in Megatron-LM's form."""
        path = self._asked.result_rejected_tracker_filename
        if not path:
            return
        line = ""
        if rejection is not None:
            node, _, device = self._place.partition(" device ")
            line = (
                f"ts={time.strftime('%Y-%m-%d %H:%M:%S')} node={node} device={device or 0} "
                f"jobID={os.environ.get('SLURM_JOBID', 'N/A')} rank={self._context.rank} iteration={iteration} "
                f"status={status} result={rejection.value!r} message='{rejection.result}: {rejection.why}'\n"
            )
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise ConfigError(
                f"--result-rejected-tracker-filename {path} cannot be written: {error.strerror}"
            ) from None


def _words(rejection: Rejection) -> str:
    return f"unexpected {rejection.result} {rejection.value:.6g}: {rejection.why}"


def _place() -> str:
    """Return the machine, and the device where a machine has several."""
    device = f" device {ms.get_context('device_id')}" if ms.get_context("device_target") == "Ascend" else ""
    return f"{platform.node()}{device}"
