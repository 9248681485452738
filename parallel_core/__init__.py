"""parallel_core: Megatron-style parallel training for MindSpore in PyNative mode."""

__version__ = "0.1.0"
