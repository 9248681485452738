"""A whole layer over a cache in one C call: a step of one token has no time for a dozen."""

from __future__ import annotations

from ctypes import c_int64, c_void_p

import numpy as np
from mindspore import Tensor

from parallel_core.ops import raw, reference_layer
from parallel_core.ops.fused import KINDS, takes_activation
from parallel_core.ops.library import declare, lib
from parallel_core.ops.registry import compiled

declare("pc_cached_layer", "PPFF")


def _refused(*args: object, activation: str, **options: object) -> str:  # noqa: ARG001
    return "" if takes_activation(activation) else f"the activation is {activation}"


@compiled(
    reference_layer.cached_layer, integers=["rows", "firsts"], halves=["qkv_OH", "proj_HI", "fc1_OH", "fc2_HF"],
    refuses=_refused, needs_gemm=True,
)  # fmt: skip
def _cached_layer(
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
    hidden = hidden_SBH.contiguous()
    (S, B, H), (_, G, capacity, D) = hidden.shape, keys_RGTD.shape
    tensors = (
        hidden, input_norm_H, input_norm_bias_H, qkv_OH, qkv_bias_O, proj_HI, proj_bias_H, mlp_norm_H, mlp_norm_bias_H,
        fc1_OH, fc1_bias_O, fc2_HF, fc2_bias_H, cos, sin,
    )  # fmt: skip
    out = raw.new((S, B, H))
    arrays = (x.ctypes.data for x in (keys_RGTD, values_RGTD, rows, firsts))
    pointers = (c_void_p * 20)(*map(raw.pointer, tensors), *arrays, out.data_ptr())
    turned, per_batch = (0, 0) if cos is None else (cos.shape[-1], cos.shape[1] > 1)
    kind = -1 if activation == "swiglu" else KINDS[activation]
    kinds = [raw.KINDS[weight.dtype] for weight in (qkv_OH, proj_HI, fc1_OH, fc2_HF)]
    numbers = (c_int64 * 18)(
        S, B, H, proj_HI.shape[1] // D, G, D, fc1_OH.shape[0], fc2_HF.shape[1], capacity, window,
        turned, per_batch, interleaved, kind, *kinds,
    )  # fmt: skip
    lib.pc_cached_layer(pointers, numbers, eps, scale)
    return out
