"""The section of multi-latent attention (DeepSeek-V2, arXiv:2405.04434): ranks of its latents, sizes of its heads."""

from __future__ import annotations

from dataclasses import dataclass

TRAINED_LENGTH = 4096
"""Positions of the first training that YaRN counts from in multi-latent attention, where nothing is said."""


@dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """Queries, keys and values from low-rank latents; without `multi_latent_attention` nothing here says anything."""

    multi_latent_attention: bool = False
    q_lora_rank: int = 0
    """Width of the queries' latent; 0: queries are projected from the residual stream."""
    kv_lora_rank: int = 32
    """Width of the latent that keys and values share."""
    qk_head_dim: int = 128
    """Channels of a query or key head that do not turn with the position."""
    qk_pos_emb_head_dim: int = 64
    """Channels of a query or key head that turn; of keys, all heads share them."""
    v_head_dim: int = 128
    """Channels of a value head."""
    rope_type: str = ""
    """Rotary frequencies: rope or yarn; empty: yarn."""

    @property
    def head_size(self) -> int:
        """Channels of a query or key head."""
        return self.qk_head_dim + self.qk_pos_emb_head_dim
