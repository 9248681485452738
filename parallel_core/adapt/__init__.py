"""Adapting a trained model: low-rank adapters beside its frozen linear layers."""

from __future__ import annotations

from parallel_core.adapt.lora import LoraLinear, adapt, add_adapters

__all__ = ["LoraLinear", "adapt", "add_adapters"]
