"""From a command line and a YAML file to the config tree, with every violation at once."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from parallel_core.bundled import bundled_config
from parallel_core.config import table
from parallel_core.config.argument import REFUSED
from parallel_core.config.checkpoint_args import MODEL_NAMES, checkpoint_values, superseded
from parallel_core.config.flags import ExtraArgsProvider, UserArguments, read_flags
from parallel_core.config.forms import read_forms
from parallel_core.config.mindformers import is_mindformers, read_mindformers, with_base_files
from parallel_core.config.rules import build_config, run_rules
from parallel_core.config.schema import AllConfig
from parallel_core.config.values import Given, Unreadable, convert
from parallel_core.config.yaml_tree import read_leaves
from parallel_core.errors import ConfigError


@dataclass(frozen=True)
class LoadedConfig:
    """What a run is told, and how it came to be told so."""

    config: AllConfig
    notes: list[str]
    """Ignored arguments with the reason, and derivations worth saying."""
    provenance: dict[str, str]
    """Field path -> "file:line", "--flag", "default" or "derived: rule"."""
    args: argparse.Namespace
    """Megatron-named values, resolved, with the user's own argument groups."""
    given: dict[str, Given]
    """What the user gave, by argument name."""
    world_size: int
    """The number of ranks that the batch sizes were resolved for."""


def load_config(
    argv: Sequence[str],
    *,
    world_size: int | None = None,
    extra_args_provider: ExtraArgsProvider | None = None,
    args_defaults: Mapping[str, object] | None = None,
) -> LoadedConfig:
    """Return the configuration that a command line describes.

    Args:
        argv: `[--config FILE | --yaml-cfg FILE] [--megatron-flag value ...]`; flags override the file. Where
            there is no such file, `configs/NAME.yaml` is the one that comes with the package.
        world_size: Ranks of the run; None: as many as the layout needs.
        extra_args_provider: Adds the user's own argument groups to an argparse parser, as in Megatron.
        args_defaults: Values for arguments that have none otherwise, as in Megatron.

    Raises:
        ConfigError: The arguments are unknown, unreadable, contradictory or ask for what is not built; all of it at
            once, in the user's terms.
    """
    user = UserArguments(extra_args_provider)
    levels, problems, notes = read_levels(argv, user)
    return resolve(levels, user, problems, notes, world_size=world_size, args_defaults=args_defaults)


def is_legal(argv: Sequence[str], world_size: int, **options: Any) -> bool:
    """Tell whether a configuration is one of a run on so many ranks; see `load_config`."""
    try:
        load_config(argv, world_size=world_size, **options)
    except ConfigError:
        return False
    return True


def read_levels(argv: Sequence[str], user: UserArguments) -> tuple[list[list[Given]], list[str], list[str]]:
    """Return what the file and the flags of a command line say, what is wrong with them, and what is ignored."""
    from_flags, files, problems = read_flags(argv, user)
    from_files: list[Given] = []
    notes: list[str] = []
    for name in files:
        file = name if os.path.exists(name) else str(bundled_config(name) or name)
        leaves, trouble = read_leaves(file)
        if is_mindformers(leaves):
            leaves, more = with_base_files(leaves, file)
            values, unknown, said = read_mindformers(leaves, user.names)
            notes += said
        else:
            values, unknown = read_forms(leaves, user.names)
            more = []
        problems += trouble + more + unknown
        from_files += values
    if len(files) > 1:
        problems.append(f"--config: names {len(files)} files, {' and '.join(files)}; give one")
    return [from_files, from_flags], problems, notes


def resolve(
    levels: Sequence[Iterable[Given]],
    user: UserArguments | None = None,
    problems: Iterable[str] = (),
    said: Iterable[str] = (),
    *,
    world_size: int | None = None,
    args_defaults: Mapping[str, object] | None = None,
) -> LoadedConfig:
    """Return the configuration of values given in several places; later levels override earlier ones.

    Raises:
        ConfigError: As `load_config`.
    """
    user = user or UserArguments(None)
    trouble = list(problems)
    notes = list(said)
    given, unreadable = _merge(levels, user, trouble, notes)
    defaults = _default_values(given, user, args_defaults or {}, notes, trouble)
    filled, unread = _merge([defaults], user, trouble, notes)
    given.update(filled)
    unreadable |= unread
    if "use_checkpoint_args" in given and given["use_checkpoint_args"].value:
        unreadable |= _take_checkpoint_values(given, user, notes, trouble)
    mine = {name: entry for name, entry in given.items() if name in table.BY_NAME}
    resolution = run_rules(mine, world_size, trouble, notes, frozenset(unreadable))
    config = build_config(resolution) if not resolution.problems else None
    if config is None:
        raise ConfigError(_report(resolution.problems))
    values = {**user.defaults(), **{name: entry.value for name, entry in given.items()}, **resolution.values}
    provenance = {path: resolution.source(argument.name) for path, argument in table.DIRECT.items()}
    told = list(dict.fromkeys(resolution.notes))
    return LoadedConfig(config, told, provenance, argparse.Namespace(**values), given, resolution.world_size or 1)


def _report(problems: Sequence[str]) -> str:
    unique = list(dict.fromkeys(problems))
    if len(unique) == 1:
        return unique[0]
    return f"{len(unique)} problems in the configuration:\n" + "\n".join(f"  {problem}" for problem in unique)


def _merge(
    levels: Sequence[Iterable[Given]],
    user: UserArguments,
    problems: list[str],
    notes: list[str],
) -> tuple[dict[str, Given], set[str]]:
    """Return one typed value per name, and the names whose values cannot be read.

    Later levels win. Within a file two different values for one argument are a violation; on the command line the last
    one counts, as for Megatron. None (`null`, or that word on the command line) takes back what came before.
    """
    merged: dict[str, Given] = {}
    unreadable: set[str] = set()
    for level in levels:
        here: dict[str, Given] = {}
        for entry in level:
            try:
                typed = _typed(entry)
            except Unreadable as error:
                where = entry.written if entry.written.startswith("--") else f"{entry.source}: {entry.written}"
                problems.append(f"{where} {error.about(entry.raw if entry.is_substituted else error.raw)}")
                unreadable.add(entry.name)
                continue
            before = here.get(entry.name)
            if before is not None and before.value != typed.value:
                if typed.written.startswith("--"):
                    notes.append(f"{before.terms}: not used, {typed.terms} comes after it")
                else:
                    problems.append(f"{before.terms} and {typed.terms}: two values for {typed.name}; give one")
            here[typed.name] = typed
        merged.update(here)
    return {name: entry for name, entry in merged.items() if entry.value is not None}, unreadable - set(merged)


def _typed(entry: Given) -> Given:
    """Return `entry` with its value in the argument's type; refused arguments keep a word they cannot read."""
    argument = table.BY_NAME.get(entry.name)
    if argument is None:
        return entry
    try:
        return dataclasses.replace(entry, value=convert(argument, entry.value))
    except Unreadable:
        if argument.status == REFUSED:
            return entry
        raise


def _take_checkpoint_values(
    given: dict[str, Given], user: UserArguments, notes: list[str], problems: list[str]
) -> set[str]:
    """Let the checkpoint's arguments stand over the user's, as Megatron does, and say where they differ.

    Returns:
        The names that a checkpoint which cannot be read would have given.
    """
    try:
        found = checkpoint_values(given)
    except ConfigError as error:
        problems.append(str(error))
        return set(MODEL_NAMES)
    if not found and "num_layers" not in given:
        problems.append(f"{given['load'].terms}: holds no checkpoint to take the model's arguments from; give them too")
        return set(MODEL_NAMES)
    if not found:
        notes.append(f"{given['load'].terms}: no checkpoint yet to take arguments from; those given are used")
    stored, _ = _merge([found], user, problems, notes)
    for name, told in superseded(given, stored).items():
        terms = given.pop(name).terms
        if not told.endswith(f"={name}"):  # --swiglu and hidden_act=swiglu agree
            notes.append(f"{terms}: not used, the checkpoint has {told}")
    for name, entry in stored.items():
        if name in given and given[name].value != entry.value:
            notes.append(f"{given[name].terms}: not used, the checkpoint has {name}={entry.value}")
        given[name] = entry
    return set()


def _default_values(
    given: Mapping[str, Given],
    user: UserArguments,
    defaults: Mapping[str, object],
    notes: list[str],
    problems: list[str],
) -> list[Given]:
    """Return what `args_defaults` and the user parser's defaults give to arguments without a value, as in Megatron."""
    filled: dict[str, Given] = {}
    for name, value in defaults.items():
        found = table.find(name)
        argument = found[0] if found else None
        if argument is None and name not in user.names:
            problems.append(f"args_defaults[{name!r}]: unknown argument{table.suggestion(name)}")
            continue
        key = argument.name if argument else name
        present = given[key].value if key in given else argument.default if argument else user.defaults().get(name)
        if present is not None and present == value:
            continue
        if present is not None:
            notes.append(f"args_defaults[{name!r}]={value!r}: not used, {key} is {present!r}")
            continue
        filled[key] = Given(key, value, "args_defaults", f"args_defaults[{name!r}]", value)
    for name, value in user.defaults().items():
        if name in table.BY_NAME and name not in given and name not in filled and value is not None:
            filled[name] = Given(name, value, "extra_args_provider", name, value)
    return list(filled.values())


def required_world_size(config: AllConfig) -> int:
    """Return how many ranks `config` needs: tensor x pipeline x context parallel size x data parallel size."""
    parallel, data = config.parallel_config, config.dataset_config
    model = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    return model * max(1, data.global_batch_size // (data.batch_size * data.micro_batch_num))
