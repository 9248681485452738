"""A whole layer's forward and backward pass over memory: one and ten C calls in place of the callers of its kernels.

The steps are the kernels that the layer's modules call, in their order, so the results are the same to the bit. Between
two steps a caller can put what ranks exchange, or something that it computes itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_int64
from typing import NamedTuple

import numpy as np

from parallel_core.ops import memory
from parallel_core.ops.layer_places import (
    LayerSizes,
    Places,
    gradient_places,
    kept_places,
    packed_alike,
    passing_places,
)
from parallel_core.ops.library import bits_of, declare, lib

declare("pc_layer_forward", "PII")
declare("pc_layer_backward", "PII")

PROJECTED, ATTENDED, SPREAD, FED = 1, 5, 7, 10
"""Steps of the forward pass before which its arrays `normed1`, `attended`, `normed2` and `fed` can be exchanged."""
ATTENTION_STEPS, MLP_STEPS = range(6), range(6, 11)
"""Which steps of the forward pass belong to either half of a layer."""
ATTENDS, NARROWED = 3, 9
"""The step that is attention, and the one that multiplies by fc2's weight."""
MLP_GRADIENTS, ATTENTION_GRADIENTS = range(8), range(8, 17)
"""Which steps of the backward pass do."""
ATTENTION_GRADIENT = 11
"""The one that is attention's."""
PRODUCT_STEPS = {"pc_layer_forward": (1, 4, 7, 9), "pc_layer_backward": (1, 2, 4, 5, 9, 10, 13, 14)}
"""Steps of either pass that multiply matrices."""


class GradientSteps(NamedTuple):
    """The steps of the backward pass that are the gradients of a linear layer."""

    of_input: int
    of_weight: int


FC2, FC1, PROJ, QKV = GradientSteps(1, 2), GradientSteps(4, 5), GradientSteps(9, 10), GradientSteps(13, 14)

_FORWARD = (
    "moments1", "normed1", "mixed", "moments_q", "moments_k", "headed", "heads", "context", "log_sum_exp", "attended",
    "hidden", "moments2", "normed2", "spread", "activated", "fed", "y", "apart",
)  # fmt: skip
_BACKWARD = (
    "dfed", "dactivated", "dspread", "dnormed2", "dhidden", "dattended", "dcontext", "dheads", "dheaded", "dmixed",
    "dnormed1", "dx", "sums",
)  # fmt: skip
_NUMBERS = LayerSizes._fields.index("rounds")
_WEIGHTS = _NUMBERS + 6 + 4
_LINEARS = _WEIGHTS + 8
_X = _LINEARS + 4 * 5 + 3
_ROUNDED = ("rounded normed1", "rounded context", "rounded normed2", "rounded activated")
_LINEAR_FIELDS = range(_LINEARS, _LINEARS + 4 * 5, 5)
_ROUNDED_INPUT, _ROUNDED_GRADIENT = 3, 4  # of a linear layer's five fields
_DY = _X + 1 + len(_FORWARD)
_GRADIENTS = _DY + 1 + len(_BACKWARD)
_LENGTH = _GRADIENTS + 3 * 16
_FIELDS = dict(zip(("x", *_FORWARD, "dy", *_BACKWARD), range(_X, _GRADIENTS)))


class GradientLayout(NamedTuple):
    """Where the arrays of a backward pass stand, and which offset goes to which field of the C struct."""

    places: tuple[Places, Places]
    """In memory that waits for the gradients of weights, and in memory that the next pass may have."""
    of_fields: tuple[tuple[int, int], ...]
    """Of `_BACKWARD` the number of the memory, and the offset there."""
    others: tuple[tuple[int, int, int], ...]
    """Further fields with theirs."""


class Layout:
    """Where the arrays of both passes stand.

    Attributes:
        sizes: the argument.
        inputs: inputs of linear layers, which wait for the gradients of weights.
        kept: what else the backward pass needs of the forward pass, but for tensors that ranks have exchanged.
        passing: what the forward pass needs for itself.
        of_fields: of each array of the forward pass the number of its memory among these three, and the offset there.
    """

    def __init__(self, sizes: LayerSizes) -> None:
        self.sizes, (self.inputs, self.kept), self.passing = sizes, kept_places(sizes), passing_places(sizes)
        alike = packed_alike(sizes, "heads") | {"attended": "branch", "fed": "branch"}
        self.of_fields = _found((self.inputs, self.kept, self.passing), [alike.get(name, name) for name in _FORWARD])
        self._gradients: dict[tuple[bool, bool], GradientLayout] = {}

    def gradients(self, drops: bool, later: bool) -> GradientLayout:
        """Return where the arrays of a backward pass stand; see `gradient_places`."""
        if (drops, later) not in self._gradients:
            self._gradients[drops, later] = self._make_gradients(drops, later)
        return self._gradients[drops, later]

    def _make_gradients(self, drops: bool, later: bool) -> GradientLayout:
        places = gradient_places(self.sizes, drops, later)
        names = [name for name in (*self.sizes.repeated(), "apart") if any(name in one.offsets for one in places)]
        others = [(_FIELDS[name], *place) for name, place in zip(names, _found(places, names))]
        if self.sizes.rounds:  # each copy is used before the next one is made
            others += [(field + _ROUNDED_GRADIENT, *_found(places, ["rounded"])[0]) for field in _LINEAR_FIELDS]
        return GradientLayout(places, _found(places, _BACKWARD), tuple(others))


def _found(all_places: Sequence[Places], names: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Return of each array the number of its memory, and the offset there; of one that is nowhere, any."""
    return tuple(
        next(((i, one.offsets[name]) for i, one in enumerate(all_places) if name in one.offsets), (0, 0))
        for name in names
    )


class LayerCall:
    """The C struct of one call of a layer; addresses are of memory that the caller keeps.

    Args:
        layout: of the layer.
        seeds: of the dropout in attention, and of the two branches: six numbers.
        factors: epsilon of the norms, factor of the scores, rates of the dropout in attention and of the branches.
        weights: addresses, of the norms and their biases, and of each linear layer with its kind and its bias, in the
            order in which they are used: norm 1, norm 2, those of queries and of keys; queries with keys and values,
            projection, fc1, fc2.
        tables: addresses of cosines, sines, and the first positions that are seen; 0 where there are none.
        x: address of the input, which is `hidden` where there is no attention.
        y: address of the output, which is `hidden` where there is no MLP.
        bases: addresses of memory for `Layout.inputs`, `Layout.kept` and `Layout.passing`.
    """

    def __init__(
        self,
        layout: Layout,
        seeds: Sequence[int],
        factors: Sequence[float],
        weights: Sequence[int],
        tables: Sequence[int],
        x: int,
        y: int,
        bases: Sequence[int],
    ) -> None:
        sizes = layout.sizes
        arrays = [bases[i] + offset for i, offset in layout.of_fields]
        numbers = *sizes[:_NUMBERS], *seeds, *map(bits_of, factors)
        self._fields = (c_int64 * _LENGTH)(*numbers, *weights, *tables, x, *arrays)
        self.put("y" if sizes.feeds else "hidden", y)
        if not sizes.attends:
            self.put("hidden", x)
        if sizes.rounds:
            offsets = layout.inputs.offsets
            for name, field in zip(_ROUNDED, _LINEAR_FIELDS):
                self._fields[field + _ROUNDED_INPUT] = bases[0] + offsets[name] if name in offsets else 0

    def forward(self, first: int, last: int) -> None:
        """Run the steps [first, last)."""
        lib.pc_layer_forward(self._fields, first, last)

    def put(self, name: str, address: int) -> None:
        """Say where an array stands from now on, such as what ranks have got in exchange for it."""
        self._fields[_FIELDS[name]] = address

    def start_backward(
        self,
        layout: Layout,
        dy: int,
        dx: int,
        bases: Sequence[int],
        gradients: Sequence[int],
        *,
        drops: bool,
        later: bool,
    ) -> None:
        """Take what a backward pass needs.

        Args:
            layout: of the layer.
            dy: address of the output's gradient.
            dx: address of the input's.
            bases: addresses of memory for the two of `Layout.gradients`.
            gradients: of each parameter in the order of the weights its address, 0 for none, the kind of its numbers,
                and whether to add.
            drops: see there.
            later: likewise.
        """
        where = layout.gradients(drops, later)
        self._fields[_DY:] = [dy, *[bases[i] + offset for i, offset in where.of_fields], *gradients]
        for field, i, offset in where.others:
            self._fields[field] = bases[i] + offset
        self._put_ends(layout.sizes, dy, dx, drops=drops)

    def _put_ends(self, z: LayerSizes, dy: int, dx: int, *, drops: bool) -> None:
        """Say where gradients are that are no arrays of the pass: the output's, the input's, and a half's `hidden`."""
        self.put("dx" if z.attends else "dhidden", dx)
        if not z.feeds:
            self.put("dhidden", dy)
        if not drops:  # what a branch adds has the gradient of the sum
            self.put("dfed" if z.feeds else "dattended", dy)

    def backward(self, first: int, last: int) -> None:
        """Run the steps [first, last)."""
        lib.pc_layer_backward(self._fields, first, last)


def rounds_operands(rows: int) -> bool:
    """Return whether products of so many rows round their operands to bfloat16."""
    return bool(lib.pc_rounds_operand(rows))


class _Scratch:
    """Memory that one pass leaves to the next."""

    def __init__(self) -> None:
        self._array = np.empty(0, np.float32)
        self._address = 0

    def take(self, floats: int) -> tuple[np.ndarray, int]:
        """Return an array of at least so many floats, and its address."""
        if self._array.size < floats:
            self._array = memory.empty((floats,))
            self._address = self._array.ctypes.data
        return self._array, self._address


scratch = _Scratch()
