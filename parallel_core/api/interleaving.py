"""MindSpore's `MicroBatchInterleaved` with the mean of its parts."""

from __future__ import annotations

from typing import Any

from mindspore import Tensor, nn

from parallel_core.errors import ConfigError


class MicroBatchInterleaved(nn.Cell):
    """Calls a network that returns a mean over its samples on equal parts of its inputs, and returns the mean.

    MindSpore's class of this name adds the parts' losses, so that gradients and what is logged are `interleave_num`
    times as large. It hides no communication by itself: in training that is `--micro-batch-interleave-num`, or
    `set_parallel_config(micro_batch_interleave_num=...)`, which are exact for samples of different lengths too.

    Args:
        network: what is called; its result is the mean of samples, a scalar.
        interleave_num: parts.

    Raises:
        ConfigError: there are none.
    """

    def __init__(self, network: nn.Cell, interleave_num: int = 2) -> None:
        super().__init__(auto_prefix=False)
        if interleave_num < 1:
            raise ConfigError(f"interleave_num={interleave_num}: give 1 or more")
        self.network, self.interleave_num = network, interleave_num

    def construct(self, *inputs: Tensor) -> Any:
        """Return the mean over all samples.

        Args:
            inputs: tensors [B, ..], B a multiple of `interleave_num`.

        Raises:
            ConfigError: B is not.
        """
        sizes = {x.shape[0] for x in inputs}
        if len(sizes) != 1 or min(sizes) % self.interleave_num:
            raise ConfigError(f"inputs of {sorted(sizes)} samples are not {self.interleave_num} parts of one size")
        size = min(sizes) // self.interleave_num
        parts = [
            self.network(*(x[i * size : (i + 1) * size].contiguous() for x in inputs))
            for i in range(self.interleave_num)
        ]
        return sum(parts[1:], parts[0]) / self.interleave_num
