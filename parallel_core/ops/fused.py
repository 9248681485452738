"""The compiled kernels that autograd goes through: forward and backward in one C call each."""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor

from parallel_core.autograd import Function
from parallel_core.errors import ConfigError
from parallel_core.ops import raw, reference
from parallel_core.ops.library import declare, lib
from parallel_core.ops.registry import compiled
from parallel_core.ops.small_gradients import bias_gradient

_WORD = (1 << 64) - 1


# ---- types ----------------------------------------------------------------------------------------------------------
class _Convert(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: Any) -> Tensor:
        ctx.dtype = x.dtype
        return raw.converted(x, dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return raw.converted(dy, ctx.dtype), None


def _not_a_float(x: Tensor, dtype: Any) -> str:
    return "" if dtype in raw.KINDS and x.dtype != dtype else f"{x.dtype} becomes {dtype}"


@compiled(reference.convert, halves=["x"], refuses=_not_a_float)
def _convert(x: Tensor, dtype: Any) -> Tensor:
    return _Convert.apply(x, dtype)


# ---- norms ----------------------------------------------------------------------------------------------------------
declare("pc_layer_norm", "PPPPPPLLF")
declare("pc_layer_norm_grad", "PPPPPPPPLL")


class _LayerNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        H = x.shape[-1]
        T = x.size // H
        y, mean, rstd = raw.new(x.shape), raw.new((2, T)), raw.new((T,))
        ctx.dtypes, weight, bias = (weight.dtype, bias.dtype), raw.wide(weight), raw.wide(bias)
        lib.pc_layer_norm(
            x.data_ptr(),
            weight.data_ptr(),
            bias.data_ptr(),
            y.data_ptr(),
            mean.data_ptr(),
            rstd.data_ptr(),
            T,
            H,
            eps,
        )
        ctx.save_for_backward(x, weight)
        ctx.moments = mean, rstd
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        mean, rstd = ctx.moments
        dy = dy.contiguous()
        H = x.shape[-1]
        dx, dw, db = raw.new(x.shape), raw.new((H,)), raw.new((H,))
        lib.pc_layer_norm_grad(
            dy.data_ptr(),
            x.data_ptr(),
            weight.data_ptr(),
            mean.data_ptr(),
            rstd.data_ptr(),
            dx.data_ptr(),
            dw.data_ptr(),
            db.data_ptr(),
            x.size // H,
            H,
        )
        return dx, raw.converted(dw, ctx.dtypes[0]), raw.converted(db, ctx.dtypes[1]), None


def _require_width(x: Tensor, weight_H: Tensor) -> None:
    """Refuse what the kernel would read past the end of the weight for."""
    if x.shape[-1] != weight_H.shape[0]:
        raise ConfigError(f"a norm of width {weight_H.shape[0]} is given {list(x.shape)}")


@compiled(reference.layer_norm, halves=["weight_H", "bias_H"])
def _layer_norm(x: Tensor, weight_H: Tensor, bias_H: Tensor, eps: float) -> Tensor:
    _require_width(x, weight_H)
    return _LayerNorm.apply(x, weight_H, bias_H, eps)


declare("pc_rms_norm", "PPPPLLF")
declare("pc_rms_norm_grad", "PPPPPPLL")


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        H = x.shape[-1]
        T = x.size // H
        y, rstd = raw.new(x.shape), raw.new((T,))
        ctx.dtype, weight = weight.dtype, raw.wide(weight)
        lib.pc_rms_norm(x.data_ptr(), weight.data_ptr(), y.data_ptr(), rstd.data_ptr(), T, H, eps)
        ctx.save_for_backward(x, weight)
        ctx.rstd = rstd
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dy = dy.contiguous()
        H = x.shape[-1]
        dx, dw = raw.new(x.shape), raw.new((H,))
        lib.pc_rms_norm_grad(
            dy.data_ptr(),
            x.data_ptr(),
            weight.data_ptr(),
            ctx.rstd.data_ptr(),
            dx.data_ptr(),
            dw.data_ptr(),
            x.size // H,
            H,
        )
        return dx, raw.converted(dw, ctx.dtype), None


@compiled(reference.rms_norm, halves=["weight_H"])
def _rms_norm(x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    _require_width(x, weight_H)
    return _RMSNorm.apply(x, weight_H, eps)


# ---- activations ----------------------------------------------------------------------------------------------------
declare("pc_activation", "PPPLLI")
declare("pc_activation_grad", "PPPPLLI")
declare("pc_swiglu", "PPPLL")
declare("pc_swiglu_grad", "PPPPLL")
KINDS = {"gelu": 0, "gelu_tanh": 1, "openai_gelu": 1, "silu": 2, "relu": 3, "squared_relu": 4, "fast_gelu": 5}


def takes_activation(name: str) -> bool:
    """Return whether the kernels have an activation."""
    return name == "swiglu" or name in KINDS


class _Activation(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, name: str) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        ctx.parameter, ctx.name = bias, name
        ctx.bias = bias = None if bias is None else raw.wide(bias)
        F = x.shape[-1]
        T = x.size // F
        if name == "swiglu":
            y = raw.new((*x.shape[:-1], F // 2))
            lib.pc_swiglu(x.data_ptr(), raw.pointer(bias), y.data_ptr(), T, F // 2)
        else:
            y = raw.new(x.shape)
            lib.pc_activation(x.data_ptr(), raw.pointer(bias), y.data_ptr(), T, F, KINDS[name])
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        dy, bias = dy.contiguous(), ctx.bias
        F = x.shape[-1]
        T = x.size // F
        dx = raw.new(x.shape)
        addresses = dy.data_ptr(), x.data_ptr(), raw.pointer(bias), dx.data_ptr(), T
        if ctx.name == "swiglu":
            lib.pc_swiglu_grad(*addresses, F // 2)
        else:
            lib.pc_activation_grad(*addresses, F, KINDS[ctx.name])
        return dx, None if bias is None else bias_gradient(ctx.parameter, dx), None


def _no_such_activation(x: Tensor, bias: Tensor | None, name: str) -> str:
    return "" if takes_activation(name) else f"the activation is {name}"


@compiled(reference.activation, halves=["bias"], refuses=_no_such_activation)
def _activation(x: Tensor, bias: Tensor | None, name: str) -> Tensor:
    return _Activation.apply(x, bias, name)


# ---- positions ------------------------------------------------------------------------------------------------------
declare("pc_rotary", "PPPPLLLLLIIIL")


class _Rotary(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, head_size: int) -> Tensor:
        ctx.options = cos.contiguous(), sin.contiguous(), interleaved, head_size
        return _rotate(x, *ctx.options, inverse=False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _rotate(dy, *ctx.options, inverse=True), None, None, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, head_size: int, *, inverse: bool) -> Tensor:
    """Rotate every head of [S, B, N, D]; or of [S, B, G, X] with `head_size` D < X all but the last of each group."""
    x = x.contiguous()
    y = raw.new(x.shape)
    S, B, heads, width = x.shape
    period = width // head_size
    lib.pc_rotary(
        x.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        y.data_ptr(),
        S,
        B,
        heads * period,
        head_size,
        cos.shape[-1],
        cos.shape[1] > 1,
        interleaved,
        inverse,
        period if period > 1 else 0,
    )
    return y


@compiled(reference.rotary)
def _rotary(x_SBND: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return _Rotary.apply(x_SBND, cos, sin, interleaved, x_SBND.shape[-1])


@compiled(reference.rotary_packed)
def _rotary_packed(mixed_SBGX: Tensor, head_size: int, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return _Rotary.apply(mixed_SBGX, cos, sin, interleaved, head_size)


# ---- heads of multi-latent attention --------------------------------------------------------------------------------
declare("pc_latent_heads", "PPPPPPPPLLLLLLII")


class _LatentHeads(Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, latent: Tensor, k_pos: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        (S, B, N, X), Y, R = query.shape, latent.shape[-1], k_pos.shape[-1]
        ctx.shapes, ctx.tables = (query.shape, latent.shape, k_pos.shape), (cos.contiguous(), sin.contiguous())
        parts = raw.new((S, B, N, X)), raw.new((S, B, N, X)), raw.new((S, B, N, Y - X + R))
        _turn_heads((query.contiguous(), latent.contiguous(), k_pos.contiguous()), parts, ctx.tables, inverse=False)
        return parts

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dquery, dlatent, dk_pos = (raw.new(shape) for shape in ctx.shapes)
        parts = tuple(gradient.contiguous() for gradient in gradients)
        _turn_heads((dquery, dlatent, dk_pos), parts, ctx.tables, inverse=True)
        return dquery, dlatent, dk_pos, None, None


def _turn_heads(
    projected: tuple[Tensor, ...], heads: tuple[Tensor, ...], tables: tuple[Tensor, ...], *, inverse: bool
) -> None:
    """Write queries, keys and values from what the projections give, or the gradients of these from those of heads."""
    (S, B, N, X), Y, R = projected[0].shape, projected[1].shape[-1], projected[2].shape[-1]
    pointers = [tensor.data_ptr() for tensor in (*projected, *heads, *tables)]
    lib.pc_latent_heads(*pointers, S, B, N, X, Y, R, tables[0].shape[1] > 1, inverse)


@compiled(reference.latent_heads)
def _latent_heads(
    query_SBNX: Tensor, latent_SBNY: Tensor, k_pos_SBR: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _LatentHeads.apply(query_SBNX, latent_SBNY, k_pos_SBR, cos, sin)


# ---- splitting ------------------------------------------------------------------------------------------------------
declare("pc_copy_rows", "PLPLLL")


class _SplitLastDim(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, widths: tuple[int, ...]) -> tuple[Tensor, ...]:
        ctx.shape = x.shape
        parts = tuple(raw.new((*x.shape[:-1], width)) for width in widths)
        _copy_parts(x.contiguous(), parts, into_parts=True)
        return parts

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dx = raw.new(ctx.shape)
        _copy_parts(dx, tuple(g.contiguous() for g in gradients), into_parts=False)
        return dx, None


def _copy_parts(whole: Tensor, parts: tuple[Tensor, ...], *, into_parts: bool) -> None:
    stride = whole.shape[-1]
    rows, start = whole.size // stride, whole.data_ptr()
    for part in parts:
        width = part.shape[-1]
        if into_parts:
            lib.pc_copy_rows(start, stride, part.data_ptr(), width, width, rows)
        else:
            lib.pc_copy_rows(part.data_ptr(), width, start, stride, width, rows)
        start += 4 * width


@compiled(reference.split_last_dim)
def _split_last_dim(x: Tensor, widths: tuple[int, ...]) -> tuple[Tensor, ...]:
    return _SplitLastDim.apply(x, widths)


class _JoinedLastDim(Function):
    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> Tensor:
        parts = tuple(part.contiguous() for part in given)
        ctx.widths = [part.shape[-1] for part in parts]
        mixed = raw.new((*parts[0].shape[:-1], sum(ctx.widths)))
        _copy_parts(mixed, parts, into_parts=False)
        return mixed

    @staticmethod
    def backward(ctx: Any, dmixed: Tensor) -> tuple[Tensor | None, ...]:
        parts = tuple(raw.new((*dmixed.shape[:-1], width)) for width in ctx.widths)
        _copy_parts(dmixed.contiguous(), parts, into_parts=True)
        return parts


@compiled(reference.packed_heads)
def _packed_heads(query_SBGX: Tensor, key_SBGD: Tensor, value_SBGD: Tensor) -> Tensor:
    return _JoinedLastDim.apply(query_SBGX, key_SBGD, value_SBGD)


@compiled(reference.side_by_side)
def _side_by_side(x: Tensor, y: Tensor) -> Tensor:
    return _JoinedLastDim.apply(x, y)


# ---- dropout and residual -------------------------------------------------------------------------------------------
declare("pc_bias_dropout_add", "PPPPLLFUU")


class _BiasDropoutAdd(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, residual: Tensor | None, rate: float, seed: tuple[int, int]
    ) -> Tensor:
        ctx.bias, ctx.has_residual, ctx.rate, ctx.seed = bias, residual is not None, rate, seed
        return _add_dropped(x, None if bias is None else raw.wide(bias), residual, rate, seed)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = _add_dropped(dy, None, None, ctx.rate, ctx.seed) if ctx.rate else dy
        db = None if ctx.bias is None else bias_gradient(ctx.bias, dx)
        return dx, db, dy if ctx.has_residual else None, None, None


def _add_dropped(x: Tensor, bias: Tensor | None, residual: Tensor | None, rate: float, seed: tuple[int, int]) -> Tensor:
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    H = x.shape[-1]
    y = raw.new(x.shape)
    lib.pc_bias_dropout_add(
        x.data_ptr(),
        raw.pointer(bias),
        raw.pointer(residual),
        y.data_ptr(),
        x.size // H,
        H,
        rate,
        seed[0] & _WORD,
        seed[1] & _WORD,
    )
    return y


def _another_shape(x: Tensor, bias: Tensor | None, residual: Tensor | None, *_: object) -> str:
    return "" if residual is None or x.shape == residual.shape else "the residual has another shape"


@compiled(reference.bias_dropout_add, halves=["bias"], refuses=_another_shape)
def _bias_dropout_add(
    x: Tensor, bias: Tensor | None, residual: Tensor | None, rate: float, seed: tuple[int, int]
) -> Tensor:
    if bias is None and residual is None and not rate:
        return x
    return _BiasDropoutAdd.apply(x, bias, residual, rate, seed)


@compiled(reference.dropout)
def _dropout(x: Tensor, rate: float, seed: tuple[int, int]) -> Tensor:
    """The mask is a function of seed and element, whatever the number of threads."""
    if rate == 0.0:
        return x
    return _BiasDropoutAdd.apply(x, None, None, rate, seed)


def _two_shapes(x: Tensor, y: Tensor) -> str:
    return "" if x.shape == y.shape else "the shapes differ"


@compiled(reference.total, refuses=_two_shapes)
def _total(x: Tensor, y: Tensor) -> Tensor:
    return _add_dropped(x, None, y, 0.0, (0, 0)) if x.size else x  # rows of experts that got no token


def _not_alike(x: Tensor, residual: Tensor, weight_H: Tensor, eps: float) -> str:
    return "" if x.shape == residual.shape else "the residual has another shape"


@compiled(reference.add_rms_norm, halves=["weight_H"], refuses=_not_alike)
def _add_rms_norm(x: Tensor, residual: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    _require_width(x, weight_H)
    total = _BiasDropoutAdd.apply(x, None, residual, 0.0, (0, 0))
    return _RMSNorm.apply(total, weight_H, eps), total


# ---- small things, for which an operator of MindSpore's takes longer to be called than to run ------------------------
class _Transposed(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return raw.on(np.ascontiguousarray(raw.array_of(x.contiguous()).T))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return (raw.on(np.ascontiguousarray(raw.array_of(dy.contiguous()).T)),)


def _unknown_to_numpy(x: Tensor) -> str:
    return "" if x.dtype in (ms.float32, ms.int32) else f"x is {x.dtype}"


@compiled(reference.transposed, integers=["x"], refuses=_unknown_to_numpy)
def _transposed(x: Tensor) -> Tensor:
    return _Transposed.apply(x)


class _Shifted(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, offset: float) -> Tensor:  # noqa: ARG004 - the gradient is that of the sum
        return raw.on(raw.array_of(x.contiguous()) + np.float32(offset))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ARG004
        return dy, None


@compiled(reference.shifted)
def _shifted(x: Tensor, offset: float) -> Tensor:
    return _Shifted.apply(x, offset)


class _Multiplied(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Any) -> Tensor:
        ctx.factor = factor
        return raw.on(np.asarray(raw.array_of(x.contiguous()) * factor))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return raw.on(np.asarray(raw.array_of(dy.contiguous()) * ctx.factor)), None


@compiled(reference.multiplied)
def _multiplied(x: Tensor, factor: float) -> Tensor:
    return _Multiplied.apply(x, np.float32(factor))


@compiled(reference.multiplied_by, refuses=lambda x, factors: _two_shapes(x, factors))
def _multiplied_by(x: Tensor, factors: Tensor) -> Tensor:
    return _Multiplied.apply(x, raw.array_of(factors.contiguous()))


class _PlusMultiple(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, factor: float) -> Tensor:
        ctx.factor = np.float32(factor)
        return raw.on(np.asarray(raw.array_of(x.contiguous()) + ctx.factor * raw.array_of(y.contiguous())))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return dy, raw.on(np.asarray(ctx.factor * raw.array_of(dy.contiguous()))), None


@compiled(reference.plus_multiple, refuses=lambda x, y, factor: _two_shapes(x, y))
def _plus_multiple(x: Tensor, y: Tensor, factor: float) -> Tensor:
    return _PlusMultiple.apply(x, y, factor)


class _Gated(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scores: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        with np.errstate(over="ignore"):
            ctx.gates = np.float32(1.0) / (np.float32(1.0) + np.exp(-raw.array_of(scores.contiguous())))
        return raw.on(raw.array_of(x.contiguous()) * ctx.gates)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,), gates, dy = ctx.saved_tensors, ctx.gates, raw.array_of(dy.contiguous())
        through = np.einsum("...h,...h->...", dy, raw.array_of(x.contiguous()))[..., None]
        return raw.on(dy * gates), raw.on(through * gates * (1.0 - gates))


def _no_rows(x: Tensor, scores: Tensor) -> str:
    return "" if scores.shape == (*x.shape[:-1], 1) else "there is not one score for each row"


@compiled(reference.gated, refuses=_no_rows)
def _gated(x: Tensor, scores: Tensor) -> Tensor:
    return _Gated.apply(x, scores)


def _scalar(value: float) -> Tensor:
    return raw.on(np.array(value, np.float32))


class _MaskedSum(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        ctx.mask = raw.array_of(mask.contiguous())
        total = (raw.array_of(values.contiguous()) * ctx.mask).sum(dtype=np.float64)
        return _scalar(total), _scalar(ctx.mask.sum(dtype=np.float64))

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor, dnumber: Tensor) -> tuple[Tensor | None, ...]:
        return raw.on(ctx.mask * raw.array_of(dtotal)), None


def _two_forms(values: Tensor, mask: Tensor) -> str:
    return "" if values.shape == mask.shape else "the mask has another shape"


@compiled(reference.masked_sum, refuses=_two_forms)
def _masked_sum(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    return _MaskedSum.apply(values, mask)


class _MeanLoss(Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, number: Tensor, factor: float) -> Tensor:
        ctx.factor, ctx.counted = np.float32(factor), np.maximum(raw.array_of(number), np.float32(1.0))
        return _scalar(_MeanLoss._scaled(ctx, total))

    @staticmethod
    def backward(ctx: Any, dmean: Tensor) -> tuple[Tensor | None, ...]:
        return _scalar(_MeanLoss._scaled(ctx, dmean)), None, None

    @staticmethod
    def _scaled(ctx: Any, x: Tensor) -> Any:
        # Divided first where there is no factor, as the reference does: its bits are the same.
        x = raw.array_of(x)
        return x / ctx.counted if ctx.factor == 1.0 else x * (ctx.factor / ctx.counted)


@compiled(reference.mean_loss)
def _mean_loss(total: Tensor, number: Tensor, factor: float) -> Tensor:
    return _MeanLoss.apply(total, number, factor)
