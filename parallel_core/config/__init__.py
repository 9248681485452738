"""Configuration: the schema, Megatron's names for it, the rules across fields, and the readers of every input form."""

from __future__ import annotations

from parallel_core.config.load import LoadedConfig, load_config, required_world_size
from parallel_core.config.megatron_api import (
    get_args,
    init_configs_from_args,
    init_configs_from_yaml,
    initialize_megatron,
)
from parallel_core.config.schema import (
    AllConfig,
    DatasetConfig,
    FlashAttentionConfig,
    ModelParallelConfig,
    OptimizerConfig,
    ProfileConfig,
    TrainingConfig,
    TransformerConfig,
)

__all__ = [
    "AllConfig",
    "DatasetConfig",
    "FlashAttentionConfig",
    "LoadedConfig",
    "ModelParallelConfig",
    "OptimizerConfig",
    "ProfileConfig",
    "TrainingConfig",
    "TransformerConfig",
    "get_args",
    "init_configs_from_args",
    "init_configs_from_yaml",
    "initialize_megatron",
    "load_config",
    "required_world_size",
]
