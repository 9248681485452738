"""What a cluster says of its nodes: Slurm's variables inside `srun`, a file of hosts.

`srun --ntasks-per-node=1 bash pretrain_gpt.sh ...` starts the launcher once on each node, without further variables.
`python -m parallel_core.launch hostfile FILE` prints the launch line of each host.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from parallel_core.errors import ConfigError
from parallel_core.files import read_regular
from parallel_core.launch.rank_table import Server, print_lines
from parallel_core.records import show

_LARGEST_FILE = 1 << 20
_MOST_HOSTS = 1 << 16
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9.:_-]{0,254}")
_LINE = re.compile(r"(?P<host>\S+)(?:\s+slots=(?P<slots>\d{1,6}))?")
_ENTRY = re.compile(r"(?P<before>[^\[\],\s]*)(?:\[(?P<ranges>[\d,-]+)\])?(?P<after>[^\[\],\s]*)")
_FIRST_PORT, _PAIRS = 10_000, 10_000


def with_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables with NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT of a Slurm step of several nodes.

    What is set already stays; outside of `srun`, and on one node, nothing is added.

    Raises:
        ConfigError: the step has not one task on each node, or its list of nodes cannot be read.
    """
    nodes = _count(environment, "SLURM_STEP_NUM_NODES")
    if nodes < 2 or environment.get("NNODES"):
        return dict(environment)
    tasks = _count(environment, "SLURM_STEP_NUM_TASKS")
    if tasks != nodes:
        raise ConfigError(
            f"SLURM_STEP_NUM_TASKS={tasks} on {nodes} nodes: the launcher starts the ranks of a node itself; write "
            "srun --ntasks-per-node=1"
        )
    found = {
        "NNODES": str(nodes),
        "NODE_RANK": str(_count(environment, "SLURM_NODEID")),
        "MASTER_ADDR": next(expand(environment.get("SLURM_STEP_NODELIST", ""))),
        # The same on every node without asking, and for another job others: it and the one after it are used.
        "MASTER_PORT": str(_FIRST_PORT + 2 * (_count(environment, "SLURM_JOB_ID") % _PAIRS)),
    }
    return {**found, **environment}


def _count(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "0")
    if not re.fullmatch(r"\d{1,18}", text):
        raise ConfigError(f"{name}={show(text)} is no number; Slurm sets it, so do not")
    return int(text)


def expand(nodes: str) -> Iterator[str]:
    """Yield the hosts of Slurm's compact form: `a,node[01-03,7]` is a, node01, node02, node03, node7.

    Raises:
        ConfigError: it cannot be read.
    """
    wrong = ConfigError(f"SLURM_STEP_NODELIST={show(nodes)} is no list of nodes; write for example node[01-04]")
    for entry in re.split(r",(?![^\[]*\])", nodes):
        match = _ENTRY.fullmatch(entry)
        if match is None or not _HOST.fullmatch(match["before"] + "0" * bool(match["ranges"]) + match["after"]):
            raise wrong
        if not match["ranges"]:
            yield entry
            continue
        for part in match["ranges"].split(","):
            ends = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part)
            if ends is None:
                raise wrong
            first, last = ends[1], ends[2] or ends[1]
            if not 0 <= int(last) - int(first) < _MOST_HOSTS:
                raise wrong
            for number in range(int(first), int(last) + 1):
                yield f"{match['before']}{number:0{len(first)}d}{match['after']}"


def read_hosts(file: Path, slots: int) -> tuple[Server, ...]:
    """Return the hosts of a file: a line each, `HOST` or `HOST slots=N`; what follows # is a comment.

    Args:
        file: the file.
        slots: ranks of a host that does not say.

    Raises:
        ConfigError: it cannot be read, a host is there twice, or hosts have different numbers of slots.
    """
    try:
        text = read_regular(file, _LARGEST_FILE).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: {getattr(error, 'strerror', None) or error}") from None
    servers: list[Server] = []
    for number, line in enumerate(text.splitlines(), 1):
        said = line.split("#")[0].strip()
        if not said:
            continue
        match = _LINE.fullmatch(said)
        if match is None or not _HOST.fullmatch(match["host"]):
            raise ConfigError(f"{file}:{number}: {show(said)} is no host; write HOST or HOST slots=N")
        ranks = int(match["slots"] or slots)
        if ranks < 1:
            raise ConfigError(f"{file}:{number}: {match['host']} has no slots; leave the line out")
        if any(server.address == match["host"] for server in servers):
            raise ConfigError(f"{file}:{number}: {match['host']} is there twice; give it once, with all of its slots")
        if servers and len(servers[0].devices) != ranks:
            raise ConfigError(
                f"{file}:{number}: {match['host']} has {ranks} slots and {servers[0].address} "
                f"{len(servers[0].devices)}; every node runs as many ranks"
            )
        servers.append(Server(match["host"], tuple(range(ranks)), ranks * len(servers), file))
    if not servers:
        raise ConfigError(f"{file} names no host; write a line HOST or HOST slots=N for each")
    return tuple(servers)


def main(argv: Sequence[str]) -> int:
    """Print the lines and return the exit status; 2 for a file that cannot be, said in a sentence."""
    parser = argparse.ArgumentParser(
        prog="python -m parallel_core.launch hostfile",
        description="Print the launch line of each host of a file: a line each, HOST or HOST slots=N.",
        allow_abbrev=False,
    )
    parser.add_argument("file", metavar="FILE", type=Path)
    parser.add_argument("--slots", type=int, default=8, help="ranks of a host that does not say (default: 8)")
    return print_lines(parser, argv, lambda args: read_hosts(args.file, args.slots))
