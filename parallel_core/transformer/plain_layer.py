"""Layers that run as one function: what most models' layers are, forward and backward a sequence of kernels.

The modules of `transformer.layer` say what is computed, and compute it wherever something else is asked for.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from parallel_core import ops
from parallel_core.autograd import Function
from parallel_core.comm.interface import Group
from parallel_core.config.schema import TransformerConfig
from parallel_core.deferral import is_deferring
from parallel_core.main_grad import MainGrad, main_grad_of, needs_gradient
from parallel_core.ops import raw
from parallel_core.ops import training_layer as kernel
from parallel_core.ops.fused import KINDS, takes_activation
from parallel_core.ops.small_gradients import bias_gradient
from parallel_core.ops.training_layer import Arrays, LayerCall, LayerSizes
from parallel_core.tape import WRITTEN, has_hooks, is_known, is_on_tape, takes_notes
from parallel_core.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear, weight_gradient
from parallel_core.transformer.attention import CoreAttention, SelfAttention
from parallel_core.transformer.mlp import MLP
from parallel_core.transformer.plain_run import Run
from parallel_core.transformer.recomputed import RecomputedMLP


def is_plain(layer: Any, config: TransformerConfig) -> bool:
    """Tell whether a `TransformerLayer` is norm, attention, norm, MLP with nothing else between, whatever attends."""
    attention, mlp = layer.self_attention, layer.mlp
    if type(attention) is not SelfAttention or type(mlp) not in (MLP, RecomputedMLP):
        return False
    columns = type(attention.linear_qkv), type(mlp.linear_fc1)
    rows = type(attention.linear_proj), type(mlp.linear_fc2)
    return (
        set(columns) == {ColumnParallelLinear}
        and set(rows) == {RowParallelLinear}
        and not (layer.residual_after_norm or layer.parallel_residual or config.use_sandwich_norm)
        and (config.normalization == "LayerNorm" or config.apply_rmsnorm_fusion)
        and (attention.rotary is None or config.apply_rope_fusion)
        and takes_activation(mlp.hidden_act)
        and (config.apply_swiglu_fusion or not config.is_gated)
        and layer.compute_dtype == ms.float32
    )


class PlainLayer:
    """Calls a layer as one function, where it is plain and nobody looks into it.

    Args:
        layer: the layer.
        config: the model.
    """

    def __init__(self, layer: Any, config: TransformerConfig) -> None:
        self._layer, self._config = layer, config
        self._possible, self._known_parts = False, list[nn.Cell]()
        self._sizes: dict[tuple[tuple[int, ...], bool], LayerSizes] = {}

    def takes(self, hidden: Tensor, more: tuple[Any, ...]) -> bool:
        """Return whether it computes what the layer does of `hidden`, and of `more` than that and document starts."""
        parts = self._parts()
        if parts != self._known_parts:  # on the first call, and when somebody has put another module in its place
            self._known_parts = parts
            self._possible = is_plain(self._layer, self._config) and is_known(self._layer) and self._is_whole()
        if not self._possible or more or hidden.dtype != ms.float32 or not ops.are_compiled():
            return False
        # A tape has looked for hooks before.
        return takes_notes() or not has_hooks(self._layer, self._parameters)

    def _parts(self) -> list[nn.Cell]:
        layer = self._layer
        attention, mlp = layer.self_attention, layer.mlp
        parts = [layer.input_layernorm, attention, layer.pre_mlp_layernorm, mlp]
        if type(attention) is SelfAttention and isinstance(mlp, MLP):
            parts += [norm for norm in self._norms_of_heads() if norm is not None]
            parts += [attention.linear_qkv, attention.core_attention, attention.linear_proj]
            parts += [mlp.linear_fc1, mlp.linear_fc2]
        return parts

    def _is_whole(self) -> bool:
        """Return whether attention is this rank's alone, and note the layer's parts."""
        layer = self._layer
        attention, mlp = layer.self_attention, layer.mlp
        self.weights = [
            layer.input_layernorm.weight, getattr(layer.input_layernorm, "bias", None),
            layer.pre_mlp_layernorm.weight, getattr(layer.pre_mlp_layernorm, "bias", None),
            *(getattr(norm, name, None) for norm in self._norms_of_heads() for name in ("weight", "bias")),
            attention.linear_qkv.weight, attention.linear_qkv.bias,
            attention.linear_proj.weight, attention.linear_proj.bias,
            mlp.linear_fc1.weight, mlp.linear_fc1.bias, mlp.linear_fc2.weight, mlp.linear_fc2.bias,
        ]  # fmt: skip
        self._parameters = [weight for weight in self.weights if weight is not None]
        self.group: Group = attention.linear_qkv.tp_group
        self._activation = -1 if mlp.hidden_act == "swiglu" else KINDS[mlp.hidden_act]
        self._parts_of_sequence = self.group.size if attention.linear_qkv.sequence_parallel else 1
        self._keeps_parts = self._parts_of_sequence > 1 and attention.linear_qkv.regather_input
        core = attention.core_attention
        self.offset: float = layer.input_layernorm.offset
        self._repeats = attention.recompute_core, type(mlp) is RecomputedMLP
        return type(core) is CoreAttention and core.cp_size == 1

    def _norms_of_heads(self) -> tuple[nn.Cell | None, nn.Cell | None]:
        attention = self._layer.self_attention
        return attention.q_layernorm, attention.k_layernorm

    def __call__(self, hidden: Tensor, document_start_BS: Tensor | None) -> Tensor:
        """Return the layer's output, in the shape of `hidden`, [S, B, H] ([S / tp, B, H] when cut)."""
        layer = self._layer
        attention = layer.self_attention
        S, B, H = hidden.shape
        S *= self._parts_of_sequence
        options = attention.core_attention.options((S, B), document_start_BS)
        tables = () if attention.rotary is None else attention.rotary.tables(S)
        rate, start = layer.rate(), options["document_start_BS"]
        seeds = (*options["dropout_seed"], *layer.seeds("attention"), *layer.seeds("mlp"))
        factors = layer.input_layernorm.eps, options["scale"] * options["softmax_coefficient"], options["dropout_rate"]
        key = (S, B, H), kernel.rounds_operands(S * B)
        if key not in self._sizes:
            self._sizes[key] = self._sizes_of(*key, tables)
        start = None if start is None else raw.int32(start)
        fixed = _Fixed(self, self._sizes[key], seeds, (*factors, rate), tables, start)
        return _PlainLayer.apply(hidden, fixed, *self.weights)

    def _sizes_of(self, shape: tuple[int, ...], rounds: bool, tables: tuple[Tensor, ...]) -> LayerSizes:
        attention = self._layer.self_attention
        turned, per_batch = (tables[0].shape[-1], tables[0].shape[1] > 1) if tables else (0, False)
        return LayerSizes(
            shape[0], shape[1], shape[2],
            attention.num_groups * attention.heads_per_group, attention.num_groups, attention.head_size,
            self.weights[_FC1].shape[0], self.weights[_FC2].shape[1], self._parts_of_sequence, turned, int(per_batch),
            int(self._config.rotary_interleaved), self._activation, rounds, self._keeps_parts, *self._repeats,
            self.weights[_NORM_OF_QUERIES] is not None,
        )  # fmt: skip

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
            sum_ = getattr(weight, "main_grad", None)
            if sum_ is None or not sum_.takes_writes or len(weight.receivers) > len(weight.completions):
                return None
            found.append(sum_)
        return found


class _Fixed(NamedTuple):
    """What a call of a layer is told beside its tensors."""

    layer: PlainLayer
    sizes: LayerSizes
    seeds: tuple[int, ...]
    factors: tuple[float, ...]
    tables: tuple[Tensor, ...]
    start: Tensor | None

    def addresses(self) -> list[int]:
        tables = [table.data_ptr() for table in self.tables] or [0, 0]
        return [*tables, 0 if self.start is None else self.start.data_ptr()]


_NORMS = range(8)
"""Where the weights of norms stand among all, each with its bias behind it; and those of linear layers, likewise."""
_NORM_WEIGHTS, _NORM_OF_QUERIES = _NORMS[::2], 4
_QKV, _PROJ, _FC1, _FC2 = _LINEARS = (8, 10, 12, 14)
_USES = {
    _QKV: ("dmixed", "normed1"), _PROJ: ("dattended", "context"), _FC1: ("dspread", "normed2"),
    _FC2: ("dfed", "activated"),
}  # fmt: skip
"""Of each linear layer the gradient of its output, and its input."""


class _PlainLayer(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fixed: _Fixed, *weights: Any) -> Tensor:
        x, y, z = x.contiguous(), raw.new(x.shape), fixed.sizes
        # Norms and biases are read as float32; matrices as they are.
        small = [None if i in _LINEARS else w for i, w in enumerate(weights)]
        if fixed.layer.offset:
            small = [_shifted(w, fixed.layer.offset) if i in _NORM_WEIGHTS else w for i, w in enumerate(small)]
        addresses, kept_alive = raw.wide_addresses(small)
        words = addresses[: _NORMS.stop]
        for i in _LINEARS:
            words += [weights[i].data_ptr(), raw.KINDS[weights[i].dtype], addresses[i + 1], 0, 0]
        kept, passing = kernel.kept_places(z), kernel.passing_places(z)
        arena = np.empty(kept.floats, np.float32)
        array, address = kernel.scratch.take(passing.floats)
        places = x.data_ptr(), y.data_ptr(), arena.ctypes.data, address
        call = LayerCall(z, fixed.seeds, fixed.factors, words, fixed.addresses(), *places)
        ctx.run = Run(call, z, fixed.layer.group, Arrays(kept, arena))
        ctx.run.forward(Arrays(passing, array))
        ctx.fixed, ctx.small = fixed, kept_alive
        ctx.save_for_backward(x, *weights)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, *weights = ctx.saved_tensors
        dy, dx, later = dy.contiguous(), raw.new(x.shape), is_deferring()
        layout = ctx.fixed.sizes, ctx.fixed.factors[3] > 0.0, not later
        where = kernel.gradient_places(*layout)
        if later:
            array = np.empty(where.floats, np.float32)
            base = array.ctypes.data
        else:
            array, base = kernel.scratch.take(where.floats)
        targets = _targets(ctx, weights, dy, later)
        ctx.run.call.start_backward(dy.data_ptr(), dx.data_ptr(), base, layout, targets.words)
        needed = [not later and needs_gradient(weights[i]) for i in (_QKV, _FC1)]
        ctx.run.backward(dy, Arrays(where, array), (needed[0], needed[1]), later=later)
        gradients = targets.gradients()
        if later:
            gradients[_NORMS.stop :] = _later(ctx.run, weights, dy)
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
        self.words = [word for target in targets for word in (target.address, 0, 0)]

    def gradients(self) -> list[Any]:
        return [target.gradient() for target in self._targets]


def _targets(ctx: Any, weights: list[Any], dy: Tensor, later: bool) -> _Sums | _Targets:
    sums = None if later or not is_on_tape(ctx) else ctx.fixed.layer.sums()
    if sums is not None:
        return _Sums(sums)
    return _Targets([_Target(weight, dy, i in _NORMS, later) for i, weight in enumerate(weights)])


class _Target:
    """A parameter's gradient in a tensor of its own, from where it goes to its sum if it has one.

    Args:
        weight: the parameter; None: there is none.
        dy: a gradient that it follows from.
        is_norm: it is small, and computed with the gradient of an input.
        later: gradients of the others are computed later.
    """

    def __init__(self, weight: Any, dy: Tensor, is_norm: bool, later: bool) -> None:
        self.address = 0
        self._weight, self._is_norm = weight, is_norm
        self._own: Tensor | None = None
        self._main_grad: Any = None
        if weight is None or (later and not is_norm) or not needs_gradient(weight):
            return
        self._main_grad = main_grad_of(weight, dy)
        self._own = raw.new(weight.shape)
        self.address = self._own.data_ptr()

    def gradient(self) -> Tensor | None:
        """Return what a backward pass returns for the parameter, once it is written."""
        own = self._own
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
        operand, group = run.operand(used)
        gradients.append(weight_gradient(run.gradient(given), operand, weight, main_grad_of(weight, dy), group))
        gradients.append(None if bias is None else bias_gradient(bias, run.part_of_gradient(given)))
    return gradients
