"""Entries of a checkout under Megatron-LM's paths; what they run is in `parallel_core`."""
