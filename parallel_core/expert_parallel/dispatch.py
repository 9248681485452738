"""How tokens get to their experts and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from mindspore import Tensor

from parallel_core.comm.interface import Group, SoloGroup
from parallel_core.config.experts import MoEConfig
from parallel_core.errors import ConfigError
from parallel_core.expert_parallel.functions import (
    exchange_rows,
    exchange_rows_start,
    put_back,
    reorder_rows,
    take_rows,
)
from parallel_core.expert_parallel.permutation import Permutation, by_expert, for_ranks, permute
from parallel_core.expert_parallel.routing import Routing
from parallel_core.tape import reshaped
from parallel_core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)

if TYPE_CHECKING:
    from parallel_core.config.schema import ModelParallelConfig
    from parallel_core.context import ParallelContext


@dataclass(frozen=True)
class ExpertGroups:
    """The groups of a rank's experts.

    Attributes:
        ep: ranks that share the experts of a layer.
        etp: ranks that share each expert.
        ep_etp: both, ranks of one expert next to each other: where tokens are exchanged.
        etp_axis: the mesh axis of `etp`.
        replicas: the group of `ParallelContext` whose ranks hold the same experts.
    """

    ep: Group = field(default_factory=SoloGroup)
    etp: Group = field(default_factory=SoloGroup)
    ep_etp: Group = field(default_factory=SoloGroup)
    etp_axis: str = "tp"
    replicas: str = "dp_cp"

    @classmethod
    def of(cls, parallel: ModelParallelConfig, context: ParallelContext) -> ExpertGroups:
        """Return the groups of a rank's experts; where those are cut as the rest of the model, they are part of it."""
        as_the_rest = parallel.expert_model_parallel_size == 1 and context.etp.size == context.tp.size
        axis, replicas = ("tp", "dp_cp") if as_the_rest else ("etp", "edp")
        return cls(context.ep, context.etp, context.ep_etp, axis, replicas)


class Dispatched(NamedTuple):
    """Rows for this rank's experts.

    Attributes:
        rows: gives [N, H], those of one expert together, once they are here.
        weights: float32 [N], their routing weights.
        counts: int64 [E / ep].
        state: what `combine` needs.
    """

    rows: Callable[[], Tensor]
    weights: Tensor
    counts: np.ndarray
    state: Any


class Dispatcher(Protocol):
    """Brings tokens to experts and their outputs back."""

    def dispatch(self, x_TH: Tensor, weights_TK: Tensor, routing: Routing) -> Dispatched:
        """Return the rows of all ranks' tokens for this rank's experts."""

    def combine(self, rows_NH: Tensor, state: Any) -> Tensor:
        """Return the sum of each of this rank's tokens' rows, [T, H], over the ranks of an expert too."""


class LocalDispatcher:
    """All experts are here: rows are put in their order."""

    def __init__(self, moe: MoEConfig) -> None:
        self.moe = moe

    def dispatch(self, x_TH: Tensor, weights_TK: Tensor, routing: Routing) -> Dispatched:
        """See `Dispatcher`."""
        order = permute(routing.experts, routing.kept, 0, self.moe.num_experts, _padding(self.moe, routing))
        rows, weights = take_rows(x_TH, weights_TK, order)
        return Dispatched(lambda: rows, weights, order.counts, order)

    def combine(self, rows_NH: Tensor, state: Permutation) -> Tensor:
        """See `Dispatcher`."""
        return put_back(rows_NH, state)


class AllToAllDispatcher:
    """Rows go to the ranks of their expert alone.

    Communication: forward one all-gather of E numbers (none when padded to capacity) and all-to-alls of the rows, of
    their weights and of the outputs; backward the same but the first. A row goes to every rank of its expert. The rows
    are on their way from `dispatch` until they are asked for, and so are their gradients in backward, where the shared
    expert is to be computed meanwhile.
    """

    def __init__(self, moe: MoEConfig, groups: ExpertGroups) -> None:
        self.moe, self.groups = moe, groups
        self._exchange = exchange_rows_start if moe.moe_shared_expert_overlap else _exchange_at_once

    def dispatch(self, x_TH: Tensor, weights_TK: Tensor, routing: Routing) -> Dispatched:
        """See `Dispatcher`."""
        group, ep, etp = self.groups.ep_etp, self.groups.ep, self.groups.etp
        padding = _padding(self.moe, routing)
        order = permute(routing.experts, routing.kept, 0, self.moe.num_experts, padding)
        if padding is None:
            counts = group.all_gather(Tensor(order.counts.astype(np.int32).reshape(1, -1)), 0).asnumpy()
        else:
            counts = np.full((group.size, self.moe.num_experts), padding)
        of_experts = counts.astype(np.int64).reshape(group.size, ep.size, -1)  # [from, ep rank, expert]
        traffic = np.repeat(of_experts.sum(2), etp.size, 1)  # [from, to]
        order = for_ranks(order, ep.size, etp.size)
        rows, weights = take_rows(x_TH, weights_TK, order)
        arriving = self._exchange(rows, traffic, group)
        weights = exchange_rows(reshaped(weights, weights.size, 1), traffic, group)
        own = of_experts[:, ep.rank]
        index = by_expert(own)
        weights = reorder_rows(weights, index)
        weights = reshaped(weights, weights.size)
        state = (order, traffic, index)
        return Dispatched(lambda: reorder_rows(arriving(), index), weights, own.sum(0), state)

    def combine(self, rows_NH: Tensor, state: tuple[Permutation, np.ndarray, np.ndarray]) -> Tensor:
        """See `Dispatcher`."""
        order, traffic, index = state
        back = reorder_rows(rows_NH, np.argsort(index).astype(np.int32))
        return put_back(exchange_rows(back, np.ascontiguousarray(traffic.T), self.groups.ep_etp), order)


def _exchange_at_once(rows: Tensor, traffic: np.ndarray, group: Group) -> Callable[[], Tensor]:
    arrived = exchange_rows(rows, traffic, group)
    return lambda: arrived


class AllGatherDispatcher:
    """Every rank sees all tokens of the group and takes those of its experts.

    Communication: forward an all-gather of tokens, experts and weights and a reduce-scatter of outputs; backward the
    transposes.
    """

    def __init__(self, moe: MoEConfig, groups: ExpertGroups) -> None:
        self.moe, self.groups = moe, groups

    def dispatch(self, x_TH: Tensor, weights_TK: Tensor, routing: Routing) -> Dispatched:
        """See `Dispatcher`."""
        group, ep = self.groups.ep_etp, self.groups.ep
        number = self.moe.num_experts // ep.size
        chosen = np.where(routing.kept, routing.experts, -1).astype(np.int32)
        experts = group.all_gather(Tensor(chosen), 0).asnumpy().astype(np.int64)
        order = permute(experts, experts >= 0, ep.rank * number, number)
        x = gather_from_sequence_parallel_region(x_TH, group)
        rows, weights = take_rows(x, gather_from_sequence_parallel_region(weights_TK, group), order)
        return Dispatched(lambda: rows, weights, order.counts, order)

    def combine(self, rows_NH: Tensor, state: Permutation) -> Tensor:
        """See `Dispatcher`."""
        return reduce_scatter_to_sequence_parallel_region(put_back(rows_NH, state), self.groups.ep_etp)


def _padding(moe: MoEConfig, routing: Routing) -> int | None:
    return routing.capacity if moe.moe_pad_expert_input_to_capacity else None


def make_dispatcher(moe: MoEConfig, groups: ExpertGroups) -> Dispatcher:
    """Return the dispatcher of a layer.

    Raises:
        ConfigError: there is none of the name.
    """
    if groups.ep_etp.size == 1:
        return LocalDispatcher(moe)
    if moe.moe_token_dispatcher_type == "alltoall":
        return AllToAllDispatcher(moe, groups)
    if moe.moe_token_dispatcher_type == "allgather":
        return AllGatherDispatcher(moe, groups)
    raise ConfigError(f"moe_token_dispatcher_type={moe.moe_token_dispatcher_type!r}: use alltoall or allgather")
