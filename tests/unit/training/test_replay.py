"""An iteration whose numbers cannot be right: replayed layer by layer, computed twice, told of."""

from __future__ import annotations

import math

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from parallel_core.checkpoint import open_checkpoint
from parallel_core.diagnose.results import SAMPLES, Rejection, Usual, difference
from parallel_core.errors import CheckpointError, ConfigError, ParallelCoreError, ResultError
from parallel_core.training import results
from parallel_core.training.step import TrainingStep
from parallel_core.transformer.models import make_model
from tests.helpers.one_process import iterations, run

TWO_LAYERS = "--num-layers 2 --hidden-dropout 0.5 --save-interval 1"


class Bursting(nn.Cell):
    """A layer's MLP whose output overflows in one iteration."""

    def __init__(self, mlp: nn.Cell, streams, iteration: int) -> None:
        super().__init__()
        self.mlp, self.streams, self.iteration = mlp, streams, iteration

    def construct(self, hidden: Tensor):
        output, bias = self.mlp(hidden)
        now = self.streams.get_state()[0]
        return (output * 1e38 * 1e38 if now == self.iteration else output), bias


def bursting(iteration: int, layer: int = 1):
    def provider(pre_process, post_process, stage):
        model = make_model(stage)
        layers = model.decoder.layers
        layers[layer].mlp = Bursting(layers[layer].mlp, stage.streams, iteration)
        return model

    return provider


def test_a_run_that_stops_is_replayed_from_the_checkpoint_before(tmp_path):
    words = f"{TWO_LAYERS} --save {tmp_path}/ck --lr 1e-3"
    arguments = {"provider": bursting(4)}
    with pytest.raises(ResultError, match=r"parameters whose gradient is not finite(.|\n)*--replay 4"):
        run(tmp_path / "run", f"{words} --save-interval 2", **arguments)
    before = sorted(str(path) for path in (tmp_path / "ck").rglob("*"))
    with pytest.raises(ResultError) as told:
        run(tmp_path / "replay", f"{words} --replay 4", **arguments)
    text = str(told.value)
    assert "replay of iteration 4: the first value that is not finite is on rank 0" in text
    assert "output 0 of decoder.layers.1.mlp (Bursting): float32 [8, 2, 8], 0 NaN and 128 infinite of 128" in text
    assert "in the forward pass of microbatch 0 at pipeline stage 0" in text
    assert "its input: float32 [8, 2, 8], finite" in text
    assert "the last one before it, output 1 of decoder.layers.1.mlp.mlp (MLP), was finite" in text
    assert sorted(str(path) for path in (tmp_path / "ck").rglob("*")) == before  # a replay writes no checkpoint


@pytest.mark.slow
def test_a_replay_has_the_numbers_of_the_run(tmp_path):
    words = f"{TWO_LAYERS} --save {tmp_path}/ck --lr 1e-3"
    calm = run(tmp_path / "calm", words)
    with pytest.raises(ConfigError, match="the checkpoint that is loaded is of iteration 3; give one before"):
        run(tmp_path / "late", f"{words} --load {tmp_path}/ck/iter_0000003 --save null --replay 2")
    seen = run(tmp_path / "finite", f"{words} --replay 4")
    (third,) = [line for line in seen.lines if "Step: 4" in line]  # the same numbers as the run itself had
    assert third.split(", Time")[0] == next(x for x in calm.lines if "Step: 4" in x).split(", Time")[0]
    assert "INFO - Replay of iteration 4, from iteration 3" in seen.lines and not seen.rows
    assert any("every parameter, output and gradient is finite" in line for line in seen.lines)


@pytest.mark.slow
def test_what_grew_most_and_an_iteration_on_the_way_that_fails_already(tmp_path):
    seen = run(tmp_path / "a", "--replay 3")
    at = next(i for i, line in enumerate(seen.lines) if "what grew most since the iteration before" in line)
    assert " before" in seen.lines[at + 1] and "decoder.layers.0" in "".join(seen.lines[at:])
    with pytest.raises(ResultError, match="The iteration on the way, 2, fails already"):
        run(tmp_path / "b", f"{TWO_LAYERS} --replay 4", provider=bursting(2))


@pytest.mark.slow
def test_a_parameter_and_a_gradient(tmp_path):
    wild = "--lr 1e38 --clip-grad 0 --optimizer sgd --init-method-std 20"
    with pytest.raises(ResultError, match=r"parameter decoder.layers.0(.|\n)*before the iteration begins"):
        run(tmp_path / "a", f"{wild} --replay 2")
    # The forward pass is finite; the gradients carry a factor that is too large for them.
    with pytest.raises(ResultError, match=r"gradient of (.|\n)*in the backward pass of microbatch 0(.|\n)*was finite"):
        run(tmp_path / "b", "--loss-scale 1e38 --init-method-std 30 --replay 1")


@pytest.mark.slow
def test_looking_changes_no_number(tmp_path):
    """Losses and updates of an iteration that is looked at are those of one that is not, to the bit."""
    full = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    for words in (full, "--num-experts 4"):
        plain = run(tmp_path / words[2:7] / "a", f"{TWO_LAYERS} {words} --save ck")
        with pytest.raises(ResultError, match=r"output (0 )?of decoder.layers.1.mlp \(Bursting"):
            run(tmp_path / words[2:7] / "b", f"{TWO_LAYERS} {words} --replay 4", provider=bursting(4))
        seen = run(tmp_path / words[2:7] / "c", f"{TWO_LAYERS} {words} --replay 4")
        losses = [line.split("Loss: ")[1].split(",")[0] for line in seen.lines if "Step: " in line]
        assert losses == [f"{row['loss']:.10f}" for row in plain.rows]


# ---- computed twice -------------------------------------------------------------------------------------------------
VALIDATE = f"{TWO_LAYERS} --rerun-mode validate_results --save ck"


@pytest.mark.slow
def test_computing_twice_changes_no_number_and_finds_no_difference(tmp_path):
    words = f"{TWO_LAYERS} --num-experts 4 --moe-router-score-function sigmoid --moe-router-enable-expert-bias"
    once = run(tmp_path / "once", words)
    twice = run(tmp_path / "twice", f"{words} --rerun-mode report_stats")
    numbers = [[row[key] for key in ("loss", "grad_norm", "lr")] for row in once.rows]
    assert numbers == [[row[key] for key in ("loss", "grad_norm", "lr")] for row in twice.rows]
    assert "INFO - Rerun, up to iteration 4: losses: 8 computed twice, all identical" in twice.lines
    assert "INFO - Rerun, up to iteration 4: gradient norms: 4 computed twice, all identical" in twice.lines


class Flaky:
    """Makes `TrainingStep._compute` give a wrong gradient once, or always from one iteration on."""

    def __init__(self, monkeypatch, iteration: int, times: int) -> None:
        self.left, real = times, TrainingStep._compute

        def compute(step, *arguments):
            found = real(step, *arguments)
            if step._iteration == iteration and self.left:
                self.left -= 1
                step.ddp.buffers[0].grads.numpy()[:4] = np.inf
                found = type(found)(found.losses, found.tokens, math.inf, found.stop)
            return found

        monkeypatch.setattr(TrainingStep, "_compute", compute)


def test_a_result_that_is_another_the_second_time_ends_the_run_with_17(tmp_path, monkeypatch):
    Flaky(monkeypatch, 3, 1)
    with pytest.raises(ResultError) as told:
        run(tmp_path, VALIDATE)
    assert told.value.exit_status == 17
    assert "unexpected gradient norm inf: it is not finite; now 0." in str(told.value)
    assert "possibly a passing error of the hardware" in str(told.value)


@pytest.mark.slow
def test_a_result_that_is_the_same_is_computed_on_another_machine(tmp_path, monkeypatch):
    Flaky(monkeypatch, 3, 99)
    with pytest.raises(ResultError) as told:
        run(tmp_path, VALIDATE)
    assert told.value.exit_status == 16 and "the same again" in str(told.value)
    saved = open_checkpoint(tmp_path / "ck/iter_0000002").common["rerun"]
    assert saved["iteration"] == 3 and saved["ranks"]["0"]["value"] == "inf"
    with pytest.raises(ResultError, match="on the same machine again") as told:
        run(tmp_path, f"{VALIDATE} --load ck")
    assert told.value.exit_status == 16
    monkeypatch.setattr(results, "_place", lambda: "another")
    with pytest.raises(ResultError, match="the same on another: the machine is right") as told:
        run(tmp_path, f"{VALIDATE} --load ck")
    assert told.value.exit_status == 17
    monkeypatch.undo()
    monkeypatch.setattr(results, "_place", lambda: "another")
    with pytest.raises(ResultError, match=r"on another it is 0\.\d+: possibly a lasting error of ") as told:
        run(tmp_path, f"{VALIDATE} --load ck")
    assert told.value.exit_status == 17
    monkeypatch.undo()
    seen = run(tmp_path, f"{TWO_LAYERS} --load ck")  # the state before the iteration is what was saved
    assert [row["loss"] for row in seen.rows] == [row["loss"] for row in run(tmp_path / "calm", TWO_LAYERS).rows]
    assert any("--rerun-mode validate_results does that" in line for line in seen.lines)
    assert iterations(seen) == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "status"), [("transient_error", 17), ("persistent_error", 16), ("correct_result", 16)]
)
def test_injected_errors_end_as_their_kind_does(kind, status, tmp_path, monkeypatch):
    # The first is not in iteration 1, before which there is nothing to save.
    words = f"{VALIDATE} --error-injection-rate 12 --error-injection-type {kind}"
    words += f" --result-rejected-tracker-filename {tmp_path}/rejected"
    with pytest.raises(ResultError, match="an error is injected") as told:
        run(tmp_path, f"{words} --train-iters 40 --seed 2")
    assert told.value.exit_status == status
    line, then = (tmp_path / "rejected").read_text().splitlines()
    assert "status=initial_run" in line and "rank=0 iteration=" in line and "message='" in line
    assert ("status=first_rerun_not_reproducible" if status == 17 else "status=first_rerun_reproducible") in then
    if status == 16:
        monkeypatch.setattr(results, "_place", lambda: "another")
        lasting = "possibly a lasting error" if kind == "persistent_error" else "the machine is right"
        with pytest.raises(ResultError, match=lasting) as told:
            run(tmp_path, f"{words} --train-iters 40 --seed 2 --load ck")
        assert told.value.exit_status == 17


@pytest.mark.slow
def test_a_spike_is_told_and_training_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("parallel_core.diagnose.results.SAMPLES", 4)  # two iterations of two microbatches
    factor = {3: 1000.0}

    def loss_func(model):
        from tests.unit.training.test_losses import own_loss

        steps = iter(range(2, 100))

        def scaled(total, number):
            scale = factor.get(next(steps) // 2, 1.0)
            return total * scale, number, {"lm loss": (total * scale, number)}

        return own_loss(scaled)

    seen = run(tmp_path / "a", "--check-for-spiky-loss --check-for-large-grads", forward_step_func=loss_func(None))
    warned = [line for line in seen.lines if "unexpected loss" in line]
    assert len(warned) == 2 and all("iteration 3, rank 0" in line and "--replay 3" in line for line in warned)
    assert iterations(seen) == [1, 2, 3, 4]
    seen = run(tmp_path / "b", "--check-for-spiky-loss --rerun-mode validate_results",
               forward_step_func=loss_func(None))  # fmt: skip
    assert any("unexpected loss" in line and "now 3" in line and "training goes on" in line for line in seen.lines)
    assert iterations(seen) == [1, 2, 3, 4]


def test_what_is_unexpectedly_large():
    usual = Usual()
    assert [usual.exceeded_by(value) for value in [*np.linspace(0.5, 2.0, SAMPLES), 19.9, math.nan, math.inf]] == [
        None
    ] * (SAMPLES + 3)
    assert usual.exceeded_by(-20.0) == 2.0
    assert difference(math.nan, math.nan) == difference(math.inf, math.inf) == 0.0
    assert difference(1.0, math.nan) == difference(math.inf, -math.inf) == math.inf
    assert difference(1.0, 1.001) == pytest.approx(0.001, rel=0.01)


def test_what_a_checkpoint_says_of_a_rejected_result_is_read_by_type():
    good = Rejection("gradient norm", math.nan, "why", True, "host").to_record()
    assert Rejection.of_record(good, "x").to_record() == good
    for key, value in (("value", "many"), ("value", 3), ("fatal", "yes"), ("place", None), ("result", 1)):
        with pytest.raises(CheckpointError, match=key):
            Rejection.of_record({**good, key: value}, "x")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--replay 9", "--replay 9, --train-iters 4: the run has iterations 1 to 4"),
        ("--replay -1", "is the number of an iteration, from 1"),
        ("--replay 2 --dataloader-type external", "cannot be brought to an iteration"),
        ("--error-injection-rate 3", "give --rerun-mode validate_results"),
        ("--result-rejected-tracker-filename x", "no result is checked"),
        ("--rerun-mode sometimes", "disabled, validate_results"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_name(words, said, tmp_path):
    with pytest.raises(ParallelCoreError) as told:
        run(tmp_path, words)
    assert said in str(told.value)
    assert ms.get_context("mode") == ms.PYNATIVE_MODE
