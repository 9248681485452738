"""`python -m tools.convert_megatron` in a checkout: the converter is `parallel_core.convert`."""
