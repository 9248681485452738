"""Which backend carries the groups of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import mindspore as ms

from parallel_core.comm.interface import Group, SoloGroup
from parallel_core.comm.meeting import Meeting, meeting
from parallel_core.comm.mindspore_comm import WORLD, HcclGroup, McclGroup, start_communication
from parallel_core.comm.shm import ShmGroup, share_memory
from parallel_core.comm.watchdog import Watchdog
from parallel_core.errors import ConfigError

_LONGEST_NAME = 128
_CARRIERS: dict[type[Group], str] = {ShmGroup: "shared memory", McclGroup: "MCCL", HcclGroup: "HCCL"}


def group_factory(backend: str, timeout_s: float, rank: int, world_size: int) -> Callable[[str, list[int]], Group]:
    """Return a function (label, ranks) -> Group for `backend`; collective over the world.

    `auto` is HCCL on Ascend; on CPU shared memory for groups of ranks of one host, where the C++ part can be built, and
    MCCL for all others. MindSpore's own communication is joined where it is needed: ranks of one host that meet in
    memory do without.

    Raises:
        ConfigError: if the backend does not exist here.
    """
    target = ms.get_context("device_target")
    known = ("auto", "hccl") if target == "Ascend" else ("auto", "shm", "mccl")
    if backend not in known:
        raise ConfigError(f"distributed_backend={backend} does not exist on {target}; use {' or '.join(known)}")
    kind = HcclGroup if target == "Ascend" else McclGroup
    watchdog = Watchdog(timeout_s)

    def make(label: str, ranks: list[int]) -> Group:
        if len(ranks) == 1:
            return SoloGroup(label, rank)
        return kind(WORLD if len(ranks) == world_size else group_name(label, ranks), ranks, rank, watchdog)

    if target == "Ascend" or backend == "mccl":
        start_communication()
        return make
    gathered = meeting()
    if gathered is None:
        start_communication()
    return _with_shared_memory(backend, make, gathered or make("world", list(range(world_size))), timeout_s)


def carrier_of(group: Group) -> str:
    """Return what carries a group, for people; empty for a group of one."""
    return _CARRIERS.get(type(group), "")


def group_name(label: str, ranks: list[int]) -> str:
    """Return the name of a group in the backend: the same on all its members, another one for other ranks.

    HCCL takes names of fewer than 128 bytes; where the ranks are too many to be told, their hash stands for them.
    """
    name = "-".join([label, *map(str, ranks)])
    if len(name) < _LONGEST_NAME:
        return name
    return f"{label}-{len(ranks)}-ranks-{hashlib.blake2b(name.encode(), digest_size=16).hexdigest()}"


def _with_shared_memory(
    backend: str, between: Callable[[str, list[int]], Group], world: Group | Meeting, timeout_s: float
) -> Callable[[str, list[int]], Group]:
    """Return a factory that joins ranks of one host over shared memory, where that works, and all others by `between`.

    Every rank sees the same hosts and the same problems, so all members of a group choose alike.
    """
    memory = share_memory(world, timeout_s)
    inside, several = memory.group, len(memory.sizes) > 1
    if backend == "shm" and (several or memory.problem):
        reason = memory.problem or "the ranks are on several hosts (or in several containers)"
        raise ConfigError(f"distributed_backend=shm cannot work here: {reason}; use auto")
    if memory.problem and world.rank == 0:
        print(f"WARNING - MCCL also joins ranks of one host, several times slower: {memory.problem}", flush=True)

    if inside is None or several:
        start_communication()

    def make(label: str, ranks: list[int]) -> Group:
        if inside is None or len(ranks) == 1 or not set(ranks) <= set(inside.ranks):
            return between(label, ranks)
        return inside if label == "world" else inside.subgroup(label, ranks)

    return make
