"""Layers over a cache that run as one kernel: what most models' layers are."""

from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, nn

from parallel_core import ops
from parallel_core.config.schema import TransformerConfig
from parallel_core.generate.cache import KeyValueCache
from parallel_core.transformer.block import TransformerBlock
from parallel_core.transformer.layer import TransformerLayer
from parallel_core.transformer.plain_layer import is_plain
from parallel_core.transformer.stage import ModelStage


class CachedLayer(nn.Cell):
    """A layer whose Cells' work is done by `ops.cached_layer`; what it returns is what they return.

    A step of one token is a few small kernels a layer, and as many calls of Cells take a fifth of its time.

    Args:
        layer: the trained layer, of which `is_covered` holds.
        cache: of the stage.
    """

    def __init__(self, layer: TransformerLayer, cache: KeyValueCache) -> None:
        super().__init__(auto_prefix=False)
        self.layer = layer
        attention, mlp, core = layer.self_attention, layer.mlp, layer.self_attention.core_attention
        number, groups, size = layer.layer_number, attention.num_groups, attention.head_size
        weights = (
            layer.input_layernorm.weight, _bias(layer.input_layernorm),
            attention.linear_qkv.weight, attention.linear_qkv.bias,
            attention.linear_proj.weight, attention.linear_proj.bias,
            layer.pre_mlp_layernorm.weight, _bias(layer.pre_mlp_layernorm),
            mlp.linear_fc1.weight, mlp.linear_fc1.bias, mlp.linear_fc2.weight, mlp.linear_fc2.bias,
        )  # fmt: skip
        options = {
            "eps": layer.input_layernorm.eps, "interleaved": False, "scale": core.total_scale, "window": core.window,
            "activation": mlp.hidden_act,
        }  # fmt: skip

        def run(hidden: Tensor) -> Tensor:
            rotary, step = attention.rotary, cache.step
            cos, sin = (None, None) if rotary is None else rotary.tables(step.length)
            cached = *cache.layer(number, groups, size, size), step.rows, step.firsts
            return ops.cached_layer(hidden, *weights, cos, sin, *cached, **options)

        self._run = run

    def construct(self, hidden: Tensor, document_start_BS: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """Return the layer's output of the tokens of the cache's step, [S, B, H]."""
        return self._run(hidden)


def is_covered(layer: nn.Cell, config: TransformerConfig) -> bool:
    """Tell whether a layer is `ops.cached_layer`: a plain one of a GPT, whole on this rank, in float32."""
    if type(layer) is not TransformerLayer or ms.get_context("device_target") != "CPU" or not is_plain(layer, config):
        return False
    small = [p for p in layer.get_parameters() if p.ndim == 1]
    whole = layer.self_attention.linear_qkv.tp_group.size == 1
    whole = whole and not (config.rotary_interleaved or config.qk_layernorm or config.apply_layernorm_1p)
    return whole and all(p.dtype == ms.float32 for p in small)


def join_layers(model: nn.Cell, stage: ModelStage, cache: KeyValueCache) -> None:
    """Put a `CachedLayer` in the place of each layer of a model that can be one; the others stay as they are."""
    if type(model.decoder) is not TransformerBlock:
        return
    layers = model.decoder.layers
    for i, layer in enumerate(layers):
        if is_covered(layer, stage.config):
            layers[i] = CachedLayer(layer, cache)


def _bias(norm: nn.Cell) -> Tensor | None:
    return getattr(norm, "bias", None)
