"""The communicators of one rank, made once from a `Mesh` and passed down to whoever needs one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from parallel_core.comm.interface import Group, SoloGroup
from parallel_core.errors import ConfigError
from parallel_core.layout.mesh import Mesh

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from parallel_core.config.schema import ModelParallelConfig


@dataclass(frozen=True)
class ParallelContext:
    """One rank's place in the mesh and its groups.

    `dp` also carries the distributed optimizer's shards; `model` is tensor x pipeline (one replica of the model);
    `embedding` is the first and last pipeline stage, or a group of one on the stages between.
    """

    mesh: Mesh
    rank: int
    world: Group
    tp: Group
    dp: Group
    pp: Group
    model: Group
    embedding: Group

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the first pipeline stage."""
        return self.pp.rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the last pipeline stage."""
        return self.pp.rank == self.pp.size - 1

    @classmethod
    def solo(cls) -> ParallelContext:
        """Return the context of a program of one process; nothing is initialised."""
        group = SoloGroup()
        return cls(Mesh.megatron(1), 0, *[group] * 6)

    @classmethod
    def create(cls, config: ModelParallelConfig, rank: int, world_size: int) -> ParallelContext:
        """Create the groups of this rank. Collective: every rank calls it with the same configuration.

        Raises:
            ConfigError: if the sizes do not fit `world_size`, or the backend does not exist here.
        """
        mesh = Mesh.megatron(
            world_size,
            tensor_parallel=config.tensor_model_parallel_size,
            context_parallel=config.context_parallel_size,
            pipeline_parallel=config.pipeline_model_parallel_size,
        )
        if world_size == 1:
            return cls.solo()
        make = group_factory(config.distributed_backend, config.distributed_timeout_minutes * 60, rank, world_size)
        groups = {}
        for label, axes in (("tp", ("tp",)), ("dp", ("dp",)), ("pp", ("pp",)), ("model", ("tp", "pp"))):
            groups[label] = make(label, mesh.group_of(rank, *axes))
        stages = mesh.group_of(rank, "pp")
        ends = [stages[0], stages[-1]] if len(stages) > 1 else stages
        groups["embedding"] = make("embedding", ends) if rank in ends else SoloGroup("embedding", rank)
        return cls(mesh, rank, make("world", list(range(world_size))), **groups)

    def destroy(self) -> None:
        """Wait for every rank, so that no message is lost when one of them exits early."""
        self.world.barrier()


def group_factory(backend: str, timeout_s: float, rank: int, world_size: int) -> Callable[[str, list[int]], Group]:
    """Return a function (label, ranks) -> Group for `backend`; collective over the world.

    `auto` is HCCL on Ascend; on CPU shared memory when all ranks are on one host and the C++ part can be built, else
    MCCL.

    Raises:
        ConfigError: if the backend does not exist here.
    """
    import mindspore as ms

    from parallel_core.comm.mindspore_comm import WORLD, HcclGroup, McclGroup
    from parallel_core.comm.watchdog import Watchdog

    target = ms.get_context("device_target")
    known = ("auto", "hccl") if target == "Ascend" else ("auto", "shm", "mccl")
    if backend not in known:
        raise ConfigError(f"distributed_backend={backend} does not exist on {target}; use {' or '.join(known)}")
    kind = HcclGroup if target == "Ascend" else McclGroup
    watchdog = Watchdog(timeout_s)

    def make(label: str, ranks: list[int]) -> Group:
        if len(ranks) == 1:
            return SoloGroup(label, rank)
        name = WORLD if len(ranks) == world_size else label + "-" + "-".join(map(str, ranks))
        return kind(name, ranks, rank, watchdog)

    if target == "Ascend" or backend == "mccl":
        return make
    return _shared_memory_factory(backend, make("world", list(range(world_size))), timeout_s) or make


def _shared_memory_factory(
    backend: str, world_over_mccl: Group, timeout_s: float
) -> Callable[[str, list[int]], Group] | None:
    """Return the factory of groups over shared memory, or None where that does not work and is not insisted on."""
    from parallel_core.comm.shm import world_over_shared_memory

    world, reason = world_over_shared_memory(world_over_mccl, timeout_s)
    if world is None:
        if backend == "shm":
            raise ConfigError(f"distributed_backend=shm cannot work here: {reason}; use mccl")
        logger.info("communication: MCCL (%s)", reason)
        return None
    logger.info("communication: shared memory")

    def make(label: str, ranks: list[int]) -> Group:
        if len(ranks) == 1:
            return SoloGroup(label, world_over_mccl.ranks[world_over_mccl.rank])
        return world if label == "world" else world.subgroup(label, ranks)

    return make
