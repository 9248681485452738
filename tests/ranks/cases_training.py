"""One iteration's machinery on several ranks: recomputation, gradient buckets, sharded state, overflows, 16 bits."""

from __future__ import annotations

import functools
import logging
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn

from parallel_core.errors import ConfigError, ParallelCoreError
from parallel_core.layout.shard import TensorShard, mark, shard_of
from parallel_core.tensor_parallel.parameter import constant, make_parameter
from parallel_core.training.checkpointing import Checkpointer
from parallel_core.training.names import check_parameter_names
from parallel_core.transformer import ModelStage
from tests.helpers.cases import CaseContext, case
from tests.ranks.cases_layouts import settings
from tests.ranks.support import (
    Tiny,
    TinyRun,
    assert_close,
    context_of,
    from_rank_0,
    gather_values,
    parallel_context,
    provide_model,
    world_group,
)

DROPOUT = {"hidden_dropout_rate": 0.2, "attention_dropout_rate": 0.2}


def trained(ctx: CaseContext, tiny: Tiny, iterations: int = 2) -> dict[str, Any]:
    """Train and return everything there is to compare."""
    run = TinyRun(tiny, context_of(ctx, tiny))
    reports = run.train(iterations)
    return {
        "losses": np.array([r.losses["lm loss"] for r in reports]),
        "norms": np.array([r.grad_norm for r in reports]),
        "gradients": run.gradients(),
        "parameters": run.parameters(),
    }


def assert_equal_bits(got: dict[str, Any], want: dict[str, Any]) -> None:
    np.testing.assert_array_equal(got["losses"], want["losses"])
    np.testing.assert_array_equal(got["norms"], want["norms"])
    assert_close(got["gradients"], want["gradients"], 0.0)
    assert_close(got["parameters"], want["parameters"], 0.0)


# ---- recomputation --------------------------------------------------------------------------------------------------
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def per_stage(layout: str, name: str, count: int) -> dict[str, Any]:
    """Return a per-stage list with `count` layers for every chunk."""
    parallel = settings(layout).parallel
    chunks = (count,) * parallel.get("virtual_pipeline_model_parallel_size", 1)
    return {name: (chunks,) * parallel.get("pipeline_model_parallel_size", 1)}


RECOMPUTE: dict[str, Any] = {
    "uniform 1": lambda layout: Tiny(model=FULL),
    "uniform 2": lambda layout: Tiny(model={**FULL, "recompute_num_layers": 2}),
    "block": lambda layout: Tiny(model={**FULL, "recompute_method": "block"}),
    "selective": lambda layout: Tiny(model={"recompute_granularity": "selective"}),
    "recompute list": lambda layout: Tiny(parallel=per_stage(layout, "recompute", 1)),
    "select_recompute list": lambda layout: Tiny(parallel=per_stage(layout, "select_recompute", 1)),
    "select_comm_recompute list": lambda layout: Tiny(parallel=per_stage(layout, "select_comm_recompute", 1)),
}


@functools.cache
def without_recompute(rank: int, world_size: int, layout: str, kernels: str) -> dict[str, Any]:
    ctx: Any = CaseContext(rank, world_size, None)  # type: ignore[arg-type]
    return trained(ctx, settings(layout).with_(model={**DROPOUT, "kernels": kernels}))


def check_recompute(ctx: CaseContext, layout: str, kernels: str, method: str) -> None:
    want = without_recompute(ctx.rank, ctx.world_size, layout, kernels)
    how = RECOMPUTE[method](layout)
    base = settings(layout).with_(model={**DROPOUT, "kernels": kernels})
    assert_equal_bits(trained(ctx, base.with_(model=how.model, parallel=how.parallel)), want)


@case(world_size=1, variants=[{"kernels": kind, "method": name} for kind in ("auto", "local") for name in RECOMPUTE])
def test_recompute_is_bit_equal_on_one_rank(ctx: CaseContext, kernels: str, method: str) -> None:
    """The second run draws the masks of the first."""
    check_recompute(ctx, "tp1", kernels, method)


@case(
    world_size=2,
    variants=[{"layout": layout, "method": name} for layout in ("tp2 sp", "pp2 vpp2") for name in RECOMPUTE],
)
def test_recompute_is_bit_equal_with_microbatches_in_flight(ctx: CaseContext, layout: str, method: str) -> None:
    """With a pipeline, other microbatches have drawn since."""
    check_recompute(ctx, layout, "auto", method)


# ---- random streams -------------------------------------------------------------------------------------------------
@case(world_size=4, variants=[{"sp": False}, {"sp": True}])
def test_replicas_draw_alike_and_shards_differ(ctx: CaseContext, sp: bool) -> None:
    """Hidden dropout is a replica's without sequence parallelism, attention dropout always a shard's."""
    tiny = settings("tp2 sp" if sp else "tp2").with_(model=DROPOUT, data={"global_batch_size": 8})
    run = TinyRun(tiny, context_of(ctx, tiny))
    streams, drawn = run.step.model.streams, []
    original = streams.seeds

    def seeds(site: str, sharded: bool = False, by_position: bool = False) -> tuple[int, int]:
        pair = original(site, sharded, by_position)
        drawn.append((site, sharded, pair))
        return pair

    streams.seeds = seeds  # type: ignore[method-assign]
    run.train(1)
    mine = {(place, site): (sharded, pair) for place, (site, sharded, pair) in enumerate(drawn)}
    assert len(drawn) == 2 * 13  # two microbatches: embedding, and in four layers attention, projection, MLP
    assert len({pair for _, pair in mine.values()}) == len(mine), "two places or microbatches draw the same mask"
    peers = gather_values(run.context.tp, mine)
    for place, (sharded, pair) in peers[0].items():
        assert sharded == (sp or "attention_dropout" in place[1] and "self_attention" in place[1])
        assert (peers[1][place][1] == pair) == (not sharded)
    replicas = gather_values(run.context.dp, mine)
    assert all(replicas[0][place][1] != replicas[1][place][1] for place in replicas[0])


# ---- gradient buckets -----------------------------------------------------------------------------------------------
@functools.cache
def plain_ddp(rank: int, world_size: int, layout: str) -> dict[str, Any]:
    return trained(CaseContext(rank, world_size, None), settings(layout))  # type: ignore[arg-type]


BUCKETS: list[dict[str, Any]] = [
    {"bucket_size": 1},
    {"bucket_size": 700},
    {"overlap_grad_reduce": True},
    {"overlap_grad_reduce": True, "bucket_size": 1},
    {"overlap_grad_reduce": True, "bucket_size": 700},
    {"overlap_grad_reduce": True, "bucket_size": 700, "average_in_collective": True},
    {"average_in_collective": True},
    {"wrap_with_ddp": False},
]


@case(world_size=2, variants=BUCKETS)
def test_buckets_and_overlap_change_no_gradient(ctx: CaseContext, **training: Any) -> None:
    """The sum of two numbers, and their half, have one value whatever the bucket or the order."""
    want = plain_ddp(ctx.rank, ctx.world_size, "dp2")
    assert_equal_bits(trained(ctx, settings("dp2").with_(training=training)), want)


@case(
    world_size=4,
    variants=[
        {"overlap_grad_reduce": True, "delay_grad_reduce": True, "bucket_size": 300},
        {"overlap_grad_reduce": True, "bucket_size": 300},
    ],
)
def test_delayed_reduction_changes_no_gradient(ctx: CaseContext, **training: Any) -> None:
    want = plain_ddp(ctx.rank, ctx.world_size, "pp2 vpp2")
    assert_equal_bits(trained(ctx, settings("pp2 vpp2").with_(training=training)), want)


@case(world_size=2)
def test_overlapped_reductions_start_during_the_last_backward_pass(ctx: CaseContext) -> None:
    """Every bucket but the last starts before the gradients are asked for, once, and only in the last microbatch."""
    tiny = settings("dp2").with_(training={"overlap_grad_reduce": True, "bucket_size": 700})
    run = TinyRun(tiny, context_of(ctx, tiny))
    (buffer,) = run.step.ddp.buffers
    started: list[int] = []
    original, finish = buffer.start_reduction, run.step.ddp.finish_grad_sync
    buffer.start_reduction = lambda bucket: (started.append(bucket), original(bucket))  # type: ignore[method-assign]
    before: list[int] = []
    run.step.ddp.finish_grad_sync = lambda: (before.extend(started), finish())  # type: ignore[method-assign]
    run.train(1)
    assert len(buffer.layout.buckets) > 3
    assert before == started and sorted(started) == list(range(len(buffer.layout.buckets))), (before, started)


@case(world_size=2)
def test_only_the_last_backward_pass_reduces(ctx: CaseContext) -> None:
    tiny = settings("dp2").with_(training={"overlap_grad_reduce": True, "bucket_size": 700})
    run = TinyRun(tiny, context_of(ctx, tiny))
    ddp, (buffer,) = run.step.ddp, run.step.ddp.buffers
    ones = [Tensor(np.full(p.shape, 1.0 + ctx.rank, np.float32)) for p in buffer.parameters]
    receivers = [ddp._receiver(0, buffer, i) for i in range(len(ones))]
    ddp.start_iteration()
    for receive, gradient in zip(receivers, ones):
        receive(gradient)
    assert not buffer.running
    ddp.enable_sync(0)
    for receive, gradient in zip(receivers, ones):
        receive(gradient)
    assert len(buffer.running) == len(buffer.layout.buckets)
    ddp.finish_grad_sync()
    for i in range(len(ones)):
        np.testing.assert_array_equal(buffer.main_grad(i).numpy(), 3.0)  # (2 x 1 + 2 x 2) / 2


class WithSpare(nn.Cell):
    """A model with a parameter that its output does not depend on."""

    def __init__(self, inner: nn.Cell) -> None:
        super().__init__(auto_prefix=True)
        self.inner = inner
        self.spare = make_parameter(TensorShard.cut("nobody.uses.this", (3,)), constant(0.0))

    def construct(self, *inputs: Any) -> Tensor:
        return self.inner(*inputs)


@case(
    world_size=(1, 2),
    variants=[{}, {"overlap_grad_reduce": True, "bucket_size": 500}, {"use_distributed_optimizer": True}],
    timeout_s=60.0,
)
def test_a_parameter_without_gradient_is_named_and_nothing_hangs(ctx: CaseContext, **training: Any) -> None:
    """A bucket that waits for a gradient that never comes would hang the ranks or end them without a name."""
    tiny = settings("dp2" if ctx.world_size > 1 else "tp1").with_(training=training)

    def provide(pre_process: bool, post_process: bool, stage: ModelStage) -> nn.Cell:
        return WithSpare(provide_model(pre_process, post_process, stage))

    messages: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("parallel_core.optimizer.grad_buffer")
    logger.addHandler(listener)
    run = TinyRun(tiny, context_of(ctx, tiny), provide)
    run.train(2)
    logger.removeHandler(listener)
    (message,) = messages  # once, not in every iteration
    assert "1 parameters is exactly zero" in message and message.endswith("\n  nobody.uses.this")
    assert any(shard.name == "nobody.uses.this" for shard in (shard_of(p) for p in run.step.ddp.buffers[0].parameters))


@case(world_size=1, variants=[{}, {"overlap_grad_reduce": True}])
def test_a_parameter_whose_gradient_never_came_is_an_error(ctx: CaseContext, **training: Any) -> None:
    """Where the framework leaves a gradient out, the step ends with its name instead of an old value."""
    run = TinyRun(Tiny(training=training), context_of(ctx, Tiny()))
    (buffer,) = run.step.ddp.buffers
    accumulate, left_out = buffer.accumulate, buffer.names.index("decoder.final_layernorm.weight")
    buffer.accumulate = lambda index, g: None if index == left_out else accumulate(index, g)  # type: ignore[method-assign]
    with pytest.raises(ParallelCoreError, match=f"1 parameters got no gradient .*\n  {buffer.names[left_out]}$"):
        run.train(1)


@case(world_size=2, variants=[{"distributed": False}, {"distributed": True}])
def test_replicas_start_from_the_first_ones_parameters(ctx: CaseContext, distributed: bool) -> None:
    """Replicas that start apart stay apart, and nothing but their losses would tell."""
    tiny = settings("dp2").with_(training={"use_distributed_optimizer": distributed})

    def provide(pre_process: bool, post_process: bool, stage: ModelStage) -> nn.Cell:
        model = provide_model(pre_process, post_process, stage)
        for parameter in model.trainable_params():
            parameter.set_data(parameter + float(ctx.rank))
        return model

    different = TinyRun(tiny, context_of(ctx, tiny), provide)
    same = TinyRun(tiny, context_of(ctx, tiny))
    assert_close(different.parameters(), same.parameters(), 0.0)  # which also compares the replicas
    different.train(2)
    different.parameters()


@case(world_size=2)
def test_both_copies_of_a_tied_embedding_stay_equal(ctx: CaseContext) -> None:
    """The gradients of both stages are summed on both, and the second copy counts in no norm."""
    tiny = settings("pp2")
    run = TinyRun(tiny, context_of(ctx, tiny))
    copies = [p for b in run.step.ddp.buffers for p in b.parameters if shard_of(p).shared_embedding]
    assert len(copies) == 1 and shard_of(copies[0]).is_copy == (ctx.rank == 1)
    run.train(2)
    first, last = gather_values(world_group(ctx), copies[0].asnumpy())
    np.testing.assert_array_equal(first, last)


# ---- the distributed optimizer --------------------------------------------------------------------------------------
@case(
    world_size=(2, 4),
    variants=[
        {"layout": "distopt"},
        {"layout": "distopt overlap"},
        {"layout": "tp2 sp distopt overlap"},
        {"layout": "pp2 distopt"},
    ],
)
def test_the_distributed_optimizer_is_adam(ctx: CaseContext, layout: str) -> None:
    """Only the order of the gradient norm's sum differs, by a rounding of float32.

    That changes the clipping by 1e-7, and Adam moves an element with a small gradient by as much as one with a large
    one: parameters agree within 5e-6 of the largest, where any mistake in a shard is off by the learning rate, 1e-2.
    """
    tiny = settings(layout)
    plain = settings(" ".join(word for word in layout.split() if word not in ("distopt", "overlap")))
    runs = [TinyRun(each, context_of(ctx, each)) for each in (tiny, plain)]
    for run in runs:
        run.train(3)
    assert_close(runs[0].parameters(), runs[1].parameters(), 5e-6)
    for key in ("exp_avg", "exp_avg_sq"):
        assert_close(runs[0].moments(key), runs[1].moments(key), 5e-6)


@case(world_size=(2, 4), variants=[{"dtype": "float32"}, {"dtype": "bfloat16"}])
def test_each_rank_holds_its_part_of_the_optimizer_state(ctx: CaseContext, dtype: str) -> None:
    """1 / dp of the state, measured, up to the padding of the parameters and of one bucket."""
    sections = {"model": {"params_dtype": dtype, "hidden_size": 64}, "training": {"enable_mem_align": False}}
    runs = [TinyRun(tiny.with_(**sections), context_of(ctx, tiny)) for tiny in (settings("tp1"), settings("distopt"))]
    whole, part = (run.step.optimizer.memory_bytes() for run in runs)
    each = 8 if dtype == "float32" else 12  # two moments, and masters where the parameters are not float32
    number_of_elements = whole // each
    assert number_of_elements > 50_000
    assert part * ctx.world_size >= whole
    padding = 64 * sum(len(buffer.parameters) for buffer in runs[0].step.ddp.buffers) + 128 * ctx.world_size
    assert part <= (number_of_elements + padding) * each // ctx.world_size


# ---- overflows ------------------------------------------------------------------------------------------------------
def poison(run: TinyRun, parameter: int, value: float) -> None:
    """Let one element of one parameter's gradient overflow on this rank, before any reduction."""
    finish = run.step.ddp.finish_grad_sync

    def finish_grad_sync() -> None:
        run.step.ddp.buffers[0].main_grad(parameter).numpy()[-1] = value
        finish()

    run.step.ddp.finish_grad_sync = finish_grad_sync  # type: ignore[method-assign]


@case(
    world_size=2,
    variants=[
        {"layout": layout, "where": where, "value": value}
        for layout, value in (("tp2 sp", "inf"), ("pp2", "nan"), ("dp2", "inf"), ("dp2 distopt", "nan"))
        for where in (0, 1)
    ],
)
def test_an_overflow_on_any_rank_skips_the_update_everywhere(
    ctx: CaseContext, layout: str, where: int, value: str
) -> None:
    """In any parameter, on any rank; neither learning rate nor weight decay advances."""
    tiny = settings(layout).with_(
        model={"params_dtype": "float16", "compute_dtype": "float16", "num_layers": 2},
        training={"fp16": True, "loss_scale_value": 64.0, "hysteresis": 2},
        data={"global_batch_size": 4},
        optimizer={
            "start_weight_decay": 0.0,
            "end_weight_decay": 0.1,
            "weight_decay_incr_style": "linear",
            "lr_warmup_iters": 2,
        },
    )
    for parameter in (0, 1, -1):
        run = TinyRun(tiny, context_of(ctx, tiny))
        run.train(1)
        before, lr, wd = run.parameters(), run.step.scheduler.get_lr(), run.step.scheduler.get_wd()
        moments = run.moments("exp_avg")
        if ctx.rank == where:
            count = len(run.step.ddp.buffers[0].parameters)
            poison(run, parameter % count, float(value))
        reports = run.train(2)
        assert all(r.skipped and not np.isfinite(r.grad_norm) for r in reports)
        assert [r.loss_scale for r in reports] == [64.0, 64.0]
        assert run.step.scaler.scale == 32.0  # the second overflow halved it
        assert (run.step.scheduler.get_lr(), run.step.scheduler.get_wd()) == (lr, wd)
        assert run.step.optimizer.step_count == 1
        assert_close(run.parameters(), before, 0.0)
        assert_close(run.moments("exp_avg"), moments, 0.0)


@case(world_size=2, variants=[{"layout": "tp2"}, {"layout": "dp2 distopt"}])
def test_a_gradient_that_is_not_a_number_is_named_or_skipped(ctx: CaseContext, layout: str) -> None:
    """Check_for_nan_in_loss_and_grad acts; without it, and under a constant scale, the weights are kept."""
    tiny = settings(layout)
    run = TinyRun(tiny, context_of(ctx, tiny))
    if ctx.rank == 0:
        poison(run, 0, float("nan"))
    with pytest.raises(ParallelCoreError, match="the gradient norm is nan after 0 updates"):
        run.train(1)
    for scale in ({}, {"loss_scale": 8.0}):
        run = TinyRun(tiny.with_(training={"check_for_nan_in_loss_and_grad": False, **scale}), context_of(ctx, tiny))
        before = run.parameters()
        if ctx.rank == 0:
            poison(run, 0, float("nan"))
        (report,) = run.train(1)
        assert report.skipped and np.isnan(report.grad_norm) and run.step.scheduler.num_samples == 0
        assert_close(run.parameters(), before, 0.0)


# ---- 16 bits --------------------------------------------------------------------------------------------------------
REPEATS = 6


def trains(ctx: CaseContext, layout: str, model: dict[str, Any], training: dict[str, Any]) -> TinyRun:
    """Train on one repeated batch and see the loss fall; compare with float32."""
    small: dict[str, Any] = {"num_layers": 2}
    data = {"global_batch_size": 4}
    optimizer = {"lr_decay_style": "constant", "eps": 1e-6, "learning_rate": 2e-2}
    tiny = settings(layout).with_(model={**small, **model}, training=training, optimizer=optimizer, data=data)
    run = TinyRun(tiny, context_of(ctx, tiny))
    losses = []
    for _ in range(REPEATS):
        run.iteration = 0
        losses.append(run.train(1)[0].losses["lm loss"])
    assert losses[-1] < 0.8 * losses[0], losses
    plain = Tiny(model=small, optimizer=tiny.optimizer, data=data)
    want = from_rank_0(ctx, lambda: reference_losses(plain))
    np.testing.assert_allclose(losses, want, rtol=2e-2)  # 16-bit parameters: 8 bits of mantissa, in every layer
    return run


@functools.cache
def reference_losses(tiny: Tiny) -> list[float]:
    run = TinyRun(tiny, context_of(CaseContext(0, 1, None), tiny))  # type: ignore[arg-type]
    losses = []
    for _ in range(REPEATS):
        run.iteration = 0
        losses.append(run.train(1)[0].losses["lm loss"])
    return losses


def assert_masters(run: TinyRun, dtype: ms.Type) -> None:
    """Parameters have `dtype`, masters are float32 and more exact than they."""
    optimizer = run.step.optimizer
    run.step.ddp.finish_param_gather()
    finer = 0
    for segment in optimizer.segments:
        buffer = run.step.ddp.buffers[segment.buffer]
        assert buffer.parameters[segment.parameter].dtype == dtype
        master = optimizer.master(segment).numpy()
        value = buffer.params.part(segment.start, segment.end).numpy()
        assert master.dtype == np.float32
        np.testing.assert_array_equal(value, master.astype(value.dtype))  # rounded to nearest
        finer += int((value.astype(np.float32) != master).sum())
    assert finer > 0
    assert all(part.numpy().dtype == np.float32 for state in optimizer.state for part in state.values())


@case(world_size=2, variants=[{"layout": layout} for layout in ("tp2 sp", "pp2", "distopt overlap")])
def test_float16_trains_with_dynamic_loss_scale_and_float32_masters(ctx: CaseContext, layout: str) -> None:
    model = {"params_dtype": "float16", "compute_dtype": "float16"}
    run = trains(ctx, layout, model, {"fp16": True, "loss_scale_value": 1024.0, "loss_scale_window": 3})
    assert run.step.scaler.scale == 4096.0  # doubled after the third and after the sixth update
    assert_masters(run, ms.float16)


@case(world_size=2, variants=[{"layout": layout} for layout in ("tp2 sp", "pp2", "distopt overlap")])
def test_bfloat16_parameters_train_with_float32_masters(ctx: CaseContext, layout: str) -> None:
    """Params_dtype and compute_dtype are independent; on CPU bfloat16 parameters compute in float32."""
    for extra in ({}, {"accumulate_allreduce_grads_in_fp32": False}):
        run = trains(ctx, layout, {"params_dtype": "bfloat16"}, extra)
        assert_masters(run, ms.bfloat16)


@case(world_size=1)
def test_float32_parameters_compute_in_float16(ctx: CaseContext) -> None:
    """Masters are the parameters themselves."""
    run = trains(ctx, "tp1", {"compute_dtype": "float16"}, {"fp16": True, "loss_scale_value": 1024.0})
    (buffer,) = run.step.ddp.buffers
    assert all(p.dtype == ms.float32 for p in buffer.parameters)
    assert run.step.optimizer.memory_bytes() == 8 * buffer.layout.numel


@case(world_size=1)
def test_a_fixed_loss_scale_changes_nothing_in_float32(ctx: CaseContext) -> None:
    """Gradients are unscaled before the norm is taken; a power of two is exact."""
    plain, scaled = (trained(ctx, Tiny(training=training)) for training in ({}, {"loss_scale": 1024.0}))
    np.testing.assert_array_equal(plain["losses"], scaled["losses"])
    np.testing.assert_array_equal(plain["norms"], scaled["norms"])
    assert_close(scaled["parameters"], plain["parameters"], 1e-7)


# ---- the update -----------------------------------------------------------------------------------------------------
@case(world_size=(1, 2), variants=[{"optimizer": "adam"}, {"optimizer": "sgd"}])
def test_two_updates_follow_the_formula(ctx: CaseContext, optimizer: str) -> None:
    """Clip_grad, no decay of biases and norms, the decoupled learning rate, against NumPy in float64."""
    options = {
        "optimizer_type": optimizer,
        "clip_grad": 0.5,
        "weight_decay": 0.1,
        "decoupled_lr": 3e-3,
        "min_lr": 1e-4,
        "betas": (0.9, 0.95),
    }
    tiny = settings("tp1" if ctx.world_size == 1 else "tp2 sp").with_(optimizer=options)
    run = TinyRun(tiny, context_of(ctx, tiny))
    config, shape = run.config.optimizer_config, run.step.scheduler.shape
    values = {name: value.astype(np.float64) for name, value in run.parameters().items()}
    first = {name: np.zeros_like(value) for name, value in values.items()}
    second = {name: np.zeros_like(value) for name, value in values.items()}
    for step in (1, 2):
        seen = run.step.scheduler.num_samples
        (report,) = run.train(1)
        gradients = run.gradients()
        norm = np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in gradients.values()))
        np.testing.assert_allclose(report.grad_norm, norm, rtol=1e-6)
        assert norm > 0.5
        for name, g in gradients.items():
            g = g.astype(np.float64) * 0.5 / (norm + 1e-6)
            decoupled = name in ("embedding.word_embeddings.weight", "output_layer.weight")
            lr = shape.lr(seen, 3e-3, 1e-4) if decoupled else shape.lr(seen)
            wd = 0.0 if values[name].ndim == 1 else 0.1
            if optimizer == "sgd":
                first[name] = config.sgd_momentum * first[name] + g + wd * values[name]
                values[name] = values[name] - lr * first[name]
                continue
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.95 * second[name] + 0.05 * g * g
            root = np.sqrt(second[name] / (1 - 0.95**step)) + config.eps
            values[name] = values[name] * (1 - lr * wd) - lr * first[name] / (1 - 0.9**step) / root
    assert_close(run.parameters(), values, 1e-6)


@case(world_size=1)
def test_a_frozen_parameter_is_left_alone(ctx: CaseContext) -> None:
    """The others train on, biases next to frozen weights among them."""
    frozen: list[Parameter] = []

    def provide(pre_process: bool, post_process: bool, stage: ModelStage) -> nn.Cell:
        model = provide_model(pre_process, post_process, stage)
        for parameter in model.trainable_params():
            if shard_of(parameter).name.endswith("linear_fc1.weight"):
                parameter.requires_grad = False
                frozen.append(parameter)
        return model

    run = TinyRun(Tiny(), context_of(ctx, Tiny()), provide)
    kept = [p.asnumpy().copy() for p in frozen]
    before = run.parameters()
    run.train(2)
    after = run.parameters()
    assert len(frozen) == 4
    for parameter, value in zip(frozen, kept):
        np.testing.assert_array_equal(parameter.asnumpy(), value)
    assert all((after[name] != before[name]).any() != name.endswith("linear_fc1.weight") for name in after)


# ---- groups ---------------------------------------------------------------------------------------------------------
@case(world_size=2, variants=[{}, {"use_distributed_optimizer": True}])
def test_gradients_norms_and_state_go_by_dp_cp_and_samples_by_dp(ctx: CaseContext, **training: Any) -> None:
    """Two ranks that differ on the cp axis alone read the same samples, so they train what one rank trains."""
    tiny = Tiny(training=training, data={"global_batch_size": 4}, optimizer={"clip_grad": 0.1})
    context = parallel_context(ctx.rank, 2, cp=2)
    assert (context.cp.size, context.dp.size, context.dp_cp.size) == (2, 1, 2)
    run = TinyRun(tiny, context)
    reports = run.train(3)

    def alone() -> dict[str, Any]:
        single = TinyRun(tiny, parallel_context(0, 1))
        of_one = single.train(3)
        return {"norms": [r.grad_norm for r in of_one], "parameters": single.parameters()}

    want = from_rank_0(ctx, alone)
    np.testing.assert_allclose([r.grad_norm for r in reports], want["norms"], rtol=1e-6)
    assert_close(run.parameters(), want["parameters"], 2e-6)  # fp32: (g + g) / 2 is g, the norm adds in parts
    mine = {key for key in checkpointer(run)._shards_to_save() if "@" not in key}
    theirs = context.world.all_gather_object(sorted(mine))
    assert not set(theirs[0]) & set(theirs[1]) and set(theirs[0]) | set(theirs[1]) == set(run.parameters())


@case(world_size=2, variants=[{}, {"use_distributed_optimizer": True}, {"overlap_grad_reduce": True}])
def test_a_parameter_names_the_group_that_its_gradient_is_summed_over(ctx: CaseContext, **training: Any) -> None:
    """As experts do, which live on some of the data parallel ranks; buffers are made by dtype and by group."""
    tiny = settings("dp2").with_(training=training)

    def provide(pre_process: bool, post_process: bool, stage: ModelStage) -> nn.Cell:
        model = provide_model(pre_process, post_process, stage)
        for parameter in model.decoder.layers[0].mlp.trainable_params():
            mark(parameter, replicas="tp")  # a group of one: each rank keeps a value of its own
        return model

    run = TinyRun(tiny, context_of(ctx, tiny), provide)
    usual = TinyRun(tiny, context_of(ctx, tiny))
    assert {(b.group.size, len(b.parameters)) for b in run.step.ddp.buffers} == {(1, 4), (2, len(names_of(usual)) - 4)}
    run.train(1)
    usual.train(1)
    own, summed = gradients_here(run), gradients_here(usual)
    for name, gradient in summed.items():
        if ".0.mlp." in name:
            both = gather_values(run.context.dp, own[name])
            assert not np.array_equal(both[0], both[1])
            np.testing.assert_allclose(both[0] + both[1], gradient, rtol=1e-5, atol=1e-7)
        elif not training.get("use_distributed_optimizer"):
            np.testing.assert_array_equal(own[name], gradient)


def checkpointer(run: TinyRun) -> Checkpointer:
    return Checkpointer(run.config, run.context, run.step, lambda text: None)


def names_of(run: TinyRun) -> list[str]:
    return [shard_of(p).name for p, _ in run.step.ddp.parameters()]


def gradients_here(run: TinyRun) -> dict[str, np.ndarray]:
    """Return this rank's reduced gradients; with the distributed optimizer those it owns are reduced."""
    found = {}
    for buffer in run.step.ddp.buffers:
        for index, name in enumerate(buffer.names):
            found[name] = buffer.main_grad(index).numpy().copy()
    if any(buffer.sharded for buffer in run.step.ddp.buffers):
        return _owned(run)
    return found


def _owned(run: TinyRun) -> dict[str, np.ndarray]:
    """Return the gradients of the first MLP, joined over the ranks where they are sharded."""
    parts: dict[str, np.ndarray] = {}
    for parameter, segments in run.step.optimizer.segments_by_parameter():
        name, local = shard_of(parameter).name, np.zeros(parameter.size, np.float32)
        for one in segments:
            values = run.step.ddp.buffers[one.buffer].grads.part(one.start, one.end).numpy()
            local[one.offset : one.offset + one.end - one.start] = values
        group = run.context.groups[shard_of(parameter).replicas]
        parts[name] = sum(gather_values(group, local))
    return parts


# ---- names ----------------------------------------------------------------------------------------------------------
@case(world_size=2)
def test_equal_names_on_two_stages_are_refused_on_every_rank(ctx: CaseContext) -> None:
    """A model of one's own whose stages call their layers alike would keep one of the two in a checkpoint."""
    context = context_of(ctx, settings("pp2"))
    own = nn.Dense(4, 4)
    with pytest.raises(ConfigError, match="weight: on pipeline ranks 0 and 1"):
        check_parameter_names([own], context)
    check_parameter_names([nn.SequentialCell(nn.Dense(4, 4)) if ctx.rank else own], context)  # "0.weight", "weight"
