"""Building this rank's model chunks."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from mindspore import nn

from parallel_core.adapt.lora import adapt
from parallel_core.config.schema import AllConfig
from parallel_core.context import ParallelContext
from parallel_core.context_parallel.attention import ContextGroups
from parallel_core.expert_parallel.dispatch import ExpertGroups
from parallel_core.expert_parallel.ledger import RoutingLedger
from parallel_core.layout.recompute import recompute_plan
from parallel_core.layout.stages import StageLayout, stage_layout
from parallel_core.tensor_parallel.random import RandomStreams
from parallel_core.training.tied import require_trained_alike
from parallel_core.transformer.stage import ModelStage

ModelProvider = Callable[..., nn.Cell]
"""`model_provider_func(pre_process, post_process[, vp_stage][, stage]) -> Cell`."""


@dataclass(frozen=True)
class RankModel:
    """The chunks of one rank, and where they stand in the pipeline."""

    chunks: tuple[nn.Cell, ...]
    layout: StageLayout
    streams: RandomStreams
    ledger: RoutingLedger


def get_model(model_provider_func: ModelProvider, config: AllConfig, context: ParallelContext) -> RankModel:
    """Build this rank's chunks.

    The provider is called once a chunk with `pre_process` and `post_process`, and with `vp_stage` and `stage` (a
    `transformer.ModelStage`) if it takes them.
    """
    parallel = config.parallel_config
    layout = stage_layout(config.model_config.num_layers, parallel)
    streams = RandomStreams(config.training_config.seed, context.tp.rank, context.cp.rank)
    ledger = RoutingLedger.of(config, context)
    accepted = inspect.signature(model_provider_func).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
    rank, chunks = context.pp.rank, []
    for chunk, layers in enumerate(layout.layers[rank]):
        numbers = tuple(n for n in layers if n not in parallel.noop_layers)
        stage = ModelStage(
            config.model_config,
            context.tp,
            parallel.sequence_parallel,
            streams,
            config.training_config.seed,
            layer_numbers=numbers,
            pre_process=layout.is_first(rank, chunk),
            post_process=layout.is_last(rank, chunk),
            plan=recompute_plan(config.model_config, parallel, len(numbers), rank, chunk),
            context_groups=ContextGroups(context.cp, context.cp_inner, context.cp_ring),
            exchanges=parallel.cp_comm_type,
            expert_groups=ExpertGroups.of(parallel, context),
            ledger=ledger,
            vp_stage=chunk,
            run=config,
            context=context,
        )
        taken = {key: x for key, x in (("vp_stage", chunk), ("stage", stage)) if takes_all or key in accepted}
        chunks.append(model_provider_func(pre_process=stage.pre_process, post_process=stage.post_process, **taken))
    if config.training_config.lora.rank:
        adapt(chunks, config.training_config, streams, context.world)
        ledger.freeze()
    require_trained_alike(chunks, context.embedding)
    return RankModel(tuple(chunks), layout, streams, ledger)
