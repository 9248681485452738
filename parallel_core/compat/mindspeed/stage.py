"""Which pipeline stage a model class builds, when nobody passes it one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

from parallel_core.compat import parallel_state
from parallel_core.compat.mindspeed.config import ModelConfig
from parallel_core.config.schema import AllConfig, TransformerConfig
from parallel_core.context_parallel.attention import ContextGroups
from parallel_core.errors import ConfigError
from parallel_core.layout.recompute import recompute_plan
from parallel_core.tensor_parallel.random import RandomStreams
from parallel_core.training.runtime import supported_precision
from parallel_core.transformer.stage import ModelStage

_building: list[ModelStage] = []


@contextmanager
def building(stage: ModelStage) -> Iterator[None]:
    """Inside the block, models are built for `stage`, and `parallel_state` speaks of it."""
    if stage.run is None or stage.context is None:
        raise ConfigError("models of these scripts are built inside pretrain(), which knows the run and its groups")
    parallel = stage.run.parallel_config
    chunks = parallel.virtual_pipeline_model_parallel_size
    parallel_state.set_context(stage.context, chunks if chunks > 1 else None)
    _building.append(stage)
    try:
        with parallel_state.virtual_pipeline_stage(stage.vp_stage):
            yield
    finally:
        _building.pop()


def run_of(config: TransformerConfig) -> AllConfig:
    """Return everything the run is told, of which `config` is the model; see `current_stage`."""
    run = current_stage(config).run
    if run is None:
        raise ConfigError("the run's configuration is known inside pretrain()'s model_provider_func only")
    return run


def current_stage(config: TransformerConfig, pre_process: bool = True, post_process: bool = True) -> ModelStage:
    """Return the stage to build a model of `config` for.

    Inside a model provider that is the one `pretrain` asks for. Outside it is the whole model, where model parallelism
    is initialized without pipeline stages.

    Args:
        config: what the model class was given; it may differ from the run's.
        pre_process: the model class was told to embed tokens.
        post_process: the model class was told to end in a loss.

    Raises:
        ConfigError: outside of a model provider, if there are pipeline stages or no `parallel_state`.
    """
    if _building and _building[-1].run is not None:
        stage, run = _building[-1], _building[-1].run
        model = supported_precision(dataclasses.replace(run, model_config=config))[0].model_config
        return dataclasses.replace(stage, config=model, pre_process=pre_process, post_process=post_process)
    context = parallel_state.get_context()
    if context.pp.size > 1 or not isinstance(config, ModelConfig):
        raise ConfigError(
            "which part of the model to build is known inside pretrain()'s model_provider_func only; outside of it, "
            "use pipeline_model_parallel_size=1 and the model_config that init_configs_from_args returns"
        )
    parallel, seed = config.parallel_config, config.training_config.seed
    sections = {name: getattr(config, name) for name in ("training_config", "dataset_config", "optimizer_config")}
    whole = supported_precision(AllConfig(model_config=config, parallel_config=parallel, **sections))[0]
    streams = RandomStreams(seed, context.tp.rank, context.cp.rank)
    layers = tuple(n for n in range(config.num_layers) if n not in parallel.noop_layers)
    plan = recompute_plan(whole.model_config, parallel, len(layers), 0, 0)
    return ModelStage(
        whole.model_config,
        context.tp,
        parallel.sequence_parallel,
        streams,
        seed,
        layer_numbers=layers,
        pre_process=pre_process,
        post_process=post_process,
        plan=plan,
        context_groups=ContextGroups(context.cp, context.cp_inner, context.cp_ring),
        exchanges=parallel.cp_comm_type,
        run=whole,
        context=context,
    )
