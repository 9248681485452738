"""Adapters train alike in every layout, and what they stand beside does not move."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from parallel_core.checkpoint.lora import LORA_A, LORA_B
from parallel_core.config.lora import LoraConfig
from parallel_core.layout.shard import shard_of
from tests.helpers.cases import CaseContext, case
from tests.ranks.cases_experts import check, run_of, variants
from tests.ranks.cases_layouts import settings
from tests.ranks.support import LLAMA, Tiny, TinyRun, assert_close, context_of, from_rank_0, parallel_context

RECOMPUTED = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
LAYOUTS = {
    1: ["tp1 recomputed"],
    2: ["tp2", "tp2 sp", "pp2", "pp2 vpp2", "dp2 distopt overlap", "cp2 p2p"],
    4: ["tp2 sp pp2", "tp2 sp distopt overlap"],
}
GATED = {**LLAMA.model}


def of(layout: str, model: dict[str, Any], **lora: Any) -> Tiny:
    run = settings(layout.replace(" recomputed", ""))
    extra = RECOMPUTED if "recomputed" in layout else {}
    own = (r"decoder\.layers\.1\..*fc1=5:2.5",)  # one layer has another rank and scale than the others
    config = LoraConfig(rank=3, alpha=6.0, target_ranks=own, **lora)
    return run.with_(model={**model, **extra}, training={"lora": config})


@functools.cache
def alone(gated: bool, dropout: float) -> dict[str, Any]:
    """Train on one process, and the same model without adapters for no step."""
    model = GATED if gated else {}
    run = TinyRun(of("tp1", model, dropout=dropout), parallel_context(0, 1))
    plain = TinyRun(settings("tp1").with_(model=model), parallel_context(0, 1))
    initial, first = run.parameters(), run.evaluate()["lm loss"]
    reports = run.train(5)
    return {
        "initial": initial, "first": first, "plain": plain.evaluate()["lm loss"], "after": run.parameters(),
        "losses": [r.losses["lm loss"] for r in reports], "norms": [r.grad_norm for r in reports],
        "gradients": run.gradients(), "base": plain.parameters(),
    }  # fmt: skip


def is_factor(name: str) -> bool:
    return name.endswith((LORA_A, LORA_B))


@case(world_size=(1, 2, 4), variants=[{"gated": False}, {"gated": True}])
def test_adapters_train_as_on_one_rank_and_the_base_stays(ctx: CaseContext, gated: bool) -> None:
    want = from_rank_0(ctx, lambda: alone(gated, 0.0))
    for layout in LAYOUTS[ctx.world_size]:
        config = of(layout, GATED if gated else {})
        run = TinyRun(config, context_of(ctx, config))
        before = run.parameters()
        assert_close(before, want["initial"], 0.0)
        # Before the first update B is zero: the model is the base, whose weights are those of a run without adapters.
        np.testing.assert_allclose(run.evaluate()["lm loss"], want["first"], rtol=2e-6)
        assert want["first"] == want["plain"]
        assert_close({name: value for name, value in before.items() if not is_factor(name)}, want["base"], 0.0)
        reports = run.train(5)
        np.testing.assert_allclose([r.losses["lm loss"] for r in reports], want["losses"], rtol=4e-6)
        np.testing.assert_allclose([r.grad_norm for r in reports], want["norms"], rtol=4e-5)
        assert_close(run.gradients(), want["gradients"], 1e-4)
        after = run.parameters()
        moved = {name for name, value in after.items() if not np.array_equal(value, before[name])}
        assert moved == {name for name in after if is_factor(name)}
        held = {shard_of(p).name for buffer in run.step.ddp.buffers for p in buffer.parameters}
        assert all(map(is_factor, held)), "the optimizer has state for what is frozen"
        assert before["decoder.layers.1.mlp.linear_fc1.lora_A.weight"].shape[0] == 5


@case(world_size=2, variants=[{"layout": name} for name in ("pp2", "dp2 distopt")])
def test_dropout_of_an_adapters_input_does_not_depend_on_the_layout(ctx: CaseContext, layout: str) -> None:
    want = from_rank_0(ctx, lambda: alone(False, 0.3))
    config = of(layout, {}, dropout=0.3)
    reports = TinyRun(config, context_of(ctx, config)).train(5)
    np.testing.assert_allclose([r.losses["lm loss"] for r in reports], want["losses"], rtol=4e-6)


def of_experts(ctx: CaseContext, model: str, layout: str) -> None:
    # With this alpha no two tokens are within rounding of each other for the last place of an expert with a capacity.
    lora = LoraConfig(rank=3, alpha=5.0, target_ranks=(r".*experts\.linear_fc2=2",))
    check(ctx, model, layout, lora=lora)
    config = run_of(model, layout, lora=lora)
    run = TinyRun(config, context_of(ctx, config))
    before = run.parameters()
    run.train(5)
    moved = {name for name, value in run.parameters().items() if not np.array_equal(value, before[name])}
    assert moved == {name for name in before if is_factor(name)}
    assert any("experts.experts.linear_fc2" in name for name in moved)


@case(world_size=2, variants=variants("""
    sigmoid: tp2 sp alltoall
    softmax: ep2 allgather
"""))
def test_adapters_of_experts_train_as_on_one_rank(ctx: CaseContext, model: str, layout: str) -> None:
    of_experts(ctx, model, layout)


@case(world_size=2, variants=variants("""
    sigmoid: pp2 vpp2 moe
    sigmoid: ep2 distopt overlap alltoall ahead
    capacity: ep2 alltoall
    softmax: tp2 sp etp1 allgather
    sigmoid+mla: tp2 sp alltoall
"""), slow=True)
def test_adapters_of_experts_in_more_layouts(ctx: CaseContext, model: str, layout: str) -> None:
    of_experts(ctx, model, layout)


@case(world_size=4, variants=variants("sigmoid: tp2 sp ep2 etp1 pp2 alltoall full"), slow=True)
def test_adapters_of_experts_on_four_ranks(ctx: CaseContext, model: str, layout: str) -> None:
    of_experts(ctx, model, layout)
