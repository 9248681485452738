"""The command line: Megatron flags and a user's own argument groups, read into values with their flags."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import NoReturn

from parallel_core.config import table
from parallel_core.config.argument import LISTS
from parallel_core.config.values import Given, shortened

ExtraArgsProvider = Callable[[argparse.ArgumentParser], "argparse.ArgumentParser | None"]


class _Complaint(Exception):
    """What argparse would have printed before it exits."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _Complaint(message)


class UserArguments:
    """The argument groups that `extra_args_provider` adds, parsed by argparse as in Megatron."""

    def __init__(self, provider: ExtraArgsProvider | None) -> None:
        self.parser = _Parser(add_help=False, allow_abbrev=False)
        if provider is not None:
            self.parser = provider(self.parser) or self.parser  # type: ignore[assignment]
        self.actions = {
            option: action for action in self.parser._actions for option in action.option_strings
        }
        self.names = {action.dest for action in self.parser._actions}

    def defaults(self) -> dict[str, object]:
        """Return what the user's arguments, and `set_defaults` on the parser, give when nothing is written."""
        found = {name: self.parser.get_default(name) for name in self.names}
        for name in table.BY_NAME:
            value = self.parser.get_default(name)
            if value is not None:
                found[name] = value
        return found

    def parse(self, words: Sequence[str]) -> dict[str, object]:
        """Return the user's arguments that `words` give, by name.

        Raises:
            ValueError: argparse refuses the words; the text is its message.
        """
        for action in self.parser._actions:
            action.required = False
        blank = argparse.Namespace(**dict.fromkeys(self.names, _ABSENT))
        try:
            parsed = self.parser.parse_args(list(words), blank)
        except _Complaint as error:
            raise ValueError(str(error)) from None
        return {name: value for name, value in vars(parsed).items() if value is not _ABSENT}


_ABSENT = object()
FILE_FLAGS = ("--config", "--yaml-cfg", "--yaml_cfg")
"""Flags that name a YAML file."""


def looks_like_flag(word: str) -> bool:
    """Return whether a word of the command line starts an argument; negative numbers do not."""
    return word.startswith("--") and len(word) > 2


def split_words(argv: Sequence[str]) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """Return the command line as (flag, its words) pairs, and the words that stand before any flag."""
    pairs: list[tuple[str, list[str]]] = []
    stray: list[str] = []
    for word in argv:
        if looks_like_flag(word):
            flag, equals, value = word.partition("=")
            pairs.append((flag, [value] if equals else []))
        elif pairs:
            pairs[-1][1].append(word)
        else:
            stray.append(word)
    return pairs, stray


def read_flags(argv: Sequence[str], user: UserArguments) -> tuple[list[Given], list[str], list[str]]:
    """Return the values that `argv` gives, the files it names, and what is wrong with it."""
    given: list[Given] = []
    files: list[str] = []
    problems: list[str] = []
    pairs, stray = split_words(argv)
    problems += [f"{word}: stands before any flag; values follow their flag" for word in stray]
    for flag, words in pairs:
        if flag in FILE_FLAGS:
            if len(words) == 1:
                files.append(words[0])
            else:
                problems.append(f"{flag}: takes one file name, got {len(words)} words")
        elif flag in user.actions:
            _user_flag(flag, words, user, given, problems)
        else:
            _table_flag(flag, words, user, given, problems)
    return given, files, problems


def _user_flag(flag: str, words: list[str], user: UserArguments, given: list[Given], problems: list[str]) -> None:
    try:
        parsed = user.parse([flag, *words])
    except ValueError as error:
        problems.append(f"{flag}: {error}")
        return
    given += [Given(name, value, flag, flag, value) for name, value in parsed.items()]


def _table_flag(flag: str, words: list[str], user: UserArguments, given: list[Given], problems: list[str]) -> None:
    found = table.find(flag)
    if found is None:
        near = table.suggestion(flag, tuple(map(table.normal, user.actions)))
        if flag in ("-h", "--help"):
            near = "; `python -m parallel_core.config explain NAME` tells of one argument, docs/arguments.md of all"
        problems.append(f"{shortened(flag)}: unknown argument{near}")
        return
    argument, negated = found
    if argument.is_switch:
        if len(words) > 1 or (words and words[0].lower() not in ("true", "false")):
            problems.append(f"{flag}: takes no value, got {' '.join(words)!r}")
            return
        on = not words or words[0].lower() == "true"
        given.append(Given(argument.name, on != negated, flag, flag, True))
    elif argument.kind in LISTS:
        given.append(Given(argument.name, words, flag, flag, words))
    elif len(words) != 1:
        got = f"{len(words)}: {' '.join(words)}" if words else "none"
        problems.append(f"{flag}: takes one value, got {got}")
    else:
        given.append(Given(argument.name, words[0], flag, flag, words[0]))
