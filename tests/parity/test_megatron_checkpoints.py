"""Training goes on from checkpoints that Megatron-LM wrote, in their layout and in others, as Megatron went on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.runs import Run, pretrain_gpt, several
from tests.parity.golden import CHECKPOINTS, LAYOUTS, arguments, assert_follows, curve

# Ten updates from Megatron's own weights and Adam state: less drift than from scratch, the same kinds of sums.
TOLERANCE = 2e-6

# (model, checkpoint, layout that goes on); the curve to follow is `resume_` and what comes after `ckpt_torch_`.
RESUMES = [
    ("gpt2", "ckpt_torch_tp1pp1", "tp1pp1"),
    ("gpt2", "ckpt_torch_tp2pp2", "tp1pp1"),
    ("llama", "ckpt_torch_tp2pp1", "tp1pp1"),
    ("llama", "ckpt_torch_pp2vpp2", "tp1pp1"),
    ("llama", "ckpt_torch_dp2distopt", "tp1pp1"),
    ("llama", "ckpt_torch_dist_dp2distopt", "tp1pp1"),
    ("gpt2", "ckpt_torch_tp1pp1", "tp2pp1sp"),
    ("gpt2", "ckpt_torch_tp2pp2", "dp2distopt"),
    ("llama", "ckpt_torch_tp2pp1", "tp2pp1"),
    ("llama", "ckpt_torch_tp1pp2", "tp1pp2"),
    ("llama", "ckpt_torch_tp1pp2", "dp2"),
    ("llama", "ckpt_torch_pp2vpp2", "pp2vpp2"),
    ("llama", "ckpt_torch_dp2distopt", "dp2distopt"),
    ("llama", "ckpt_torch_dp2distopt", "tp2pp1"),
    ("llama", "ckpt_torch_dist_dp2distopt", "dp2distopt"),
    ("llama", "ckpt_torch_dist_dp2distopt", "pp2vpp2"),
    ("gpt2", "ckpt_torch_tp2pp2", "tp2pp2"),
    ("llama", "ckpt_torch_pp2vpp2", "tp2dp2distopt"),
]
SLOW_RANKS = 4
SLOW = {
    ("llama", "ckpt_torch_tp2pp1", "tp2pp1"),
    ("llama", "ckpt_torch_tp1pp2", "dp2"),
    ("llama", "ckpt_torch_dp2distopt", "tp2pp1"),
    ("llama", "ckpt_torch_dist_dp2distopt", "pp2vpp2"),
}
"""Two ranks, but much like others."""


def is_slow(one: tuple[str, ...]) -> bool:
    return one in SLOW or LAYOUTS[one[2]][0] >= SLOW_RANKS


def flags(model: str, checkpoint: str, layout: str) -> list[str]:
    return arguments(model, layout, "--load", str(CHECKPOINTS / model / checkpoint))


@pytest.fixture(scope="module")
def runs(workplace: Path, tmp_path_factory):
    """A function (model, checkpoint, layout) -> run; one job for each number of ranks, one more for the slow ones."""
    directory = tmp_path_factory.mktemp("resumed")
    done: dict[tuple[int, bool], dict[str, Run]] = {}

    def group_of(which: tuple[str, ...]) -> tuple[int, bool]:
        return LAYOUTS[which[2]][0], is_slow(which)

    def get(*which: str) -> Run:
        group = group_of(which)
        if group not in done:
            entries = {"-".join(one): {"argv": flags(*one)} for one in RESUMES if group_of(one) == group}
            done[group] = several(directory / f"{group[0]}_ranks_{group[1]}", group[0], entries, cwd=workplace)
        return done[group]["-".join(which)]

    return get


def resumes() -> list:
    return [
        pytest.param(*one, id="-".join(one), marks=[pytest.mark.slow] if is_slow(one) else [])
        for one in RESUMES
    ]


@pytest.mark.parametrize(("model", "checkpoint", "layout"), resumes())
def test_a_resumed_run_follows_megatrons(model: str, checkpoint: str, layout: str, runs):
    run = runs(model, checkpoint, layout)
    assert run.status == 0, run.console
    assert_follows(run.steps, curve(model, checkpoint.replace("ckpt_torch", "resume")), TOLERANCE)


def test_through_the_script(workplace: Path, tmp_path):
    run = pretrain_gpt(tmp_path / "logs", flags("gpt2", "ckpt_torch_tp2pp2", "tp1pp2"), cwd=workplace)
    assert_follows(run.steps, curve("gpt2", "resume_tp2pp2"), TOLERANCE)
    assert "Loaded checkpoint" in run.console


def test_weights_alone(workplace: Path, tmp_path):
    """A checkpoint without optimizer state is refused as a whole run, and gives its weights when they are asked for."""
    path = str(CHECKPOINTS / "gpt2" / "ckpt_torch_tp1pp1_no_optim")
    plan = {
        "whole": {"argv": arguments("gpt2", "tp1pp1", "--load", path)},
        "weights": {"argv": arguments("gpt2", "tp1pp1", "--load", path, "--no-load-optim", "--exit-interval", "11")},
    }
    runs = several(tmp_path, 1, plan, cwd=workplace)
    assert runs["whole"].status == 1
    assert runs["whole"].console.splitlines()[-1] == (
        f"{path}/iter_0000010 holds weights but no optimizer state; add --no-load-optim to go on with fresh state, or "
        "--finetune to start a new run from these weights"
    )
    assert runs["weights"].status == 0, runs["weights"].console
    first = {11: curve("gpt2", "resume_tp1pp1")[11]}  # the state of Adam is first used by this iteration's update
    assert_follows(runs["weights"].steps, first, TOLERANCE)
