"""The specification of a whole layer over a cache, by the kernels of its parts; see `reference`."""

from __future__ import annotations

import numpy as np
from mindspore import Tensor

from parallel_core.ops import reference
from parallel_core.ops.registry import kernel


@kernel
def cached_layer(
    hidden_SBH: Tensor,
    input_norm_H: Tensor,
    input_norm_bias_H: Tensor | None,
    qkv_OH: Tensor,
    qkv_bias_O: Tensor | None,
    proj_HI: Tensor,
    proj_bias_H: Tensor | None,
    mlp_norm_H: Tensor,
    mlp_norm_bias_H: Tensor | None,
    fc1_OH: Tensor,
    fc1_bias_O: Tensor | None,
    fc2_HF: Tensor,
    fc2_bias_H: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    keys_RGTD: np.ndarray,
    values_RGTD: np.ndarray,
    rows: np.ndarray,
    firsts: np.ndarray,
    *,
    eps: float,
    interleaved: bool,
    scale: float,
    window: int,
    activation: str,
) -> Tensor:
    """Return a layer's output for S new tokens of B sequences, [S, B, H]; no autograd.

    x = hidden + attention(norm(hidden)), then x + mlp(norm(x)), with all of the layer on this rank.

    Args:
        hidden_SBH: the layer's input.
        input_norm_H: weight of the norm before attention.
        input_norm_bias_H: its bias; None: the norms are RMSNorm, else LayerNorm.
        qkv_OH: queries, keys and values of each group, packed as `causal_attention_packed` takes them.
        qkv_bias_O: its bias.
        proj_HI: weight of the projection back.
        proj_bias_H: its bias.
        mlp_norm_H: weight of the norm before the MLP.
        mlp_norm_bias_H: its bias.
        fc1_OH: weight that widens; [gates; others] where the activation is gated.
        fc1_bias_O: its bias.
        fc2_HF: weight that narrows.
        fc2_bias_H: its bias.
        cos: float32 [S, 1 or B, 1, R], by which queries and keys turn; None: they do not.
        sin: likewise.
        keys_RGTD: as for `cached_attention`; and what follows.
        values_RGTD: their values.
        rows: int32 [B].
        firsts: int32 [B].
        eps: of the norms.
        interleaved: whether neighbouring channels turn together.
        scale: factor of the scores.
        window: how far back a token sees.
        activation: a name that `activation` knows.
    """
    S, B, _ = hidden_SBH.shape
    G, D = keys_RGTD.shape[1], keys_RGTD.shape[3]

    def normed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return reference.rms_norm(x, weight, eps) if bias is None else reference.layer_norm(x, weight, bias, eps)

    mixed = reference.linear(normed(hidden_SBH, input_norm_H, input_norm_bias_H), qkv_OH, qkv_bias_O)
    mixed = mixed.reshape(S, B, G, -1)
    if cos is not None and sin is not None:
        mixed = reference.rotary_packed(mixed, D, cos, sin, interleaved)
    cached = keys_RGTD, values_RGTD, rows, firsts
    context = reference.cached_attention_packed(mixed, D, *cached, scale=scale, window=window)
    branch = reference.linear(context, proj_HI, None)
    hidden = reference.bias_dropout_add(branch, proj_bias_H, hidden_SBH, 0.0, (0, 0))
    wide = reference.linear(normed(hidden, mlp_norm_H, mlp_norm_bias_H), fc1_OH, None)
    branch = reference.linear(reference.activation(wide, fc1_bias_O, activation), fc2_HF, None)
    return reference.bias_dropout_add(branch, fc2_bias_H, hidden, 0.0, (0, 0))
