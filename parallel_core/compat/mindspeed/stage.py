"""Which pipeline stage a model class builds, when nobody passes it one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager

from parallel_core.compat import parallel_state
from parallel_core.compat.mindspeed.config import ModelConfig
from parallel_core.config.schema import AllConfig, TransformerConfig
from parallel_core.errors import ConfigError
from parallel_core.tensor_parallel.random import RandomStreams
from parallel_core.training.model import ModelStage
from parallel_core.training.runtime import supported_precision
from parallel_core.transformer.build import BuildContext
from parallel_core.transformer.recompute_plan import recompute_plan

_building: list[ModelStage] = []


@contextmanager
def building(stage: ModelStage) -> Iterator[None]:
    """Inside the block, models are built for `stage`, and `parallel_state` speaks of it."""
    parallel = stage.config.parallel_config
    chunks = parallel.virtual_pipeline_model_parallel_size
    parallel_state.set_context(stage.context, chunks if chunks > 1 else None)
    _building.append(stage)
    try:
        with parallel_state.virtual_pipeline_stage(stage.vp_stage):
            yield
    finally:
        _building.pop()


def current_stage(config: TransformerConfig) -> ModelStage:
    """Return the stage to build a model of `config` for.

    Inside a model provider that is the one `pretrain` asks for. Outside it is the whole model, where model parallelism
    is initialized without pipeline stages.

    Args:
        config: what the model class was given; it may differ from the run's.

    Raises:
        ConfigError: outside of a model provider, if there are pipeline stages or no `parallel_state`.
    """
    if _building:
        stage = _building[-1]
        model = supported_precision(dataclasses.replace(stage.config, model_config=config))[0].model_config
        return dataclasses.replace(stage, build=dataclasses.replace(stage.build, config=model))
    context = parallel_state.get_context()
    if context.pp.size > 1 or not isinstance(config, ModelConfig):
        raise ConfigError(
            "which part of the model to build is known inside pretrain()'s model_provider_func only; outside of it, "
            "use pipeline_model_parallel_size=1 and the model_config that init_configs_from_args returns"
        )
    parallel, seed = config.parallel_config, config.training_config.seed
    sections = {name: getattr(config, name) for name in ("training_config", "dataset_config", "optimizer_config")}
    whole = supported_precision(AllConfig(model_config=config, parallel_config=parallel, **sections))[0]
    streams = RandomStreams(seed, context.tp.rank)
    build = BuildContext(whole.model_config, context.tp, parallel.sequence_parallel, streams, seed)
    layers = tuple(n for n in range(config.num_layers) if n not in parallel.noop_layers)
    plan = recompute_plan(whole.model_config, parallel, len(layers), 0, 0)
    return ModelStage(whole, context, build, layers, plan, 0)
