"""From given values to the config tree: derivations, checks, and the fields that the results fill."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from parallel_core.config import table
from parallel_core.config.argument import IGNORED, REFUSED
from parallel_core.config.bert import BertConfig
from parallel_core.config.checks import CHECKS
from parallel_core.config.derivations import DERIVATIONS
from parallel_core.config.diagnosis import DiagnosisConfig
from parallel_core.config.experts import MoEConfig
from parallel_core.config.latent_attention import MLAConfig
from parallel_core.config.lora import LoraConfig
from parallel_core.config.multi_token import MTPConfig
from parallel_core.config.resolution import Resolution
from parallel_core.config.schema import (
    AllConfig,
    DatasetConfig,
    FlashAttentionConfig,
    ModelParallelConfig,
    OptimizerConfig,
    ProfileConfig,
    TrackingConfig,
    TrainingConfig,
    TransformerConfig,
)
from parallel_core.config.values import Given


def run_rules(
    given: dict[str, Given],
    world_size: int | None,
    problems: Iterable[str] = (),
    notes: Iterable[str] = (),
    unreadable: frozenset[str] = frozenset(),
) -> Resolution:
    """Return the state after the rules: values, derivations, notes and problems."""
    resolution = Resolution(given, world_size, unreadable, problems=list(problems), notes=list(notes))
    _sort_out(resolution)
    for rule in DERIVATIONS.values():
        rule(resolution)
    for check in CHECKS.values():
        check(resolution)
    return resolution


def _sort_out(resolution: Resolution) -> None:
    """Refuse what is not built, feature by feature, and say what is ignored and why."""
    refused: dict[str, list[str]] = {}
    for name, entry in resolution.given.items():
        argument = table.BY_NAME[name]
        if argument.status == IGNORED and entry.value != argument.default:
            resolution.note(f"{entry.terms}: ignored; {argument.reason}")
        if argument.status != REFUSED:
            continue
        resolution.values[name] = argument.default
        if not asks_for_nothing(name, entry.value):
            refused.setdefault(argument.reason, []).append(entry.terms)
    for feature, terms in refused.items():
        if feature.startswith("removed"):
            resolution.problems.append(f"{', '.join(terms)}: {feature}")
        else:
            resolution.problems.append(f"{', '.join(terms)}: not built: {feature}")


def asks_for_nothing(name: str, value: object) -> bool:
    """Whether `value` of a refused argument is what runs without the feature have anyway."""
    argument = table.BY_NAME[name]
    harmless = (argument.default, *argument.harmless, None)
    return any(_same(value, quiet) for quiet in harmless)


def _same(value: object, other: object) -> bool:
    if isinstance(value, (list, tuple)) or isinstance(other, (list, tuple)):
        as_list = [list(v) if isinstance(v, (list, tuple)) else v for v in (value, other)]
        return as_list[0] == as_list[1]
    return value == other or str(value) == str(other)


_SECTION_TYPES: dict[str, Any] = {
    "model_config": TransformerConfig,
    "parallel_config": ModelParallelConfig,
    "training_config": TrainingConfig,
    "dataset_config": DatasetConfig,
    "optimizer_config": OptimizerConfig,
}
_NESTED_TYPES: dict[str, Any] = {
    "bert": BertConfig,
    "diagnosis": DiagnosisConfig,
    "fa_config": FlashAttentionConfig,
    "lora": LoraConfig,
    "mla": MLAConfig,
    "moe": MoEConfig,
    "mtp": MTPConfig,
    "profile": ProfileConfig,
    "tracking": TrackingConfig,
}


def build_config(resolution: Resolution) -> AllConfig:
    """Return the config tree of resolved values; None means the field's own "derive it" value."""
    sections: dict[str, dict[str, Any]] = {name: {} for name in _SECTION_TYPES}
    nested: dict[tuple[str, str], dict[str, Any]] = {}
    for path, argument in table.DIRECT.items():
        value = resolution.values[argument.name]
        if value is None:
            continue
        section, _, rest = path.partition(".")
        outer, _, inner = rest.partition(".")
        if inner:
            nested.setdefault((section, outer), {})[inner] = value
        else:
            sections[section][outer] = value
    for (section, outer), values in nested.items():
        sections[section][outer] = values
    return config_of_sections(sections)


def config_of_sections(sections: Mapping[str, Mapping[str, Any]]) -> AllConfig:
    """Return the config tree of field values by section, the inverse of `AllConfig.to_dict`."""
    built = {}
    for name, kind in _SECTION_TYPES.items():
        values = dict(sections[name])
        for outer in _NESTED_TYPES.keys() & values.keys():
            values[outer] = _NESTED_TYPES[outer](**values[outer])
        built[name] = kind(**values)
    return AllConfig(**built)
