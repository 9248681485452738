"""`python -m parallel_core.launch rank-table FILE [FILE ...]`: the launch line of each node of a rank table.

A rank table (hccl_*.json) says which devices of which servers are which ranks. Here the launcher's environment says so,
and no table is needed; this reads the tables of several servers as one and prints what to type on each.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel_core.errors import ConfigError
from parallel_core.files import read_regular
from parallel_core.records import parse_json, show

_LARGEST_FILE = 64 << 20
_MOST_RANKS = 1 << 20
_ADDRESS = re.compile(r"[A-Za-z0-9][A-Za-z0-9.:_-]{0,254}")


@dataclass(frozen=True)
class Server:
    """One server of a rank table.

    Attributes:
        address: its `server_id`.
        devices: device numbers, in the order of their ranks.
        first_rank: rank of the first device; the others follow.
        file: the table it is from.
    """

    address: str
    devices: tuple[int, ...]
    first_rank: int
    file: Path


def read_rank_tables(files: Sequence[Path]) -> tuple[Server, ...]:
    """Return the servers of rank tables in the order of their ranks, which of several files are numbered anew.

    Raises:
        ConfigError: a file cannot be read, is no rank table, or says what cannot be: ranks that do not count from 0,
            a server's ranks apart, a device twice, a server in two files, servers of different sizes.
    """
    servers: list[Server] = []
    for file in files:
        for server in _read(file):
            other = next((s for s in servers if s.address == server.address), None)
            if other is not None:
                raise ConfigError(f"{file}: server {server.address} is in {other.file} already; give its table once")
            first = servers[-1].first_rank + len(servers[-1].devices) if servers else 0
            servers.append(Server(server.address, server.devices, first, file))
    sizes = {len(server.devices): server for server in servers}
    if len(sizes) > 1:
        (few, small), *_, (many, large) = sorted(sizes.items())
        raise ConfigError(
            f"{small.file}: server {small.address} has {few} devices and {large.address} {many}; every node runs as "
            "many ranks, so take the others out of the table"
        )
    return tuple(servers)


def launch_lines(servers: Sequence[Server], port: int, command: str) -> Iterator[tuple[Server, str]]:
    """Yield each server with the line that starts its ranks.

    Args:
        servers: what `read_rank_tables` returned.
        port: of the scheduler, on the first server.
        command: what is started.
    """
    size = len(servers[0].devices)
    for number, server in enumerate(servers):
        words = [f"NPROC={size * len(servers)}"]
        if len(servers) > 1:
            words += [f"NNODES={len(servers)}", f"NODE_RANK={number}", f"MASTER_ADDR={servers[0].address}",
                      f"MASTER_PORT={port}"]  # fmt: skip
        words.append(f"ASCEND_RT_VISIBLE_DEVICES={','.join(map(str, server.devices))}")
        yield server, f"{' '.join(words)} {command}"


def main(argv: Sequence[str]) -> int:
    """Print the lines and return the exit status; 2 for a table that cannot be, said in a sentence."""
    parser = argparse.ArgumentParser(
        prog="python -m parallel_core.launch rank-table",
        description="Print the launch line of each node of a rank table, or of one table for each server.",
        allow_abbrev=False,
    )
    parser.add_argument("files", nargs="+", metavar="FILE", type=Path, help="hccl_*.json; several are joined in order")
    return print_lines(parser, argv, lambda args: read_rank_tables(args.files))


def print_lines(
    parser: argparse.ArgumentParser,
    argv: Sequence[str],
    read: Callable[[argparse.Namespace], Sequence[Server]],
) -> int:
    """Print the launch line of each server and return the exit status; 2 for what cannot be, said in a sentence.

    Args:
        parser: of the command; the options of the lines are added to it.
        argv: the command's words.
        read: returns the servers of the parsed words.
    """
    parser.add_argument("--port", type=int, default=8848, help="MASTER_PORT, free on the first node (default: 8848)")
    parser.add_argument("--command", default="bash pretrain_gpt.sh", help="what is started (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        if not 1 <= args.port <= 65535:
            raise ConfigError(f"--port {args.port} is not a port; ports go from 1 to 65535")
        for server, line in launch_lines(read(args), args.port, args.command):
            last = server.first_rank + len(server.devices) - 1
            print(f"# {server.address}: ranks {server.first_rank} to {last}\n{line}")
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


# ---- one file -------------------------------------------------------------------------------------------------------
def _read(file: Path) -> list[Server]:
    try:
        data = read_regular(file, _LARGEST_FILE)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror or error}") from None
    table = parse_json(data, str(file), ConfigError)
    listed = table.get("server_list") if isinstance(table, dict) else None
    if not isinstance(listed, list) or not listed:
        raise ConfigError(f"{file} is no rank table: it has no server_list")
    if table.get("status", "completed") != "completed":
        raise ConfigError(f"{file}: its status is {show(table['status'])}; a finished table says completed")
    if "server_count" in table and _number(table, "server_count", file) != len(listed):
        raise ConfigError(f"{file}: server_count is {show(table['server_count'])} and server_list has {len(listed)}")
    servers = sorted((_server(entry, file) for entry in listed), key=lambda server: server.first_rank)
    following = 0
    for server in servers:
        if server.first_rank != following:
            raise ConfigError(
                f"{file}: server {server.address} begins with rank {server.first_rank} instead of {following}; ranks "
                "count from 0, each once, and those of a server follow one another"
            )
        following += len(server.devices)
    return servers


def _server(entry: Any, file: Path) -> Server:
    address, listed = (entry.get("server_id"), entry.get("device")) if isinstance(entry, dict) else (None, None)
    if not isinstance(address, str) or not _ADDRESS.fullmatch(address):
        raise ConfigError(f"{file}: server_id {show(address)} is no address or host name")
    if not isinstance(listed, list) or not listed or not all(isinstance(device, dict) for device in listed):
        raise ConfigError(f"{file}: server {address} has no device list")
    where = f"{file}: server {address}"
    by_rank: dict[int, int] = {}
    for device in listed:
        rank, number = _number(device, "rank_id", where), _number(device, "device_id", where)
        if rank in by_rank:
            raise ConfigError(f"{where} has rank {rank} twice")
        if number in by_rank.values():
            raise ConfigError(f"{where} has device {number} twice")
        by_rank[rank] = number
    first = min(by_rank)
    if max(by_rank) != first + len(by_rank) - 1:
        gap = next(rank for rank in range(first, max(by_rank)) if rank not in by_rank)
        raise ConfigError(f"{where} has ranks {first} to {max(by_rank)} without rank {gap}; they follow one another")
    return Server(address, tuple(by_rank[rank] for rank in sorted(by_rank)), first, file)


def _number(values: Mapping[str, Any], key: str, where: object) -> int:
    """Return a count that tables write as text."""
    text = str(values.get(key, ""))
    if not re.fullmatch(r"[0-9]{1,7}", text) or int(text) > _MOST_RANKS:
        raise ConfigError(f"{where}: {key} is {show(values.get(key))}, which is no number of a rank or device")
    return int(text)
