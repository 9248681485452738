"""End-of-document masks, losses per token and recomputation against Megatron-LM's runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.e2e.runs import Run, several
from tests.parity.golden import CONTEXT_LAYOUTS, LAYOUTS, arguments, arrays, assert_follows, curve
from tests.parity.test_one_step import assert_step_agrees, full_gradients, probed, relative_error

TOLERANCE = 2e-6  # float32, 20 updates: see test_curves.py
MASKS = "--eod-mask-loss --reset-position-ids --reset-attention-mask".split()
PER_TOKEN = "--calculate-per-token-loss"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()
BLOCK = "--recompute-granularity full --recompute-method block --recompute-num-layers 2".split()
SELECTIVE = "--recompute-granularity selective".split()
DROPOUT = "--attention-dropout 0.1 --hidden-dropout 0.1 --exit-interval 4".split()
SHORT = ["--exit-interval", "10"]
"""Half of Megatron's curve: the whole way of it is test_curves.py's business."""
MASKED_LAYOUTS = ("tp1pp1", "tp2pp1", "tp1pp2", "dp2distopt")
CUT_LAYOUTS = ("cp2", "cp2allgather", "cp2a2a")
"""Documents begin anywhere in sequences that are cut over two ranks."""
RANKS = {layout: ranks for layout, (ranks, _) in {**LAYOUTS, **CONTEXT_LAYOUTS}.items()}
PLAN: dict[str, tuple[str, list[str]]] = {
    **{f"masks-{layout}": (layout, [*MASKS, *SHORT]) for layout in MASKED_LAYOUTS},
    **{f"masks-{layout}": (layout, [*MASKS, *SHORT]) for layout in CUT_LAYOUTS},
    "per_token": ("tp1pp1", [*MASKS, PER_TOKEN, "--exit-interval", "3"]),
    "per_token-dp2": ("dp2", [*MASKS, PER_TOKEN, "--exit-interval", "3"]),
    "per_token-pp2vpp2": ("pp2vpp2", [*MASKS, PER_TOKEN, "--exit-interval", "3"]),
    "one_microbatch": ("tp1pp1", [*MASKS, "--micro-batch-size", "8", "--exit-interval", "3"]),
    "full": ("tp1pp1", [*FULL, *SHORT]),
    "selective": ("tp2pp1sp", [*SELECTIVE, *SHORT]),
    "dropout": ("tp1pp1", DROPOUT),
    "dropout-full": ("tp1pp1", [*DROPOUT, *FULL]),
    "dropout-block": ("tp1pp1", [*DROPOUT, *BLOCK]),
    "dropout-selective": ("tp1pp1", [*DROPOUT, *SELECTIVE]),
    "dropout-pp2vpp2": ("pp2vpp2", DROPOUT),
    "dropout-full-pp2vpp2": ("pp2vpp2", [*DROPOUT, *FULL]),
    "dropout-tp2pp1sp": ("tp2pp1sp", DROPOUT),
    "dropout-full-tp2pp1sp": ("tp2pp1sp", [*DROPOUT, *FULL]),
}


@pytest.fixture(scope="module")
def run_of(workplace: Path, initial, tmp_path_factory):
    """A function name -> run of the plan; one job for each number of ranks."""
    directory = tmp_path_factory.mktemp("masks")
    done: dict[str, Run] = {}

    def get(name: str) -> Run:
        if name not in done:
            ranks = RANKS[PLAN[name][0]]
            load = ("--load", initial["gpt2"], "--finetune")
            entries = {
                key: {"argv": _without_repeats(arguments("gpt2", layout, *load, *flags)), "probe": [1, 2, 3]}
                for key, (layout, flags) in PLAN.items() if RANKS[layout] == ranks
            }  # fmt: skip
            done.update(several(directory / f"{ranks}_ranks", ranks, entries, cwd=workplace))
        assert done[name].status == 0, done[name].console
        return done[name]

    return get


def _without_repeats(argv: list[str]) -> list[str]:
    """Drop the first of two settings of one flag: a flag is given once."""
    for flag in ("--micro-batch-size", "--attention-dropout", "--hidden-dropout"):
        if argv.count(flag) > 1:
            place = argv.index(flag)
            argv = argv[:place] + argv[place + 2 :]
    return argv


def half(whole: dict) -> dict:
    return {iteration: row for iteration, row in whole.items() if iteration <= 10}


@pytest.mark.parametrize("layout", MASKED_LAYOUTS)
def test_document_masks_follow_megatron(layout: str, run_of):
    run = run_of(f"masks-{layout}")
    assert_follows(run.steps, half(curve("gpt2_eodmask", layout)), TOLERANCE)
    io, gradients = (arrays("gpt2_eodmask", f"step_0001_{kind}.npz") for kind in ("io", "grads"))
    assert_step_agrees(run, 1, layout, io, gradients)


@pytest.mark.parametrize("layout", CUT_LAYOUTS)
def test_document_masks_of_cut_sequences_follow_megatron(layout: str, run_of):
    assert_follows(run_of(f"masks-{layout}").steps, half(curve("gpt2_eodmask", "tp1pp1")), TOLERANCE)


def test_without_masks_the_losses_differ():
    """So the agreement above says something: the masks change the numbers by far more than the tolerance."""
    masked, plain = curve("gpt2_eodmask", "tp1pp1"), curve("gpt2", "tp1pp1")
    assert all(abs(masked[i][1] / plain[i][1] - 1) > 1e-3 for i in masked)


@pytest.mark.parametrize("name", ["per_token", "per_token-dp2", "per_token-pp2vpp2"])
def test_per_token_loss_weighs_every_token_alike(name: str, run_of):
    """Cut into microbatches or not, the gradient is that of the mean over all tokens.

    In one microbatch the mean of means and the mean are the same, so no flag is needed there. In iteration 2 the four
    microbatches count 63, 62, 64 and 62 tokens, and the weights are still those all runs start from.
    """
    golden = full_gradients(probed(run_of("one_microbatch"), 2))
    got = full_gradients(probed(run_of(name), 2))
    errors = {key: relative_error(got[key], golden[key]) for key in golden}
    assert max(errors.values()) < 1e-5, errors  # float32, another order of the sums
    means = full_gradients(probed(run_of("masks-tp1pp1"), 2))
    assert max(relative_error(means[key], golden[key]) for key in golden) > 1e-3
    one, cut = run_of("one_microbatch").steps, run_of(name).steps
    assert [abs(cut[i]["loss"] / one[i]["loss"] - 1) < TOLERANCE for i in one] == [True] * 3


def test_full_recompute_follows_megatron(run_of):
    assert_follows(run_of("full").steps, half(curve("gpt2_recompute", "tp1pp1_full_recompute")), TOLERANCE)


def test_selective_recompute_follows_megatron(run_of):
    golden = half(curve("gpt2_recompute", "tp2pp1sp_selective_recompute"))
    assert_follows(run_of("selective").steps, golden, TOLERANCE)


@pytest.mark.parametrize(
    ("plain", "recomputed"),
    [
        ("dropout", "dropout-full"),
        ("dropout", "dropout-block"),
        ("dropout", "dropout-selective"),
        ("dropout-pp2vpp2", "dropout-full-pp2vpp2"),
        ("dropout-tp2pp1sp", "dropout-full-tp2pp1sp"),
    ],
)
def test_recomputation_changes_no_bit(plain: str, recomputed: str, run_of):
    """Four microbatches in flight, dropout on: the same masks, the same sums, so not even the last bit differs."""
    first, second = run_of(plain), run_of(recomputed)
    for key in ("loss", "grad_norm"):
        assert first.column(key) == second.column(key)
    for one, other in zip(probed(first, 3), probed(second, 3), strict=True):
        assert one.keys() == other.keys()
        different = [key for key in one if not np.array_equal(one[key], other[key], equal_nan=key != "places")]
        assert not different


def test_dropout_is_not_off(run_of):
    assert run_of("dropout").steps[1]["loss"] != run_of("per_token").steps[1]["loss"]
    assert abs(run_of("dropout").steps[1]["loss"] / curve("gpt2", "tp1pp1")[1][0] - 1) > 1e-4
