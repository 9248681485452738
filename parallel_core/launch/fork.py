"""Ranks and scheduler of a CPU job on one host: forked from one process that has imported what they import.

Only the thread that forks exists in a child, so a process with threads starts its children afresh; no device, no pool
and no communicator exists before a rank is one.
"""

from __future__ import annotations

import ast
import ctypes
import gc
import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from parallel_core import startup
from parallel_core.environment import LOG_DIR_VARIABLE, MEETING_VARIABLE
from parallel_core.files import create_file

FORK_VARIABLE = "PARALLEL_CORE_FORK_RANKS"
"""Set for the process that forks: the number of ranks."""

_ROOTS = ("mindspore", "numpy", "parallel_core")
"""What is imported before the fork, where the script imports it; a script's own modules may depend on the rank."""
_SCHEDULER = -1
_SCHEDULER_PATIENCE_S = 10**8
"""It is there for ranks that may never call on it, and ends with the job."""


def fork_environment(num_ranks: int, address: str, port: int, timeout_s: int) -> dict[str, str]:
    """Return the variables of the process that forks; those of a rank have the room that their values need."""
    return {
        FORK_VARIABLE: str(num_ranks),
        "MS_WORKER_NUM": str(num_ranks),
        "RANK_SIZE": str(num_ranks),
        "MS_SCHED_HOST": address,
        "MS_SCHED_PORT": str(port),
        "MS_TOPO_TIMEOUT": str(timeout_s),
        "MS_ROLE": "MS_WORKER",
        **dict.fromkeys(_OF_A_RANK, "0" * 7),
    }


_OF_A_RANK = ("RANK_ID", "MS_NODE_ID", "DEVICE_ID")


def fork_ranks(script: Path) -> None:
    """Import what `script` will import, and become a rank or the scheduler, as the environment says; the parent ends.

    Args:
        script: what the ranks run.
    """
    rooms = _rooms()  # before any variable is set, which moves it
    count, log_dir = int(os.environ.pop(FORK_VARIABLE)), Path(os.environ[LOG_DIR_VARIABLE])
    os.environ[MEETING_VARIABLE] = str(os.memfd_create("parallel_core-meeting", os.MFD_CLOEXEC))
    with suppress(Exception):  # a rank meets the same error, and reports it
        _import_once(script)
    startup.note("imports", begins=True)
    afresh = _has_threads()
    gc.collect()
    gc.freeze()  # the collector would touch, and so copy, every page
    for rank in (*range(count), _SCHEDULER):
        # Before the fork, so that whoever looks at the child never sees another rank's.
        _set(_variables(rank), rooms)
        if os.fork() == 0:
            _become(rank, log_dir)
            if afresh:
                _start_afresh()
            return
    os._exit(0)


def _import_once(script: Path) -> None:
    importlib.import_module("mindspore")
    for name in imported_at_top(script):
        importlib.import_module(name)


def imported_at_top(script: Path) -> Iterator[str]:
    """Yield the modules of `_ROOTS` that a script imports before anything else runs; none of one that is no Python."""
    try:
        body = ast.parse(script.read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return
    for node in body:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names = [node.module]
        yield from (name for name in names if name.split(".")[0] in _ROOTS)


def _has_threads() -> bool:
    """Return whether this process has threads that a child would lack; OpenBLAS ends its own before a fork."""
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    return len(os.listdir("/proc/self/task")) > 1


def _variables(rank: int) -> dict[str, str]:
    if rank == _SCHEDULER:
        return {"MS_ROLE": "MS_SCHED", "RANK_ID": "0", "MS_TOPO_TIMEOUT": str(_SCHEDULER_PATIENCE_S)}
    return {"MS_ROLE": "MS_WORKER", **{name: str(rank) for name in _OF_A_RANK}}


def _rooms() -> dict[str, tuple[int, int]]:
    """Return address and length of every variable's value in the memory that /proc/PID/environ shows."""
    entries = ctypes.POINTER(ctypes.c_void_p).in_dll(ctypes.CDLL(None), "environ")
    rooms, place = {}, 0
    while entries[place]:
        name, _, value = ctypes.string_at(entries[place]).partition(b"=")
        rooms[name.decode(errors="replace")] = (int(entries[place]) + len(name) + 1, len(value))
        place += 1
    return rooms


def _set(variables: Mapping[str, str], rooms: Mapping[str, tuple[int, int]]) -> None:
    """Set variables for this process and, where there is room, for those who look at it from outside."""
    for name, value in variables.items():
        address, room = rooms.get(name, (0, -1))
        if len(value) <= room:
            ctypes.memmove(address, value.encode().ljust(room, b"\0"), room)
        os.environ[name] = value


def _become(rank: int, log_dir: Path) -> None:
    """Give this child its log and, to a rank, a session of its own."""
    name = "scheduler.log" if rank == _SCHEDULER else f"worker_{rank}.log"
    with create_file(log_dir / name) as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    if rank != _SCHEDULER:
        os.setsid()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()  # as in a process of its own; Python's generator sees to itself


def _start_afresh() -> None:
    descriptor = int(os.environ[MEETING_VARIABLE])
    os.set_inheritable(descriptor, True)
    os.environ[startup.STARTUP_VARIABLE] = startup.handed_over()
    os.execv(sys.executable, [sys.executable, *sys.argv])
