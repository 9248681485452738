"""Low-rank adapters of a frozen model's linear layers, as a run is told of them."""

from __future__ import annotations

from dataclasses import dataclass

LORA_MODULES = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
"""Linear layers of a GPT's layer, by Megatron's names: what has an adapter where nobody says otherwise."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adaptation (LoRA): W stays, and alpha / rank x B A is learned beside it."""

    rank: int = 0
    """Rows of A; 0: no adapters, and the whole model is trained."""
    alpha: float = 32.0
    dropout: float = 0.0
    """Share of A's input that is dropped in training."""
    target_modules: tuple[str, ...] = LORA_MODULES
    """Which linear layers have one: last parts of their names, or regular expressions of whole names."""
    base: str = ""
    """Directory of the base model of an adapter that is loaded; empty: where the adapter says it is."""
