"""The section of multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MTPConfig:
    """Further layers that predict tokens beyond the next one; they train the model, and do not change its logits."""

    mtp_num_layers: int = 0
    """Tokens beyond the next one that are predicted, each by a layer of its own; 0: none."""
    mtp_loss_scaling_factor: float = 0.1
    """Factor of the mean of their losses in the objective."""
