"""What a layer of one function is, and where the arrays of its passes stand in memory."""

from __future__ import annotations

from collections.abc import Container
from itertools import accumulate
from typing import NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Tensor

from parallel_core.ops import raw

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


_NOTHING = Places({}, {}, 0)


def _places(shapes: dict[str, Shape]) -> Places:
    if not shapes:
        return _NOTHING
    counts = [(m * n + 1) // 2 if _is_rounded(name) else m * n for name, (m, n) in shapes.items()]
    ends = list(accumulate(-(-count // _SCRATCH_ALIGNMENT) * _SCRATCH_ALIGNMENT for count in counts))
    return Places({name: 4 * start for name, start in zip(shapes, [0, *ends])}, shapes, ends[-1])


def _is_rounded(name: str) -> bool:
    return name.startswith("rounded")


class Arrays:
    """Arrays in a few allocations, each of which lives as long as a tensor of it.

    Args:
        allocations: of each where its arrays stand, and float32 numbers, at least as many as the places say.
    """

    def __init__(self, *allocations: tuple[Places, np.ndarray]) -> None:
        self._allocations = allocations
        self._elsewhere: dict[str, Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return any(name in places.offsets for places, _ in self._allocations)

    def tensor(self, name: str) -> Tensor:
        """Return an array as a tensor on the same memory, float32 or, if it is a rounded copy, bfloat16."""
        if name in self._elsewhere:
            return self._elsewhere[name]
        places, memory = next(one for one in self._allocations if name in one[0].offsets)
        start, (rows, columns) = places.offsets[name], places.shapes[name]
        if not _is_rounded(name):
            return raw.on(memory[start // 4 : start // 4 + rows * columns].reshape(rows, columns))
        halves = memory.view(raw.numpy_dtype(ms.bfloat16))
        return Tensor.from_numpy(halves[start // 2 : start // 2 + rows * columns].reshape(rows, columns))

    def put(self, name: str, x: Tensor) -> None:
        """Let an array be this tensor."""
        self._elsewhere[name] = x


def kept_places(z: LayerSizes) -> tuple[Places, Places]:
    """Return what the backward pass needs of the forward pass, but for tensors that ranks have exchanged.

    The first are inputs of linear layers, which the gradients of weights are made of; where these are computed later
    than those of inputs, the others are free before.
    """
    kept = (_kept_by_attention(z) if z.attends else {}) | (_kept_by_mlp(z) if z.feeds else {})
    if z.attends and z.feeds:
        kept["hidden"] = z.rows, z.H
    inputs = {"normed1", "normed2", "activated", "" if z.rounds else "context"}
    return _in_two(kept, {name for name in kept if name in inputs or _is_rounded(name)})


def _in_two(shapes: dict[str, Shape], first: Container[str]) -> tuple[Places, Places]:
    """Return places for those of the arrays that are among the first, and for the others."""
    return (
        _places({name: shape for name, shape in shapes.items() if name in first}),
        _places({name: shape for name, shape in shapes.items() if name not in first}),
    )


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


def packed_alike(z: LayerSizes, first: str, prefix: str = "") -> dict[str, str]:
    """Return which of the packed heads are the same array as another; `first`: the one that all are at least."""
    mixed, headed, heads = (prefix + name for name in ("mixed", "headed", "heads"))
    if not (z.rotary or z.norms_heads):
        return dict.fromkeys({mixed, headed, heads} - {first}, first)
    if z.rotary and z.norms_heads:
        return {}
    return {headed: mixed if z.rotary else heads}


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


def gradient_places(z: LayerSizes, drops: bool, later: bool) -> tuple[Places, Places]:
    """Return the arrays of a backward pass: those that wait for the gradients of weights, and the others.

    Args:
        z: the layer.
        drops: there is dropout on what attention and MLP add.
        later: the gradients of weights are computed later; otherwise nothing waits. Of what does not, arrays of the
            MLP are attention's too, once they are used.
    """
    of_attention = _gradients_of_attention(z, drops) if z.attends else {}
    of_mlp = _gradients_of_mlp(z, drops) if z.feeds else {}
    shapes = {"sums": (2, max(z.H, z.D)), **_gradients_of_heads(z), **z.repeated(), **of_mlp, **of_attention}
    alike = packed_alike(z, "dmixed", "d") if z.attends else {}
    if z.attends and z.feeds:
        shapes["dhidden"] = z.rows, z.H
        alike |= {} if drops else {"dattended": "dhidden"}
    if z.rounds:
        shapes["rounded"] = z.S * z.B, max(z.wide, z.packed, z.H)
    waits = {"dmixed", "dattended", "dspread", "dfed", "context", "activated"} if later else set()
    if "dattended" in waits and "dattended" in alike:
        waits.add("dhidden")
    if z.attends and z.feeds:
        alike |= {one: other for one, other in zip(of_attention, of_mlp) if one not in waits}
    for name, first in alike.items():
        alike[name] = alike.get(first, first)
        shapes.setdefault(name, shapes[first])
    sizes = {name: shape for name, shape in shapes.items() if name not in alike}
    for name, first in alike.items():
        sizes[first] = max(sizes[first], shapes[name])
    waiting, passing = _in_two(sizes, waits)
    return _with_alike(waiting, shapes, alike), _with_alike(passing, shapes, alike)


def _with_alike(places: Places, shapes: dict[str, Shape], alike: dict[str, str]) -> Places:
    """Return places with the arrays that stand where another one does, each with its own shape."""
    offsets = places.offsets | {name: places.offsets[one] for name, one in alike.items() if one in places.offsets}
    return Places(offsets, {name: shapes[name] for name in offsets}, places.floats)


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
