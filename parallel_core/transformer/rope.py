"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), in Megatron-LM's conventions."""

from __future__ import annotations

import numpy as np
from mindspore import Tensor

from parallel_core import ops
from parallel_core.config.schema import TransformerConfig
from parallel_core.ops import reference


class RotaryEmbedding:
    """Turns pairs of head dims by position-dependent angles; the tables are float32 and made once for a length.

    Pair i turns by position / factor * base^(-2i / R), R = kv_channels * rotary_percent. Pairs are (i, i + R/2), or
    (2i, 2i + 1) when interleaved.
    """

    def __init__(self, config: TransformerConfig) -> None:
        self._dim = int(config.kv_channels * config.rotary_percent)
        self._base = float(config.rotary_base)
        self._factor = float(config.rotary_seq_len_interpolation_factor)
        self._interleaved = config.rotary_interleaved
        self._rotate = ops.rotary if config.apply_rope_fusion else reference.rotary
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, x_SBND: Tensor) -> Tensor:
        """Return queries or keys of positions 0..S-1 turned by their angles, in their dtype."""
        length = x_SBND.shape[0]
        if length not in self._tables:
            self._tables[length] = self._make_tables(length)
        return self._rotate(x_SBND, *self._tables[length], self._interleaved)

    def _make_tables(self, length: int) -> tuple[Tensor, Tensor]:
        inverse = 1.0 / (self._base ** (np.arange(0, self._dim, 2, dtype=np.float32) / np.float32(self._dim)))
        angles = np.outer(np.arange(length, dtype=np.float32) / np.float32(self._factor), inverse.astype(np.float32))
        angles = np.repeat(angles, 2, 1) if self._interleaved else np.concatenate((angles, angles), 1)
        angles = angles.astype(np.float32)[:, None, None, :]
        return Tensor(np.cos(angles)), Tensor(np.sin(angles))
