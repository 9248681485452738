"""The configuration as these scripts read it: `model_config` also knows the other sections."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from parallel_core import config as core
from parallel_core.config.schema import (
    AllConfig,
    DatasetConfig,
    ModelParallelConfig,
    OptimizerConfig,
    TrainingConfig,
    TransformerConfig,
)
from parallel_core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ModelConfig(TransformerConfig):
    """The model's configuration, from which a model class can reach the other sections."""

    parallel_config: ModelParallelConfig = field(default_factory=ModelParallelConfig)
    training_config: TrainingConfig = field(default_factory=TrainingConfig)
    dataset_config: DatasetConfig = field(default_factory=DatasetConfig)
    optimizer_config: OptimizerConfig = field(default_factory=OptimizerConfig)


_current: list[AllConfig] = []


def init_configs_from_args(args: argparse.Namespace | Mapping[str, object]) -> AllConfig:
    """Return the configuration of Megatron-named arguments; see `parallel_core.config.init_configs_from_args`.

    Its `model_config` is a `ModelConfig`. The data functions of this package go by the configuration made last.
    """
    return keep(core.init_configs_from_args(args))


def init_configs_from_yaml(file_path: str) -> AllConfig:
    """Return the configuration of a YAML file; otherwise like `init_configs_from_args`."""
    return keep(core.init_configs_from_yaml(file_path))


def keep(config: AllConfig) -> AllConfig:
    """Return `config` with a `ModelConfig`, and make it the current one."""
    sections: dict[str, Any] = {name: getattr(config, name) for name in _SECTIONS}
    model = ModelConfig(**_fields(config.model_config), **sections)
    _current[:] = [dataclasses.replace(config, model_config=model)]
    return _current[0]


def current_config() -> AllConfig:
    """Return the configuration made last.

    Raises:
        ConfigError: if there is none.
    """
    if not _current:
        raise ConfigError("there is no configuration yet: call init_configs_from_args(get_args()) first")
    return _current[0]


def plain(config: AllConfig) -> AllConfig:
    """Return `config` with the core's own `TransformerConfig`."""
    return dataclasses.replace(config, model_config=TransformerConfig(**_fields(config.model_config)))


_SECTIONS = ("parallel_config", "training_config", "dataset_config", "optimizer_config")


def _fields(model: TransformerConfig) -> dict[str, Any]:
    return {each.name: getattr(model, each.name) for each in dataclasses.fields(TransformerConfig)}
