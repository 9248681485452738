"""What a loss is: by tokens, over everything that counts, in every form that a loss function may return."""

from __future__ import annotations

import math

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, mint, nn

from parallel_core.checkpoint import open_checkpoint
from parallel_core.errors import ConfigError, ParallelCoreError
from parallel_core.pipeline.loss_contract import checked_loss
from parallel_core.training.forward_step import forward_step, get_batch
from parallel_core.training.scalars import LossTotals
from tests.helpers.one_process import Samples, evaluations, iterations, run

EVALUATE = "--skip-train --eval-iters"


def some(index: int) -> np.ndarray:
    """Between one and seven tokens of eight count."""
    return (np.arange(8) < 1 + index % 7).astype(np.float32)


def own_loss(function):
    """A forward step with another loss function: `function(sum of the loss, number of tokens)` of a microbatch."""

    def step(data_iterator, model):
        tokens, labels, mask, document_start, positions = get_batch(data_iterator)
        output = model(tokens, positions, document_start, labels)
        return output, lambda losses: function((losses * mask).sum(), mask.sum())

    return step


def validation(folder, words: str, mask=some, number: int = 8) -> list:
    return evaluations(run(folder, words, datasets=(Samples(1), Samples(number, mask), None)))


def test_evaluation_loss_is_the_mean_over_tokens_whatever_the_batch_size(tmp_path):
    ((_, _, four),) = validation(tmp_path / "a", f"{EVALUATE} 2")
    ((_, _, one),) = validation(tmp_path / "b", f"{EVALUATE} 8 --micro-batch-size 1 --global-batch-size 1")
    ((_, _, all_),) = validation(tmp_path / "c", f"{EVALUATE} 1 --micro-batch-size 8 --global-batch-size 8")
    assert one == pytest.approx(all_, rel=1e-6) and four == pytest.approx(all_, rel=1e-6)
    ((_, _, sample_0),) = validation(tmp_path / "d", f"{EVALUATE} 1 --micro-batch-size 1 --global-batch-size 1")
    assert abs(sample_0 / all_ - 1) > 1e-4  # samples differ, so a mean of means would too


def test_a_fully_masked_batch_counts_nothing_in_an_evaluation(tmp_path):
    ((_, _, both),) = validation(tmp_path / "a", f"{EVALUATE} 2", lambda index: float(index < 4))
    ((_, _, first),) = validation(tmp_path / "b", f"{EVALUATE} 1", lambda index: float(index < 4))
    assert both == first


def test_an_evaluation_in_which_no_token_counts_has_no_loss(tmp_path):
    seen = run(tmp_path, f"{EVALUATE} 2", datasets=(Samples(1), Samples(8, lambda index: 0.0), None))
    assert [(row["loss"], row["ppl"]) for row in seen.rows] == [(None, None)]
    assert "INFO - Evaluation: validation, Step: 0, Loss: none, PPL: none" in seen.lines


def test_a_training_batch_in_which_no_token_counts_makes_no_update(tmp_path):
    data = Samples(16, lambda index: float(index // 4 != 1))  # the second of four batches
    seen = run(tmp_path, "--save ck --lr-decay-style linear --save-interval 1", datasets=(data, None, None))
    assert [row["loss"] is None for row in seen.rows] == [False, True, False, False]
    assert [row["skipped"] for row in seen.rows] == [False, True, False, False]
    assert [row["consumed_samples"] for row in seen.rows] == [4, 8, 12, 16]
    assert seen.rows[1]["lr"] == seen.rows[2]["lr"] > seen.rows[3]["lr"]  # the schedule waits for updates
    assert any("Step: 2, Loss: none," in line and "Skipped: 1," in line for line in seen.lines)
    one, two = (open_checkpoint(tmp_path / f"ck/iter_000000{i}") for i in (1, 2))
    assert (one.common["adam_step"], two.common["adam_step"]) == (1, 1)
    key = "decoder.layers.0.mlp.linear_fc1.weight"
    values = [np.empty(source.info(key).shape, np.float32) for source in (one, two)]
    for source, array in zip((one, two), values):
        source.read_into(key, [(0, n) for n in array.shape], array)
    np.testing.assert_array_equal(*values)  # neither weight decay nor momentum moved it


def test_a_reported_loss_that_is_not_finite_stops_the_run_by_name(tmp_path):
    broken = own_loss(lambda total, number: (total, number, {"lm loss": (total, number), "extra": (math.inf, 1)}))
    with pytest.raises(ParallelCoreError, match="iteration 1: the reported 'extra' is inf, though every gradient is"):
        run(tmp_path / "a", forward_step_func=broken)
    assert run(tmp_path / "a").rows  # nothing of it stays behind
    seen = run(tmp_path / "b", "--no-check-for-nan-in-loss-and-grad", forward_step_func=broken)
    assert iterations(seen) == [1, 2, 3, 4] and {row["extra"] for row in seen.rows} == {None}


def test_metrics_hold_null_where_a_number_is_not_finite(tmp_path):
    words = "--lr 1e38 --min-lr 1e38 --clip-grad 0 --optimizer sgd --init-method-std 20"
    seen = run(tmp_path, f"{words} --no-check-for-nan-in-loss-and-grad --eval-iters 1", datasets=None)
    assert seen.rows[-1]["loss"] is None or math.isfinite(seen.rows[-1]["loss"])
    assert None in {row.get("grad_norm", 0.0) for row in seen.rows}


def both(total: Tensor, number: Tensor) -> Tensor:
    return mint.cat((total.reshape(1), number.reshape(1)))


FORMS = {
    "sums of Python numbers": lambda total, number: (total, int(number), {"lm loss": (total, float(number))}),
    "a tensor of two": lambda total, number: (total, number, {"lm loss": both(total, number)}),
    "mean and a value": lambda total, number: (total / number, {"lm loss": total / number}),
    "shape [1]": lambda total, number: (total.reshape(1), number.reshape(1), {"lm loss": (total.reshape(1), number)}),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_a_loss_function(form, tmp_path):
    seen = run(tmp_path / "own", forward_step_func=own_loss(FORMS[form]))
    usual = run(tmp_path / "usual")
    for one, other in zip(seen.rows, usual.rows, strict=True):  # every token counts, so all forms say the same
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)


REFUSED = {
    "its loss is a tensor of shape [2, 8], not one number": lambda losses: (losses, losses.sum(), {}),
    "its number of tokens is a tensor of shape [2, 8]": lambda losses: (losses.sum(), losses, {}),
    "its number of tokens is a str": lambda losses: (losses.sum(), "8", {}),
    "its report is a tensor of shape []": lambda losses: (losses.sum(), losses.sum()),
    "its report['acc'] is a tensor of shape [2, 8]": lambda losses: (losses.sum(), {"acc": losses}),
    "its report['acc'][1] is a NoneType": lambda losses: (losses.sum(), {"acc": (losses.sum(), None)}),
    "got a tensor of shape []": lambda losses: losses.sum(),
    "got a tuple of 4": lambda losses: (losses.sum(), 1, {}, {}),
    "its loss is a float": lambda losses: (1.0, {}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_no_loss_is_refused_by_part_and_shape(message):
    with pytest.raises(ConfigError) as error:
        checked_loss(REFUSED[message](Tensor(np.ones((2, 8), np.float32))))
    assert str(error.value).startswith("loss_func must return (sum of the loss, number of tokens, {name: ")
    assert message in str(error.value)


def test_an_evaluation_may_report_other_losses_than_training(tmp_path):
    def step(data_iterator, model):
        output, loss_func = forward_step(data_iterator, model)
        training = model.training

        def named(losses):
            total, number, report = loss_func(losses)
            return total, number, report if training else {"half": (total / 2, number), **report}

        return output, named

    seen = run(tmp_path, "--eval-iters 1 --eval-interval 2", forward_step_func=step)
    found = {(row["iteration"], row.get("name", "lm loss")): row["loss"] for row in seen.rows
             if row.get("split") == "validation"}  # fmt: skip
    assert sorted(found) == [(2, "half"), (2, "lm loss"), (4, "half"), (4, "lm loss")]
    assert found[2, "half"] == pytest.approx(found[2, "lm loss"] / 2, rel=1e-6)
    assert iterations(seen) == [1, 2, 3, 4]
    assert not any("half" in row for row in seen.rows if "split" not in row)


class OwnModel(nn.Cell):
    """A linear model with MindSpore's dropout, and a note of which share of it was dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 32)
        self.dropout = nn.Dropout(p=0.5)
        self.seen: list[tuple[bool, float]] = []

    def construct(self, tokens, position_ids, document_start, labels):
        hidden = self.embedding(tokens) + 1.0
        dropped = self.dropout(hidden)
        self.seen.append((self.training, float((dropped == 0).astype(ms.float32).mean())))
        return nn.CrossEntropyLoss(reduction="none")(dropped.reshape(-1, 32), labels.reshape(-1)).reshape(labels.shape)


def test_dropout_of_a_model_of_ones_own_drops_in_training_and_not_in_evaluation(tmp_path):
    made: list[OwnModel] = []

    def provider(pre_process, post_process):
        made.append(OwnModel())
        return made[-1]

    run(tmp_path, "--eval-iters 1 --eval-interval 2", provider=provider)
    (model,) = made
    assert {training for training, _ in model.seen} == {True, False}
    for training, share in model.seen:
        assert 0.3 < share < 0.7 if training else share == 0.0


OF_A_COPY = {"what pretrain_gpt.py has": forward_step, "a loss_func without non_loss_data": own_loss(
    lambda total, number: (total, number, {"lm loss": (total, number)}))}  # fmt: skip


@pytest.mark.parametrize("kind", OF_A_COPY)
def test_a_copy_of_pretrain_gpt_may_collect_what_is_no_loss(kind, tmp_path):
    told = []
    run(tmp_path / "a", "--eval-iters 1 --eval-interval 2", forward_step_func=OF_A_COPY[kind],
        process_non_loss_data_func=lambda data, iteration, writer: told.append((data, iteration, writer)))  # fmt: skip
    assert [(iteration, writer) for _, iteration, writer in told] == [(2, None), (4, None)]
    assert all([part.shape for part in data] == [(2, 8), (2, 8)] for data, _, _ in told)  # each token's loss


def test_a_loss_function_that_takes_non_loss_data_is_asked_for_it(tmp_path):
    told = []

    def step(data_iterator, model):
        output, loss_func = forward_step(data_iterator, model)
        return output, lambda losses, non_loss_data=False: "mine" if non_loss_data else loss_func(losses)

    run(tmp_path, "--eval-iters 1", forward_step_func=step,
        process_non_loss_data_func=lambda data, iteration, writer: told.append(data))  # fmt: skip
    assert told == [["mine", "mine"]]


def test_totals_of_batches_are_those_of_one_batch():
    """Random splits of random losses: what is added up in parts is what is added up at once."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        parts = [(float(rng.normal()), float(rng.integers(0, 3))) for _ in range(rng.integers(1, 9))]
        totals = LossTotals()
        for value, count in parts:
            totals.add(LossTotals({"x": value * count}, {"x": count}))
        number = sum(count for _, count in parts)
        mean = totals.means()["x"]
        assert (mean is None) == (number == 0)
        if mean is not None:
            assert mean == pytest.approx(sum(v * c for v, c in parts) / number, abs=1e-12)


def test_the_tensor_of_a_loss_keeps_its_gradient():
    """The three-part form changes no number: a scalar goes through as the same object."""
    total = Tensor(np.float32(3.0))
    assert checked_loss((total, 2, {}))[0] is total
