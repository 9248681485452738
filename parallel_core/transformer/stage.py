"""What a part of a model is built from, in one value that is passed down to every layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import mindspore as ms
import numpy as np
from mindspore import Parameter, nn

from parallel_core.comm.interface import Group, SoloGroup
from parallel_core.config.schema import AllConfig, TransformerConfig
from parallel_core.context_parallel.attention import ContextGroups
from parallel_core.expert_parallel.dispatch import ExpertGroups
from parallel_core.expert_parallel.ledger import RoutingLedger
from parallel_core.layout.recompute import RecomputePlan
from parallel_core.layout.sequence import positions
from parallel_core.layout.shard import Cut, TensorShard, mark
from parallel_core.tensor_parallel.parameter import InitMethod, make_parameter, named_normal, named_xavier_uniform
from parallel_core.tensor_parallel.random import RandomStreams

if TYPE_CHECKING:
    from parallel_core.context import ParallelContext

WORD_EMBEDDINGS = "embedding.word_embeddings.weight"
"""The global name of the word embedding's table."""


@dataclass(frozen=True)
class ModelStage:
    """One model chunk: which layers it has, and what they are built from. By default the whole model on one process.

    Attributes:
        config: the model.
        tp_group: the tensor parallel group.
        sequence_parallel: activations between the linear layers are cut along the sequence over the group.
        streams: where dropout draws.
        seed: initial values depend on this and on a tensor's global name only.
        layer_numbers: global numbers of the chunk's layers; None: all of the model's.
        pre_process: this chunk embeds tokens.
        post_process: this chunk ends in logits or losses.
        plan: what is recomputed in backward; None: nothing.
        make_core_attention: builds a layer's core attention from this stage, the layer's number and its name; None:
            `attention.CoreAttention`.
        make_mlp: builds a layer's feed-forward block; None:
            `feed_forward.make_feed_forward`, which has the signature.
        context_groups: the ranks that hold parts of the same sequences.
        exchanges: how attention sees the other ranks' keys, a word of `layout.sequence.EXCHANGES` for each
            layer of the model, or one for all.
        expert_groups: the ranks that share a layer's experts.
        ledger: what routers of experts share.
        vp_stage: number of the chunk on this rank.
        run: everything the run is told, where there is one.
        context: this rank's groups, where there is a run.
    """

    config: TransformerConfig
    tp_group: Group = field(default_factory=SoloGroup)
    sequence_parallel: bool = False
    streams: RandomStreams = field(default_factory=lambda: RandomStreams(0))
    seed: int = 1234
    layer_numbers: tuple[int, ...] | None = None
    pre_process: bool = True
    post_process: bool = True
    plan: RecomputePlan | None = None
    make_core_attention: Callable[[ModelStage, int, str], nn.Cell] | None = None
    make_mlp: Callable[..., nn.Cell] | None = None
    context_groups: ContextGroups = field(default_factory=ContextGroups)
    exchanges: tuple[str, ...] = ("p2p",)
    expert_groups: ExpertGroups = field(default_factory=ExpertGroups)
    ledger: RoutingLedger = field(default_factory=RoutingLedger)
    vp_stage: int = 0
    run: AllConfig | None = None
    context: ParallelContext | None = None

    def exchange_of(self, layer_number: int) -> str:
        """Return how a layer's attention sees the other ranks' keys."""
        return self.exchanges[min(layer_number, len(self.exchanges) - 1)]

    def positions(self, local_length: int) -> np.ndarray | None:
        """Return the positions of this rank's part of a sequence, int [S / CP]; None: 0, 1, 2, ..."""
        cp = self.context_groups.cp
        return None if cp.size == 1 else positions(local_length * cp.size, cp.size, cp.rank)

    @property
    def num_parts(self) -> int:
        """Parts in which layers compute a microbatch, one beside the communication of another."""
        return 1 if self.run is None else self.run.parallel_config.micro_batch_interleave_num

    @property
    def layers(self) -> tuple[int, ...]:
        """Global numbers of the chunk's layers."""
        return tuple(range(self.config.num_layers)) if self.layer_numbers is None else self.layer_numbers

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

    def share_word_embeddings(self, table: Parameter | None) -> Parameter | None:
        """Tie the word embeddings of the first and the last pipeline stage, so that their gradients are summed.

        Args:
            table: the embedding of this chunk, on the first stage.

        Returns:
            On a last stage that is not the first one its own copy, [V / tp, H], which starts equal because initial
            values go by name; None elsewhere.
        """
        if self.pre_process and not self.post_process and table is not None:
            mark(table, shared_embedding=True)
        if self.pre_process or not self.post_process:
            return None
        rows = Cut("tp", 0, self.tp_group.rank, self.tp_group.size)
        shape = (self.config.vocab_size, self.config.hidden_size)
        shard = TensorShard.cut(
            WORD_EMBEDDINGS, shape, rows, is_embedding_or_output=True, shared_embedding=True, is_copy=True
        )
        return make_parameter(shard, self.embedding_init(WORD_EMBEDDINGS), self.config.embedding_init_dtype)
