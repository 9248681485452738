"""What routers share over an iteration: the strength of their losses, and the record of what they did.

Each router tells once of every microbatch, in its backward pass: so recomputation counts once and evaluation not at
all. From the record come the balancing losses that look at more than one microbatch, the step of the experts' biases,
and the numbers that are logged.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from mindspore import Parameter, Tensor

from parallel_core.comm.interface import Group, SoloGroup
from parallel_core.config.experts import MoEConfig

if TYPE_CHECKING:
    from parallel_core.config.schema import AllConfig
    from parallel_core.context import ParallelContext

Numbers = dict[str, tuple[float, float]]
"""{name: (sum, number)}"""


@dataclass
class RouterRecord:
    """What one router did in the iteration so far.

    Attributes:
        bias: the experts' biases, float32 [E], where there are any.
        counts: tokens of each expert on this rank, [E].
        seen: tokens of each expert over the microbatches that `global_aux_loss` looks back on, [E].
        microbatches: how many these are.
        layer: the number of its layer; those behind the model's last follow it.
    """

    bias: Parameter | None
    counts: np.ndarray
    seen: np.ndarray
    microbatches: int = 0
    layer: int = 0


@dataclass
class RoutingLedger:
    """The record of all routers of a rank.

    Args:
        moe: how tokens are routed.
        tp: ranks that hold parts of the same sequences' positions under sequence parallelism.
        cp: ranks that hold parts of the same sequences.
        dp: ranks that read other samples.
        per_token: the objective is a sum over tokens (`calculate_per_token_loss`).
    """

    moe: MoEConfig = field(default_factory=MoEConfig)
    tp: Group = field(default_factory=SoloGroup)
    cp: Group = field(default_factory=SoloGroup)
    dp: Group = field(default_factory=SoloGroup)
    per_token: bool = False

    @classmethod
    def of(cls, config: AllConfig, context: ParallelContext) -> RoutingLedger:
        """Return the ledger of a rank's run."""
        per_token = config.training_config.calculate_per_token_loss
        return cls(config.model_config.moe, context.tp, context.cp, context.dp, per_token)

    def __post_init__(self) -> None:
        self._records: list[RouterRecord] = []
        self._numbers: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self.strength = 1.0
        """Factor of every routing loss of a microbatch in its gradient, before data parallel averaging."""

    def add_router(self, bias: Parameter | None, layer: int = 0) -> RouterRecord:
        """Take a router in."""
        zeros = np.zeros(self.moe.num_experts, np.float32)
        record = RouterRecord(bias, zeros, zeros, layer=layer)
        self._records.append(record)
        return record

    def biases(self) -> list[np.ndarray | None]:
        """Return copies of the experts' biases of all routers, which each iteration moves."""
        return [None if one.bias is None else one.bias.asnumpy().copy() for one in self._records]

    def set_biases(self, values: list[np.ndarray | None]) -> None:
        """Give the experts' biases back what `biases` has returned."""
        for record, bias in zip(self._records, values):
            if record.bias is not None and bias is not None:
                record.bias.set_data(Tensor(bias))

    def freeze(self) -> None:
        """Leave the experts' biases as they are, in runs that train none of the model."""
        for record in self._records:
            record.bias = None

    def start_iteration(self, loss_scale: float, num_microbatches: int) -> None:
        """Forget the last iteration.

        Args:
            loss_scale: factor of the gradients.
            num_microbatches: of this rank.
        """
        # A microbatch's mean counts cp times, because gradients are averaged over dp x cp afterwards.
        self.strength = loss_scale if self.per_token else loss_scale * self.cp.size / num_microbatches
        self._numbers.clear()
        for record in self._records:
            record.counts = np.zeros(self.moe.num_experts, np.float32)
            record.seen, record.microbatches = record.counts, 0

    def tell(self, name: str, value: float, number: float = 1.0) -> None:
        """Add to a number that is logged as sum / number over all layers, microbatches and ranks."""
        pair = self._numbers[name]
        pair[0] += value
        pair[1] += number

    def tell_loss(self, record: RouterRecord, name: str, value: float) -> None:
        """Add one microbatch's loss of a router, and where it is asked for the one layer's."""
        self.tell(name, value)
        if self.moe.moe_per_layer_logging:
            self.tell(f"moe/{name}_layer_{record.layer}", value)

    @property
    def parts(self) -> int:
        """Ranks that hold a microbatch together."""
        return self.tp.size * self.cp.size

    def over_microbatch(self, counts: np.ndarray) -> np.ndarray:
        """Return counts of any shape, summed over the ranks that hold a microbatch together."""
        return _sum(_sum(counts, self.tp), self.cp)

    def gathered(self, rows: np.ndarray) -> np.ndarray:
        """Return rows, put one behind the other over tp, then over cp."""
        for group in (self.tp, self.cp):
            if group.size > 1:
                rows = group.all_gather(Tensor(np.ascontiguousarray(rows, np.float32)), 0).asnumpy()
        return rows

    def looking_back(self, record: RouterRecord, counts: np.ndarray) -> tuple[np.ndarray, float]:
        """Return the mean counts that `global_aux_loss` compares a microbatch with, [E], and the microbatches in each.

        The microbatches of an iteration are numbered over data parallel ranks; a microbatch is compared with itself and
        those before it, which are the same in every layout. Megatron-LM takes the rounds up to this one, each of all
        data parallel ranks, as one microbatch of so many tokens.

        Args:
            record: of the router; the counts are added to it.
            counts: tokens of each expert in this microbatch, over the ranks that hold it.

        Communication: one all-gather of E numbers over dp.
        """
        total = counts
        if self.dp.size > 1:
            gathered = self.dp.all_gather(Tensor(counts.reshape(1, -1).astype(np.float32)), 0).asnumpy()
            total = gathered.sum(0)
            up_to_here = gathered[: self.dp.rank + 1].sum(0)
        else:
            up_to_here = counts
        if self.moe.moe_global_aux_loss_form == "megatron":
            record.seen, record.microbatches = record.seen + total, record.microbatches + 1
            return record.seen / record.microbatches, float(self.dp.size)
        mean = (record.seen + up_to_here) / (record.microbatches + self.dp.rank + 1)
        record.seen, record.microbatches = record.seen + total, record.microbatches + self.dp.size
        return mean, 1.0

    def finish_iteration(self, speaks: bool) -> Numbers:
        """Move the experts' biases, and return the numbers to log, of which each rank has its share.

        Biases go up by `moe_router_bias_update_rate` where an expert got fewer tokens than the mean, and else down.

        Args:
            speaks: whether this is the one rank of its pipeline stage that tells of loads.

        Communication: one all-reduce of layers x E over each of tp, cp and dp, if there are experts.
        """
        if not self._records:
            return {}
        counts = _sum(self.over_microbatch(np.stack([record.counts for record in self._records])), self.dp)
        for record, load in zip(self._records, counts):
            if record.bias is not None:
                step = np.float32(self.moe.moe_router_bias_update_rate) * np.sign(load.mean() - load)
                record.bias.set_data(Tensor(record.bias.asnumpy() + step.astype(np.float32)))
            if speaks and load.mean():
                self.tell("tokens_per_expert_max_over_mean", float(load.max() / load.mean()))
        return {name: (pair[0], pair[1]) for name, pair in self._numbers.items()}


def _sum(counts: np.ndarray, group: Group) -> np.ndarray:
    if group.size == 1:
        return counts
    return group.all_reduce(Tensor(np.ascontiguousarray(counts, np.float32))).asnumpy()
