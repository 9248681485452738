"""Kernels. `reference` specifies each one in plain MindSpore; `use_kernels` selects the fastest that works here."""

from parallel_core.ops import reference
from parallel_core.ops.reference import ACTIVATIONS, attention_mask, cast
from parallel_core.ops.select import selectable, use_kernels

activation = selectable(reference.activation)
adam_ = selectable(reference.adam_)
add_ = selectable(reference.add_)
attention_block = selectable(reference.attention_block)
attention_block_grad = selectable(reference.attention_block_grad)
bias_dropout_add = selectable(reference.bias_dropout_add)
causal_attention = selectable(reference.causal_attention)
causal_attention_packed = selectable(reference.causal_attention_packed)
dropout = selectable(reference.dropout)
embedding = selectable(reference.embedding)
embedding_grad_table = selectable(reference.embedding_grad_table)
embedding_grad_table_ = selectable(reference.embedding_grad_table_)
layer_norm = selectable(reference.layer_norm)
linear = selectable(reference.linear)
linear_grad_bias = selectable(reference.linear_grad_bias)
linear_grad_input = selectable(reference.linear_grad_input)
linear_grad_weight = selectable(reference.linear_grad_weight)
linear_grad_weight_ = selectable(reference.linear_grad_weight_)
rms_norm = selectable(reference.rms_norm)
rotary = selectable(reference.rotary)
rotary_packed = selectable(reference.rotary_packed)
split_last_dim = selectable(reference.split_last_dim)
sum_of_squares = selectable(reference.sum_of_squares)
vocab_grad_logits = selectable(reference.vocab_grad_logits)
vocab_statistics = selectable(reference.vocab_statistics)
write_ = selectable(reference.write_)

__all__ = [
    "ACTIVATIONS",
    "activation",
    "adam_",
    "add_",
    "attention_block",
    "attention_block_grad",
    "attention_mask",
    "bias_dropout_add",
    "cast",
    "causal_attention",
    "causal_attention_packed",
    "dropout",
    "embedding",
    "embedding_grad_table",
    "embedding_grad_table_",
    "layer_norm",
    "linear",
    "linear_grad_bias",
    "linear_grad_input",
    "linear_grad_weight",
    "linear_grad_weight_",
    "rms_norm",
    "rotary",
    "rotary_packed",
    "split_last_dim",
    "sum_of_squares",
    "use_kernels",
    "vocab_grad_logits",
    "vocab_statistics",
    "write_",
]
