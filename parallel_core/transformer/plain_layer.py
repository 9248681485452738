"""Layers that run as one function: what most models' layers are, forward and backward a sequence of kernels.

The modules of `transformer.layer` say what is computed, and compute it wherever something else is asked for.
"""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from parallel_core import ops
from parallel_core.autograd import Function, is_applied_otherwise
from parallel_core.comm.interface import Group
from parallel_core.config.schema import TransformerConfig
from parallel_core.deferral import is_deferring
from parallel_core.main_grad import main_grad_of, needs_gradient
from parallel_core.ops import raw
from parallel_core.ops import training_layer as kernel
from parallel_core.ops.fused import KINDS, takes_activation
from parallel_core.ops.small_gradients import bias_gradient
from parallel_core.ops.training_layer import LayerCall, LayerSizes
from parallel_core.tape import has_hooks, is_known
from parallel_core.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear, weight_gradient
from parallel_core.transformer.attention import CoreAttention, SelfAttention
from parallel_core.transformer.mlp import MLP


def is_plain(layer: Any, config: TransformerConfig) -> bool:
    """Tell whether a `TransformerLayer` is norm, attention, norm, MLP, with nothing else between its kernels."""
    attention, mlp = layer.self_attention, layer.mlp
    if type(attention) is not SelfAttention or type(mlp) is not MLP:
        return False
    columns = type(attention.linear_qkv), type(mlp.linear_fc1)
    rows = type(attention.linear_proj), type(mlp.linear_fc2)
    return (
        set(columns) == {ColumnParallelLinear}
        and set(rows) == {RowParallelLinear}
        and type(attention.core_attention) is CoreAttention
        and attention.core_attention.cp_size == 1
        and not (layer.residual_after_norm or layer.parallel_residual or config.use_sandwich_norm)
        and not (config.qk_layernorm or config.apply_layernorm_1p)
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
        self._possible: bool | None = None

    def takes(self, hidden: Tensor, more: tuple[Any, ...]) -> bool:
        """Return whether it computes what the layer does of `hidden`, and of `more` than that and document starts."""
        if self._possible is None:
            self._possible = is_plain(self._layer, self._config) and is_known(self._layer) and self._is_whole()
        if not self._possible or more or hidden.dtype != ms.float32 or not ops.are_compiled():
            return False
        # A tape has looked for hooks before.
        return is_applied_otherwise() or not has_hooks(self._layer, self._parameters)

    def _is_whole(self) -> bool:
        """Return whether no sequence is cut, nothing is computed again, and take note of the layer's parts."""
        layer = self._layer
        attention, mlp = layer.self_attention, layer.mlp
        self._weights = [
            layer.input_layernorm.weight, getattr(layer.input_layernorm, "bias", None),
            layer.pre_mlp_layernorm.weight, getattr(layer.pre_mlp_layernorm, "bias", None),
            attention.linear_qkv.weight, attention.linear_qkv.bias,
            attention.linear_proj.weight, attention.linear_proj.bias,
            mlp.linear_fc1.weight, mlp.linear_fc1.bias, mlp.linear_fc2.weight, mlp.linear_fc2.bias,
        ]  # fmt: skip
        self._parameters = [weight for weight in self._weights if weight is not None]
        self._group: Group = attention.linear_qkv.tp_group
        self._activation = -1 if mlp.hidden_act == "swiglu" else KINDS[mlp.hidden_act]
        cut = self._group.size > 1 and attention.linear_qkv.sequence_parallel
        return not (cut or attention.recompute_core)

    def __call__(self, hidden: Tensor, document_start_BS: Tensor | None) -> Tensor:
        """Return the layer's output, in the shape of `hidden`, [S, B, H]."""
        layer = self._layer
        attention, core = layer.self_attention, layer.self_attention.core_attention
        S, B, H = hidden.shape
        options = core.options((S, B), document_start_BS)
        start = options["document_start_BS"]
        tables: tuple[Tensor, ...] = ()
        if attention.rotary is not None:
            tables = attention.rotary.tables(S)
        fc2 = self._weights[10]
        sizes = LayerSizes(
            S, B, H, attention.num_groups * attention.heads_per_group, attention.num_groups, attention.head_size,
            self._weights[8].shape[0], fc2.shape[1], tables[0].shape[-1] if tables else 0,
            int(bool(tables) and tables[0].shape[1] > 1), int(self._config.rotary_interleaved), self._activation,
        )  # fmt: skip
        rate = layer.rate()
        seeds = (
            *options["dropout_seed"], *layer.seeds("attention", rate), *layer.seeds("mlp", rate),
        )  # fmt: skip
        factors = (
            layer.input_layernorm.eps, options["scale"] * options["softmax_coefficient"], options["dropout_rate"], rate,
        )  # fmt: skip
        fixed = _Fixed(sizes, seeds, factors, tables, None if start is None else raw.int32(start), self._group)
        return _PlainLayer.apply(hidden, fixed, *self._weights)


class _Fixed:
    """What a call of a layer is told beside its tensors."""

    def __init__(
        self,
        sizes: LayerSizes,
        seeds: tuple[int, ...],
        factors: tuple[float, ...],
        tables: tuple[Tensor, ...],
        start: Tensor | None,
        group: Group,
    ) -> None:
        self.sizes, self.seeds, self.factors, self.group = sizes, seeds, factors, group
        self.tables, self.start = tables, start

    def addresses(self) -> list[int]:
        tables = [table.data_ptr() for table in self.tables] or [0, 0]
        return [*tables, 0 if self.start is None else self.start.data_ptr()]


_NORMS = (0, 1, 2, 3)
_LINEARS = (4, 6, 8, 10)
_USES = {4: ("dmixed", "normed1"), 6: ("dattended", "context"), 8: ("dspread", "normed2"), 10: ("dfed", "activated")}
"""Of each linear layer the gradient of its output, and its input."""


class _PlainLayer(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fixed: _Fixed, *weights: Any) -> Tensor:
        x, y = x.contiguous(), raw.new(x.shape)
        # Norms and biases are read as float32; matrices as they are.
        small = [None if w is None or i in _LINEARS else raw.wide(w) for i, w in enumerate(weights)]
        addresses = [0 if w is None else w.data_ptr() for w in small]
        words = addresses[:4]
        for i in _LINEARS:
            words += [weights[i].data_ptr(), raw.KINDS[weights[i].dtype], addresses[i + 1]]
        kept, passing = kernel.kept_places(fixed.sizes), kernel.passing_places(fixed.sizes)
        arena = np.empty(kept.floats, np.float32)
        base = arena.ctypes.data
        array, start = kernel.scratch.take(passing.floats)
        places = {name: base + offset for name, offset in kept.offsets.items()}
        places |= {name: start + offset for name, offset in passing.offsets.items()}
        places["y"] = y.data_ptr()
        call = LayerCall(fixed.sizes, fixed.seeds, fixed.factors, words, fixed.addresses(), x.data_ptr(), places)
        if fixed.group.size == 1:
            call.forward(0, kernel.FORWARD_STEPS)
        else:
            branch = raw.on(array[: x.size].reshape(x.shape))  # it stands first
            call.forward(0, kernel.ATTENDED)
            attended = fixed.group.all_reduce_(branch)
            call.put_attended(attended.data_ptr())
            call.forward(kernel.ATTENDED, kernel.FED)
            fed = fixed.group.all_reduce_(branch)
            call.put_fed(fed.data_ptr())
            call.forward(kernel.FED, kernel.FORWARD_STEPS)
        ctx.call, ctx.fixed, ctx.arena, ctx.places, ctx.small = call, fixed, arena, places, small
        ctx.save_for_backward(x, *weights)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        dy, dx, later = dy.contiguous(), raw.new(x.shape), is_deferring()
        drops = ctx.fixed.factors[3] > 0.0
        where = kernel.gradient_places(ctx.fixed.sizes, drops, not later)
        if later:
            array = np.empty(where.floats, np.float32)
            base = array.ctypes.data
        else:
            array, base = kernel.scratch.take(where.floats)
        places = {name: base + offset for name, offset in where.offsets.items()}
        places["dx"] = dx.data_ptr()
        targets = [_Target(weight, dy, i in _NORMS, later) for i, weight in enumerate(weights)]
        words = [word for target in targets for word in (target.address, target.add)]
        ctx.call.start_backward(dy.data_ptr(), places, words)
        _run_backward(ctx.call, ctx.fixed.group, _dnormed(array, where, x.shape))
        gradients = [target.gradient() for target in targets]
        if later:
            gradients[4:] = _later(ctx, weights, array, dy, where, drops)
        return dx, None, *gradients


def _dnormed(array: np.ndarray, where: kernel.Places, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    size = int(np.prod(shape))
    starts = {name: where.offsets[name] // 4 for name in ("dnormed2", "dnormed1")}
    return {name: array[start : start + size].reshape(shape) for name, start in starts.items()}


def _run_backward(call: LayerCall, group: Group, dnormed: dict[str, np.ndarray]) -> None:
    if group.size == 1:
        return call.backward(0, kernel.BACKWARD_STEPS)
    first = 0
    for name, step in (("dnormed2", kernel.INPUT_OF_MLP), ("dnormed1", kernel.INPUT_OF_ATTENTION)):
        call.backward(first, step)
        # The sum is under way while the gradients of the layer's weights are computed.
        summed = group.all_reduce_start_(raw.on(dnormed[name]))
        call.backward(step, step + 1)
        total = summed.wait()
        if total is not None:
            call.put_dnormed(name, total.data_ptr())
        first = step + 1
    call.backward(first, kernel.BACKWARD_STEPS)
    return None


class _Target:
    """Where a parameter's gradient is written: in its sum over microbatches, or in a tensor of its own.

    Args:
        weight: the parameter; None: there is none.
        dy: a gradient that it follows from.
        is_norm: it is small, and computed with the gradient of an input.
        later: gradients of the others are computed later.
    """

    def __init__(self, weight: Any, dy: Tensor, is_norm: bool, later: bool) -> None:
        self.address = self.add = 0
        self._weight, self._is_norm = weight, is_norm
        self._own: Tensor | None = None
        self._placeholder: Tensor | None = None
        self._main_grad: Any = None
        if weight is None or (later and not is_norm) or not needs_gradient(weight):
            return
        self._main_grad = main_grad_of(weight, dy)
        reserved = None if self._main_grad is None else self._main_grad.reserve()
        if reserved is None:
            self._own = raw.new(weight.shape)
            self.address = self._own.data_ptr()
        else:
            self.address, self.add, self._placeholder = reserved
            self._main_grad = None

    def gradient(self) -> Tensor | None:
        """Return what a backward pass returns for the parameter, once it is written."""
        if self._own is None:
            return self._placeholder
        own = self._own
        if self._main_grad is None or self._is_norm:
            return ops.cast(own, self._weight.dtype)
        return self._main_grad.accumulate(lambda into, add: _put(into, own, add))


def _put(into: np.ndarray, values: Tensor, add: bool) -> None:
    (ops.add_ if add else ops.write_)(into.reshape(-1), values)


def _later(
    ctx: Any, weights: list[Any], array: np.ndarray, dy: Tensor, where: kernel.Places, drops: bool
) -> list[Tensor | None]:
    """Return what a backward pass returns for linear layers whose gradients wait."""
    z = ctx.fixed.sizes
    kept = kernel.kept_places(z).offsets
    T, gradients = z.S * z.B, list[Tensor | None]()
    for i, (given, used) in _USES.items():
        weight, bias = weights[i], weights[i + 1]
        O, I = weight.shape
        if given in where.offsets:
            dout = _part(array, where.offsets[given], T, O)
        else:  # nothing is dropped, so it is the gradient of the sum itself
            dout = dy if given == "dfed" else _part(array, where.offsets["dhidden"], T, O)
        gradients.append(weight_gradient(dout, _part(ctx.arena, kept[used], T, I), weight, None))
        gradients.append(None if bias is None else bias_gradient(bias, dout))
    return gradients


def _part(array: np.ndarray, offset: int, rows: int, columns: int) -> Tensor:
    start = offset // 4
    return raw.on(array[start : start + rows * columns].reshape(rows, columns))
