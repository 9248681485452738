"""`python -m parallel_core.launch run-distribute TABLE CONFIG [a,b] MODE [RANK_SIZE] [TEXT]`: the node's launch line.

The arguments are those of MindFormers' `run_distribute.sh`, by their place. There the script starts one process for
each device and returns at once; here it prints the one command that starts the node's ranks and stays with them.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from parallel_core.errors import ConfigError
from parallel_core.launch.rank_table import Server, launch_lines, read_rank_tables

_RANGE = re.compile(r"\[?\s*(\d{1,6})\s*,\s*(\d{1,6})\s*[\])]?")
_MODES = ("train", "finetune", "eval", "predict")


def main(argv: Sequence[str]) -> int:
    """Print the line and return the exit status; 2 for what cannot be, said in a sentence."""
    parser = argparse.ArgumentParser(
        prog="python -m parallel_core.launch run-distribute",
        description="Print the launch line of this node for the arguments of MindFormers' run_distribute.sh.",
        allow_abbrev=False,
    )
    parser.add_argument("table", type=Path, metavar="RANK_TABLE", help="hccl_*.json; of several servers: of all")
    parser.add_argument("config", metavar="CONFIG", help="a YAML file of run_mindformer.py")
    parser.add_argument("devices", metavar="[a,b]", help="this node's ranks (with RANK_SIZE) or devices; b is not one")
    parser.add_argument("mode", metavar="MODE", help=", ".join(_MODES))
    parser.add_argument("rank_size", nargs="?", metavar="RANK_SIZE", help="all ranks, of several servers")
    parser.add_argument("text", nargs="?", metavar="TEXT", help="what predict continues")
    parser.add_argument("--port", type=int, default=8848, help="MASTER_PORT, free on the first node (default: 8848)")
    args = parser.parse_args(argv)
    try:
        print(line_of(args.table, args.config, args.devices, args.mode, args.rank_size, args.text, args.port))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def line_of(
    table: Path, config: str, devices: str, mode: str, rank_size: str | None, text: str | None, port: int
) -> str:
    """Return the command that a node runs.

    Args:
        table: the rank table.
        config: the run's YAML file.
        devices: `[a,b]` or `[a,b)`: with `rank_size` the ranks of this node, else devices of the only one.
        mode: train, finetune, eval or predict.
        rank_size: how many ranks there are.
        text: what predict continues.
        port: of the scheduler.

    Raises:
        ConfigError: the table cannot be, or has not such devices or ranks.
    """
    servers = read_rank_tables([table])
    match = _RANGE.fullmatch(devices.strip())
    first, end = (int(match[1]), int(match[2])) if match else (0, 0)
    if first >= end:
        raise ConfigError(f"{devices} is no range of devices; write [0,8] for the eight devices 0 to 7")
    if mode not in _MODES:
        raise ConfigError(f"{mode} is no mode; give one of {', '.join(_MODES)}")
    if (text is not None) != (mode == "predict"):
        raise ConfigError("predict needs a text, and no other mode takes one; RANK_SIZE stands before it")
    words = ["python", "run_mindformer.py", "--config", config, "--use_parallel", "True", "--run_mode", mode]
    command = shlex.join(words + (["--predict_data", text] if text is not None else []))
    if rank_size is None or len(servers) == 1:
        return _alone(servers, first, end, rank_size, command, port)
    count = sum(len(server.devices) for server in servers)
    if str(count) != rank_size.strip():
        raise ConfigError(f"{table} has {count} ranks and RANK_SIZE is {rank_size}; give the table of all servers")
    for server, line in launch_lines(servers, port, command):
        if server.first_rank == first and len(server.devices) == end - first:
            return line
    there = ", ".join(f"[{s.first_rank},{s.first_rank + len(s.devices)}]" for s in servers)
    raise ConfigError(f"{devices} are the ranks of no server; those of {table} are {there}")


def _alone(
    servers: Sequence[Server], first: int, end: int, rank_size: str | None, command: str, port: int
) -> str:
    """Return the line of one machine, which runs on some of its devices."""
    server, wanted = servers[0], tuple(range(first, end))
    missing = [number for number in wanted if number not in server.devices]
    if len(servers) > 1:
        raise ConfigError(f"the table has {len(servers)} servers; give RANK_SIZE, and this node's ranks as [a,b]")
    if missing or (rank_size is not None and rank_size.strip() != str(end - first)):
        raise ConfigError(
            f"device {missing[0]} is not in the table of {server.address}" if missing else
            f"RANK_SIZE is {rank_size} and [{first},{end}] are {end - first} devices of the table's only server"
        )  # fmt: skip
    return next(iter(launch_lines([replace(server, devices=wanted)], port, command)))[1]
