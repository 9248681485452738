"""What every layer of one model needs to be built, in one value that is passed down."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import mindspore as ms

from parallel_core.comm.interface import Group, SoloGroup
from parallel_core.config.schema import TransformerConfig
from parallel_core.tensor_parallel.parameter import InitMethod, named_normal, named_xavier_uniform
from parallel_core.tensor_parallel.random import RandomStreams


@dataclass(frozen=True)
class BuildContext:
    """The model's configuration, the tensor parallel group, random streams and the seed of initial values.

    Attributes:
        config: the model.
        tp_group: the tensor parallel group.
        sequence_parallel: activations between the linear layers are cut along the sequence over the group.
        streams: where dropout draws.
        seed: initial values depend on this and on a tensor's global name only.
    """

    config: TransformerConfig
    tp_group: Group = field(default_factory=SoloGroup)
    sequence_parallel: bool = False
    streams: RandomStreams = field(default_factory=lambda: RandomStreams(0))
    seed: int = 1234

    @cached_property
    def compute_dtype(self) -> ms.Type:
        """The dtype of activations and matrix products."""
        return getattr(ms, self.config.compute_dtype)

    @cached_property
    def residual_dtype(self) -> ms.Type:
        """The dtype of the residual stream, which is also what pipeline stages send."""
        return ms.float32 if self.config.fp32_residual_connection else self.compute_dtype

    def init(self, name: str) -> InitMethod:
        """Return the init method of a matrix: N(0, init_method_std^2), or Xavier uniform."""
        return self._init(name, self.config.init_method_std)

    def output_init(self, name: str) -> InitMethod:
        """Return the init method of a matrix that writes to the residual stream: std / sqrt(2 * num_layers)."""
        return self._init(name, self.config.init_method_std / math.sqrt(2.0 * self.config.num_layers))

    def embedding_init(self, name: str) -> InitMethod:
        """Return the init method of an embedding table."""
        return self._init(name, self.config.embedding_init_std)

    def _init(self, name: str, std: float) -> InitMethod:
        if self.config.init_method_xavier_uniform:
            return named_xavier_uniform(self.seed, name)
        return named_normal(std, self.seed, name)
