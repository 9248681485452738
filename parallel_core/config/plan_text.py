"""A plan as text: rank table, layer placement, schedule, memory, parameters, FLOPs."""

from __future__ import annotations

from collections.abc import Iterator

from parallel_core.config.expert_plan import exchanged_bytes
from parallel_core.config.plan import (
    BYTES,
    Plan,
    active_parameters,
    in_flight,
    model_parameters,
    num_floating_point_operations,
)
from parallel_core.pipeline.figures import format_steps
from parallel_core.pipeline.schedule import make_schedule, name_of_schedule

_FEW_RANKS = 64
_FEW_TICKS = 96


def plan_text(plan: Plan, every_rank: bool = False) -> str:
    """Return `plan` for people; `every_rank` lists all ranks however many there are."""
    parts = [
        *_summary(plan), "", *_rank_table(plan, every_rank), "", *_layers(plan), "", *_schedule(plan), "",
        *_memory(plan),
    ]
    return "\n".join(parts) + "\n"


def _summary(plan: Plan) -> Iterator[str]:
    config, data = plan.config, plan.config.dataset_config
    count = model_parameters(config.model_config, len(config.parallel_config.noop_layers))
    flops = num_floating_point_operations(config, data.global_batch_size)
    tokens = data.global_batch_size * config.model_config.seq_length
    axes = " x ".join(f"{name} {size}" for name, size in plan.mesh.axes)
    yield f"ranks: {plan.mesh.world_size} = {axes}"
    yield f"parameters: {count:,} ({_scaled(count, 1000)})"
    if config.model_config.moe.num_experts:
        yield from _experts(plan)
    yield (
        f"batch: {data.global_batch_size} samples = micro batch {data.batch_size} x data parallel "
        f"{plan.mesh.size('dp')} x {data.micro_batch_num} microbatches; {tokens:,} tokens"
    )
    yield f"operations: {flops:.4e} per step, {flops / plan.mesh.world_size:.4e} per rank"


def _experts(plan: Plan) -> Iterator[str]:
    config = plan.config
    model, parallel = config.model_config, config.parallel_config
    active = active_parameters(model, len(parallel.noop_layers))
    ep, etp, pp = parallel.expert_model_parallel_size, parallel.expert_tensor_size, plan.mesh.size("pp")
    yield f"  of them active for a token: {active:,} ({_scaled(active, 1000)})"
    yield (
        f"experts: {model.moe.num_experts} in {model.moe.layers_with_experts(model.num_layers)} of {model.num_layers} "
        f"layers, {model.moe.moe_router_topk} for a token; ranks: expert tensor {etp} x expert {ep} x equal experts "
        f"{plan.mesh.world_size // (etp * ep * pp)} x pipeline {pp}"
    )
    sent = exchanged_bytes(config, BYTES[model.compute_dtype])
    yield (
        f"exchange ({model.moe.moe_token_dispatcher_type}): {sent / 2**20:.2f} MiB sent by a rank in one layer's "
        "forward and backward pass of a microbatch, for even loads"
    )


def _rank_table(plan: Plan, every_rank: bool) -> Iterator[str]:
    world = plan.mesh.world_size
    names = [name for name, _ in plan.mesh.axes]
    yield "rank table (tensor parallel ranks are neighbours, pipeline stages are farthest apart):"
    if every_rank or world <= _FEW_RANKS:
        yield "   rank | " + " | ".join(f"{name:>4}" for name in names)
        for rank in range(world):
            where = plan.mesh.coordinates(rank)
            yield f"  {rank:5d} | " + " | ".join(f"{where[name]:4d}" for name in names)
        return
    per_stage = world // plan.mesh.size("pp")
    tp = plan.mesh.size("tp")
    for stage in range(plan.mesh.size("pp")):
        first = stage * per_stage
        groups = f"tensor parallel groups {first}-{first + tp - 1}, ..., "
        groups += f"{first + per_stage - tp}-{first + per_stage - 1}"
        yield f"  pipeline rank {stage}: ranks {first}-{first + per_stage - 1}; {groups}"
    yield f"  (--every-rank lists all {world})"


def _layers(plan: Plan) -> Iterator[str]:
    counts = plan.layout.counts()
    yield f"layers per pipeline rank: {', '.join(str(sum(row)) for row in counts)}"
    for rank, row in enumerate(plan.layout.layers):
        chunks = []
        for chunk, layers in enumerate(row):
            ends = ["embedding"] if plan.layout.is_first(rank, chunk) else []
            ends += [_range(layers)] if layers else []
            ends += ["norm, head, loss"] if plan.layout.is_last(rank, chunk) else []
            chunks.append(f"[{', '.join(ends)}]")
        yield f"  pipeline rank {rank}: {' '.join(chunks)}"


def _range(layers: range) -> str:
    return str(layers.start) if len(layers) == 1 else f"{layers.start}-{layers.stop - 1}"


def _schedule(plan: Plan) -> Iterator[str]:
    ranks, chunks = plan.layout.num_ranks, plan.layout.num_chunks
    number = plan.config.dataset_config.micro_batch_num
    name = name_of_schedule(plan.config.parallel_config.pipeline_schedule, chunks)
    kind = {"1f1b": "1F1B", "interleaved": "interleaved 1F1B", "zero-bubble": "zero bubble"}[name]
    kind = "no pipeline" if ranks == 1 else kind if chunks == 1 else f"{kind}, {chunks} chunks per rank"
    yield f"schedule: {kind}, {number} microbatches; ideal bubble {100 * plan.bubble:.1f}% of a step"
    if ranks > 1 and ranks <= 8 and number * chunks * 2 <= _FEW_TICKS:
        group = plan.config.parallel_config.microbatch_group_size_per_virtual_pipeline_stage
        yield format_steps(make_schedule(ranks, chunks, number, name=name, group_size=group))


def _memory(plan: Plan) -> Iterator[str]:
    yield "memory per rank (GiB, estimated):"
    yield "  pipeline rank |  parameters | weights | gradients | optimizer | in flight | activations |  total"
    for stage, (memory, count) in enumerate(zip(plan.memory, plan.parameters)):
        gib = [f"{value / 2**30:.3f}" for value in (memory.weights, memory.gradients, memory.optimizer)]
        yield (
            f"  {stage:13d} | {_scaled(count.total, 1000):>11} | {gib[0]:>7} | {gib[1]:>9} | {gib[2]:>9} | "
            f"{in_flight(plan.config, stage):9d} | {memory.activations / 2**30:11.3f} | {memory.total / 2**30:6.3f}"
        )


def _scaled(value: float, step: int) -> str:
    for unit in ("", " k", " M", " B"):
        if value < step or unit == " B":
            return f"{value:.2f}{unit}" if unit else str(value)
        value /= step
    return str(value)
