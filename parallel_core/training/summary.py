"""The facts a run starts with."""

from __future__ import annotations

import mindspore as ms

import parallel_core
from parallel_core.comm.factory import carrier_of
from parallel_core.config.schema import AllConfig
from parallel_core.context import ParallelContext
from parallel_core.layout.derived import BatchSizes
from parallel_core.layout.mesh import Mesh
from parallel_core.layout.shard import shard_of
from parallel_core.training.step import TrainingStep


def describe_run(
    config: AllConfig, context: ParallelContext, step: TrainingStep, sizes: BatchSizes, iterations: int
) -> list[str]:
    """Return the lines that a run begins with; collective (parameters are counted over the pipeline)."""
    model, parallel, mesh = config.model_config, config.parallel_config, context.mesh
    here = sum(_elements(p) for p, _ in step.ddp.parameters() if not shard_of(p).is_copy)
    total = sum(context.pp.all_gather_object(here))
    memory = step.ddp.memory_bytes()
    layers = " | ".join("+".join(map(str, row)) for row in step.model.layout.counts())
    return [
        f"parallel_core {parallel_core.__version__}, MindSpore {ms.__version__} on {ms.get_context('device_target')}, "
        f"{mesh.world_size} process{'es' if mesh.world_size > 1 else ''}",
        f"Layout: tensor {mesh.size('tp')}{' + sequence' if parallel.sequence_parallel else ''} x pipeline "
        f"{mesh.size('pp')} x data {mesh.size('dp')}{_context(config, mesh)}; layers of each pipeline rank: {layers}",
        *_communication(context),
        f"Model: {model.num_layers} layers, hidden {model.hidden_size}, {model.num_attention_heads} heads, "
        f"sequence {model.seq_length}, vocabulary {model.vocab_size}, {total:,} parameters, "
        f"{model.params_dtype} parameters, {model.compute_dtype} computation",
        f"Batch: {sizes.global_batch_size} samples = {mesh.size('dp')} x "
        f"{sizes.microbatches_of(sizes.global_batch_size)} microbatches of {sizes.micro_batch_size}; "
        f"{iterations} iterations",
        f"Memory of rank 0: parameters {memory['parameters'] / 1e6:.1f} MB, gradients "
        f"{memory['gradients'] / 1e6:.1f} MB, optimizer {step.optimizer.memory_bytes() / 1e6:.1f} MB",
    ]


def _communication(context: ParallelContext) -> list[str]:
    """Say what carries this rank's groups; nothing where there are none."""
    carried: dict[str, list[str]] = {}
    named = [*context.groups.items(), ("world", context.world)]
    first_name = {id(group): name for name, group in reversed(named)}
    for name, group in named:
        if (carrier := carrier_of(group)) and first_name[id(group)] == name:
            carried.setdefault(carrier, []).append(name)
    if len(carried) > 1:
        return ["Communication: " + "; ".join(f"{', '.join(names)} over {one}" for one, names in carried.items())]
    return [f"Communication: {one}" for one in carried]


def _context(config: AllConfig, mesh: Mesh) -> str:
    words = dict.fromkeys(config.parallel_config.cp_comm_type)
    return f" x context {mesh.size('cp')} ({', '.join(words)})" if mesh.size("cp") > 1 else ""


def _elements(parameter: object) -> int:
    size = 1
    for n in shard_of(parameter).global_shape:
        size *= n
    return size
