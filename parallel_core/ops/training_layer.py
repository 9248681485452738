"""A whole layer's forward and backward pass over memory: one and nine C calls in place of the callers of its kernels.

The steps are the kernels that the layer's modules call, in their order, so the results are the same to the bit. Between
two steps a caller can put a sum over ranks.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable, Sequence
from ctypes import c_int64
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from parallel_core.ops.library import declare, lib

declare("pc_layer_forward", "PII")
declare("pc_layer_backward", "PII")

ATTENDED, FED, FORWARD_STEPS = 5, 10, 11
"""Steps of the forward pass before which what attention gives, or the MLP, is summed over ranks; and all steps."""
PARAMETER_STEPS = (2, 5, 10, 14)
"""Steps of the backward pass that are the gradients of fc2, fc1, the projection, and of queries, keys and values."""
PRODUCT_STEPS = {"pc_layer_forward": (1, 4, 7, 9), "pc_layer_backward": (1, 4, 9, 13, *PARAMETER_STEPS)}
"""Steps of either pass that multiply matrices."""
SUMS_BEFORE = {5: "dnormed2", 14: "dnormed1"}
"""What is summed over ranks from before such a step to behind it."""
BACKWARD_STEPS = 17

_SCRATCH_ALIGNMENT = 16


class LayerSizes(NamedTuple):
    """What a layer is to its kernels.

    Attributes:
        S: positions.
        B: samples.
        H: hidden size.
        N: query heads of this rank.
        G: groups of keys and values of this rank.
        D: head size.
        wide: features of fc1's output on this rank.
        narrow: features of fc2's input on this rank.
        rotary: channels of a head that turn; 0: none.
        per_batch: whether samples have positions of their own.
        interleaved: whether neighbouring channels turn together.
        activation: its number in `fused.KINDS`; -1: SwiGLU.
        rounds: whether products round their operands to bfloat16, and keep the copies.
    """

    S: int
    B: int
    H: int
    N: int
    G: int
    D: int
    wide: int
    narrow: int
    rotary: int
    per_batch: int
    interleaved: int
    activation: int
    rounds: bool

    @property
    def packed(self) -> int:
        """Features of queries, keys and values together."""
        return (self.N + 2 * self.G) * self.D


class Places(NamedTuple):
    """Where arrays stand in one allocation: offsets in bytes by name, and floats in all."""

    offsets: dict[str, int]
    floats: int


def _places(sizes: Iterable[tuple[str, int]]) -> Places:
    names, counts = zip(*sizes)
    ends = list(accumulate(-(-n // _SCRATCH_ALIGNMENT) * _SCRATCH_ALIGNMENT for n in counts))
    return Places({name: 4 * start for name, start in zip(names, [0, *ends])}, ends[-1])


def _inputs(z: LayerSizes) -> list[tuple[str, int]]:
    """Return the inputs of the linear layers that are nothing else's, and their sizes."""
    T = z.S * z.B
    return [("normed1", T * z.H), ("normed2", T * z.H), ("activated", T * z.narrow)]


@functools.lru_cache(maxsize=64)
def kept_places(z: LayerSizes) -> Places:
    """Return what the backward pass needs of the forward pass."""
    T = z.S * z.B
    sizes = [
        ("moments1", 3 * T), ("turned" if z.rotary else "mixed", T * z.packed), ("context", T * z.N * z.D),
        ("log_sum_exp", T * z.N), ("hidden", T * z.H), ("moments2", 3 * T), ("spread", T * z.wide),
    ]  # fmt: skip
    inputs = _inputs(z)
    if z.rounds:  # copies of two bytes, of the context too
        inputs = [(f"rounded {name}", (n + 1) // 2) for name, n in [*inputs, ("context", T * z.N * z.D)]]
    return _places(sizes + inputs)


@functools.lru_cache(maxsize=64)
def passing_places(z: LayerSizes) -> Places:
    """Return what a forward pass needs for itself; `branch` stands first."""
    sizes = [("branch", z.S * z.B * z.H)]
    sizes += [("mixed", z.S * z.B * z.packed)] if z.rotary else []
    return _places(sizes + _inputs(z) if z.rounds else sizes)


@functools.lru_cache(maxsize=64)
def gradient_places(z: LayerSizes, drops: bool, shared: bool) -> Places:
    """Return the arrays of a backward pass; `shared`: those of the MLP are attention's too, once they are used."""
    T, H, ND = z.S * z.B, z.H, z.N * z.D
    if shared:
        narrow, wide = max(z.narrow, ND), max(z.wide, z.packed)
        sizes = [("dactivated", T * narrow), ("dspread", T * wide), ("dnormed2", T * H), ("dhidden", T * H)]
        sizes += [("dfed", T * H)] if drops else []
    else:
        sizes = [
            ("dactivated", T * z.narrow), ("dspread", T * z.wide), ("dnormed2", T * H), ("dhidden", T * H),
            ("dcontext", T * ND), ("dmixed", T * z.packed), ("dnormed1", T * H),
        ]  # fmt: skip
        sizes += [("dfed", T * H), ("dattended", T * H)] if drops else []
    sizes += [("dturned", T * z.packed)] if z.rotary else []
    sizes += [("rounded", (T * max(z.wide, z.packed, H) + 1) // 2)] if z.rounds else []
    places = _places([*sizes, ("sums", 2 * H)])
    if shared:
        twice = {"dcontext": "dactivated", "dmixed": "dspread", "dnormed1": "dnormed2", "dattended": "dfed"}
        places.offsets.update({name: places.offsets.get(other, 0) for name, other in twice.items()})
    return places


_FORWARD = (
    "moments1", "normed1", "mixed", "turned", "context", "log_sum_exp", "attended", "hidden", "moments2", "normed2",
    "spread", "activated", "fed", "y",
)  # fmt: skip
_BACKWARD = (
    "dfed", "dactivated", "dspread", "dnormed2", "dhidden", "dattended", "dcontext", "dturned", "dmixed", "dnormed1",
)  # fmt: skip
_WEIGHTS = 22
_LINEARS = _WEIGHTS + 4
_X = _LINEARS + 4 * 5 + 3
_ROUNDED = ("rounded normed1", "rounded context", "rounded normed2", "rounded activated")
_DY = _X + 1 + len(_FORWARD)
_GRADIENTS = _DY + 1 + len(_BACKWARD) + 2
_LENGTH = _GRADIENTS + 24
_FIELDS = dict(zip(_FORWARD, range(_X + 1, _DY))) | dict(zip(_BACKWARD, range(_DY + 1, _GRADIENTS)))


@functools.cache
def _bits(number: float) -> int:
    """Return the bits of a double as an integer: every field of the C struct has eight bytes."""
    bits: int = struct.unpack("q", struct.pack("d", number))[0]
    return bits


@functools.lru_cache(maxsize=64)
def _forward_layout(z: LayerSizes) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return the offsets of `_FORWARD` in what is kept and in the scratch, and which of them are kept, as 1 or 0."""
    kept, passing = kept_places(z).offsets, passing_places(z).offsets
    of_kept = tuple(kept.get(name, 0) for name in _FORWARD)
    of_scratch = tuple(0 if name in kept else passing.get(name, 0) for name in _FORWARD)
    return of_kept, of_scratch, tuple(int(name in kept) for name in _FORWARD)


@functools.lru_cache(maxsize=64)
def _backward_layout(z: LayerSizes, drops: bool, shared: bool) -> tuple[int, ...]:
    offsets = gradient_places(z, drops, shared).offsets
    return tuple(offsets.get(name, 0) for name in (*_BACKWARD, "sums"))


class LayerCall:
    """The C struct of one call of a layer; addresses are of memory that the caller keeps.

    Args:
        sizes: of the layer.
        seeds: of the dropout in attention, and of the two branches: six numbers.
        factors: epsilon of the norms, factor of the scores, rates of the dropout in attention and of the branches.
        weights: addresses, of the norms and their biases, and of each linear layer with its kind and its bias, in the
            order in which they are used: norm 1, norm 2; queries with keys and values, projection, fc1, fc2.
        tables: addresses of cosines, sines, and the first positions that are seen; 0 where there are none.
        x: address of the input.
        y: address of the output.
        kept: address of memory for `kept_places`.
        passing: address of memory for `passing_places`.
    """

    def __init__(
        self,
        sizes: LayerSizes,
        seeds: Sequence[int],
        factors: Sequence[float],
        weights: Sequence[int],
        tables: Sequence[int],
        x: int,
        y: int,
        kept: int,
        passing: int,
    ) -> None:
        arrays = [kept + k if is_kept else passing + p for k, p, is_kept in zip(*_forward_layout(sizes))]
        arrays[-1] = y
        self._fields = (c_int64 * _LENGTH)(*sizes[:-1], *seeds, *map(_bits, factors), *weights, *tables, x, *arrays)
        if sizes.rounds:
            offsets = kept_places(sizes).offsets
            self._fields[_LINEARS + 3 : _X - 3 : 5] = [kept + offsets[name] for name in _ROUNDED]

    def forward(self, first: int, last: int) -> None:
        """Run the steps [first, last)."""
        lib.pc_layer_forward(self._fields, first, last)

    def put_sum(self, name: str, address: int) -> None:
        """Say where the sum over ranks of `attended`, `fed`, `dnormed2` or `dnormed1` stands."""
        self._fields[_FIELDS[name]] = address

    def start_backward(
        self, dy: int, dx: int, base: int, layout: tuple[LayerSizes, bool, bool], gradients: Sequence[int]
    ) -> None:
        """Take what a backward pass needs.

        Args:
            dy: address of the output's gradient.
            dx: address of the input's.
            base: address of memory for `gradient_places`.
            layout: the arguments of that.
            gradients: of each parameter in the order of the weights its address, 0 for none, and whether to add.
        """
        *arrays, sums = [base + offset for offset in _backward_layout(*layout)]
        if layout[0].rounds:  # each copy is used before the next one is made
            self._fields[_LINEARS + 4 : _X - 3 : 5] = [base + gradient_places(*layout).offsets["rounded"]] * 4
        self._fields[_DY:] = [dy, *arrays, dx, sums, *gradients]

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
            self._array = np.empty(floats, np.float32)
            self._address = self._array.ctypes.data
        return self._array, self._address


scratch = _Scratch()
