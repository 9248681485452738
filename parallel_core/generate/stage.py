"""The training model's layers over a cache: attention that keeps keys and values, and positions that go on."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from parallel_core import ops
from parallel_core.config.schema import TransformerConfig
from parallel_core.generate.cache import KeyValueCache, Step
from parallel_core.generate.layer import join_layers
from parallel_core.tensor_parallel.parameter import InitMethod
from parallel_core.transformer import GPTModel
from parallel_core.transformer.attention import CoreAttention
from parallel_core.transformer.models import make_model
from parallel_core.transformer.multi_latent_attention import MultiLatentAttention
from parallel_core.transformer.rope import RotaryEmbedding
from parallel_core.transformer.stage import ModelStage


class CachedAttention(CoreAttention):
    """Core attention of new tokens to all of their sequences, whose keys and values stand in the stage's cache."""

    def __init__(self, stage: ModelStage, layer_number: int, name: str) -> None:
        super().__init__(stage, layer_number, name)
        if not isinstance(stage, CachedStage):
            raise TypeError(f"{name}: a layer over a cache is built from a CachedStage, not {type(stage).__name__}")
        self._cache, self.number = stage.cache, layer_number
        self.total_scale = self.scale * self.coefficient

    def construct(
        self, query_SBND: Tensor, key_SBGD: Tensor, value_SBGE: Tensor, document_start_BS: Tensor | None = None
    ) -> Tensor:
        """Return the context [S, B, N * E] of the tokens of the cache's step."""
        step, (G, D), E = self._cache.step, key_SBGD.shape[2:], value_SBGE.shape[3]
        keys, values = self._cache.layer(self.number, G, D, E)
        new = query_SBND, key_SBGD, value_SBGE
        return ops.cached_attention(
            *new, keys, values, step.rows, step.firsts, scale=self.total_scale, window=self.window
        )

    def packed(self, mixed_SBGX: Tensor, document_start_BS: Tensor | None = None) -> Tensor:
        """Return the context [S, B, N * D] of packed queries, keys and values."""
        step, D = self._cache.step, self.head_size
        keys, values = self._cache.layer(self.number, mixed_SBGX.shape[2], D, D)
        return ops.cached_attention_packed(
            mixed_SBGX, D, keys, values, step.rows, step.firsts, scale=self.total_scale, window=self.window
        )


class CachedLatentAttention(nn.Cell):
    """Multi-latent attention of new tokens, over latents and shared keys' channels alone.

    A head's score q . W_k c is (W_k^T q) . c, and its context W_v (sum p c): so queries are taken to the latent's
    space, where all heads attend to the one latent of each token, and contexts back from it. Keys and values of heads
    are never made.

    Args:
        attention: the trained layer, whose weights and group these are.
        cache: where the latents stand.
        number: of the layer.
    """

    def __init__(self, attention: MultiLatentAttention, cache: KeyValueCache, number: int) -> None:
        super().__init__(auto_prefix=False)
        self.attention, self._cache, self._number = attention, cache, number
        self._wide: np.ndarray | None = None

    def construct(
        self, hidden: Tensor, document_start_BS: Tensor | None, positions: np.ndarray | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return (output, bias or None) of the tokens of the cache's step; see `MultiLatentAttention`."""
        its, step, (S, B, _) = self.attention, self._cache.step, hidden.shape
        L, R, N = its.kv_lora_rank, its.rotary_size, its.num_heads
        cos, sin = its.rotary.tables(S)
        before, low, shared = its.latents(hidden)
        latent, k_pos = _array(its.normed(low)), _array(shared)
        query = _array(its.queries(before)).reshape(S, B, N, -1)
        to_latent, from_latent = self._absorbed(query.shape[-1] - R)
        # Small products of memory that is there already: as NumPy arrays they cost no operator's dispatch.
        queries = np.empty((S, B, N, L + R), np.float32)
        queries[..., :L] = _by_heads(query[..., :-R], to_latent)
        queries[..., L:] = _array(ops.rotary(Tensor(query[..., -R:].copy()), cos, sin, True))
        keys = np.empty((S, B, 1, L + R), np.float32)
        keys[..., 0, :L] = latent
        keys[..., L:] = _array(ops.rotary(Tensor(k_pos.reshape(S, B, 1, R).copy()), cos, sin, True))
        kept, core, key = self._cache.latents(self._number, L + R), its.core_attention, Tensor.from_numpy(keys)
        context = ops.cached_attention(
            Tensor.from_numpy(queries), key, key, kept, kept, step.rows, step.firsts,
            scale=core.total_scale, window=core.window,
        )  # fmt: skip
        values = _by_heads(_array(context).reshape(S, B, N, L + R)[..., :L], from_latent)
        return its.linear_proj(Tensor.from_numpy(np.ascontiguousarray(values.reshape(S, B, -1))).astype(hidden.dtype))

    def _absorbed(self, key_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return W_k [N, key_size, L] and W_v^T [N, L, v_head_dim], parts of the projection from latents to heads."""
        its = self.attention
        weight: Any = its.linear_kv_up_proj.weight
        if self._wide is None or weight.dtype == ms.float32:
            self._wide = _array(weight)
        parts = self._wide.reshape(its.num_heads, -1, its.kv_lora_rank)
        return parts[:, :key_size], parts[:, key_size:].transpose(0, 2, 1)


def _array(x: Tensor) -> np.ndarray:
    """Return a tensor as float32."""
    return (x if x.dtype == ms.float32 else x.astype(ms.float32)).asnumpy()


def _by_heads(x_SBND: np.ndarray, weight_NDE: np.ndarray) -> np.ndarray:
    """Return the product of each head with its own matrix, [S, B, N, E]."""
    S, B, N, D = x_SBND.shape
    rows = x_SBND.reshape(S * B, N, D).transpose(1, 0, 2)
    return np.matmul(rows, weight_NDE).transpose(1, 0, 2).reshape(S, B, N, -1)


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
    for _, layer in list(model.cells_and_names()):
        attention = layer.name_cells().get("self_attention")
        if isinstance(attention, MultiLatentAttention):
            layer.self_attention = CachedLatentAttention(attention, cache, attention.core_attention.number)
    turning = [cell for _, cell in model.cells_and_names() if getattr(cell, "rotary", None) is not None]
    shared = CachedRotary(stage.config, cache) if turning else None
    for cell in turning:
        cell.rotary = shared
    join_layers(model, stage, cache)
    model.set_train(False)
    return model


def position_ids(step: Step) -> Tensor:
    """Return the step's positions, int32 [B, S]."""
    at = step.positions if step.positions.ndim == 2 else step.positions[:, None]
    return Tensor(np.ascontiguousarray(at.T), ms.int32)
