"""The configuration that the launcher resolved, handed to the ranks in a file, so that it is resolved once.

What the launcher checked is then what every rank runs, whatever happens to a YAML file, to an environment variable or
to the latest checkpoint in between.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from parallel_core.config.flags import ExtraArgsProvider
from parallel_core.config.load import LoadedConfig, load_config
from parallel_core.config.rules import config_of_sections
from parallel_core.config.values import Given
from parallel_core.environment import HANDOVER_VARIABLE
from parallel_core.errors import ConfigError
from parallel_core.files import create_file


def write_handover(loaded: LoadedConfig, argv: Sequence[str], path: Path) -> None:
    """Write `loaded`, which the command line `argv` leads to, for the ranks.

    Raises:
        ConfigError: the file cannot be written.
    """
    content = {
        "argv": list(argv),
        "world_size": loaded.world_size,
        "config": _encoded(loaded.config.to_dict()),
        "notes": loaded.notes,
        "provenance": loaded.provenance,
        "args": _encoded(vars(loaded.args)),
        "given": [_encoded(dataclasses.asdict(entry)) for entry in loaded.given.values()],
    }
    partial = path.with_suffix(".tmp")
    try:
        with create_file(partial) as file:
            file.write(json.dumps(content))
        os.replace(partial, path)
    except OSError as error:
        raise ConfigError(f"the configuration cannot be written to {path}: {error.strerror or error}") from None


def load_run_config(
    argv: Sequence[str],
    *,
    world_size: int | None = None,
    extra_args_provider: ExtraArgsProvider | None = None,
    args_defaults: Mapping[str, object] | None = None,
) -> LoadedConfig:
    """Return the configuration of a run: the launcher's where it resolved this command line, else `load_config`'s.

    A script with arguments or defaults of its own, which the launcher does not know, resolves its command line itself.

    Raises:
        ConfigError: as `load_config`, or the launcher's file cannot be read.
    """
    file = os.environ.get(HANDOVER_VARIABLE)
    if file and extra_args_provider is None and not args_defaults:
        found = _read_handover(Path(file), argv, world_size)
        if found is not None:
            return found
    loaded = load_config(
        argv, world_size=world_size, extra_args_provider=extra_args_provider, args_defaults=args_defaults
    )
    if loaded.config.training_config.elastic:
        raise ConfigError("--elastic: only the launcher starts a run again; use it, or leave --elastic out")
    return loaded


def _read_handover(path: Path, argv: Sequence[str], world_size: int | None) -> LoadedConfig | None:
    """Return what the file at `path` holds, or None when it is about another command line or number of ranks."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["argv"] != list(argv) or world_size not in (None, content["world_size"]):
            return None
        given = [Given(**_decoded(entry)) for entry in content["given"]]
        return LoadedConfig(
            config_of_sections(_decoded(content["config"])),
            content["notes"],
            content["provenance"],
            argparse.Namespace(**_decoded(content["args"])),
            {entry.name: entry for entry in given},
            content["world_size"],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{HANDOVER_VARIABLE}={path}: the launcher's configuration cannot be read: {error!r}; unset it to "
            "run without the launcher"
        ) from None


def _encoded(value: Any) -> Any:
    """Return `value` for JSON, in which tuples stay apart from lists."""
    if isinstance(value, dict):
        return {key: _encoded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_encoded(item) for item in value]
        return {_TUPLE: items} if isinstance(value, tuple) else items
    return value


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_TUPLE}:
            return tuple(_decoded(item) for item in value[_TUPLE])
        return {key: _decoded(item) for key, item in value.items()}
    return [_decoded(item) for item in value] if isinstance(value, list) else value


_TUPLE = "<tuple>"
