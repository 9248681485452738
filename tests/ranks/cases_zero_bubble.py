"""Split backward passes: bit-equal to whole ones, in every layout, and nothing is left over."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from parallel_core.errors import ParallelCoreError
from parallel_core.optimizer.grad_buffer import ParamAndGradBuffer
from parallel_core.pipeline.schedule import Op
from parallel_core.pipeline.stage import PipelineStage
from tests.helpers.cases import CaseContext, case
from tests.ranks.cases_experts import run_of
from tests.ranks.cases_latent_attention import MODEL as LATENT
from tests.ranks.cases_layouts import draw, settings
from tests.ranks.cases_lora import GATED
from tests.ranks.cases_lora import of as adapted
from tests.ranks.cases_multi_token import MODEL as FURTHER
from tests.ranks.cases_multi_token import TIED
from tests.ranks.cases_training import DROPOUT, FULL, assert_equal_bits, trained
from tests.ranks.support import LLAMA, SampleSource, Tiny, TinyRun, context_of

ITERATIONS = 20
SPLIT: dict[str, Any] = {"pipeline_schedule": "zero-bubble"}
BATCHES = {"batch_size": 1, "global_batch_size": 8}
"""More microbatches than pipeline ranks, so that passes are late in the steady state, too."""


def check(ctx: CaseContext, tiny: Tiny, iterations: int = ITERATIONS) -> None:
    """Train with whole and with split backward passes, and compare to the bit."""
    want = trained(ctx, tiny, iterations)
    assert_equal_bits(trained(ctx, tiny.with_(parallel=SPLIT), iterations), want)
    assert len(set(want["losses"].tolist())) == iterations and want["norms"].min() > 0


MODELS: dict[str, Tiny] = {
    "tied": Tiny(model=DROPOUT, data=BATCHES),
    "recomputed": Tiny(model={**DROPOUT, **FULL}, data=BATCHES),
    "selective": Tiny(model={**DROPOUT, "recompute_granularity": "selective"}, data=BATCHES),
    "llama": LLAMA.with_(data=BATCHES),
    "plain kernels": Tiny(model={"kernels": "local"}, data=BATCHES),
    "per token": Tiny(training={"calculate_per_token_loss": True}, data=BATCHES),
}


def variants(*rows: str) -> list[dict[str, Any]]:
    """Return one variant for each `layout: model`."""
    return [dict(zip(("layout", "model"), row.split(": "))) for row in rows]


def in_layout(layout: str, model: str) -> Tiny:
    return settings(layout).with_(model=MODELS[model].model, training=MODELS[model].training, data=MODELS[model].data)


@case(world_size=2, variants=variants("pp2: tied", "pp2 vpp2: recomputed"))
def test_split_passes_of_two_ranks_are_bit_equal(ctx: CaseContext, layout: str, model: str) -> None:
    check(ctx, in_layout(layout, model))


@case(world_size=4, variants=variants("tp2 sp pp2 overlap: llama", "pp2 distopt overlap: tied"))
def test_split_passes_of_four_ranks_are_bit_equal(ctx: CaseContext, layout: str, model: str) -> None:
    check(ctx, in_layout(layout, model), iterations=4)


@case(
    world_size=4,
    slow=True,
    timeout_s=300.0,
    variants=[
        {"model": "softmax", "layout": "pp2 ep2"},
        {"model": "sigmoid", "layout": "tp2 sp pp2 ep2 etp1"},
        {"model": "padded", "layout": "pp2 vpp2 ep2 full"},
        {"model": "capacity", "layout": "pp2 ep2 allgather overlap"},
        {"model": "latent", "layout": "tp2 sp pp2"},
        {"model": "latent", "layout": "pp2 vpp2 cp2"},
    ],
)
def test_split_passes_of_experts_and_latents_are_bit_equal(ctx: CaseContext, model: str, layout: str) -> None:
    tiny = settings(layout).with_(model=LATENT) if model == "latent" else run_of(model, layout)
    check(ctx, tiny.with_(data={"batch_size": 1, "global_batch_size": 16}))


@case(world_size=2, slow=True, variants=[{"layout": "pp2"}, {"layout": "pp2 vpp2"}])
def test_split_passes_of_adapters_and_further_tokens_are_bit_equal(ctx: CaseContext, layout: str) -> None:
    """Frozen weights leave nothing; a tied embedding is the last stage's table and output layer in one pass."""
    check(ctx, adapted(layout, GATED).with_(data=BATCHES))
    check(ctx, settings(layout).with_(model=TIED, data=BATCHES))
    check(ctx, settings(layout).with_(model=FURTHER, data=BATCHES))


MORE = ("llama", "selective", "plain kernels", "per token")


@case(world_size=2, slow=True, variants=variants(*(f"pp2: {model}" for model in MORE)))
def test_split_passes_of_more_models_are_bit_equal(ctx: CaseContext, layout: str, model: str) -> None:
    check(ctx, in_layout(layout, model))


@case(
    world_size=4,
    slow=True,
    timeout_s=300.0,
    variants=variants(
        "tp2 sp pp2 vpp2: tied",
        "tp2 pp2: recomputed",
        "pp4: tied",
        "pp4: recomputed",
        "pp2 cp2 p2p: llama",
        "pp2 cp2 all_gather overlap: llama",
        "pp2 vpp2 cp2 a2a: recomputed",
        "pp2 vpp2 distopt overlap: llama",
    ),
)
def test_split_passes_of_more_layouts_are_bit_equal(ctx: CaseContext, layout: str, model: str) -> None:
    check(ctx, in_layout(layout, model))


def drawn(seed: int, world_size: int) -> Tiny:
    """Return the first layout with a pipeline that numbers from `100 * seed` on draw; some with cp ranks."""
    for number in range(100 * seed, 100 * seed + 100):
        _, tiny = draw(number, world_size)
        pp, tp = (tiny.parallel[f"{axis}_model_parallel_size"] for axis in ("pipeline", "tensor"))
        if pp > 1:
            break
    rng = random.Random(seed)
    if world_size // pp // tp > 1 and rng.random() < 0.5:
        tiny = tiny.with_(parallel={"context_parallel_size": 2, "cp_comm_type": (rng.choice(["p2p", "all_gather"]),)})
    return tiny.with_(data={"global_batch_size": 8 * tiny.data["batch_size"]})


@case(world_size=(2, 4), slow=True, timeout_s=300.0, variants=[{"seed": seed} for seed in range(8)])
def test_split_passes_of_drawn_layouts_are_bit_equal(ctx: CaseContext, seed: int) -> None:
    check(ctx, drawn(seed, ctx.world_size))


@case(world_size=8, slow=True, timeout_s=300.0, variants=[{"seed": seed} for seed in range(2)])
def test_split_passes_of_drawn_layouts_of_eight_ranks_are_bit_equal(ctx: CaseContext, seed: int) -> None:
    check(ctx, drawn(seed, 8))


HALVES = [{"params": "float16", "compute": "float16"}, {"params": "float16"}, {"params": "bfloat16"}]


@case(world_size=2, variants=HALVES)
def test_sixteen_bit_weights_are_split_too(ctx: CaseContext, params: str, compute: str = "float32") -> None:
    """What is late, and what is not, is rounded where a whole backward pass rounds it."""
    training = {"fp16": True, "loss_scale_value": 128.0} if params == "float16" else {"bf16": True}
    half = {"params_dtype": params, "compute_dtype": compute}
    tiny = settings("pp2").with_(model=half, data=BATCHES, training=training)
    whole, split = (trained(ctx, tiny.with_(parallel=extra), 4) for extra in ({}, SPLIT))
    assert_equal_bits(split, whole)


@case(world_size=4)
def test_a_bucket_is_reduced_only_when_its_last_weight_is_in(ctx: CaseContext) -> None:
    """No reduction starts before the last W of its chunk, and all start before the iteration's passes end."""
    happened: list[str] = []
    original, weights = ParamAndGradBuffer.start_reduction, PipelineStage.weight_grad

    def start_reduction(self: ParamAndGradBuffer, bucket: int) -> None:
        assert not any(self.is_pending(slot.index) for slot in self.layout.slots if slot.bucket == bucket)
        happened.append("reduced")
        original(self, bucket)

    def weight_grad(self: PipelineStage, microbatch: int, is_last: bool) -> None:
        happened.append("last W begins" if is_last else "W begins")
        weights(self, microbatch, is_last)
        happened.append("W ends")

    tiny = settings("pp2 overlap").with_(parallel=SPLIT, data=BATCHES, training={"bucket_size": 500})
    run = TinyRun(tiny, context_of(ctx, tiny))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ParamAndGradBuffer, "start_reduction", start_reduction)
        patch.setattr(PipelineStage, "weight_grad", weight_grad)
        run.train(1)
    if run.context.pp.rank == 0:
        return  # whole passes
    first = happened.index("reduced")
    assert first > happened.index("last W begins")
    last_end = len(happened) - 1 - happened[::-1].index("W ends")
    buckets = sum(len(buffer.layout.buckets) for buffer in run.step.ddp.buffers)
    assert happened.count("reduced") == buckets > 3
    assert happened[:last_end].count("reduced") == buckets, "reductions are hidden behind the weights that are left"


@case(world_size=2)
def test_weights_that_were_left_out_are_found(ctx: CaseContext) -> None:
    """An iteration whose W are missing fails at its end, and the next does not start on what it left."""
    tiny = settings("pp2").with_(parallel=SPLIT, data=BATCHES)
    run = TinyRun(tiny, context_of(ctx, tiny))
    run.train(1)
    for key, steps in run.step._schedules.items():
        run.step._schedules[key] = [
            step._replace(compute=None) if step.compute is not None and step.compute.op is Op.WEIGHT_GRAD else step
            for step in steps
        ]
    data: Any = SampleSource(run.config, run.context, 8, 2)
    if run.context.pp.rank == 0:
        run.step._run(data, 8, forward_only=False)
        return
    with pytest.raises(ParallelCoreError, match="gradients of weights were left and never computed: W0.0, W1.0"):
        run.step._run(data, 8, forward_only=False)
    with pytest.raises(ParallelCoreError, match="microbatches .0, 1, .* were never computed"):
        run.step._stages[0].start_iteration(iter(()), 8)
    np.testing.assert_equal(len(run.step._stages[0]._late), 8)
