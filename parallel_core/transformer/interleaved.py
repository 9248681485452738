"""Layers that compute a microbatch in parts: one part's arithmetic beside the tensor parallel sum of another.

In a layer attention and MLP each end in a sum over the ranks. A part starts its sum and gives way to the next part, and
waits for it when its turn comes again. In backward the sum of a column-parallel layer's input gradient goes on while
the gradient of its weight is computed. Every sample has the values that it has alone, so the loss of the microbatch,
its mean, and all gradients are those of the whole, but for the order in which weights' gradients are added.

Source: MindSpore's multi-copy parallel (`nn.MicroBatchInterleaved`), whose losses are of parts.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

from mindspore import Tensor, mint, nn

from parallel_core.autograd import Function
from parallel_core.errors import ConfigError
from parallel_core.tensor_parallel.open_sums import OpenSum, leave_open


def interleaved(layers: Sequence[nn.Cell], hidden_SBH: Tensor, mask_BS: Tensor | None, num_parts: int) -> Tensor:
    """Return what the layers make of `hidden_SBH`, computed in `num_parts` parts of the microbatch.

    Args:
        layers: in their order; each is `TransformerLayer` or has its `attend`, `after_attention`, `feed`, `after_mlp`.
        hidden_SBH: [S, B, H], or [S / tp, B, H] with sequence parallelism.
        mask_BS: what a layer takes beside it, int32 [B, S].
        num_parts: a divisor of B.

    Raises:
        ConfigError: B is no multiple of it.
    """
    size, left = divmod(hidden_SBH.shape[1], num_parts)
    if left:
        raise ConfigError(f"a microbatch of {hidden_SBH.shape[1]} samples is not {num_parts} parts of one size")
    if not layers:
        return hidden_SBH
    hidden = _Cut.apply(hidden_SBH, num_parts)
    masks = [None if mask_BS is None else mask_BS[i * size : (i + 1) * size].contiguous() for i in range(num_parts)]
    done: dict[int, Tensor] = {}
    turns = [_part(layers, part, mask) for part, mask in zip(hidden, masks)]
    while len(done) < num_parts:
        for number, turn in enumerate(turns):  # all give way as often, and end in the same round
            try:
                next(turn)
            except StopIteration as end:
                done[number] = end.value
    return mint.cat([done[number] for number in range(num_parts)], 1)


def _part(layers: Sequence[Any], hidden: Tensor, mask_BS: Tensor | None) -> Generator[None, None, Tensor]:
    """Compute one part, giving way whenever a sum is under way."""
    for layer in layers:
        layer_input = hidden
        with leave_open() as layers_left:
            branch, bias, residual = layer.attend(hidden, mask_BS)
        under_way = OpenSum(branch, layers_left)
        yield
        hidden = layer.after_attention(under_way.wait(), bias, residual)
        with leave_open() as layers_left:
            branch, bias, residual = layer.feed(hidden, layer_input)
        under_way = OpenSum(branch, layers_left)
        yield
        hidden = layer.after_mlp(under_way.wait(), bias, residual)
    return hidden


class _Cut(Function):
    """Equal parts along dim 1, as tensors of their own."""

    @staticmethod
    def forward(ctx: Any, x_SBH: Tensor, num_parts: int) -> tuple[Tensor, ...]:
        size = x_SBH.shape[1] // num_parts
        return tuple(mint.narrow(x_SBH, 1, i * size, size).contiguous() for i in range(num_parts))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return mint.cat(tuple(g.contiguous() for g in gradients), 1), None
