"""The layers of one pipeline stage, with the final norm on the last one."""

from __future__ import annotations

from mindspore import Parameter, Tensor, nn

from parallel_core.layout.recompute import RecomputePlan
from parallel_core.tensor_parallel.recompute import recompute
from parallel_core.transformer.layer import TransformerLayer
from parallel_core.transformer.norm import make_norm
from parallel_core.transformer.stage import ModelStage


class TransformerBlock(nn.Cell):
    """Layers in sequence.

    Args:
        stage: configuration, group, streams, numbers of the layers, and what is recomputed.
        post_layer_norm: end with the model's final norm.
    """

    layer_class: type[nn.Cell] = TransformerLayer

    def __init__(self, stage: ModelStage, *, post_layer_norm: bool = True) -> None:
        super().__init__(auto_prefix=True)
        self.streams, self.plan = stage.streams, stage.plan or RecomputePlan(regather=len(stage.layers))
        self.layers = nn.CellList(
            [
                self.layer_class(
                    stage,
                    number,
                    recompute_core_attention=i < self.plan.core_attention,
                    regather_input=i < self.plan.regather,
                )
                for i, number in enumerate(stage.layers)
            ]
        )
        self.final_layernorm: nn.Cell | None = None
        if post_layer_norm:
            self.final_layernorm = make_norm(
                stage.config, "decoder.final_layernorm", partial_gradient=stage.sequence_parallel
            )

    def construct(self, hidden: Tensor, document_start_BS: Tensor | None = None) -> Tensor:
        """Return the last layer's output (after the final norm where there is one), in hidden's shape."""
        starts = {segment.start: segment for segment in self.plan.segments}
        i = 0
        while i < len(self.layers):
            segment = starts.get(i)
            if segment is None:
                hidden = self.layers[i](hidden, document_start_BS)
                i += 1
            else:
                hidden = self._recomputed(segment, hidden, document_start_BS)
                i = segment.stop
        return hidden if self.final_layernorm is None else self.final_layernorm(hidden)

    def _recomputed(self, segment: range, hidden: Tensor, document_start_BS: Tensor | None) -> Tensor:
        layers = [self.layers[i] for i in segment]
        parameters: list[Parameter] = [p for layer in layers for p in layer.trainable_params()]

        def run(x: Tensor, *masks: Tensor) -> Tensor:
            for layer in layers:
                x = layer(x, *masks)
            return x

        masks = () if document_start_BS is None else (document_start_BS,)
        return recompute(run, (hidden, *masks), parameters, self.streams)
