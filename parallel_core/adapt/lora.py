"""Low-rank adapters of parallel linear layers: Y = X W^T + alpha / rank * (X A^T) B^T, W frozen.

A tall product is kept small before it crosses ranks, so an adapter adds no communication of the hidden size:

- a column-parallel layer: A is whole on every rank and B is cut as W's rows are. With sequence parallelism the low-rank
  rows [S / tp, B, r] are gathered; without it their gradient [S, B, r] is summed.
- a row-parallel layer: A is cut as W's columns are and B is whole. The low-rank partial products [S, B, r] are summed,
  with sequence parallelism reduce-scattered.

Source: Hu et al. 2021 (arXiv:2106.09685).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from mindspore import Parameter, Tensor, nn

from parallel_core import ops
from parallel_core.adapt.experts import ExpertAdapter
from parallel_core.checkpoint.lora import LORA_A, LORA_B
from parallel_core.comm.interface import Group, SoloGroup
from parallel_core.config.lora import LORA_MODULES, LoraConfig, TargetRank, is_target
from parallel_core.config.schema import TrainingConfig
from parallel_core.errors import ConfigError
from parallel_core.layout.shard import Cut, TensorShard, shard_of
from parallel_core.tensor_parallel import mappings
from parallel_core.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from parallel_core.tensor_parallel.parameter import constant, make_parameter, named_xavier_uniform
from parallel_core.tensor_parallel.random import RandomStreams
from parallel_core.transformer.moe.experts import GroupedMLP
from parallel_core.transformer.moe.router import TopKRouter

Linear = ColumnParallelLinear | RowParallelLinear


class LoraLinear(nn.Cell):
    """A frozen linear layer with a low-rank adapter; it is called as the layer is, and returns what that returns.

    A and B are kept in float32, whatever the layer's type, and cast to the type of X. A starts as Xavier's uniform
    values by its global name, B as zeros, so the first output is the layer's own in every layout.

    Args:
        base: the layer.
        config: rank and scale of each layer, dropout.
        streams: where dropout draws.
        seed: initial values depend on this and on the name.
    """

    def __init__(self, base: Linear, config: LoraConfig, streams: RandomStreams, seed: int) -> None:
        super().__init__(auto_prefix=True)
        weight = base.weight
        if weight is None:
            raise ConfigError("a linear layer without a weight of its own has no adapter")
        self.base, self.group = base, base.tp_group
        self.sequence_parallel = base.sequence_parallel and base.tp_group.size > 1
        self.by_rows = isinstance(base, ColumnParallelLinear)
        shard, self.name = shard_of(weight), _name_of(weight)
        rows, alpha = config.of(self.name)
        self.scale, self.rate, self.streams = alpha / rows, config.dropout, streams
        out_features, in_features = shard.global_shape
        rank, size = self.group.rank, self.group.size
        stride = shard.cuts[0].parts if self.by_rows and shard.cuts else 1
        a_cuts = () if self.by_rows else (Cut("tp", 1, rank, size),)
        b_cuts = (Cut("tp", 0, rank, size, stride),) if self.by_rows else ()
        # With sequence parallelism the whole factor of a layer sees this rank's part of the sequence alone.
        a_shard = TensorShard.cut(
            self.name + LORA_A, (rows, in_features), *a_cuts,
            partial_gradient=shard.partial_gradient or (self.by_rows and self.sequence_parallel),
            zero_gradient_at_first=True,  # B begins as zeros
        )  # fmt: skip
        b_shard = TensorShard.cut(
            self.name + LORA_B, (out_features, rows), *b_cuts,
            partial_gradient=shard.partial_gradient or (not self.by_rows and self.sequence_parallel),
        )  # fmt: skip
        self.lora_A = make_parameter(a_shard, named_xavier_uniform(seed, a_shard.name), "float32")
        self.lora_B = make_parameter(b_shard, constant(0.0), "float32")
        # Products with given weights, whose gradients go where all linear layers' go; they sum nothing over ranks.
        self._product = ColumnParallelLinear(
            1, 1, tp_group=SoloGroup(), init_method=constant(0.0), bias=False, skip_weight_param_allocation=True
        )

    @property
    def weight(self) -> Parameter | None:
        """The frozen weight."""
        return self.base.weight

    def construct(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return (Y, bias or None) as the layer does for the same X."""
        y, bias = self.base(x)
        rate = self.rate if self.streams.training else 0.0
        if rate:
            sharded = self.sequence_parallel or not self.by_rows
            x = ops.dropout(x, rate, self.streams.seeds(f"{self.name}.lora_dropout", sharded))
        low, _ = self._product(x, self.lora_A)
        if self.by_rows:
            if self.sequence_parallel:
                low = mappings.gather_from_sequence_parallel_region(low, self.group)
            else:
                low = mappings.copy_to_tensor_model_parallel_region(low, self.group)
        elif self.sequence_parallel:
            low = mappings.reduce_scatter_to_sequence_parallel_region(low, self.group)
        else:
            low = mappings.reduce_from_tensor_model_parallel_region(low, self.group)
        added, _ = self._product(low, self.lora_B)
        return y + added * self.scale, bias


def add_adapters(model: nn.Cell, config: LoraConfig, streams: RandomStreams, seed: int) -> list[str]:
    """Freeze a model chunk and put adapters on its linear layers; return the adapted layers' names.

    Args:
        model: a chunk, changed in place.
        config: which layers, and what their adapters are.
        streams: the model's.
        seed: the run's.

    Raises:
        ConfigError: a target gathers its output, which an adapter cannot be added to.
    """
    for parameter in model.get_parameters():
        parameter.requires_grad = False
    found: list[str] = []
    for parent in [cell for _, cell in model.cells_and_names()]:
        for attribute, child in list(parent.name_cells().items()):
            if isinstance(child, GroupedMLP):
                found += _adapt_experts(child, config, seed)
            if not isinstance(child, (ColumnParallelLinear, RowParallelLinear)) or child.weight is None:
                continue
            name = _name_of(child.weight)
            if isinstance(parent, TopKRouter) or not config.means(name):
                continue
            if isinstance(child, ColumnParallelLinear) and child.gather_output:
                raise ConfigError(f"lora_target_modules: {name} gathers its output; leave it out")
            setattr(parent, attribute, LoraLinear(child, config, streams, seed))
            found.append(name)
    return found


def _adapt_experts(experts: GroupedMLP, config: LoraConfig, seed: int) -> list[str]:
    """Put adapters on the experts of a layer; return the names of the products that have one."""
    found = []
    for product in ("fc1", "fc2"):
        weight = getattr(experts, f"{product}_weight")
        if config.means(_name_of(weight)):
            setattr(experts, f"{product}_adapter", ExpertAdapter(weight, experts.groups, config, seed))
            found.append(_name_of(weight))
    return found


def _name_of(weight: Parameter) -> str:
    return shard_of(weight).name.removesuffix(".weight")


def adapt(chunks: Sequence[nn.Cell], training: TrainingConfig, streams: RandomStreams, world: Group) -> None:
    """Put a run's adapters on this rank's chunks; collective.

    Args:
        chunks: the model, changed in place.
        training: the run.
        streams: the model's.
        world: all ranks.

    Raises:
        ConfigError: as `add_adapters`, or a target means no layer of the model on any rank.
    """
    config = training.lora
    found = [name for chunk in chunks for name in add_adapters(chunk, config, streams, training.seed)]
    names = {name for part in world.all_gather_object(found) for name in part}
    no_layer = partial(filter, lambda target: not any(is_target(name, target) for name in names))
    strange = [] if names and config.target_modules == LORA_MODULES else list(no_layer(config.target_modules))
    if strange:
        raise ConfigError(
            f"lora_target_modules {', '.join(strange)}: no layer of the model is meant; adapters stand at "
            f"{', '.join(LORA_MODULES)}, or where a regular expression of a whole name such as "
            r"decoder\.layers\.1\.mlp\.linear_fc1 says"
        )
    if others := list(no_layer(TargetRank.read(entry).target for entry in config.target_ranks)):
        raise ConfigError(f"lora_target_ranks {', '.join(others)}: no layer with an adapter is meant")


def adapter_settings(config: LoraConfig) -> dict[str, Any]:
    """Return what an adapter's checkpoint says of it."""
    return {"rank": config.rank, "alpha": config.alpha, "target_modules": list(config.target_modules),
            "target_ranks": list(config.target_ranks)}  # fmt: skip
