"""Tensor and sequence parallel layers: linear, embedding, cross entropy, the mappings between them, random streams."""

from parallel_core.layout.shard import Cut, TensorShard, mark
from parallel_core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy, vocab_parallel_cross_entropy
from parallel_core.tensor_parallel.embedding import VocabParallelEmbedding
from parallel_core.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from parallel_core.tensor_parallel.mappings import (
    all_to_all,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
    scatter_to_tensor_model_parallel_region,
)
from parallel_core.tensor_parallel.parameter import InitMethod, init_method_normal, make_parameter
from parallel_core.tensor_parallel.random import RandomStreams

__all__ = [
    "ColumnParallelLinear",
    "Cut",
    "InitMethod",
    "RandomStreams",
    "RowParallelLinear",
    "TensorShard",
    "VocabParallelCrossEntropy",
    "VocabParallelEmbedding",
    "all_to_all",
    "copy_to_tensor_model_parallel_region",
    "gather_from_sequence_parallel_region",
    "gather_from_tensor_model_parallel_region",
    "init_method_normal",
    "make_parameter",
    "mark",
    "reduce_from_tensor_model_parallel_region",
    "reduce_scatter_to_sequence_parallel_region",
    "scatter_to_sequence_parallel_region",
    "scatter_to_tensor_model_parallel_region",
    "vocab_parallel_cross_entropy",
]
