"""Twenty iterations through the real `pretrain_gpt.sh` against Megatron-LM's, in every layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.runs import pretrain_gpt
from tests.parity.golden import CONTEXT_LAYOUTS, LAYOUTS, arguments, assert_follows, curve

# float32: two programs sum in different orders, and 20 updates carry the difference on. Megatron's own layouts differ
# by up to 4e-7 relative among themselves, these runs by up to 5e-7 from it; an error of method (a microbatch weighted
# wrongly, a shard left out of the norm) shows from 1e-4.
TOLERANCE = 2e-6

RANKS = {layout: ranks for layout, (ranks, _) in {**LAYOUTS, **CONTEXT_LAYOUTS}.items()}

BY_DEFAULT = {
    ("gpt2", "tp2pp2"),
    ("llama", "pp2vpp2"),
    ("llama", "cp2"),
}
"""Three axes; the rest is marked slow. test_one_step.py has the first eleven iterations of all layouts of two ranks."""


def all_curves() -> list:
    return [
        pytest.param(model, layout, id=f"{model}-{layout}",
                     marks=[] if (model, layout) in BY_DEFAULT else [pytest.mark.slow])
        for model in ("gpt2", "llama")
        for layout in RANKS
    ]  # fmt: skip


@pytest.mark.parametrize(("model", "layout"), all_curves())
def test_twenty_adam_updates_follow_megatron(model: str, layout: str, workplace: Path, initial, tmp_path):
    flags = arguments(model, layout, "--load", initial[model], "--finetune")
    run = pretrain_gpt(tmp_path / "logs", flags, cwd=workplace, NPROC=str(RANKS[layout]))
    # Megatron was not run on 8 ranks nor on cut sequences; its other layouts agree with its one process to 4e-7.
    golden = curve(model, "tp1pp1" if layout in (*CONTEXT_LAYOUTS, "tp2pp2dp2") else layout)
    assert_follows(run.steps, golden, TOLERANCE)


@pytest.mark.parametrize("model", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_fused_kernels_follow_megatron(model: str, workplace: Path, initial, tmp_path):
    """`--kernels local` is plain operators; this is what runs without it."""
    flags = arguments(model, "tp2pp1sp", "--load", initial[model], "--finetune")
    flags[flags.index("local")] = "auto"
    run = pretrain_gpt(tmp_path / "logs", flags, cwd=workplace)
    assert_follows(run.steps, curve(model, "tp2pp1sp"), TOLERANCE)
