"""The training model's layers over a cache: attention that keeps keys and values, and positions that go on."""

from __future__ import annotations

from dataclasses import dataclass, fields

import mindspore as ms
import numpy as np
from mindspore import Tensor

from parallel_core import ops
from parallel_core.config.schema import TransformerConfig
from parallel_core.generate.cache import KeyValueCache, Step
from parallel_core.tensor_parallel.parameter import InitMethod
from parallel_core.transformer import GPTModel
from parallel_core.transformer.attention import CoreAttention
from parallel_core.transformer.models import make_model
from parallel_core.transformer.rope import RotaryEmbedding
from parallel_core.transformer.stage import ModelStage


class CachedAttention(CoreAttention):
    """Core attention of new tokens to all of their sequences, whose keys and values stand in the stage's cache."""

    def __init__(self, stage: ModelStage, layer_number: int, name: str) -> None:
        super().__init__(stage, layer_number, name)
        if not isinstance(stage, CachedStage):
            raise TypeError(f"{name}: a layer over a cache is built from a CachedStage, not {type(stage).__name__}")
        self._cache, self._number = stage.cache, layer_number
        self._total_scale = self.scale * self.coefficient

    def construct(
        self, query_SBND: Tensor, key_SBGD: Tensor, value_SBGE: Tensor, document_start_BS: Tensor | None = None
    ) -> Tensor:
        """Return the context [S, B, N * E] of the tokens of the cache's step."""
        step, (G, D), E = self._cache.step, key_SBGD.shape[2:], value_SBGE.shape[3]
        keys, values = self._cache.layer(self._number, G, D, E)
        new = query_SBND, key_SBGD, value_SBGE
        return ops.cached_attention(
            *new, keys, values, step.rows, step.firsts, scale=self._total_scale, window=self.window
        )

    def packed(self, mixed_SBGX: Tensor, document_start_BS: Tensor | None = None) -> Tensor:
        """Return the context [S, B, N * D] of packed queries, keys and values."""
        step, D = self._cache.step, self.head_size
        keys, values = self._cache.layer(self._number, mixed_SBGX.shape[2], D, D)
        return ops.cached_attention_packed(
            mixed_SBGX, D, keys, values, step.rows, step.firsts, scale=self._total_scale, window=self.window
        )


class CachedRotary(RotaryEmbedding):
    """Rotary embedding of a step's positions, from one table; all layers of a stage share it."""

    def __init__(self, config: TransformerConfig, cache: KeyValueCache) -> None:
        super().__init__(config)
        self._cache = cache
        self._whole = [x.asnumpy() for x in self._make_tables(np.arange(cache.capacity))]
        self._of: Step | None = None
        self._now: tuple[Tensor, Tensor] = (Tensor(self._whole[0][:1]), Tensor(self._whole[1][:1]))

    def tables(self, length: int, positions: np.ndarray | None = None) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of the cache's step, float32 [S, 1 or B, 1, R]."""
        step = self._cache.step
        if self._of is not step:
            at = step.positions if step.positions.ndim == 2 else step.positions[:, None]
            cos, sin = (np.ascontiguousarray(table[at, 0]) for table in self._whole)
            self._of, self._now = step, (Tensor.from_numpy(cos), Tensor.from_numpy(sin))
        return self._now


@dataclass(frozen=True)
class CachedStage(ModelStage):
    """A stage whose sequences go on from a cache; its first values are zeros, which loading replaces."""

    cache: KeyValueCache = None  # type: ignore[assignment]

    @classmethod
    def of(cls, stage: ModelStage, cache: KeyValueCache) -> CachedStage:
        """Return `stage` over a cache: no dropout, no recomputation, whole sequences on every rank."""
        own = {f.name: getattr(stage, f.name) for f in fields(ModelStage)}
        own |= {"make_core_attention": CachedAttention, "plan": None, "sequence_parallel": False}
        stage.streams.training = False
        return cls(**own, cache=cache)

    def positions(self, local_length: int) -> np.ndarray | None:
        """Return the positions of the cache's step."""
        return self.cache.step.positions

    def _init(self, name: str, std: float) -> InitMethod:
        return lambda shape: np.broadcast_to(np.float32(0.0), shape)


def build_cached_model(stage: ModelStage, cache: KeyValueCache) -> GPTModel:
    """Return the stage's part of the model that its configuration describes, over `cache`."""
    model = make_model(CachedStage.of(stage, cache))
    turning = [cell for _, cell in model.cells_and_names() if getattr(cell, "rotary", None) is not None]
    shared = CachedRotary(stage.config, cache) if turning else None
    for cell in turning:
        cell.rotary = shared
    model.set_train(False)
    return model


def position_ids(step: Step) -> Tensor:
    """Return the step's positions, int32 [B, S]."""
    at = step.positions if step.positions.ndim == 2 else step.positions[:, None]
    return Tensor(np.ascontiguousarray(at.T), ms.int32)
