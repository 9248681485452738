"""Building this rank's model chunks, and what the optimizer needs to know of their parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mindspore import Parameter, nn

from parallel_core.config.schema import AllConfig
from parallel_core.context import ParallelContext
from parallel_core.layout.stages import StageLayout, stage_layout
from parallel_core.optimizer.optimizer import Traits
from parallel_core.tensor_parallel.parameter import shard_of
from parallel_core.tensor_parallel.random import RandomStreams
from parallel_core.transformer.build import BuildContext
from parallel_core.transformer.recompute_plan import RecomputePlan, recompute_plan


@dataclass(frozen=True)
class ModelStage:
    """What a model provider may want to know of the chunk it builds.

    Attributes:
        config: everything the run is told.
        context: this rank's groups.
        build: configuration, tensor parallel group and random streams for the layers.
        layer_numbers: global numbers of the chunk's layers.
        plan: what is recomputed in backward.
        vp_stage: number of the chunk on this rank.
    """

    config: AllConfig
    context: ParallelContext
    build: BuildContext
    layer_numbers: tuple[int, ...]
    plan: RecomputePlan
    vp_stage: int


ModelProvider = Callable[..., nn.Cell]
"""`model_provider_func(pre_process, post_process[, vp_stage][, stage]) -> Cell`."""


@dataclass(frozen=True)
class RankModel:
    """The chunks of one rank, and where they stand in the pipeline."""

    chunks: tuple[nn.Cell, ...]
    layout: StageLayout
    streams: RandomStreams


def get_model(model_provider_func: ModelProvider, config: AllConfig, context: ParallelContext) -> RankModel:
    """Build this rank's chunks.

    The provider is called once a chunk with `pre_process` and `post_process`, and with `vp_stage` and `stage` (a
    `ModelStage`) if it takes them.
    """
    parallel = config.parallel_config
    layout = stage_layout(config.model_config.num_layers, parallel)
    streams = RandomStreams(config.training_config.seed, context.tp.rank)
    build = BuildContext(
        config.model_config, context.tp, parallel.sequence_parallel, streams, config.training_config.seed
    )
    accepted = inspect.signature(model_provider_func).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
    rank, chunks = context.pp.rank, []
    for chunk, layers in enumerate(layout.layers[rank]):
        numbers = tuple(n for n in layers if n not in parallel.noop_layers)
        plan = recompute_plan(config.model_config, parallel, len(numbers), rank, chunk)
        stage = ModelStage(config, context, build, numbers, plan, chunk)
        extra: dict[str, Any] = {"vp_stage": chunk, "stage": stage}
        chunks.append(
            model_provider_func(
                pre_process=layout.is_first(rank, chunk),
                post_process=layout.is_last(rank, chunk),
                **{key: value for key, value in extra.items() if takes_all or key in accepted},
            )
        )
    return RankModel(tuple(chunks), layout, streams)


def traits_of(context: ParallelContext) -> Callable[[Parameter], Traits]:
    """Return a function that gives the optimizer's traits of a parameter on this rank."""

    def traits(parameter: Parameter) -> Traits:
        shard = shard_of(parameter)
        return Traits(
            name=shard.name,
            decays=len(shard.global_shape) > 1 and not shard.name.endswith(".bias"),
            counts=(shard.is_sharded or context.tp.rank == 0) and not shard.is_copy,
            is_embedding_or_output=shard.is_embedding_or_output,
        )

    return traits
