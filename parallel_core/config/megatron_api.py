"""Megatron's entry points for scripts: parse the command line once, read it anywhere, turn it into the config.

`set_parallel_context` and `set_seed`, which start communication and random streams, are in the training package.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence

from parallel_core.config import table
from parallel_core.config.flags import ExtraArgsProvider, UserArguments
from parallel_core.config.handover import load_run_config
from parallel_core.config.load import LoadedConfig, load_config, resolve
from parallel_core.config.schema import AllConfig
from parallel_core.config.values import Given
from parallel_core.errors import ConfigError

_state: dict[str, LoadedConfig] = {}


def world_size_of_job() -> int | None:
    """Return the number of processes that the launcher started, or None outside of a job."""
    for name in ("MS_WORKER_NUM", "WORLD_SIZE", "RANK_SIZE"):
        value = os.environ.get(name, "")
        if value.isdigit() and int(value) > 0:
            return int(value)
    return None


def initialize_megatron(
    extra_args_provider: ExtraArgsProvider | None = None,
    args_defaults: Mapping[str, object] | None = None,
    *,
    argv: Sequence[str] | None = None,
    world_size: int | None = None,
) -> LoadedConfig:
    """Return the configuration of this process's command line, and keep it for `get_args`.

    Args:
        extra_args_provider: Adds the user's argument groups to an argparse parser and returns it.
        args_defaults: Values for arguments that have none otherwise.
        argv: The command line; by default that of the process.
        world_size: Ranks of the run; by default what the launcher started.

    Raises:
        ConfigError: As `load_config`.
    """
    loaded = load_run_config(
        sys.argv[1:] if argv is None else argv,
        world_size=world_size or world_size_of_job(),
        extra_args_provider=extra_args_provider,
        args_defaults=args_defaults,
    )
    _state["loaded"] = loaded
    return loaded


def get_args() -> argparse.Namespace:
    """Return the arguments that `initialize_megatron` read, by Megatron's names, with derived values filled in.

    Raises:
        ConfigError: `initialize_megatron` was not called.
    """
    if "loaded" not in _state:
        raise ConfigError("get_args: there are no arguments yet; call initialize_megatron first")
    return _state["loaded"].args


def init_configs_from_args(args: argparse.Namespace | Mapping[str, object]) -> AllConfig:
    """Return the config tree of Megatron-named arguments, which stay as they are.

    Args:
        args: What `get_args` or Megatron-LM's own parser returns, possibly edited since. Names that are in no argument
            table are left to the script that added them.

    Raises:
        ConfigError: As `load_config`.
    """
    return configs_from_args(args).config


def configs_from_args(args: argparse.Namespace | Mapping[str, object]) -> LoadedConfig:
    """Return the same as `init_configs_from_args` with notes and provenance."""
    values = dict(args if isinstance(args, Mapping) else vars(args))
    world_size = values.pop("world_size", None)
    if values.get("train_samples") is not None:
        values.pop("train_iters", None)  # Derived from the samples when the arguments were first validated.
    given = []
    for name, value in values.items():
        found = table.find(name)
        if value is None or found is None or name in _RUN_TIME:
            continue
        argument, negated = found
        if negated and isinstance(value, bool):
            value = not value
        if value != argument.default:
            given.append(Given(argument.name, value, "args", name, value))
    if world_size is not None and (not isinstance(world_size, int) or isinstance(world_size, bool)):
        raise ConfigError(f"args.world_size is {world_size!r}; it takes the number of processes")
    return resolve([given], UserArguments(None), world_size=world_size or world_size_of_job())


_RUN_TIME = ("rank", "local_rank", "data_parallel_size", "consumed_train_samples", "consumed_valid_samples")


def init_configs_from_yaml(file_path: str, *, world_size: int | None = None) -> AllConfig:
    """Return the config tree of a YAML file in any of the layouts this project reads.

    Args:
        file_path: Path of the file.
        world_size: Ranks of the run; by default what the launcher started, else what the layout needs.

    Raises:
        ConfigError: As `load_config`.
    """
    return load_config(["--config", str(file_path)], world_size=world_size or world_size_of_job()).config
