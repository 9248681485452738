"""MindFormers' settings of a run: a dictionary whose entries are attributes too, from YAML with `base_config`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from parallel_core.data.files import read_text
from parallel_core.errors import ConfigError


class MindFormerConfig(dict[str, Any]):
    """Settings by name, as entries and as attributes; one that is not there is None.

    Args:
        files: YAML files or dictionaries, later ones over earlier ones. A file's `base_config` names files beneath it,
            from its own folder. All are read as UTF-8.
        settings: over all of them.

    Raises:
        ConfigError: a file is no YAML of settings.
    """

    def __init__(self, *files: str | Path | Mapping[str, Any], **settings: Any) -> None:
        super().__init__()
        for one in files:
            self._merge(one if isinstance(one, Mapping) else _read(Path(one)))
        self._merge(settings)

    def _merge(self, found: Mapping[str, Any]) -> None:
        for name, value in found.items():
            before = self.get(name)
            if isinstance(value, Mapping):
                self[name] = MindFormerConfig(before if isinstance(before, Mapping) else {}, value)
            else:
                self[name] = [MindFormerConfig(x) if isinstance(x, Mapping) else x for x in value] if isinstance(
                    value, list
                ) else value  # fmt: skip

    def merge_from_dict(self, options: Mapping[str, Any]) -> None:
        """Set entries by dotted names, such as `runner_config.epochs`."""
        for path, value in options.items():
            *outer, last = path.split(".")
            place: MindFormerConfig = self
            for name in outer:
                place = place.setdefault(name, MindFormerConfig())
            place._merge({last: value})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.get(name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._merge({name: value})

    def __deepcopy__(self, memo: Any) -> MindFormerConfig:
        return MindFormerConfig(self)


def _read(path: Path, above: tuple[Path, ...] = ()) -> Mapping[str, Any]:
    if path in above:
        raise ConfigError(f"{path}: base_config leads back to it")
    try:
        found = yaml.safe_load(read_text(str(path)))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: is no YAML ({error})") from None
    if not isinstance(found, Mapping):
        raise ConfigError(f"{path}: has no settings")
    base = found.get("base_config") or []
    merged = MindFormerConfig()
    for name in [base] if isinstance(base, str) else base:
        merged._merge(_read(path.parent / name, (*above, path)))
    merged._merge({name: value for name, value in found.items() if name != "base_config"})
    return merged
