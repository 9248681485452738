"""Rules of multi-token prediction."""

from __future__ import annotations

from collections.abc import Sequence

from parallel_core.config.resolution import Resolution, Rules
from parallel_core.config.schema import DEFAULTS
from parallel_core.errors import ConfigError
from parallel_core.layout.derived import ROTARY
from parallel_core.layout.stages import Placement, parse_layout

MULTI_TOKEN_CHECKS = Rules()


@MULTI_TOKEN_CHECKS
def multi_token_prediction(r: Resolution) -> None:
    """Layers that predict further tokens have no learned positions, and are fewer than a sample has tokens."""
    layers, factor = r["mtp_num_layers"], r["mtp_loss_scaling_factor"]
    if factor < 0:
        r.fail("mtp_loss_scaling_factor", "must not be negative")
    if layers is not None and layers < 0:
        r.fail("mtp_num_layers", "must not be negative")
    if not layers:
        if factor != DEFAULTS["model_config.mtp.mtp_loss_scaling_factor"]:
            r.fail("mtp_loss_scaling_factor", "belongs to mtp_num_layers; give that too, or leave it out")
        return
    if r["position_embedding_type"] not in (*ROTARY, "none"):
        r.fail("mtp_num_layers position_embedding_type",
               "predicts from tokens without positions of their own; write position_embedding_type rope or none")
    if r.positive("seq_length") and layers >= r["seq_length"]:
        r.fail("mtp_num_layers seq_length", "no token of a sample is so far ahead; give fewer layers")


@MULTI_TOKEN_CHECKS
def multi_token_placement(r: Resolution) -> None:
    """A layout string with m has all layers of multi-token prediction, on its last stage."""
    layers, text, ranks = r["mtp_num_layers"] or 0, r["pipeline_model_parallel_layout"], "pipeline_model_parallel_size"
    if text is None or not r.positive(ranks):
        return
    try:
        counts = _on_stages(parse_layout(text, r[ranks]))
    except ConfigError:
        return  # the derivation of the layers has said why
    if sum(counts) != layers:
        r.fail("pipeline_model_parallel_layout mtp_num_layers", f"has m {sum(counts)} times, for {layers} layers of "
               "multi-token prediction")
    elif sum(counts) != counts[-1]:
        r.fail("pipeline_model_parallel_layout", "has m before the last stage, where the losses are; put all m there")


def _on_stages(contents: Sequence[Sequence[str]]) -> tuple[int, ...]:
    """Return the number of layers of multi-token prediction of each stage of a parsed layout, first to last."""
    placement = Placement.in_turn(len(contents), len(contents[0]))
    places = (placement.place(stage) for stage in range(placement.num_stages))
    return tuple(contents[rank][chunk].count("m") for rank, chunk in places)
