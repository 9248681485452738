"""Where every rank sits as experts see it, as values."""

from __future__ import annotations

from typing import TYPE_CHECKING

from parallel_core.errors import ConfigError
from parallel_core.layout.mesh import Mesh

if TYPE_CHECKING:
    from parallel_core.config.schema import ModelParallelConfig

EXPERT_GROUP_AXES = {"ep": ("ep",), "etp": ("etp",), "edp": ("edp",), "ep_etp": ("etp", "ep")}
"""The axes that each group of experts spans."""


def expert_mesh(world_size: int, config: ModelParallelConfig) -> Mesh:
    """Return the mesh etp (ranks of one expert), ep (of a layer's experts), edp (of equal experts), pp, as Megatron-LM.

    Raises:
        ConfigError: if `world_size` is not a multiple of the product of the sizes.
    """
    etp, ep = config.expert_tensor_size, config.expert_model_parallel_size
    pp = config.pipeline_model_parallel_size
    if world_size < 1 or world_size % (etp * ep * pp):
        raise ConfigError(
            f"world size {world_size} is not a multiple of expert_tensor_parallel_size={etp} x "
            f"expert_model_parallel_size={ep} x pipeline_model_parallel_size={pp} = {etp * ep * pp}; "
            f"start {max(1, round(world_size / (etp * ep * pp))) * etp * ep * pp} processes, or change the sizes"
        )
    return Mesh((("etp", etp), ("ep", ep), ("edp", world_size // (etp * ep * pp)), ("pp", pp)))


def expert_spans(rank: int, world_size: int, config: ModelParallelConfig) -> list[tuple[str, list[int]]]:
    """Return the name and the ranks of each of the rank's groups of experts."""
    mesh = expert_mesh(world_size, config)
    return [(name, mesh.group_of(rank, *axes)) for name, axes in EXPERT_GROUP_AXES.items()]
