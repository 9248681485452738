"""Rules of heads for whole texts."""

from __future__ import annotations

from parallel_core.config.resolution import Resolution, Rules

CLASSIFIER_CHECKS = Rules()
_OTHER_TASKS = "mtp_num_layers sft reset_attention_mask reset_position_ids calculate_per_token_loss"


@CLASSIFIER_CHECKS
def classes(r: Resolution) -> None:
    """A head for texts is of a decoder, and texts are whole on every rank and alone in their sample."""
    labels = r["num_labels"] or 0
    if labels < 0:
        r.fail("num_labels", "must be above zero; 0: words are predicted")
    if labels <= 0:
        return
    if r["bert_head"] != "none":
        r.fail("num_labels bert_head", "are heads of two models; give one")
    if r["top_query_layer"] != "none":
        r.fail("num_labels top_query_layer", "the query layer predicts the next word; leave one out")
    for name in _OTHER_TASKS.split():
        if r[name]:
            r.fail(f"num_labels {name}", "classes of texts have no form of it; leave one out")
    if r["context_parallel_size"] != 1:
        r.fail("num_labels context_parallel_size", "texts are whole on every rank; write context_parallel_size 1")
