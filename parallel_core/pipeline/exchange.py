"""Point-to-point transfers between neighbouring pipeline stages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mindspore import Tensor

from parallel_core.comm.interface import Group, Handle
from parallel_core.layout.stages import Placement
from parallel_core.pipeline.schedule import Action, destination, origin


class PipelineExchange:
    """Sends outputs to the next stage and gradients to the previous one, over the pipeline group.

    Args:
        group: the pipeline group, in stage order.
        shape: shape of the hidden states between stages, [S, B, H] or [S / tp, B, H].
        dtype: their dtype.
        placement: where the stages are.
    """

    def __init__(self, group: Group, shape: Sequence[int], dtype: Any, placement: Placement) -> None:
        self._group, self._shape, self._dtype, self._placement = group, tuple(shape), dtype, placement
        self._sends: list[Handle] = []

    def send(self, action: Action, tensor: Tensor) -> None:
        """Start sending the tensor; it may not be changed before `finish`, and is not kept here."""
        peer, _ = destination(self._placement, self._group.rank, action)
        self._sends.append(self._group.send(tensor, peer))

    def receive(self, action: Action) -> Handle:
        """Announce a tensor."""
        return self._group.receive(self._shape, self._dtype, origin(self._placement, self._group.rank, action))

    def finish(self) -> None:
        """Wait until every tensor is sent."""
        for handle in self._sends:
            handle.wait()
        self._sends.clear()
