"""Kernels. `reference` specifies each one in plain MindSpore; `use_kernels` selects the fastest that works here."""

from parallel_core.ops import reference
from parallel_core.ops.reference import ACTIVATIONS, attention_mask
from parallel_core.ops.select import selectable, use_kernels

activation = selectable(reference.activation)
adam_ = selectable(reference.adam_)
bias_dropout_add = selectable(reference.bias_dropout_add)
causal_attention = selectable(reference.causal_attention)
dropout = selectable(reference.dropout)
embedding = selectable(reference.embedding)
embedding_grad_table = selectable(reference.embedding_grad_table)
layer_norm = selectable(reference.layer_norm)
linear = selectable(reference.linear)
linear_grad_bias = selectable(reference.linear_grad_bias)
linear_grad_input = selectable(reference.linear_grad_input)
linear_grad_weight = selectable(reference.linear_grad_weight)
rms_norm = selectable(reference.rms_norm)
rotary = selectable(reference.rotary)
sum_of_squares = selectable(reference.sum_of_squares)
vocab_grad_logits = selectable(reference.vocab_grad_logits)
vocab_statistics = selectable(reference.vocab_statistics)

__all__ = [
    "ACTIVATIONS",
    "activation",
    "adam_",
    "attention_mask",
    "bias_dropout_add",
    "causal_attention",
    "dropout",
    "embedding",
    "embedding_grad_table",
    "layer_norm",
    "linear",
    "linear_grad_bias",
    "linear_grad_input",
    "linear_grad_weight",
    "rms_norm",
    "rotary",
    "sum_of_squares",
    "use_kernels",
    "vocab_grad_logits",
    "vocab_statistics",
]
