"""Rules of microbatches that are computed in parts, one beside the communication of another."""

from __future__ import annotations

from parallel_core.config.resolution import Resolution, Rules

INTERLEAVE_CHECKS = Rules()


@INTERLEAVE_CHECKS
def micro_batch_interleave(r: Resolution) -> None:
    """A microbatch is cut into equal parts, and each layer ends in one sum over the tensor parallel ranks."""
    parts, name = r["micro_batch_interleave_num"], "micro_batch_interleave_num"
    if parts < 1:
        r.fail(name, "must be at least 1")
    if parts <= 1:
        return
    if r["micro_batch_size"] and r["micro_batch_size"] % parts:
        r.fail(f"{name} micro_batch_size", "the second must be a multiple of the first")
    if r["num_experts"]:
        r.fail(f"{name} num_experts", "experts choose among the tokens of a whole microbatch; leave one out")
    if r["lora_rank"]:
        r.fail(f"{name} lora_rank", "an adapter's output is added to a finished sum; leave one out")
    if r["recompute_granularity"] == "selective" and "mlp" in (r["recompute_modules"] or ()):
        r.fail(f"{name} recompute_modules", "an MLP alone is not computed again in parts; write core_attn, or "
               "recompute_granularity full")
    if r["tensor_model_parallel_size"] == 1:
        r.note(f"{name}={parts}: there is no tensor parallel communication that a part could be computed beside")
