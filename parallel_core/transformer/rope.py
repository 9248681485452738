"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), in Megatron-LM's conventions."""

from __future__ import annotations

import math

import numpy as np
from mindspore import Tensor

from parallel_core import ops
from parallel_core.config.schema import TransformerConfig
from parallel_core.errors import ConfigError
from parallel_core.ops import reference


class RotaryEmbedding:
    """Turns pairs of head dims by position-dependent angles; the float32 tables of the same positions are made once.

    Pair i turns by position / factor * base^(-2i / R), R = kv_channels * rotary_percent. Pairs are (i, i + R/2), or
    (2i, 2i + 1) when interleaved. With `use_rope_scaling` the frequencies are those of Llama 3.1.
    """

    def __init__(self, config: TransformerConfig) -> None:
        self._dim = int(config.kv_channels * config.rotary_percent)
        self._base = float(config.rotary_base)
        self._factor = float(config.rotary_seq_len_interpolation_factor)
        self._scaling = config.rope_scaling_factor if config.use_rope_scaling else 1.0
        self._interleaved = config.rotary_interleaved
        self._rotate = ops.rotary_packed if config.apply_rope_fusion else reference.rotary_packed
        self._tables: dict[int | bytes, tuple[Tensor, Tensor]] = {}

    def __call__(self, mixed_SBGX: Tensor, head_size: int, positions: np.ndarray | None = None) -> Tensor:
        """Return packed queries, keys and values (see `ops.causal_attention_packed`), queries and keys turned.

        Args:
            mixed_SBGX: packed queries, keys and values.
            head_size: D.
            positions: int [S], or [S, B] where samples differ: where each token stands in its sequence; None: 0..S-1.
        """
        return self._rotate(mixed_SBGX, head_size, *self.tables(mixed_SBGX.shape[0], positions), self._interleaved)

    def tables(self, length: int, positions: np.ndarray | None = None) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, float32 [S, 1 or B, 1, R]; arguments as for calling."""
        if positions is None:
            if length not in self._tables:
                self._tables[length] = self._make_tables(np.arange(length))
            return self._tables[length]
        if positions.shape[0] != length:
            shape = list(positions.shape)
            raise ConfigError(f"rotary positions of shape {shape} for {length} tokens; give [S] or [S, B]")
        key = positions.tobytes() + bytes(str(positions.shape), "ascii")
        if key not in self._tables:
            self._tables = {kept: tables for kept, tables in self._tables.items() if isinstance(kept, int)}
            self._tables[key] = self._make_tables(positions)  # the last ones only: in generation they always change
        return self._tables[key]

    def _make_tables(self, positions: np.ndarray) -> tuple[Tensor, Tensor]:
        inverse = 1.0 / (self._base ** (np.arange(0, self._dim, 2, dtype=np.float32) / np.float32(self._dim)))
        inverse = scaled_frequencies(inverse, self._scaling)
        steps = positions.astype(np.float32).reshape(len(positions), -1, 1, 1) / np.float32(self._factor)
        angles = steps * inverse.astype(np.float32)
        angles = np.repeat(angles, 2, -1) if self._interleaved else np.concatenate((angles, angles), -1)
        angles = angles.astype(np.float32)
        return Tensor(np.cos(angles)), Tensor(np.sin(angles))


_TRAINED_LENGTH, _SLOWEST, _FASTEST = 8192, 1, 4
"""Llama 3.1: frequencies with fewer turns than 1 in the 8192 positions of its first training are slow, with more than 4
fast."""


def scaled_frequencies(inverse: np.ndarray, factor: float) -> np.ndarray:
    """Return rotary frequencies with slow ones divided by `factor`, fast ones kept, and a linear blend in between.

    Source: Llama 3.1 (arXiv:2407.21783); Megatron-LM's --use-rope-scaling.

    Args:
        inverse: radians per position, float32 [R / 2].
        factor: divisor; 1: nothing changes.
    """
    if factor == 1.0:
        return inverse
    turns = _TRAINED_LENGTH * inverse / (2 * math.pi)
    kept = np.clip((turns - _SLOWEST) / (_FASTEST - _SLOWEST), 0.0, 1.0)
    return ((1 - kept) * inverse / factor + kept * inverse).astype(np.float32)
