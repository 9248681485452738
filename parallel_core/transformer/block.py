"""The layers of one pipeline stage, with the final norm on the last one."""

from __future__ import annotations

from mindspore import Parameter, Tensor, nn

from parallel_core.layout.recompute import RecomputePlan
from parallel_core.tensor_parallel.recompute import recompute
from parallel_core.transformer.interleaved import interleaved
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
        self.num_parts = stage.num_parts
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
        done = 0
        for segment in (*self.plan.segments, range(len(self.layers), len(self.layers))):
            hidden = self._run(range(done, segment.start), hidden, document_start_BS)
            if segment:
                hidden = self._recomputed(segment, hidden, document_start_BS)
            done = segment.stop
        return hidden if self.final_layernorm is None else self.final_layernorm(hidden)

    def _run(self, numbers: range, hidden: Tensor, document_start_BS: Tensor | None = None) -> Tensor:
        layers = [self.layers[i] for i in numbers]
        if self.num_parts > 1:
            return interleaved(layers, hidden, document_start_BS, self.num_parts)
        for layer in layers:
            hidden = layer(hidden, document_start_BS)
        return hidden

    def _recomputed(self, segment: range, hidden: Tensor, document_start_BS: Tensor | None) -> Tensor:
        parameters: list[Parameter] = [p for i in segment for p in self.layers[i].trainable_params()]
        masks = () if document_start_BS is None else (document_start_BS,)
        return recompute(lambda x, *more: self._run(segment, x, *more), (hidden, *masks), parameters, self.streams)
