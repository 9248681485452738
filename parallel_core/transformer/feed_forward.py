"""Which feed-forward block a layer has: an MLP, or experts."""

from __future__ import annotations

from mindspore import nn

from parallel_core.transformer.moe.layer import MoELayer
from parallel_core.transformer.recomputed import make_mlp
from parallel_core.transformer.stage import ModelStage


def make_feed_forward(stage: ModelStage, layer_number: int, *, regather_input: bool = True) -> nn.Cell:
    """Return the feed-forward block of a layer: a Cell that takes [S, B, H] and returns (output, bias or None).

    A model may bring its own by `ModelStage.make_mlp`, in this signature.
    """
    name = f"{stage.config.layer_name(layer_number)}.mlp"
    if stage.config.moe.has_experts(layer_number):
        return MoELayer(stage, name, regather_input=regather_input)
    return make_mlp(stage, name, "mlp", regather_input=regather_input)
