"""A YAML file as a flat list of values, each with its path of keys and its line.

A file is small and flat, or it is refused: the YAML reader's own recursion and the copies that aliases make never see
anything else.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from parallel_core.errors import ConfigError

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")
_LARGEST_BYTES = 2**18
_DEEPEST = 32
_MOST_NODES = 50_000
_UNREADABLE_SCALAR = (yaml.YAMLError, ValueError, LookupError, ArithmeticError, TypeError, AttributeError)
"""What PyYAML's constructors raise on a word that its tag does not fit, such as `!!int ''`."""


@dataclass(frozen=True)
class Leaf:
    """One value of the file."""

    path: tuple[str, ...]
    value: object
    source: str
    """file:line"""
    written: object = None
    """The value as it stands in the file, before variables are put in."""


def read_leaves(file: str, environment: Mapping[str, str] | None = None) -> tuple[list[Leaf], list[str]]:
    """Return the values of a YAML file in order, with `${NAME}` and `${NAME:-default}` replaced, and what is wrong.

    Args:
        file: Path of the file.
        environment: Where variables are looked up; the process's environment by default.

    Raises:
        ConfigError: The file cannot be read or is not YAML.
    """
    return leaves_of_text(_text_of(file), file, os.environ if environment is None else environment)


def _text_of(file: str) -> str:
    path = Path(file)
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise ConfigError(f"{file}: is no file; give a YAML file")
        if found.st_size > _LARGEST_BYTES:
            raise ConfigError(f"{file}: has {found.st_size} bytes; a configuration has at most {_LARGEST_BYTES}")
        return path.read_text(encoding="utf-8-sig")  # also with the mark that some editors put first
    except ConfigError:
        raise
    except FileNotFoundError:
        near = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        there = f"; {path.parent} has {', '.join(near)}" if near else ""
        raise ConfigError(f"{file}: no such file{there}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: is not UTF-8 text (byte {error.start}: {error.reason}); save it as UTF-8") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ConfigError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def leaves_of_text(text: str, name: str, environment: Mapping[str, str]) -> tuple[list[Leaf], list[str]]:
    """Return the values of YAML `text`; `name` is the file in messages.

    Raises:
        ConfigError: The text is not YAML, or not a mapping of keys to values.
    """
    try:
        _check_shape(text, name)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise ConfigError(f"{name}{where}: not YAML: {what}") from None
    if root is None:
        return [], []
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{name}:1: holds no keys; it should be lines such as 'num_layers: 4'")
    walk = _Walk(name, environment)
    walk.mapping(root, ())
    return walk.leaves, walk.problems


def _check_shape(text: str, name: str) -> None:
    """Refuse a text that is nested so deeply, or has so many parts, that composing it would not end well."""
    depth = 0
    for number, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST or number > _MOST_NODES:
            what = f"is nested more than {_DEEPEST} deep" if depth > _DEEPEST else f"has more than {_MOST_NODES} parts"
            raise ConfigError(f"{name}:{_line(event)}: {what}; no configuration does")


class _MissingVariable(Exception):
    """The environment has no variable of this name."""


@dataclass
class _Walk:
    """One pass over the nodes of a file."""

    name: str
    environment: Mapping[str, str]
    leaves: list[Leaf] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    visited: int = 0

    def mapping(self, node: yaml.MappingNode, path: tuple[str, ...]) -> None:
        """Take in the keys of a mapping."""
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = _line(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(f"{self.name}:{line}: a key must be one word")
                continue
            key = str(key_node.value)
            if key in seen:
                where = ".".join((*path, key))
                self.problems.append(f"{self.name}:{line}: {where}: given before, on line {seen[key]}; keep one")
                continue
            seen[key] = line
            if isinstance(value_node, yaml.MappingNode) and value_node.value:
                self._count(value_node, len(path))
                self.mapping(value_node, (*path, key))
            else:
                self._leaf((*path, key), value_node, line)

    def _leaf(self, path: tuple[str, ...], node: yaml.Node, line: int) -> None:
        written = self._plain(node, len(path))
        try:
            value = _substitute(written, self.environment)
        except _MissingVariable as error:
            self.problems.append(
                f"{self.name}:{line}: {path[-1]}: the environment has no variable {error}; "
                f"set it, or write ${{{error}:-default}}"
            )
            return
        self.leaves.append(Leaf(path, value, f"{self.name}:{line}", written))

    def _plain(self, node: yaml.Node, depth: int) -> object:
        """Return a node's Python value by YAML 1.1's rules; mappings are read as their keys and values."""
        self._count(node, depth)
        if isinstance(node, yaml.SequenceNode):
            return [self._plain(item, depth + 1) for item in node.value]
        if isinstance(node, yaml.MappingNode):
            return {str(self._plain(key, depth + 1)): self._plain(value, depth + 1) for key, value in node.value}
        return _scalar(str(node.tag), str(node.value))

    def _count(self, node: yaml.Node, depth: int) -> None:
        """Bound the nodes that are visited, which aliases may multiply or send in a circle."""
        self.visited += 1
        if depth > 2 * _DEEPEST or self.visited > _MOST_NODES:
            raise ConfigError(
                f"{self.name}:{_line(node)}: its aliases repeat it without end, or {_MOST_NODES} times; "
                "write the values out"
            )


def _line(part: yaml.Event | yaml.Node) -> int:
    return part.start_mark.line + 1 if part.start_mark is not None else 1


def _scalar(tag: str, word: str) -> object:
    """Return the value of one word; where its tag or its type is none of ours, the word itself."""
    constructor = yaml.SafeLoader("")
    try:
        value = constructor.construct_object(yaml.ScalarNode(tag, word))
    except _UNREADABLE_SCALAR:
        return word
    finally:
        constructor.dispose()
    if isinstance(value, int) and abs(value) >= 2**63:
        return word
    return value if isinstance(value, (bool, int, float, str)) or value is None else word


def _substitute(value: object, environment: Mapping[str, str]) -> object:
    """Replace variables in `value`; a word that a variable makes is read as YAML reads a word, so it can be a number.

    Raises:
        _MissingVariable: the environment lacks one that has no default.
    """
    if isinstance(value, list):
        return [_substitute(item, environment) for item in value]
    if not isinstance(value, str) or "${" not in value:
        return value

    def look_up(match: re.Match[str]) -> str:
        if match[1] in environment and (environment[match[1]] or match[2] is None):
            return environment[match[1]]
        if match[2] is None:
            raise _MissingVariable(match[1])
        return match[2]

    replaced = _VARIABLE.sub(look_up, value)
    read = _scalar(str(yaml.SafeLoader("").resolve(yaml.ScalarNode, replaced, (True, False))), replaced)
    return read if isinstance(read, (bool, int, float, str)) else replaced
