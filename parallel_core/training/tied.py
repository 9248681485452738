"""A tied embedding is one weight on two pipeline stages."""

from __future__ import annotations

from collections.abc import Sequence

from mindspore import nn

from parallel_core.comm.interface import Group
from parallel_core.errors import ParallelCoreError
from parallel_core.layout.shard import shard_of


def require_trained_alike(chunks: Sequence[nn.Cell], embedding_group: Group) -> None:
    """Refuse a tied embedding that only one of its stages trains: the sum of its gradients would wait for the other.

    Args:
        chunks: of this rank.
        embedding_group: first and last pipeline stage, or a group of one.

    Raises:
        ParallelCoreError: on the ranks of both.

    Communication: one all-gather over them.
    """
    if embedding_group.size == 1:
        return
    tied = [p for chunk in chunks for p in chunk.get_parameters() if shard_of(p).shared_embedding]
    trained = embedding_group.all_gather_object([p.requires_grad for p in tied])
    if trained[0] != trained[-1]:
        raise ParallelCoreError(
            f"the tied embedding, {', '.join(shard_of(p).name for p in tied)}, is frozen on the first or on the last "
            "pipeline stage alone; freeze both: parallel_core.layout.shard.shard_of(parameter).name is this on "
            "either, parameter.name is not; or write --untie-embeddings-and-output-weights"
        )
