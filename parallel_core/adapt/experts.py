"""Low-rank adapters of a layer's experts: each expert has its own A and B beside its frozen matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, nn

from parallel_core import ops
from parallel_core.checkpoint.lora import LORA_A, LORA_B
from parallel_core.config.lora import LoraConfig
from parallel_core.expert_parallel.dispatch import ExpertGroups
from parallel_core.expert_parallel.functions import grouped_linear
from parallel_core.layout.shard import Cut, TensorShard, shard_of
from parallel_core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from parallel_core.tensor_parallel.parameter import InitMethod, constant, make_parameter, named_xavier_uniform


class ExpertAdapter(nn.Cell):
    """What is added to one of the experts' two products, alpha / rank * (x A_e^T) B_e^T of each row with its expert e.

    A [E, r, I] and B [E, O, r] are float32, and cut as the weight [E, O, I] is: over the experts' ranks along E, and
    over the ranks that share an expert along O or I. Nothing crosses ranks forward: where I is cut the result is this
    rank's part of the sum, as the product's own is. A starts as Xavier's uniform values of each expert, B as zeros.

    Args:
        weight: the experts' frozen weight.
        groups: who shares experts.
        config: ranks and scales.
        seed: initial values depend on this and on the name.

    Backward:
        the gradient of the factor that ranks of one expert all hold is summed over them.
    """

    def __init__(self, weight: Parameter, groups: ExpertGroups, config: LoraConfig, seed: int) -> None:
        super().__init__(auto_prefix=True)
        shard, self.etp = shard_of(weight), groups.etp
        name = shard.name.removesuffix(".weight")
        (rank, alpha), (E, O, I) = config.of(name), shard.global_shape
        self.scale = alpha / rank
        experts, within = shard.cuts
        self.by_rows = within.dim == 1
        a_cut, b_cut = (None, within) if self.by_rows else (Cut(within.axis, 2, within.rank, within.size), None)

        def factor(suffix: str, shape: tuple[int, ...], cut: Cut | None, init: InitMethod, **traits: Any) -> Parameter:
            cuts = (experts,) if cut is None else (experts, cut)
            return make_parameter(TensorShard.cut(name + suffix, shape, *cuts, replicas=shard.replicas, **traits), init)

        own_values = _each_expert(seed, name + LORA_A)
        self.lora_A = factor(LORA_A, (E, rank, I), a_cut, own_values, zero_gradient_at_first=True)  # B begins as zeros
        self.lora_B = factor(LORA_B, (E, O, rank), b_cut, constant(0.0))

    def construct(self, rows_NI: Tensor, counts: np.ndarray) -> Tensor:
        """Return [N, O], of this rank's part of an expert.

        Args:
            rows_NI: what the product is of, rows of one expert together.
            counts: int64 [E / ep], rows of each of this rank's experts.
        """
        a, b = (ops.cast(factor, rows_NI.dtype) for factor in (self.lora_A, self.lora_B))
        if self.by_rows:
            a = copy_to_tensor_model_parallel_region(a, self.etp)
        else:
            b = copy_to_tensor_model_parallel_region(b, self.etp)
        return grouped_linear(grouped_linear(rows_NI, a, counts), b, counts) * self.scale


def _each_expert(seed: int, name: str) -> InitMethod:
    return lambda shape: np.stack([named_xavier_uniform(seed, f"{name}.{e}")(shape[1:]) for e in range(shape[0])])
