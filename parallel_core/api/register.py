"""MindFormers' register: classes of one's own by kind and name, made from YAML entries with `type:`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, TypeVar

from parallel_core.errors import ConfigError

_Class = TypeVar("_Class", bound=type)


class MindFormerModuleType(str, Enum):
    """What a registered class is for."""

    CONFIG = "config"
    MODELS = "models"
    TOKENIZER = "tokenizer"
    PROCESSOR = "processor"
    DATASET = "dataset"
    DATASET_LOADER = "dataset_loader"
    METRIC = "metric"
    TRAINER = "trainer"
    PIPELINE = "pipeline"
    TRANSFORMS = "transforms"
    LOSS = "loss"
    LR = "lr"
    OPTIMIZER = "optimizer"
    CALLBACK = "callback"
    WRAPPER = "wrapper"
    TOOLS = "tools"


class MindFormerRegister:
    """Classes by kind and name."""

    registry: dict[str, dict[str, type]] = {}

    @classmethod
    def register(
        cls, module_type: MindFormerModuleType | str = MindFormerModuleType.TOOLS, alias: str | None = None
    ) -> Callable[[_Class], _Class]:
        """Return a decorator that registers a class under its name, or another.

        Raises:
            ConfigError: another class has the name already, or the kind is unknown.
        """
        kind = _kind(module_type)

        def keep(one: _Class) -> _Class:
            known, name = cls.registry.setdefault(kind, {}), alias or one.__name__
            before = known.get(name)
            if before is not None and before.__qualname__ != one.__qualname__:
                raise ConfigError(f"{name} is registered as {kind} already, by {before.__module__}; give alias")
            known[name] = one
            return one

        return keep

    @classmethod
    def is_exist(cls, module_type: MindFormerModuleType | str, class_name: str) -> bool:
        """Tell whether a class is registered."""
        return class_name in cls.registry.get(_kind(module_type), {})

    @classmethod
    def get_cls(cls, module_type: MindFormerModuleType | str, class_name: str) -> type:
        """Return a registered class.

        Raises:
            ConfigError: there is none; those that are registered are named.
        """
        known = cls.registry.get(_kind(module_type), {})
        if class_name not in known:
            there = ", ".join(known) or "none"
            raise ConfigError(f"{class_name!r} is not registered as {_kind(module_type)}; there are: {there}")
        return known[class_name]

    @classmethod
    def get_instance(cls, module_type: MindFormerModuleType | str, class_name: str, **settings: Any) -> Any:
        """Return an object of a registered class."""
        return cls.get_cls(module_type, class_name)(**settings)

    @classmethod
    def get_instance_from_cfg(
        cls,
        cfg: Mapping[str, Any],
        module_type: MindFormerModuleType | str = MindFormerModuleType.TOOLS,
        default_args: Mapping[str, Any] | None = None,
    ) -> Any:
        """Return an object of the class that `cfg["type"]` names, made of the other entries.

        Args:
            cfg: `type` and the class's arguments.
            module_type: the kind.
            default_args: arguments that `cfg` does not have.

        Raises:
            ConfigError: `type` is missing or not registered.
        """
        if "type" not in cfg:
            raise ConfigError(f"{dict(cfg)!r} has no type, which names the class")
        given = {**(default_args or {}), **cfg}
        return cls.get_instance(module_type, str(given.pop("type")), **given)


def _kind(module_type: MindFormerModuleType | str) -> str:
    try:
        return MindFormerModuleType(module_type).value
    except ValueError:
        kinds = ", ".join(kind.value for kind in MindFormerModuleType)
        raise ConfigError(f"module_type={module_type!r}: give one of {kinds}") from None
