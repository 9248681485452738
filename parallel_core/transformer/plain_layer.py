"""Layers that run as one function: what most models' layers are, forward and backward a sequence of kernels.

The modules of `transformer.layer` say what is computed, and compute it wherever something else is asked for.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn

from parallel_core import ops
from parallel_core.autograd import Function
from parallel_core.comm.interface import Group
from parallel_core.config.schema import TransformerConfig
from parallel_core.deferral import is_deferring
from parallel_core.errors import ConfigError
from parallel_core.main_grad import MainGrad, everyone_takes_written, main_grad_of, needs_gradient
from parallel_core.ops import memory, raw
from parallel_core.ops import training_layer as kernel
from parallel_core.ops.fused import KINDS, takes_activation
from parallel_core.ops.layer_places import Arrays, LayerSizes
from parallel_core.ops.small_gradients import bias_gradient
from parallel_core.ops.training_layer import LayerCall, Layout
from parallel_core.tape import WRITTEN, has_hooks, is_known, takes_notes, takes_written
from parallel_core.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear, weight_gradient
from parallel_core.transformer.attention import CoreAttention, SelfAttention
from parallel_core.transformer.mlp import MLP
from parallel_core.transformer.norm import RMSNorm
from parallel_core.transformer.plain_run import Attend, Run
from parallel_core.transformer.recomputed import RecomputedMLP
from parallel_core.transformer.rope import RotaryEmbedding


def is_plain(layer: Any, config: TransformerConfig) -> bool:
    """Tell whether a `TransformerLayer` is norm, attention, norm, MLP with nothing else between, whatever attends."""
    return attends_plainly(layer, config) and feeds_plainly(layer, config)


def attends_plainly(layer: Any, config: TransformerConfig) -> bool:
    """Tell whether the first half of a layer is norm, attention and sum, whatever attends."""
    attention = layer.self_attention
    return (
        type(attention) is SelfAttention
        and type(attention.linear_qkv) is ColumnParallelLinear
        and type(attention.linear_proj) is RowParallelLinear
        and (attention.rotary is None or config.apply_rope_fusion)
        and _has_plain_sums(layer, config)
    )


def feeds_plainly(layer: Any, config: TransformerConfig) -> bool:
    """Tell whether the second half of a layer is norm, MLP and sum."""
    mlp = layer.mlp
    return (
        type(mlp) in (MLP, RecomputedMLP)
        and type(mlp.linear_fc1) is ColumnParallelLinear
        and type(mlp.linear_fc2) is RowParallelLinear
        and takes_activation(mlp.hidden_act)
        and (config.apply_swiglu_fusion or not config.is_gated)
        and _has_plain_sums(layer, config)
    )


def _has_plain_sums(layer: Any, config: TransformerConfig) -> bool:
    return (
        not (layer.residual_after_norm or layer.parallel_residual or config.use_sandwich_norm)
        and (config.normalization == "LayerNorm" or config.apply_rmsnorm_fusion)
        and bool(layer.compute_dtype == ms.float32)
    )


def takes_sums(norm: nn.Cell) -> bool:
    """Tell whether `of_sum` may stand for a call of a norm: it is no other's, and nobody waits for the call."""
    return type(norm) is RMSNorm and not has_hooks(norm, ())


_NORM1, _NORM2, _NORM_Q, _NORM_K = _NORMS = (0, 2, 4, 6)
_QKV, _PROJ, _FC1, _FC2 = _LINEARS = (8, 10, 12, 14)
"""Where the weights of norms and of linear layers stand among all, each with its bias behind it."""
_ALL = 16
_USES = {
    _QKV: ("dmixed", "normed1"), _PROJ: ("dattended", "context"), _FC1: ("dspread", "normed2"),
    _FC2: ("dfed", "activated"),
}  # fmt: skip
"""Of each linear layer the gradient of its output, and its input."""


class PlainParts(NamedTuple):
    """What can be called as one function, each of hidden states and document starts; None: nothing of that kind."""

    whole: Part | None = None
    """All of the layer."""
    attention: Part | None = None
    """The hidden states with attention's branch, of those before its norm."""
    mlp: Part | None = None
    """The same with the MLP's branch."""


class PlainLayer:
    """Knows what of a layer can be called as one function.

    Args:
        layer: the layer.
        config: the model.
    """

    def __init__(self, layer: Any, config: TransformerConfig) -> None:
        self._layer, self._config = layer, config
        self._known_cells, self._parameters = list[Any](), list[Parameter]()
        self._weights: list[tuple[dict[str, Parameter], str, Parameter | None]] = []
        self.found = PlainParts()

    def parts(self, hidden: Tensor, more: tuple[Any, ...]) -> PlainParts:
        """Return what computes as the layer does of `hidden`: what is plain, where nobody looks into it.

        Args:
            hidden: what the layer is given.
            more: what its attention is given beside document starts.
        """
        cells = self._cells()
        # On the first call, and when somebody has put another module or weight in its place.
        if cells != self._known_cells or any(held.get(name) is not weight for held, name, weight in self._weights):
            self._known_cells, self._parameters = cells, list(self._layer.get_parameters())
            owners = [cell._params for cell in cells if isinstance(cell, nn.Cell)]
            self._weights = [(held, name, held.get(name)) for held in owners for name in ("weight", "bias")]
            self.found = self._look()
        found = PlainParts(None, None, self.found.mlp) if more else self.found
        if found == _NOTHING or hidden.dtype != ms.float32 or not ops.are_compiled():
            return _NOTHING
        # A tape has looked for hooks before.
        return found if takes_notes() or not has_hooks(self._layer, self._parameters) else _NOTHING

    def _cells(self) -> list[Any]:
        layer = self._layer
        attention, mlp = layer.self_attention, layer.mlp
        cells = [layer.input_layernorm, attention, layer.pre_mlp_layernorm, mlp]
        if type(attention) is SelfAttention:
            cells += [attention.linear_qkv, attention.core_attention, attention.linear_proj, attention.rotary]
            cells += [norm for norm in (attention.q_layernorm, attention.k_layernorm) if norm is not None]
        if isinstance(mlp, MLP):
            cells += [mlp.linear_fc1, mlp.linear_fc2]
        return cells

    def _look(self) -> PlainParts:
        layer, config = self._layer, self._config
        if not is_known(layer):
            return _NOTHING
        feeds, attends = feeds_plainly(layer, config), attends_plainly(layer, config)
        if attends:
            attention = layer.self_attention
            attends = type(attention.core_attention) is CoreAttention
            attends = attends and (attention.rotary is None or type(attention.rotary) is RotaryEmbedding)
        return PlainParts(
            Part(layer, config, attends=True, feeds=True) if attends and feeds else None,
            Part(layer, config, attends=True) if attends else None,
            Part(layer, config, feeds=True) if feeds else None,
        )


_NOTHING = PlainParts()


class Part:
    """A layer, its attention with norm and sum, or its MLP with them, as one function; see `PlainParts`."""

    def __init__(self, layer: Any, config: TransformerConfig, *, attends: bool = False, feeds: bool = False) -> None:
        self._layer, self._config, self._attends, self._feeds = layer, config, attends, feeds
        attention, mlp = layer.self_attention, layer.mlp
        cells: dict[int, nn.Cell | None] = {}
        if attends:
            cells |= {_NORM1: layer.input_layernorm, _NORM_Q: attention.q_layernorm, _NORM_K: attention.k_layernorm}
            cells |= {_QKV: attention.linear_qkv, _PROJ: attention.linear_proj}
        if feeds:
            cells |= {_NORM2: layer.pre_mlp_layernorm, _FC1: mlp.linear_fc1, _FC2: mlp.linear_fc2}
        self.weights: list[Any] = [None] * _ALL
        for i, cell in cells.items():
            if cell is not None:
                self.weights[i : i + 2] = cell.weight, getattr(cell, "bias", None)
        first: Any = attention.linear_qkv if attends else mlp.linear_fc1
        self.group: Group = first.tp_group
        self._parts = self.group.size if first.sequence_parallel else 1
        self._keeps_parts = self._parts > 1 and first.regather_input
        norm = layer.input_layernorm if attends else layer.pre_mlp_layernorm
        self._eps, self.offset = norm.eps, float(norm.offset)
        self._layouts: dict[tuple[tuple[int, int, int], bool], Layout] = {}

    def __call__(self, hidden: Tensor, document_start_BS: Tensor | None = None) -> Tensor:
        """Return the output, in the shape of `hidden`, [S, B, H] ([S / tp, B, H] when cut)."""
        layer = self._layer
        S, B, H = hidden.shape
        S *= self._parts
        seeds, scale, rate = (0, 0), 0.0, 0.0
        tables, start = tuple[Tensor, ...](), None
        attend: Attend | None = None
        if self._attends:
            attention = layer.self_attention
            core = attention.core_attention
            options = core.options((S, B), document_start_BS)
            attend = None if core.cp_size == 1 else partial(core.attend_packed, options=options)
            seeds, rate, start = options["dropout_seed"], options["dropout_rate"], options["document_start_BS"]
            scale = options["scale"] * options["softmax_coefficient"]
            tables = () if attention.rotary is None else attention.rotary.tables(S, attention.positions(S))
        for which, is_there in (("attention", self._attends), ("mlp", self._feeds)):
            seeds += layer.seeds(which) if is_there else (0, 0)
        key = (S, B, H), kernel.rounds_operands(S * B)
        layout = self._layouts.get(key)
        if layout is None:
            layout = self._layouts[key] = Layout(self._sizes_of(*key, tables))
        start = None if start is None else raw.int32(start)
        fixed = _Fixed(self, layout, seeds, (self._eps, scale, rate, layer.rate()), tables, start, attend)
        return _PlainLayer.apply(hidden, fixed, *self.weights)

    def _sizes_of(self, shape: tuple[int, int, int], rounds: bool, tables: tuple[Tensor, ...]) -> LayerSizes:
        norm = self.weights[_NORM1 if self._attends else _NORM2]
        if shape[2] != norm.shape[0]:
            widths = f"[.., {norm.shape[0]}]; it is given [.., {shape[2]}]"
            raise ConfigError(f"{self._layer.name} takes hidden states {widths}")
        sizes = dict[str, Any](dict.fromkeys(LayerSizes._fields, 0), **dict(zip("SBH", shape)))
        sizes |= {"parts": self._parts, "keeps_parts": self._keeps_parts, "rounds": rounds}
        if self._attends:
            attention = self._layer.self_attention
            G = attention.num_groups
            sizes |= {"attends": True, "G": G, "N": G * attention.heads_per_group, "D": attention.head_size}
            sizes |= {"norms_heads": self.weights[_NORM_Q] is not None, "repeats_core": attention.recompute_core}
            sizes["attends_apart"] = attention.core_attention.cp_size > 1
        if tables:
            sizes |= {"rotary": tables[0].shape[-1], "per_batch": int(tables[0].shape[1] > 1)}
            sizes["interleaved"] = int(self._config.rotary_interleaved)
        if self._feeds:
            mlp = self._layer.mlp
            sizes |= {"feeds": True, "wide": self.weights[_FC1].shape[0], "narrow": self.weights[_FC2].shape[1]}
            sizes["activation"] = -1 if mlp.hidden_act == "swiglu" else KINDS[mlp.hidden_act]
            sizes["repeats_mlp"] = type(mlp) is RecomputedMLP
        return LayerSizes(**sizes)

    def sums(self) -> list[MainGrad | None] | None:
        """Return where each weight's gradient is summed, None for one without any.

        None in place of the list: one of them is summed in another way than by writing numbers on the host, or
        somebody wants to see it.
        """
        found: list[MainGrad | None] = []
        for weight in self.weights:
            if weight is None or not weight.requires_grad:
                found.append(None)
                continue
            found.append(_written_sum(weight))
            if found[-1] is None:
                return None
        return found


def _written_sum(weight: Any) -> MainGrad | None:
    """Return where a gradient is summed if that is by writing numbers on the host, and nobody wants to see it."""
    sum_: MainGrad | None = getattr(weight, "main_grad", None)
    return sum_ if sum_ is not None and sum_.takes_writes and everyone_takes_written(weight) else None


class _Fixed(NamedTuple):
    """What a call is told beside its tensors."""

    part: Part
    layout: Layout
    seeds: tuple[int, ...]
    factors: tuple[float, ...]
    tables: tuple[Tensor, ...]
    start: Tensor | None
    attend: Attend | None

    def addresses(self) -> list[int]:
        tables = [table.data_ptr() for table in self.tables] or [0, 0]
        return [*tables, 0 if self.start is None else self.start.data_ptr()]


class _PlainLayer(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fixed: _Fixed, *weights: Any) -> Tensor:
        x, y, layout = x.contiguous(), raw.new(x.shape), fixed.layout
        # Norms and biases are read as float32; matrices as they are.
        small = [None if i in _LINEARS else w for i, w in enumerate(weights)]
        if fixed.part.offset:
            small = [_shifted(w, fixed.part.offset) if i in _NORMS else w for i, w in enumerate(small)]
        addresses, kept_alive = raw.wide_addresses(small)
        words = addresses[:_QKV]
        for i in _LINEARS:
            weight = weights[i]
            words += [0, 0] if weight is None else [weight.data_ptr(), raw.KINDS[weight.dtype]]
            words += [addresses[i + 1], 0, 0]
        inputs, arena = (memory.empty((places.floats,)) for places in (layout.inputs, layout.kept))
        array, address = kernel.scratch.take(layout.passing.floats)
        bases = inputs.ctypes.data, arena.ctypes.data, address
        call = LayerCall(
            layout, fixed.seeds, fixed.factors, words, fixed.addresses(), x.data_ptr(), y.data_ptr(), bases
        )
        kept = Arrays((layout.inputs, inputs), (layout.kept, arena))
        ctx.run = Run(call, layout.sizes, fixed.part.group, kept, fixed.attend)
        ctx.run.forward(Arrays((layout.passing, array)))
        ctx.fixed, ctx.small = fixed, kept_alive
        ctx.save_for_backward(x, *weights)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, *weights = ctx.saved_tensors
        dy, dx, later = dy.contiguous(), raw.new(x.shape), is_deferring()
        drops = ctx.fixed.factors[3] > 0.0
        waiting, passing = ctx.fixed.layout.gradients(drops, later).places
        array, base = kernel.scratch.take(passing.floats)
        # Not of the memory that passes leave to each other: other passes run before these gradients of weights.
        own = memory.empty((waiting.floats,)) if later else array
        targets = _targets(ctx, weights, dy, later)
        ctx.run.call.start_backward(
            ctx.fixed.layout, dy.data_ptr(), dx.data_ptr(), (own.ctypes.data if later else 0, base), targets.words,
            drops=drops, later=later,
        )  # fmt: skip
        needed = [not later and weights[i] is not None and needs_gradient(weights[i]) for i in (_QKV, _FC1)]
        ctx.run.backward(dy, Arrays((waiting, own), (passing, array)), (needed[0], needed[1]), later=later)
        gradients = targets.gradients()
        if later:
            gradients[_QKV:] = _later(ctx.run, weights, dy)
        return dx, None, *gradients


def _shifted(weight: Tensor | None, offset: float) -> Tensor | None:
    return None if weight is None else raw.on(raw.array_of(raw.wide(weight)) + np.float32(offset))


class _Sums:
    """Gradients that all are written where they are summed over microbatches."""

    def __init__(self, sums: list[MainGrad | None]) -> None:
        self.words: list[int] = []
        for sum_ in sums:
            self.words += (0, 0, 0) if sum_ is None else sum_.reserve()
        self._sums = sums

    def gradients(self) -> list[Any]:
        return [None if sum_ is None else WRITTEN for sum_ in self._sums]


class _Targets:
    """Gradients of which each goes its own way."""

    def __init__(self, targets: list[_Target]) -> None:
        self._targets = targets
        self.words = [word for target in targets for word in target.words]

    def gradients(self) -> list[Any]:
        return [target.gradient() for target in self._targets]


def _targets(ctx: Any, weights: list[Any], dy: Tensor, later: bool) -> _Sums | _Targets:
    sums = None if later or not takes_written() else ctx.fixed.part.sums()
    if sums is not None:
        return _Sums(sums)
    return _Targets([_Target(weight, dy, i < _QKV, later) for i, weight in enumerate(weights)])


class _Target:
    """A parameter's gradient: where it is summed, or in a tensor of its own, from where it goes to its sum, if any.

    Args:
        weight: the parameter; None: there is none.
        dy: a gradient that it follows from.
        is_norm: it is small, and computed with the gradient of an input.
        later: gradients of the others are computed later.
    """

    def __init__(self, weight: Any, dy: Tensor, is_norm: bool, later: bool) -> None:
        self.words = 0, 0, 0
        self._weight, self._is_norm = weight, is_norm
        self._own: Tensor | None = None
        self._main_grad: Any = None
        self._written = False
        if weight is None or (later and not is_norm) or not needs_gradient(weight):
            return
        sum_ = _written_sum(weight) if is_norm and takes_written() else None
        if sum_ is not None:
            # As where nothing is late: a split backward pass rounds what a whole one does.
            self.words, self._written = sum_.reserve(), True
            return
        self._main_grad = main_grad_of(weight, dy)
        self._own = raw.new(weight.shape)
        self.words = self._own.data_ptr(), 0, 0

    def gradient(self) -> Any:
        """Return what a backward pass returns for the parameter, once it is written."""
        own = self._own
        if self._written:
            return WRITTEN
        if own is None:
            return None
        if self._main_grad is None or self._is_norm:
            return ops.cast(own, self._weight.dtype)
        return self._main_grad.accumulate(lambda into, add: _put(into, own, add))


def _put(into: np.ndarray, values: Tensor, add: bool) -> None:
    (ops.add_ if add else ops.write_)(into.reshape(-1), values)


def _later(run: Run, weights: list[Any], dy: Tensor) -> list[Tensor | None]:
    """Return what a backward pass returns for linear layers whose gradients wait."""
    gradients = list[Tensor | None]()
    for i, (given, used) in _USES.items():
        weight, bias = weights[i], weights[i + 1]
        if weight is None:
            gradients += [None, None]
            continue
        operand, group = run.operand(used)
        gradients.append(weight_gradient(run.gradient(given), operand, weight, main_grad_of(weight, dy), group))
        gradients.append(None if bias is None else bias_gradient(bias, run.part_of_gradient(given)))
    return gradients
