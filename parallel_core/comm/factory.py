"""Which backend carries the groups of a run."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable

import mindspore as ms

from parallel_core.comm.interface import Group, SoloGroup
from parallel_core.comm.meeting import Meeting, meeting
from parallel_core.comm.mindspore_comm import WORLD, HcclGroup, McclGroup, start_communication
from parallel_core.comm.shm import world_over_shared_memory
from parallel_core.comm.watchdog import Watchdog
from parallel_core.errors import ConfigError

logger = logging.getLogger(__name__)

_LONGEST_NAME = 128


def group_factory(backend: str, timeout_s: float, rank: int, world_size: int) -> Callable[[str, list[int]], Group]:
    """Return a function (label, ranks) -> Group for `backend`; collective over the world.

    `auto` is HCCL on Ascend; on CPU shared memory when all ranks are on one host and the C++ part can be built, else
    MCCL. MindSpore's own communication is joined where it is needed: ranks that meet in memory do without.

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

    gathered = meeting()
    if target != "Ascend" and backend != "mccl":
        if gathered is None:
            start_communication()
        over_memory = _shared_memory_factory(backend, gathered or make("world", list(range(world_size))), timeout_s)
        if over_memory is not None:
            return over_memory
    start_communication()
    return make


def group_name(label: str, ranks: list[int]) -> str:
    """Return the name of a group in the backend: the same on all its members, another one for other ranks.

    HCCL takes names of fewer than 128 bytes; where the ranks are too many to be told, their hash stands for them.
    """
    name = "-".join([label, *map(str, ranks)])
    if len(name) < _LONGEST_NAME:
        return name
    return f"{label}-{len(ranks)}-ranks-{hashlib.blake2b(name.encode(), digest_size=16).hexdigest()}"


def _shared_memory_factory(
    backend: str, all_ranks: Group | Meeting, timeout_s: float
) -> Callable[[str, list[int]], Group] | None:
    """Return the factory of groups over shared memory, or None where that does not work and is not insisted on."""
    world, reason = world_over_shared_memory(all_ranks, timeout_s)
    if world is None:
        if backend == "shm":
            raise ConfigError(f"distributed_backend=shm cannot work here: {reason}; use mccl")
        logger.info("communication: MCCL (%s)", reason)
        return None
    logger.info("communication: shared memory")

    def make(label: str, ranks: list[int]) -> Group:
        if len(ranks) == 1:
            return SoloGroup(label, all_ranks.ranks[all_ranks.rank])
        return world if label == "world" else world.subgroup(label, ranks)

    return make
