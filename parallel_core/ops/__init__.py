"""Kernels. `reference` specifies each one in plain MindSpore; `use_kernels` selects the fastest that works here.

Every function that `reference` marks with `@kernel` is here under its name, running what is selected (`registry`).
"""

from typing import TYPE_CHECKING

from parallel_core.ops import reference_experts  # noqa: F401 - it registers kernels
from parallel_core.ops.reference import ACTIVATIONS, attention_mask, cast
from parallel_core.ops.registry import doors
from parallel_core.ops.selection import use_kernels

if TYPE_CHECKING:  # a door has the type of its reference
    from parallel_core.ops.reference import *  # noqa: F403
    from parallel_core.ops.reference_experts import *  # noqa: F403

globals().update(doors())

__all__ = ["ACTIVATIONS", "attention_mask", "cast", "use_kernels", *doors()]  # noqa: PLE0604 - all of them are names
