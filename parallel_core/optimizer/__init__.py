"""Gradients in flat buckets, their reduction over data parallel ranks, and the update of (sharded) master weights."""
