"""Megatron-LM's checkpoint formats, read and written without torch."""
