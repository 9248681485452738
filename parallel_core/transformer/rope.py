"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), in Megatron-LM's conventions."""

from __future__ import annotations

import numpy as np
from mindspore import Tensor

from parallel_core import ops
from parallel_core.config.schema import TransformerConfig
from parallel_core.errors import ConfigError
from parallel_core.ops import reference
from parallel_core.tape import constant
from parallel_core.transformer.frequencies import rotary_amplitude, rotary_frequencies


class RotaryEmbedding:
    """Turns pairs of head dims by position-dependent angles; the float32 tables of the same positions are made once.

    Pair i turns by position * `rotary_frequencies`[i]. Pairs are (i, i + R/2), or (2i, 2i + 1) when interleaved.
    """

    def __init__(self, config: TransformerConfig) -> None:
        self._config = config
        self._interleaved = config.rotary_interleaved or config.mla.multi_latent_attention
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
        steps = positions.astype(np.float32).reshape(len(positions), -1, 1, 1)
        angles = steps * rotary_frequencies(self._config, int(positions.max(initial=0)) + 1)
        angles = np.repeat(angles, 2, -1) if self._interleaved else np.concatenate((angles, angles), -1)
        angles, amplitude = angles.astype(np.float32), np.float32(rotary_amplitude(self._config))
        return constant(Tensor(np.cos(angles) * amplitude)), constant(Tensor(np.sin(angles) * amplitude))
