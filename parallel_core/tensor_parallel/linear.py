"""Linear layers whose weight is cut over the tensor parallel group, by rows of the output or of the input.

Source: Megatron-LM, arXiv:1909.08053, section 3; sequence parallelism arXiv:2205.05198, section 4.2.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from mindspore import Parameter, Tensor, nn

from parallel_core import ops
from parallel_core.autograd import Function
from parallel_core.comm.interface import Group
from parallel_core.deferral import is_deferring, late_gradient
from parallel_core.errors import ConfigError
from parallel_core.layout.shard import Cut, TensorShard
from parallel_core.main_grad import MainGrad, main_grad_of, needs_gradient
from parallel_core.ops.small_gradients import bias_gradient
from parallel_core.spans import span
from parallel_core.tensor_parallel import mappings
from parallel_core.tensor_parallel.checks import check_features
from parallel_core.tensor_parallel.open_sums import left_open
from parallel_core.tensor_parallel.parameter import InitMethod, constant, make_parameter


class ColumnParallelLinear(nn.Cell):
    """Y = X W^T + b with the output features cut over the group: every rank computes its own part of Y.

    Args:
        input_size: features of X.
        output_size: features of Y over all ranks; a multiple of the group's size (times `stride`).
        tp_group: the tensor parallel group.
        init_method: initial value of the full [output_size, input_size] weight, of which each rank keeps its rows.
        bias: whether there is a bias, initially zero.
        gather_output: return all of Y on every rank.
        skip_bias_add: return the bias instead of adding it, so that a following kernel can.
        sequence_parallel: X is cut along dim 0 over the group; it is gathered here.
        stride: blocks stacked along the output features that are each cut over the group; 2 for a gated MLP, whose
            local output is then [gate; up] of this rank's features.
        regather_input: with sequence parallelism, keep only this rank's part of X for backward and gather it again.
        params_dtype: dtype of weight and bias; they are cast to the dtype of X.
        name: global name of the layer; its parameters are `{name}.weight` and `{name}.bias`.
        skip_weight_param_allocation: own no weight; `construct` is given one.

    Backward:
        dX is summed over the group (reduce-scattered with sequence parallelism), dW and db are local.

    Communication:
        without sequence parallelism: backward 1 all-reduce of X.size; with it: forward 1 all-gather, backward 1
        all-gather (if `regather_input`) and 1 reduce-scatter, each of S*B*input_size elements.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        tp_group: Group,
        init_method: InitMethod,
        bias: bool = True,
        gather_output: bool = False,
        skip_bias_add: bool = False,
        sequence_parallel: bool = False,
        stride: int = 1,
        regather_input: bool = True,
        params_dtype: str = "float32",
        name: str = "linear",
        skip_weight_param_allocation: bool = False,
    ) -> None:
        super().__init__(auto_prefix=True)
        if gather_output and sequence_parallel:
            raise ConfigError(f"{name}: gather_output and sequence_parallel exclude each other; choose one")
        self.tp_group, self.sequence_parallel, self.regather_input = tp_group, sequence_parallel, regather_input
        self.gather_output, self.skip_bias_add = gather_output, skip_bias_add
        rows = Cut("tp", 0, tp_group.rank, tp_group.size, stride)
        self.weight: Parameter | None = None
        self.bias: Parameter | None = None
        if not skip_weight_param_allocation:
            shard = TensorShard.cut(f"{name}.weight", (output_size, input_size), rows)
            self.weight = make_parameter(shard, init_method, params_dtype)
        if bias:
            shard = TensorShard.cut(f"{name}.bias", (output_size,), rows)
            self.bias = make_parameter(shard, constant(0.0), params_dtype)

    def construct(self, x: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return (Y, bias or None).

        Args:
            x: [S, B, input_size], or [S / tp, B, input_size] with sequence parallelism.
            weight: [output_size / tp, input_size], used in place of the layer's own.

        Returns:
            Y [S, B, output_size / tp] (all of output_size with `gather_output`), and the bias if it was not added.
        """
        y = linear(
            x,
            self.weight if weight is None else weight,
            None if self.skip_bias_add else self.bias,
            self.tp_group,
            sequence_parallel=self.sequence_parallel,
            regather_input=self.regather_input,
            reduce_input_gradient=True,
        )
        if self.gather_output:
            y = mappings.gather_from_tensor_model_parallel_region(y, self.tp_group)
        return y, self.bias if self.skip_bias_add else None


class RowParallelLinear(nn.Cell):
    """Y = X W^T + b with the input features cut over the group: the ranks' partial products are summed.

    Args:
        input_size: features of X over all ranks; a multiple of the group's size.
        output_size: features of Y.
        tp_group: the tensor parallel group.
        init_method: initial value of the full [output_size, input_size] weight, of which each rank keeps its columns.
        bias: whether there is a bias (whole on every rank), added once, after the sum.
        input_is_parallel: X is already cut along its last dim; otherwise it is cut here.
        skip_bias_add: return the bias instead of adding it.
        sequence_parallel: return only this rank's part of Y along dim 0.
        params_dtype: dtype of weight and bias; they are cast to the dtype of X.
        name: global name of the layer.

    Backward:
        dX and dW are local. With sequence parallelism the gradient of the bias covers this rank's part of the sequence
        (its `shard.partial_gradient` is set).

    Communication:
        forward 1 all-reduce (or reduce-scatter) of S*B*output_size elements; backward 1 all-gather with sequence
        parallelism.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        tp_group: Group,
        init_method: InitMethod,
        bias: bool = True,
        input_is_parallel: bool = True,
        skip_bias_add: bool = False,
        sequence_parallel: bool = False,
        params_dtype: str = "float32",
        name: str = "linear",
    ) -> None:
        super().__init__(auto_prefix=True)
        if sequence_parallel and not input_is_parallel:
            raise ConfigError(f"{name}: sequence_parallel needs input_is_parallel=True")
        self.tp_group, self.sequence_parallel = tp_group, sequence_parallel
        self.input_is_parallel, self.skip_bias_add = input_is_parallel, skip_bias_add
        columns = Cut("tp", 1, tp_group.rank, tp_group.size)
        shard = TensorShard.cut(f"{name}.weight", (output_size, input_size), columns)
        self.weight = make_parameter(shard, init_method, params_dtype)
        self.bias: Parameter | None = None
        if bias:
            shard = TensorShard.cut(f"{name}.bias", (output_size,), partial_gradient=sequence_parallel)
            self.bias = make_parameter(shard, constant(0.0), params_dtype)

    def construct(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return (Y, bias or None).

        Args:
            x: [S, B, input_size / tp], or [S, B, input_size] without `input_is_parallel`.

        Returns:
            Y [S, B, output_size], or [S / tp, B, output_size] with sequence parallelism.
        """
        if not self.input_is_parallel:
            x = mappings.scatter_to_tensor_model_parallel_region(x, self.tp_group)
        alone = self.tp_group.size == 1 and not self.skip_bias_add
        y = linear(x, self.weight, self.bias if alone else None, self.tp_group)
        if self.skip_bias_add and left_open(self):
            return y, self.bias
        if self.sequence_parallel:
            y = mappings.reduce_scatter_to_sequence_parallel_region(y, self.tp_group)
        else:
            y = mappings.reduce_from_tensor_model_parallel_region(y, self.tp_group)
        if self.skip_bias_add:
            return y, self.bias
        if self.bias is not None and not alone:
            y = y + ops.cast(self.bias, y.dtype)
        return y, None


def linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    group: Group,
    sequence_parallel: bool = False,
    regather_input: bool = False,
    reduce_input_gradient: bool = False,
) -> Tensor:
    """Return x @ weight^T + bias, gathering x and summing its gradient over the group as asked."""
    check_features(x, weight, bias)
    parallel = group.size > 1
    options = (group, sequence_parallel and parallel, regather_input, reduce_input_gradient and parallel)
    if bias is None:
        return _Linear.apply(x, weight, *options)
    return _LinearBias.apply(x, weight, bias, *options)


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, *options: Any) -> Tensor:
        return _forward(ctx, x, weight, None, *options)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw = _backward(ctx, dy)
        return dx, dw, None, None, None, None


class _LinearBias(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, *options: Any) -> Tensor:
        ctx.bias = bias
        return _forward(ctx, x, weight, bias, *options)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw = _backward(ctx, dy)
        return dx, dw, bias_gradient(ctx.bias, dy), None, None, None, None


def _forward(
    ctx: Any,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    group: Group,
    sequence_parallel: bool,
    regather: bool,
    reduce: bool,
) -> Tensor:
    total = group.all_gather(x, 0) if sequence_parallel else x
    ctx.group, ctx.sequence_parallel, ctx.reduce = group, sequence_parallel, reduce
    ctx.regather = sequence_parallel and regather
    y, operand = _with_precision(weight, ops.linear_and_operand, total, weight, bias)
    ctx.save_for_backward(x if ctx.regather else operand, weight)
    return y


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return (dx, dw)."""
    x, weight = ctx.saved_tensors
    gather = ctx.group if ctx.regather else None
    if gather is not None and needs_gradient(weight) and not is_deferring():
        x, gather = gather.all_gather(x, 0), None
    dx, operand = _with_precision(weight, ops.linear_grad_input_and_operand, dy, weight)
    # The sum over the group is started before the weight's gradient is computed, so that the two can overlap.
    if ctx.sequence_parallel:
        summed = ctx.group.reduce_scatter_start(dx)
    elif ctx.reduce:
        summed = ctx.group.all_reduce_start_(dx)
    else:
        summed = None
    with span("weight-gradient", 3):
        dw = weight_gradient(operand, x, weight, main_grad_of(weight, dy), gather)
    return dx if summed is None else summed.wait(), dw


def weight_gradient(
    dy: Tensor, x: Tensor, weight: Tensor, main_grad: MainGrad | None, gather: Group | None
) -> Tensor | None:
    """Return dw. What is deferred keeps this rank's part of x, and gathers it over `gather` when it runs."""
    if not needs_gradient(weight):
        return None

    def total() -> Tensor:
        return x if gather is None else gather.all_gather(x, 0)

    if main_grad is None:
        product = partial(_with_precision, weight, ops.linear_grad_weight, dy)
        return late_gradient(weight, lambda: ops.cast(product(total()), weight.dtype))
    return main_grad.accumulate(
        lambda into_OI, add: _with_precision(weight, ops.linear_grad_weight_, into_OI, dy, total(), add)
    )


def _with_precision(weight: Tensor, product: Callable[..., Any], *operands: Any) -> Any:
    with ops.product_precision(weight):
        return product(*operands)
