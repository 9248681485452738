"""Logits, losses and every gradient of single iterations against Megatron-LM's, on one process and in every layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.runs import Run, several
from tests.parity.golden import LAYOUTS, arguments, arrays, assert_follows, curve

# float32 sums of up to 64 x 256 terms in another order. Relative to the largest element of each tensor: the error of a
# sum goes with the size of its terms, not with the size of a result in which they cancel.
TOLERANCE = 1e-5
CURVE_TOLERANCE = 2e-6  # see test_curves.py
STEPS = (1, 11)
SLOW_LAYOUTS = ("tp2pp2", "tp2dp2distopt", "tp2pp2dp2")


def plan(model: str, layout: str, initial: str) -> dict:
    # Eleven iterations of a run that is 20 long: the second probe sees weights and data after ten updates.
    flags = arguments(model, layout, "--load", initial, "--finetune", "--exit-interval", "11")
    return {"argv": flags, "probe": list(STEPS)}


@pytest.fixture(scope="module")
def runs(workplace: Path, initial, tmp_path_factory):
    """A function (model, layout) -> run; the runs of one number of ranks share a job, started when first asked for."""
    directory = tmp_path_factory.mktemp("one_step")
    done: dict[str, dict[str, Run]] = {}

    def get(model: str, layout: str) -> Run:
        ranks = LAYOUTS[layout][0]
        group = f"{ranks}_ranks"
        if group not in done:
            entries = {
                f"{m}-{l}": plan(m, l, initial[m])
                for m in ("gpt2", "llama") for l in LAYOUTS if LAYOUTS[l][0] == ranks
            }  # fmt: skip
            done[group] = several(directory / group, ranks, entries, cwd=workplace)
        return done[group][f"{model}-{layout}"]

    return get


def probed(run: Run, iteration: int) -> list[dict[str, np.ndarray]]:
    """Return what each rank wrote at an iteration."""
    out = []
    for path in sorted(run.log_dir.glob(f"probe_{iteration}_*.npz"), key=lambda p: int(p.stem.split("_")[-1])):
        with np.load(path) as found:
            out.append({name: found[name] for name in found.files})
    return out


def full_gradients(ranks: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Put the ranks' parts together; where several have the same element, they must have the same value."""
    full: dict[str, np.ndarray] = {}
    for rank in ranks:
        for name, place in json.loads(str(rank["places"])).items():
            target = full.setdefault(name, np.full(place["global_shape"], np.nan, np.float32))
            for local, where in place["boxes"]:
                source = rank[f"grad/{name}"][tuple(slice(*pair) for pair in local)]
                part = target[tuple(slice(*pair) for pair in where)]
                both = ~np.isnan(source) & ~np.isnan(part)
                assert np.array_equal(source[both], part[both]), f"replicas of {name} have different gradients"
                part[...] = np.where(np.isnan(source), part, source)
    for name in [name for name in full if name.endswith(" (copy)")]:
        copy = full.pop(name)
        assert np.array_equal(copy, full[name.removesuffix(" (copy)")]), "the stages' shared embeddings differ"
    return full


def relative_error(got: np.ndarray, golden: np.ndarray) -> float:
    assert got.shape == golden.shape
    return float(np.abs(got - golden).max() / np.abs(golden).max())  # NaN compares as wrong


def sizes(layout: str) -> tuple[int, int]:
    tensor = 2 if "tp2" in layout else 1
    data = 2 if "dp2" in layout else 1
    return tensor, data


def assert_step_agrees(run: Run, iteration: int, layout: str, io: dict, gradients: dict) -> None:
    assert run.status == 0, run.console
    ranks = probed(run, iteration)
    assert len(ranks) == LAYOUTS[layout][0]
    tensor, data = sizes(layout)
    last_stage = [rank for rank in ranks if "logits" in rank]
    assert len(last_stage) == tensor * data  # in rank order: tensor parallel ranks of each data parallel rank
    for number in range(data):
        replica = last_stage[number * tensor : (number + 1) * tensor]
        logits = np.concatenate([rank["logits"] for rank in replica], axis=-1).transpose(0, 2, 1, 3)
        for microbatch in range(4 // data):
            rows = slice(2 * (microbatch * data + number), 2 * (microbatch * data + number) + 2)
            assert np.array_equal(replica[0]["labels"][microbatch], io["labels"][rows])
            for got, key in ((logits[microbatch], "logits"), (replica[0]["token_loss"][microbatch], "token_loss")):
                error = relative_error(got, io[key][rows])
                assert error < TOLERANCE, f"{key} of microbatch {microbatch} of data parallel rank {number}: {error}"
    step = run.steps[iteration]
    assert abs(step["loss"] / io["loss"] - 1) < TOLERANCE
    assert abs(step["grad_norm"] / io["grad_norm"] - 1) < TOLERANCE
    got = full_gradients(ranks)
    assert sorted(got) == sorted(gradients)
    errors = {name: relative_error(got[name], gradients[name]) for name in gradients}
    wrong = {name: error for name, error in errors.items() if not error < TOLERANCE}
    assert not wrong, wrong


def layouts() -> list:
    return [
        pytest.param(model, layout, id=f"{model}-{layout}",
                     marks=[pytest.mark.slow] if layout in SLOW_LAYOUTS else [])
        for layout in LAYOUTS for model in ("gpt2", "llama")
    ]  # fmt: skip


@pytest.mark.parametrize("iteration", STEPS)
@pytest.mark.parametrize(("model", "layout"), layouts())
def test_logits_losses_and_every_gradient(model: str, layout: str, iteration: int, runs):
    io = arrays(model, f"step_{iteration:04d}_io.npz")
    gradients = arrays(model, f"step_{iteration:04d}_grads.npz")
    assert_step_agrees(runs(model, layout), iteration, layout, io, gradients)


@pytest.mark.parametrize(("model", "layout"), layouts())
def test_eleven_iterations_follow_megatron(model: str, layout: str, runs):
    golden = curve(model, "tp1pp1" if layout == "tp2pp2dp2" else layout)
    assert_follows(runs(model, layout).steps, {i: golden[i] for i in range(1, 12)}, CURVE_TOLERANCE)
