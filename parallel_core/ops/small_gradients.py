"""Gradients of biases, which are summed where those of their parameter are."""

from __future__ import annotations

from mindspore import Tensor

from parallel_core.main_grad import main_grad_of, needs_gradient
from parallel_core.ops.registry import KERNELS


def bias_gradient(bias: Tensor, dy: Tensor) -> Tensor | None:
    """Return what a `Function.backward` returns for a bias [O] that was added to what `dy` [.., O] is the gradient of.

    Where the parameter keeps a sum over microbatches the gradient is added to it; nothing else is allocated.
    """
    if not needs_gradient(bias):
        return None
    main_grad = main_grad_of(bias, dy)
    if main_grad is None:
        db = KERNELS["linear_grad_bias"].selected(dy)
        return db if db.dtype == bias.dtype else KERNELS["convert"].selected(db, bias.dtype)
    return main_grad.accumulate(lambda into_O, add: KERNELS["linear_grad_bias_"].selected(into_O, dy, add))
