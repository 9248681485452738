"""A whole layer's forward and backward pass over memory: one and ten C calls in place of the callers of its kernels.

The steps are the kernels that the layer's modules call, in their order, so the results are the same to the bit. Between
two steps a caller can put what ranks exchange, or something that it computes itself.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from ctypes import c_int64
from itertools import accumulate
from typing import NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Tensor

from parallel_core.ops import memory, raw
from parallel_core.ops.library import declare, lib

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

_SCRATCH_ALIGNMENT = 16


Shape = tuple[int, int]
"""Rows and columns."""


class LayerSizes(NamedTuple):
    """What a layer, or its attention or MLP with norm and sum, is to its kernels; sizes of what is not there are 0.

    Attributes:
        S: positions.
        B: samples.
        H: hidden size.
        N: query heads of this rank.
        G: groups of keys and values of this rank.
        D: head size.
        wide: features of fc1's output on this rank.
        narrow: features of fc2's input on this rank.
        parts: ranks over which the sequence is cut between the products; norms and sums have one part.
        rotary: channels of a head that turn; 0: none.
        per_batch: whether samples have positions of their own.
        interleaved: whether neighbouring channels turn together.
        activation: its number in `fused.KINDS`; -1: SwiGLU.
        rounds: whether products round their operands to bfloat16, and keep the copies.
        keeps_parts: whether this rank's parts of what the norms give are kept, of a sequence that is cut.
        attends: whether attention is a part of it.
        feeds: whether the MLP is.
        norms_heads: whether queries and keys have norms.
        repeats_core: whether the backward pass runs attention again instead of keeping what it gives.
        repeats_mlp: whether it runs fc1 and the activation again.
        attends_apart: whether a caller attends between two steps, as where other ranks have parts of a sequence.
    """

    S: int
    B: int
    H: int
    N: int
    G: int
    D: int
    wide: int
    narrow: int
    parts: int
    rotary: int
    per_batch: int
    interleaved: int
    activation: int
    rounds: bool
    keeps_parts: bool
    attends: bool
    feeds: bool
    norms_heads: bool
    repeats_core: bool
    repeats_mlp: bool
    attends_apart: bool

    @property
    def packed(self) -> int:
        """Features of queries, keys and values together."""
        return (self.N + 2 * self.G) * self.D

    @property
    def rows(self) -> int:
        """Tokens of this rank's part of the sequence."""
        return self.S // self.parts * self.B

    def keeps(self, normed: str) -> bool:
        """Return whether what a norm gives is kept as float32 numbers, on this rank."""
        if self.repeats_mlp and normed == "normed2":
            return True
        return self.keeps_parts or not (self.rounds or self.parts > 1)

    def repeated(self) -> dict[str, Shape]:
        """Return the arrays that the backward pass computes again."""
        T, repeated = self.S * self.B, dict[str, Shape]()
        if self.repeats_core and not self.attends_apart:
            repeated |= {"context": (T, self.N * self.D), "log_sum_exp": (T, self.N)}
        if self.repeats_mlp:
            repeated |= {"spread": (T, self.wide), "activated": (T, self.narrow)}
        return repeated


class Places(NamedTuple):
    """Where arrays stand in one allocation: offsets in bytes and shapes by name, and floats in all.

    Arrays whose names begin with "rounded" have two bytes a number.
    """

    offsets: dict[str, int]
    shapes: dict[str, Shape]
    floats: int


def _places(shapes: dict[str, Shape]) -> Places:
    counts = [(m * n + 1) // 2 if _is_rounded(name) else m * n for name, (m, n) in shapes.items()]
    ends = list(accumulate(-(-count // _SCRATCH_ALIGNMENT) * _SCRATCH_ALIGNMENT for count in counts))
    return Places({name: 4 * start for name, start in zip(shapes, [0, *ends])}, shapes, ends[-1])


def _is_rounded(name: str) -> bool:
    return name.startswith("rounded")


class Arrays:
    """Arrays in one allocation.

    Args:
        places: where they stand.
        memory: float32 numbers, at least as many as the places say.
    """

    def __init__(self, places: Places, memory: np.ndarray) -> None:
        self._places, self._memory = places, memory
        self._elsewhere: dict[str, Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._places.offsets

    def tensor(self, name: str) -> Tensor:
        """Return an array as a tensor on the same memory, float32 or, if it is a rounded copy, bfloat16."""
        if name in self._elsewhere:
            return self._elsewhere[name]
        memory, start, (rows, columns) = self._memory, self._places.offsets[name], self._places.shapes[name]
        if not _is_rounded(name):
            return raw.on(memory[start // 4 : start // 4 + rows * columns].reshape(rows, columns))
        halves = memory.view(raw.numpy_dtype(ms.bfloat16))
        return Tensor.from_numpy(halves[start // 2 : start // 2 + rows * columns].reshape(rows, columns))


    def put(self, name: str, x: Tensor) -> None:
        """Let an array be this tensor."""
        self._elsewhere[name] = x


@functools.lru_cache(maxsize=64)
def kept_places(z: LayerSizes) -> Places:
    """Return what the backward pass needs of the forward pass, but for tensors that ranks have exchanged."""
    kept = (_kept_by_attention(z) if z.attends else {}) | (_kept_by_mlp(z) if z.feeds else {})
    return _places(kept | {"hidden": (z.rows, z.H)} if z.attends and z.feeds else kept)


def _kept_by_attention(z: LayerSizes) -> dict[str, Shape]:
    T = z.S * z.B
    kept = {"moments1": (z.rows, 3), **_kept_of_norm(z, "normed1")}
    if z.repeats_core or not z.attends_apart:
        kept["heads"] = T, z.packed
    if not (z.repeats_core or z.attends_apart):
        kept |= {"context": (T, z.N * z.D), "log_sum_exp": (T, z.N)}
    if z.norms_heads:
        kept |= {"mixed": (T, z.packed), "moments_q": (T * z.N, 3), "moments_k": (T * z.G, 3)}
    if z.rounds:  # beside the context itself, which attention's gradient is made of
        kept["rounded context"] = T, z.N * z.D
    return kept


def _kept_by_mlp(z: LayerSizes) -> dict[str, Shape]:
    T = z.S * z.B
    kept = {"moments2": (z.rows, 3), **_kept_of_norm(z, "normed2")}
    if not z.repeats_mlp:
        kept |= {"spread": (T, z.wide), "rounded activated" if z.rounds else "activated": (T, z.narrow)}
    return kept


def _kept_of_norm(z: LayerSizes, name: str) -> dict[str, Shape]:
    if z.keeps(name):
        return {name: (z.rows, z.H)}
    return {f"rounded {name}": (z.S * z.B, z.H)} if z.rounds else {}


def like_heads(z: LayerSizes) -> tuple[str, ...]:
    """Return the gradients of packed heads that are the same array as attention's."""
    return ("dheads", *(() if z.rotary else ("dheaded",)), *(() if z.rotary or z.norms_heads else ("dmixed",)))


def _packed_alike(z: LayerSizes, first: str, prefix: str = "") -> dict[str, str]:
    """Return which of the packed heads are the same array as another; `first`: the one that all are at least."""
    mixed, headed, heads = (prefix + name for name in ("mixed", "headed", "heads"))
    if not (z.rotary or z.norms_heads):
        return dict.fromkeys({mixed, headed, heads} - {first}, first)
    if z.rotary and z.norms_heads:
        return {}
    return {headed: mixed if z.rotary else heads}


@functools.lru_cache(maxsize=64)
def passing_places(z: LayerSizes) -> Places:
    """Return what a forward pass needs for itself; `branch` is what attention gives, and then the MLP."""
    T = z.S * z.B
    passing = {"branch": (T, z.H), **z.repeated()}
    passing |= {name: (z.rows, z.H) for name in ("normed1", "normed2") if not z.keeps(name)}
    if z.norms_heads:
        passing["apart"] = 3 * T, z.N * z.D
    if z.attends_apart and not z.repeats_core:
        passing["heads"] = T, z.packed
    if z.rotary:
        passing["headed" if z.norms_heads else "mixed"] = T, z.packed
    if z.rounds:
        passing["activated"] = T, z.narrow
    return _places(passing)


@functools.lru_cache(maxsize=64)
def gradient_places(z: LayerSizes, drops: bool, shared: bool) -> Places:
    """Return the arrays of a backward pass; `shared`: those of the MLP are attention's too, once they are used."""
    of_attention = _gradients_of_attention(z, drops) if z.attends else {}
    of_mlp = _gradients_of_mlp(z, drops) if z.feeds else {}
    more = {"sums": (2, max(z.H, z.D)), **_gradients_of_heads(z), **z.repeated()}
    alike = _packed_alike(z, "dmixed", "d") if z.attends else {}
    if z.attends and z.feeds:
        more["dhidden"] = z.rows, z.H
        alike |= {} if drops else {"dattended": "dhidden"}
    if z.rounds:
        more["rounded"] = z.S * z.B, max(z.wide, z.packed, z.H)
    if shared and z.attends and z.feeds:
        pairs = dict(zip(of_attention, of_mlp))
        places = _places(more | {one: max(of_attention[other], of_mlp[one]) for other, one in pairs.items()})
        places.offsets.update({other: places.offsets[one] for other, one in pairs.items()})
        places.shapes.update(of_mlp | of_attention)
    else:
        places = _places(more | of_mlp | of_attention)
    places.offsets.update({name: places.offsets[one] for name, one in alike.items()})
    places.shapes.update({name: places.shapes[one] for name, one in alike.items()})
    return places


def _gradients_of_attention(z: LayerSizes, drops: bool) -> dict[str, Shape]:
    T = z.S * z.B
    gradients = {"dcontext": (T, z.N * z.D), "dmixed": (T, z.packed), "dnormed1": (T, z.H)}
    return gradients | {"dattended": (z.rows, z.H)} if drops else gradients


def _gradients_of_mlp(z: LayerSizes, drops: bool) -> dict[str, Shape]:
    """Return its arrays in the order of those of attention, of which each can be in the place of one of these."""
    T = z.S * z.B
    gradients = {"dactivated": (T, z.narrow), "dspread": (T, z.wide), "dnormed2": (T, z.H)}
    return gradients | {"dfed": (z.rows, z.H)} if drops else gradients


def _gradients_of_heads(z: LayerSizes) -> dict[str, Shape]:
    T = z.S * z.B
    gradients = {"dheads": (T, z.packed)} if z.rotary or z.norms_heads else {}
    if z.norms_heads:
        gradients |= {"dheaded": (T, z.packed)} if z.rotary else {}
        gradients["apart"] = 3 * T, z.N * z.D
    return gradients


_FORWARD = (
    "moments1", "normed1", "mixed", "moments_q", "moments_k", "headed", "heads", "context", "log_sum_exp", "attended",
    "hidden", "moments2", "normed2", "spread", "activated", "fed", "y", "apart",
)  # fmt: skip
_BACKWARD = (
    "dfed", "dactivated", "dspread", "dnormed2", "dhidden", "dattended", "dcontext", "dheads", "dheaded", "dmixed",
    "dnormed1",
)  # fmt: skip
_NUMBERS = LayerSizes._fields.index("rounds")
_WEIGHTS = _NUMBERS + 6 + 4
_LINEARS = _WEIGHTS + 8
_X = _LINEARS + 4 * 5 + 3
_ROUNDED = ("rounded normed1", "rounded context", "rounded normed2", "rounded activated")
_ROUNDED_INPUT, _ROUNDED_GRADIENT = 3, 4  # of a linear layer's five fields
_DY = _X + 1 + len(_FORWARD)
_GRADIENTS = _DY + 1 + len(_BACKWARD) + 2
_LENGTH = _GRADIENTS + 3 * 16
_FIELDS = dict(zip(("x", *_FORWARD, "dy", *_BACKWARD, "dx"), range(_X, _GRADIENTS)))


@functools.cache
def _bits(number: float) -> int:
    """Return the bits of a double as an integer: every field of the C struct has eight bytes."""
    bits: int = struct.unpack("q", struct.pack("d", number))[0]
    return bits


@functools.lru_cache(maxsize=64)
def _forward_layout(z: LayerSizes) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return the offsets of `_FORWARD` in what is kept and in the scratch, and which of them are kept, as 1 or 0."""
    kept, passing, alike = kept_places(z).offsets, passing_places(z).offsets, _packed_alike(z, "heads")
    names = [alike.get(name, name) for name in _FORWARD]
    of_kept = tuple(kept.get(name, 0) for name in names)
    of_scratch = tuple(0 if name in kept else passing.get(name, 0) for name in names)
    return of_kept, of_scratch, tuple(int(name in kept) for name in names)


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
            order in which they are used: norm 1, norm 2, those of queries and of keys; queries with keys and values,
            projection, fc1, fc2.
        tables: addresses of cosines, sines, and the first positions that are seen; 0 where there are none.
        x: address of the input, which is `hidden` where there is no attention.
        y: address of the output, which is `hidden` where there is no MLP.
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
        numbers = *sizes[:_NUMBERS], *seeds, *map(_bits, factors)
        self._fields = (c_int64 * _LENGTH)(*numbers, *weights, *tables, x, *arrays)
        self.put("y" if sizes.feeds else "hidden", y)
        if not sizes.attends:
            self.put("hidden", x)
        if sizes.rounds:
            offsets = kept_places(sizes).offsets
            self._put_in_linears(_ROUNDED_INPUT, [kept + offsets[name] if name in offsets else 0 for name in _ROUNDED])

    def forward(self, first: int, last: int) -> None:
        """Run the steps [first, last)."""
        lib.pc_layer_forward(self._fields, first, last)

    def _put_in_linears(self, field: int, addresses: list[int]) -> None:
        self._fields[_LINEARS + field : _X - 3 : 5] = addresses  # type: ignore[assignment]

    def put(self, name: str, address: int) -> None:
        """Say where an array stands from now on, such as what ranks have got in exchange for it."""
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
            gradients: of each parameter in the order of the weights its address, 0 for none, the kind of its numbers,
                and whether to add.
        """
        offsets = gradient_places(*layout).offsets
        *arrays, sums = [base + offset for offset in _backward_layout(*layout)]
        if layout[0].rounds:  # each copy is used before the next one is made
            self._put_in_linears(_ROUNDED_GRADIENT, [base + offsets["rounded"]] * 4)
        self._fields[_DY:] = [dy, *arrays, dx, sums, *gradients]
        for name in (*layout[0].repeated(), *(["apart"] if layout[0].norms_heads else [])):
            self.put(name, base + offsets[name])
        self._put_ends(layout[0], dy, dx, drops=layout[1])

    def _put_ends(self, z: LayerSizes, dy: int, dx: int, *, drops: bool) -> None:
        """Say where gradients are that are no arrays of the pass: the output's, the input's, and a half's `hidden`."""
        if not z.attends:
            self.put("dhidden", dx)
        elif not z.feeds:
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
