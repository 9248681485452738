"""Parts of a layer that keep their input alone and are computed again in backward."""

from __future__ import annotations

from typing import Any

from mindspore import Tensor

from parallel_core.tensor_parallel.recompute import recompute
from parallel_core.transformer.mlp import MLP
from parallel_core.transformer.stage import ModelStage


class RecomputedMLP(MLP):
    """`MLP`, computed again in backward; see there."""

    def __init__(self, stage: ModelStage, name: str, **options: Any) -> None:
        super().__init__(stage, name, **options)
        self.streams = stage.streams

    def construct(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what `MLP` does."""
        once = super().construct
        output = recompute(lambda x: once(x)[0], (hidden,), list(self.trainable_params()), self.streams)
        return output, self.linear_fc2.bias


def make_mlp(stage: ModelStage, name: str, module: str, **options: Any) -> MLP:
    """Return an MLP, computed again in backward where `module` is a word of `recompute_modules`."""
    return (RecomputedMLP if stage.config.recomputes(module) else MLP)(stage, name, **options)
