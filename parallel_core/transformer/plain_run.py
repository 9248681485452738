"""One call of a plain layer: its steps in either direction, and between them what ranks exchange.

The exchanges are those of `tensor_parallel.linear`, in the same order, so the sums are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mindspore import Tensor

from parallel_core import ops
from parallel_core.comm.interface import Group
from parallel_core.ops import training_layer as kernel
from parallel_core.ops.layer_places import Arrays, LayerSizes, like_heads
from parallel_core.ops.training_layer import GradientSteps, LayerCall
from parallel_core.spans import span
from parallel_core.tape import Tape

Attend = Callable[[Tensor], Tensor]
"""Returns the context [S, B, N * D] of packed heads [S, B, G, (N / G + 2) * D]."""


class Run:
    """A call's steps, and its arrays as tensors.

    Args:
        call: the call.
        sizes: of the layer.
        group: the tensor parallel group.
        kept: the arrays that wait for the backward pass.
        attend: made of `Function`s, what attends in place of the step that does; None: that step.
    """

    def __init__(
        self, call: LayerCall, sizes: LayerSizes, group: Group, kept: Arrays, attend: Attend | None = None
    ) -> None:
        self.call, self._sizes, self._group, self._kept, self._core = call, sizes, group, kept, attend
        self._attended: Tape | None = None
        self._exchanged: dict[str, Tensor] = {}
        self._gradients: Arrays
        self._done = 0

    # ---- forward ----------------------------------------------------------------------------------------------------
    def forward(self, passing: Arrays) -> None:
        """Run the forward pass; `passing`: its other arrays."""
        z = self._sizes
        if self._group.size == 1:
            first = kernel.ATTENTION_STEPS if z.attends else kernel.MLP_STEPS
            last = kernel.MLP_STEPS if z.feeds else kernel.ATTENTION_STEPS
            self._steps(first.start, last.stop, passing)
        else:
            self._forward_of_ranks(passing)
        if z.repeats_core:
            self._attended = None
            self._free("context")

    def _steps(self, first: int, last: int, passing: Arrays) -> None:
        """Run the steps [first, last) of the forward pass."""
        if self._core is not None and first <= kernel.ATTENDS < last:
            self.call.forward(first, kernel.ATTENDS)
            self._attend_apart(self._core, (self._kept if "heads" in self._kept else passing).tensor("heads"))
            first = kernel.ATTENDS + 1
        self.call.forward(first, last)

    def _attend_apart(self, attend: Attend, heads: Tensor) -> None:
        z = self._sizes
        self._attended = Tape(attend, (ops.shaped(heads, (z.S, z.B, z.G, z.packed // z.G)),), ())
        self._put("context", self._attended.output)

    def _forward_of_ranks(self, passing: Arrays) -> None:
        z = self._sizes
        if z.attends:
            self._attend(passing)
        if z.feeds:
            self._feed(passing)
        self._free("attended", "fed", *(name for name in ("normed1", "normed2") if z.rounds or z.keeps(name)))

    def _attend(self, passing: Arrays) -> None:
        self.call.forward(kernel.ATTENTION_STEPS.start, kernel.PROJECTED)
        self._gather("normed1", passing)
        self._steps(kernel.PROJECTED, kernel.ATTENDED, passing)
        self._sum("attended", passing)
        self.call.forward(kernel.ATTENDED, kernel.ATTENTION_STEPS.stop)

    def _feed(self, passing: Arrays) -> None:
        self.call.forward(kernel.MLP_STEPS.start, kernel.SPREAD)
        self._gather("normed2", passing)
        self.call.forward(kernel.SPREAD, kernel.FED)
        self._sum("fed", passing)
        self.call.forward(kernel.FED, kernel.MLP_STEPS.stop)

    def _gather(self, name: str, passing: Arrays) -> None:
        if self._sizes.parts > 1:
            self._put(name, self._group.all_gather((self._kept if name in self._kept else passing).tensor(name)))

    def _sum(self, name: str, passing: Arrays) -> None:
        branch = passing.tensor("branch")
        cut = self._sizes.parts > 1
        self._put(name, self._group.reduce_scatter(branch) if cut else self._group.all_reduce_(branch))

    def _put(self, name: str, x: Tensor) -> None:
        """Go on with a tensor that ranks have exchanged; it lives until `_free`."""
        self._exchanged[name] = x
        self.call.put(name, x.data_ptr())

    def _free(self, *names: str) -> None:
        for name in names:
            self._exchanged.pop(name, None)

    # ---- backward ---------------------------------------------------------------------------------------------------
    def backward(self, dy: Tensor, gradients: Arrays, gathers: tuple[bool, bool], *, later: bool) -> None:
        """Run the backward pass.

        Args:
            dy: gradient of the output.
            gradients: the arrays of the pass.
            gathers: whether gradients of the queries' weight and of fc1's are computed now, of inputs of all tokens.
            later: gradients of the weights of linear layers are asked for later, see `gradient`.
        """
        z = self._sizes
        self._dy, self._gradients = dy, gradients
        self._done = (kernel.MLP_GRADIENTS if z.feeds else kernel.ATTENTION_GRADIENTS).start
        if z.feeds:
            self._take_back_mlp(gathers[1])
            if not later:
                self._free("dfed", "normed2", "dnormed2")
        if z.attends:
            self._take_back_attention(gathers[0])

    def _take_back_mlp(self, gathers: bool) -> None:
        if self._sizes.repeats_mlp:
            self._gather_again("normed2", wanted=True)
            self.call.forward(kernel.SPREAD, kernel.NARROWED)
        self._gather_gradient(kernel.FC2, "dfed")
        self._take_back(kernel.FC2)
        self._gather_again("normed2", gathers)
        self._take_back(kernel.FC1, "dnormed2")
        self._to(kernel.MLP_GRADIENTS.stop)

    def _take_back_attention(self, gathers: bool) -> None:
        self._gather_gradient(kernel.PROJ, "dattended")
        if self._sizes.repeats_core:
            self._steps(kernel.ATTENDS, kernel.ATTENDS + 1, self._kept)
        self._take_back(kernel.PROJ)
        self._gather_again("normed1", gathers)
        self._take_back(kernel.QKV, "dnormed1")
        self._to(kernel.ATTENTION_GRADIENTS.stop)

    def _to(self, step: int) -> None:
        """Run the backward pass up to a step."""
        if self._attended is not None and self._done <= kernel.ATTENTION_GRADIENT < step:
            self.call.backward(self._done, kernel.ATTENTION_GRADIENT)
            self._take_back_apart(self._attended)
            self._done = kernel.ATTENTION_GRADIENT + 1
        self.call.backward(self._done, step)
        self._done = step

    def _take_back_apart(self, attended: Tape) -> None:
        z = self._sizes
        dcontext = ops.shaped(self._gradients.tensor("dcontext"), (z.S, z.B, z.N * z.D))
        of_heads: Any = attended.backward(dcontext)[0][0]
        dheads = ops.shaped(of_heads, (z.S * z.B, z.packed))
        for name in like_heads(z):
            self._gradients.put(name, dheads)
            self.call.put(name, dheads.data_ptr())

    def _gather_gradient(self, linear: GradientSteps, name: str) -> None:
        if self._sizes.parts > 1:
            self._to(linear.of_input)
            self._put(name, self._group.all_gather(self.part_of_gradient(name)))

    def _gather_again(self, name: str, wanted: bool) -> None:
        if wanted and self._sizes.parts > 1 and self._sizes.keeps(name) and name not in self._exchanged:
            self._put(name, self._group.all_gather(self._kept.tensor(name)))

    def _take_back(self, linear: GradientSteps, name: str = "") -> None:
        """Run the steps to a linear layer's weight; its input's gradient `name` is summed over the ranks meanwhile."""
        self._to(linear.of_weight)
        summed = None
        if name and self._group.size > 1:
            cut = self._sizes.parts > 1
            start = self._group.reduce_scatter_start if cut else self._group.all_reduce_start_
            summed = start(self._gradients.tensor(name))
        with span("weight-gradient", 3):
            self._to(linear.of_weight + 1)
        total = None if summed is None else summed.wait()
        if total is not None:
            self._put(name, total)

    # ---- what the later gradients of weights are made of ------------------------------------------------------------
    def part_of_gradient(self, name: str) -> Tensor:
        """Return the gradient of a linear layer's output as this rank has it, [tokens, features]."""
        # Where nothing is dropped, the gradient of what is added last is that of the sum.
        return self._gradients.tensor(name) if name in self._gradients else self._dy

    def gradient(self, name: str) -> Tensor:
        """Return the gradient of a linear layer's output, of all tokens."""
        return self._exchanged[name] if name in self._exchanged else self.part_of_gradient(name)

    def operand(self, name: str) -> tuple[Tensor, Group | None]:
        """Return a linear layer's input, rounded where products round, and the ranks that have parts of it."""
        for kept in (f"rounded {name}", name):
            if kept in self._kept:
                is_part = kept in ("normed1", "normed2") and self._sizes.parts > 1
                return self._kept.tensor(kept), self._group if is_part else None
        return self._exchanged[name] if name in self._exchanged else self._gradients.tensor(name), None
