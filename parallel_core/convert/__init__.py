"""Converts checkpoints between Megatron-LM, this project and Hugging Face, without torch."""
