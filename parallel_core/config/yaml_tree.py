"""A YAML file as a flat list of values, each with its path of keys and its line."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from parallel_core.errors import ConfigError

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


@dataclass(frozen=True)
class Leaf:
    """One value of the file."""

    path: tuple[str, ...]
    value: object
    source: str
    """file:line"""


def read_leaves(file: str, environment: Mapping[str, str] | None = None) -> tuple[list[Leaf], list[str]]:
    """Return the values of a YAML file in order, with `${NAME}` and `${NAME:-default}` replaced, and what is wrong.

    Args:
        file: Path of the file.
        environment: Where variables are looked up; the process's environment by default.

    Raises:
        ConfigError: The file cannot be read or is not YAML.
    """
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        there = f"; {path.parent} has {', '.join(near)}" if near else ""
        raise ConfigError(f"{file}: no such file{there}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read as text: {error}") from None
    return leaves_of_text(text, file, os.environ if environment is None else environment)


def leaves_of_text(text: str, name: str, environment: Mapping[str, str]) -> tuple[list[Leaf], list[str]]:
    """Return the values of YAML `text`; `name` is the file in messages.

    Raises:
        ConfigError: The text is not YAML, or not a mapping of keys to values.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{name}{where}: not YAML: {getattr(error, 'problem', None) or error}") from None
    if root is None:
        return [], []
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{name}:1: holds no keys; it should be lines such as 'num_layers: 4'")
    leaves: list[Leaf] = []
    problems: list[str] = []
    _walk(root, (), name, environment, leaves, problems)
    return leaves, problems


def _walk(
    node: yaml.MappingNode,
    path: tuple[str, ...],
    name: str,
    environment: Mapping[str, str],
    leaves: list[Leaf],
    problems: list[str],
) -> None:
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = str(key_node.value)
        if key in seen:
            problems.append(f"{name}:{line}: {'.'.join((*path, key))}: given before, on line {seen[key]}; keep one")
        seen[key] = line
        if isinstance(value_node, yaml.MappingNode) and value_node.value:
            _walk(value_node, (*path, key), name, environment, leaves, problems)
            continue
        value = _plain(value_node)
        try:
            value = _substitute(value, environment)
        except KeyError as error:
            problems.append(
                f"{name}:{line}: {key}: the environment has no variable {error.args[0]}; "
                f"set it, or write ${{{error.args[0]}:-default}}"
            )
            continue
        leaves.append(Leaf((*path, key), value, f"{name}:{line}"))


def _plain(node: yaml.Node) -> object:
    """Return a node's Python value by YAML 1.1's rules; mappings are read as their keys and values."""
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        return {str(_plain(key)): _plain(value) for key, value in node.value}
    constructor = yaml.SafeLoader("")
    try:
        value = constructor.construct_object(node)
    except (yaml.YAMLError, ValueError):
        value = node.value  # A tag such as !!python/...; taken as the word that stands there.
    finally:
        constructor.dispose()
    return value if isinstance(value, (bool, int, float, str)) or value is None else node.value


def _substitute(value: object, environment: Mapping[str, str]) -> object:
    """Replace variables in `value`; a word that a variable makes is read as YAML again, so it can be a number."""
    if isinstance(value, list):
        return [_substitute(item, environment) for item in value]
    if not isinstance(value, str) or "${" not in value:
        return value

    def look_up(match: re.Match[str]) -> str:
        if match[1] in environment and (environment[match[1]] or match[2] is None):
            return environment[match[1]]
        if match[2] is None:
            raise KeyError(match[1])
        return match[2]

    replaced = _VARIABLE.sub(look_up, value)
    read = yaml.safe_load(replaced) if replaced.strip() else replaced
    return read if isinstance(read, (bool, int, float, str)) else replaced
