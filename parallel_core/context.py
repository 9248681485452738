"""The communicators of one rank, made once from a `Mesh` and passed down to whoever needs one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from parallel_core.comm.background import in_background
from parallel_core.comm.factory import group_factory
from parallel_core.comm.interface import Group, SoloGroup
from parallel_core.layout.expert_mesh import EXPERT_GROUP_AXES, expert_spans
from parallel_core.layout.mesh import Mesh

if TYPE_CHECKING:
    from parallel_core.config.schema import ModelParallelConfig


GROUP_AXES = {
    "tp": ("tp",),
    "cp": ("cp",),
    "dp": ("dp",),
    "dp_cp": ("cp", "dp"),
    "pp": ("pp",),
    "model": ("tp", "pp"),
}
"""The axes that each group of a rank spans."""


@dataclass(frozen=True)
class ParallelContext:
    """One rank's place in the mesh and its groups.

    Ranks of `dp` read different samples, ranks of `cp` hold parts of the same sequences. All of them, `dp_cp`, hold the
    same parameters: what reads data asks `dp`; what sums gradients, shards the optimizer, counts norms, shares out
    checkpoints or writes logs asks `dp_cp`. `model` is tensor x pipeline (one replica of the model); `embedding` is
    the first and last pipeline stage, or a group of one on the stages between. `cp_inner` and `cp_ring` are the two
    levels of a hierarchical exchange within `cp` (see `context_parallel.attention`), groups of one without one.

    Experts see the same ranks on a mesh of their own: `ep` shares a layer's experts, `etp` each expert, `edp` holds
    equal ones; `ep_etp` is where tokens are exchanged.
    """

    mesh: Mesh
    rank: int
    world: Group
    tp: Group
    cp: Group
    dp: Group
    dp_cp: Group
    pp: Group
    model: Group
    embedding: Group
    cp_inner: Group = field(default_factory=SoloGroup)
    cp_ring: Group = field(default_factory=SoloGroup)
    ep: Group = field(default_factory=SoloGroup)
    etp: Group = field(default_factory=SoloGroup)
    edp: Group = field(default_factory=SoloGroup)
    ep_etp: Group = field(default_factory=SoloGroup)

    @property
    def groups(self) -> dict[str, Group]:
        """The groups by name."""
        return {name: getattr(self, name) for name in (*GROUP_AXES, *EXPERT_GROUP_AXES)}

    @property
    def coordinates(self) -> dict[str, int]:
        """This rank's position on the axes that parameters are cut or repeated over (see `TensorShard`)."""
        return {"tp": self.tp.rank, "ep": self.ep.rank, "etp": self.etp.rank}

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
        return cls(Mesh.megatron(1), 0, *[group] * 8)

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
        of_experts = expert_spans(rank, world_size, config)
        if world_size == 1:
            return cls.solo()
        make = group_factory(config.distributed_backend, config.distributed_timeout_minutes * 60, rank, world_size)
        groups: dict[str, Group] = {}
        spans = [(label, mesh.group_of(rank, *axes)) for label, axes in GROUP_AXES.items()]
        for label, ranks in (*spans, *of_experts):
            same = next((group for group in groups.values() if list(group.ranks) == ranks), None)
            # Groups of the same ranks are one communicator: dp_cp is dp where nothing is cut along the sequence.
            groups[label] = make(label, ranks) if same is None or len(ranks) == 1 else same
            if label == "tp" and config.micro_batch_interleave_num > 1:
                groups[label] = in_background(groups[label])
        stages = mesh.group_of(rank, "pp")
        ends = [stages[0], stages[-1]] if len(stages) > 1 else stages
        groups["embedding"] = make("embedding", ends) if rank in ends else SoloGroup("embedding", rank)
        for label, ranks in zip(("cp_inner", "cp_ring"), hierarchy(mesh.group_of(rank, "cp"), rank, config)):
            groups[label] = make(label, ranks)
        return cls(mesh, rank, make("world", list(range(world_size))), **groups)

    def destroy(self) -> None:
        """Wait for every rank, so that no message is lost when one of them exits early, and close the groups."""
        self.world.barrier()
        every = (*self.groups.values(), self.world, self.embedding, self.cp_inner, self.cp_ring)
        for group in {id(group): group for group in every}.values():
            group.close()


def hierarchy(cp_ranks: list[int], rank: int, config: ModelParallelConfig) -> tuple[list[int], list[int]]:
    """Return (the run of neighbours, one rank of each run) that `rank` is in, of the ranks that share a sequence.

    Without a hierarchical exchange both are this rank alone.
    """
    inner = config.hierarchical_context_parallel_sizes[0] if config.hierarchical_context_parallel_sizes else 0
    if not inner:
        return [rank], [rank]
    run, place = divmod(cp_ranks.index(rank), inner)
    return cp_ranks[run * inner : (run + 1) * inner], cp_ranks[place::inner]
