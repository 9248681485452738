"""Numbers about the whole model, in every layout, against NumPy on the whole tensors."""

from __future__ import annotations

import json

import numpy as np

from parallel_core.diagnose.finite import Found
from parallel_core.errors import ResultError
from parallel_core.layout.shard import shard_of
from parallel_core.pipeline.schedule import Op
from parallel_core.training.replay import watch_of
from parallel_core.training.statistics import model_statistics
from parallel_core.training.timeline import LANES, Timeline
from parallel_core.training.timers import Timers, times_text
from tests.helpers.cases import CaseContext, case
from tests.ranks.cases_layouts import LAYOUTS_OF_2, LAYOUTS_OF_4, settings
from tests.ranks.support import TinyRun, context_of


def check(ctx: CaseContext, layout: str, **model: object) -> None:
    tiny = settings(layout).with_(model=model)
    run = TinyRun(tiny, context_of(ctx, tiny))
    run.train(2)
    found = model_statistics(run.step.optimizer, run.context, params_norm=True, num_zeros=True)
    parameters, gradients = run.parameters(), run.gradients()
    norm = np.sqrt(sum(np.square(values.astype(np.float64)).sum() for values in parameters.values()))
    zeros = sum(values.size - np.count_nonzero(values) for values in gradients.values())
    assert zeros > 0
    np.testing.assert_allclose(found["params_norm"], norm, rtol=1e-6)
    assert found["num_zeros_in_grad"] == zeros
    assert len(set(map(str, run.context.world.all_gather_object(found)))) == 1
    assert not model_statistics(run.step.optimizer, run.context, params_norm=False, num_zeros=False)


@case(world_size=2, variants=[{"layout": name} for name in (*LAYOUTS_OF_2, "cp2")])
def test_norm_and_zeros_on_two_ranks(ctx: CaseContext, layout: str) -> None:
    check(ctx, layout, max_position_embeddings=16)  # twice the sequence: half of the rows have no gradient


@case(world_size=4, variants=[{"layout": name} for name in LAYOUTS_OF_4])
def test_norm_and_zeros_on_four_ranks(ctx: CaseContext, layout: str) -> None:
    check(ctx, layout, untie_embeddings_and_output_weights=True, vocab_size=64)


@case(world_size=2, variants=[{"level": level} for level in (0, 1, 2)])
def test_timers_of_a_pipeline(ctx: CaseContext, level: int) -> None:
    """Every rank's times arrive, each level has its names, and a sum over parts is no more than the whole."""
    tiny = settings("pp2 vpp2")
    run = TinyRun(tiny, context_of(ctx, tiny))
    timers = Timers(level, run.context.world)
    for _ in range(3):
        with timers:
            run.train(1)
    times = timers.collect(reset=True)
    parts, within = {"forward-backward", "all-grads-sync", "optimizer"}, {"forward-compute", "backward-compute"}
    passing = {"forward-recv", "forward-send", "backward-recv", "backward-send", "batch-generator"}
    assert set(times) == (set(), parts, parts | within | passing)[level]
    assert all(len(of_ranks) == 2 and min(of_ranks) > 0 for of_ranks in times.values())
    if level == 2:
        for rank in range(2):
            inner = sum(times[name][rank] for name in within | passing if name != "batch-generator")
            assert inner <= times["forward-backward"][rank]
            assert times["batch-generator"][rank] <= times["forward-compute"][rank]
    run.train(1)  # nobody listens any more
    assert set(timers.collect(reset=False)) == set()
    assert (times_text(times, "minmax") == "") == (level == 0)


@case(world_size=2, variants=[{"layout": name} for name in ("pp2", "pp2 vpp2", "tp2 sp", "dp2 distopt")])
def test_the_timeline_holds_the_schedule(ctx: CaseContext, layout: str) -> None:
    """Every computation once an iteration and in the schedule's order, nothing after the end, rows without overlap."""
    tiny = settings(layout)
    run = TinyRun(tiny, context_of(ctx, tiny))
    run.train(1)
    file = ctx.tmp_path / f"timeline_{layout.replace(' ', '_')}_{ctx.rank}.json"
    timeline = Timeline(file, run.context)
    timeline.start()
    run.train(2)
    timeline.stop()
    run.train(1)
    document = json.loads(file.read_text())
    assert document["metadata"]["rank"] == ctx.rank and document["metadata"]["pp"] == run.context.pp.rank
    events = [event for event in document["traceEvents"] if event["ph"] == "X"]
    steps = run.step.schedule(run.sizes.num_microbatches(0))[run.context.pp.rank]
    computed = [step.compute for step in steps if step.compute is not None]
    names = {Op.FORWARD: "forward-compute", Op.BACKWARD: "backward-compute"}
    want = [(names[one.op], one.microbatch, one.chunk) for one in computed]
    got = [(e["name"], e["args"]["microbatch"], e["args"]["chunk"]) for e in events if e["name"] in names.values()]
    assert got == 2 * want
    count = {name: sum(event["name"] == name for event in events) for name in {event["name"] for event in events}}
    assert count["forward-backward"] == count["optimizer"] == 2 and count["weight-gradient"] > 0
    expected = {"pp": {"send", "receive"}, "tp": {"all-gather", "reduce-scatter"}, "dp": {"reduce-scatter"}}
    assert expected[layout[:2]] <= count.keys(), count
    spans = {lane: sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e["tid"] == LANES[lane])
             for lane in ("communication", "waiting")}  # fmt: skip
    for lane, of_lane in spans.items():
        overlaps = [(before, after) for before, after in zip(of_lane, of_lane[1:]) if before[1] > after[0] + 0.01]
        assert not overlaps, f"{lane}: {overlaps}"
    assert spans["communication"]
    # A rank that comes last to every operation waits in none of them: then it is the other one that has waited.
    assert any(run.context.world.all_gather_object(len(spans["waiting"])))


@case(world_size=2, variants=[{"layout": name} for name in ("pp2 vpp2", "tp2 sp", "dp2 distopt")])
def test_ranks_agree_which_layer_was_the_first_that_is_not_finite(ctx: CaseContext, layout: str) -> None:
    """Layer 2 overflows; the ranks and stages behind it follow, and say of it what the first one does."""
    tiny = settings(layout)
    run = TinyRun(tiny, context_of(ctx, tiny))
    run.train(1)
    for parameter, storage in run.step.ddp.parameters():
        if shard_of(parameter).name == "decoder.layers.2.mlp.linear_fc2.weight":
            storage.load(np.full(storage.numpy().size, 3e38, np.float32))
    failed = False
    with watch_of(run.step, run.context) as looked:
        try:
            run.train(1)
        except ResultError:
            failed = True
    record = None if looked.first is None else looked.first.to_record()
    found = [Found.of_record(one) for one in run.context.world.all_gather_object(record) if one is not None]
    first = min(found, key=lambda one: one.order)
    assert failed and "of decoder.layers.2.mlp.linear_fc2 (RowParallelLinear)" in first.what, first
    assert first.what.startswith("output ") and "forward pass of microbatch 0" in first.when, first
    assert any("linear_fc2.weight" in line and "3e+38" in line for line in first.beside), first
    assert len(found) == 2
