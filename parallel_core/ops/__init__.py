"""Kernels. `reference` specifies each one in plain MindSpore; `use_kernels` selects the fastest that works here.

Every function that `reference` marks with `@kernel` is here under its name, running what is selected (`registry`).
"""

from typing import TYPE_CHECKING, Any

import mindspore as ms
from mindspore import Tensor

from parallel_core.ops import reference_experts, reference_layer, reference_meetings  # noqa: F401 - they register kernels
from parallel_core.ops.library import exact_products, product_precision
from parallel_core.ops.reference import ACTIVATIONS, attention_mask
from parallel_core.ops.registry import KERNELS, doors
from parallel_core.ops.selection import are_compiled, use_kernels

if TYPE_CHECKING:  # a door has the type of its reference
    from parallel_core.ops.reference import *  # noqa: F403
    from parallel_core.ops.reference_experts import *  # noqa: F403
    from parallel_core.ops.reference_layer import *  # noqa: F403
    from parallel_core.ops.reference_meetings import *  # noqa: F403

globals().update(doors())

_FLOATS = (ms.float32, ms.bfloat16, ms.float16)


def cast(x: Tensor, dtype: Any) -> Tensor:  # type: ignore[no-redef] # the reference has one too
    """Return `x` as `dtype`; `x` itself where it has that dtype."""
    if x.dtype == dtype:
        return x
    return KERNELS["convert"].selected(x, dtype) if x.dtype in _FLOATS and dtype in _FLOATS else x.astype(dtype)


__all__ = [  # noqa: PLE0604 - all of them are names
    "ACTIVATIONS",
    "are_compiled",
    "attention_mask",
    "cast",
    "exact_products",
    "product_precision",
    "use_kernels",
    *doors(),
]
