"""Which layers of a stage are recomputed, and how. Pure Python."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from parallel_core.config.schema import ModelParallelConfig, TransformerConfig


@dataclass(frozen=True)
class RecomputePlan:
    """What to recompute in one model chunk; layers are counted from 0 within the chunk.

    Attributes:
        segments: runs of layers recomputed as a whole, from one kept input each.
        core_attention: the first so many layers recompute their core attention.
        regather: the first so many layers gather their sequence-parallel inputs again in backward; the others keep
            the gathered tensor.
    """

    segments: tuple[range, ...] = ()
    core_attention: int = 0
    regather: int = 0


def recompute_plan(
    model: TransformerConfig, parallel: ModelParallelConfig, num_layers: int, rank: int, chunk: int
) -> RecomputePlan:
    """Return the plan of the chunk with `num_layers` layers at pipeline `rank` and `chunk`.

    Per-stage lists (`recompute`, `select_recompute`, `select_comm_recompute`) count leading layers and, where given,
    replace `recompute_granularity`. Megatron's full recomputation is by method: uniform cuts the chunk into segments
    of recompute_num_layers, block takes the first recompute_num_layers layers one by one.
    """

    def listed(counts: tuple[tuple[int, ...], ...]) -> int:
        return min(counts[rank][chunk], num_layers) if counts else 0

    regather = listed(parallel.select_comm_recompute) if parallel.select_comm_recompute else num_layers
    if parallel.recompute or parallel.select_recompute:
        full = listed(parallel.recompute)
        segments = tuple(range(i, i + 1) for i in range(full))
        return RecomputePlan(segments, listed(parallel.select_recompute), regather)
    if model.recompute_granularity == "selective":
        return RecomputePlan((), num_layers if model.recomputes("core_attn") else 0, regather)
    if model.recompute_granularity == "full":
        step = model.recompute_num_layers
        if model.recompute_method == "uniform":
            segments = tuple(range(i, min(i + step, num_layers)) for i in range(0, num_layers, step))
        else:
            segments = tuple(range(i, i + 1) for i in range(min(step, num_layers)))
        return RecomputePlan(segments, 0, regather)
    return RecomputePlan((), 0, regather)
