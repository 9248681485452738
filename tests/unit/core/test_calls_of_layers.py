"""A parallel layer that is called with the wrong shapes says so: fused kernels would read past the end of a row."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from parallel_core import ops
from parallel_core import tensor_parallel as tp
from parallel_core.comm.interface import SoloGroup
from parallel_core.config.schema import TransformerConfig
from parallel_core.errors import ConfigError
from parallel_core.tensor_parallel.checks import equal_part
from parallel_core.transformer import GPTModel, ModelStage
from parallel_core.transformer.norm import LayerNorm, RMSNorm

ms.set_context(mode=ms.PYNATIVE_MODE, device_target="CPU", pynative_synchronize=True)

ALONE = SoloGroup()
HOW = {"tp_group": ALONE, "init_method": tp.init_method_normal(0.02)}

SMALL = {
    "num_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "vocab_size": 32, "seq_length": 8,
    "attention_dropout_rate": 0.0, "hidden_dropout_rate": 0.0, "init_method_std": 0.3,
}  # fmt: skip


def zeros(*shape: int, dtype: type = np.float32) -> Tensor:
    return Tensor(np.zeros(shape, dtype))


@pytest.fixture(params=["auto", "local"], autouse=True)
def kernels(request):
    ops.use_kernels(request.param)
    yield
    ops.use_kernels("local")


@pytest.mark.parametrize("layer", [tp.ColumnParallelLinear(8, 6, **HOW), tp.RowParallelLinear(8, 6, **HOW)])
@pytest.mark.parametrize("features", [4, 16])
def test_a_linear_layer_refuses_other_features(layer, features) -> None:
    with pytest.raises(ConfigError, match=rf"linear.weight is \[6, 8\] .* takes \[.., 8\]; .* \[5, 3, {features}\]"):
        layer(zeros(5, 3, features))


def test_a_linear_layer_refuses_integers_and_the_weight_of_another_layer() -> None:
    layer = tp.ColumnParallelLinear(8, 6, skip_weight_param_allocation=True, **HOW)
    with pytest.raises(ConfigError, match="linear.weight|the given weight: the input is Int32"):
        layer(zeros(5, 3, 8, dtype=np.int32), zeros(6, 8))
    with pytest.raises(ConfigError, match="has 4 rows on this rank, the layer's bias has 6"):
        layer(zeros(5, 3, 8), zeros(4, 8))
    with pytest.raises(ConfigError, match=r"owns no weight: call it as layer\(x, weight\)"):
        layer(zeros(5, 3, 8))


def test_cross_entropy_refuses_targets_in_another_order() -> None:
    logits, target = zeros(5, 3, 12), zeros(3, 5, dtype=np.int32)
    with pytest.raises(ConfigError, match=r"have the shape \[5, 3\]; they are given as \[3, 5\]"):
        tp.vocab_parallel_cross_entropy(logits, target, ALONE)
    with pytest.raises(ConfigError, match="label_smoothing=1.5: give a number from 0"):
        tp.vocab_parallel_cross_entropy(logits, target.T, ALONE, 1.5)


def test_an_embedding_refuses_ids_that_it_has_no_row_for() -> None:
    table = tp.VocabParallelEmbedding(8, 4, tp_group=ALONE, init_method=np.ones)
    assert table(Tensor(np.array([[0, 7]], np.int32))).asnumpy().all()
    for wrong in (8, -1):
        with pytest.raises(ConfigError, match=rf"embedding.weight has the rows 0 to 7; it is asked for {wrong}"):
            table(Tensor(np.array([[0, wrong]], np.int32)))


def test_what_has_no_equal_parts_loses_none() -> None:
    assert equal_part(zeros(6, 3), 2, 0) == 3
    with pytest.raises(ConfigError, match=r"dim 0 of a tensor \[5, 3\] cannot be cut over 2 ranks"):
        equal_part(zeros(5, 3), 2, 0)


def test_the_type_of_parameters_is_refused_by_its_name() -> None:
    with pytest.raises(ConfigError, match="linear.weight: params_dtype='bf16'; give 'float32', 'bfloat16' or"):
        tp.ColumnParallelLinear(8, 6, params_dtype="bf16", **HOW)


@pytest.mark.parametrize("kernels", ["auto"], indirect=True)
@pytest.mark.parametrize("kind", [LayerNorm, RMSNorm])
def test_a_norm_and_a_layer_refuse_another_width(kind) -> None:
    layer = GPTModel(ModelStage(TransformerConfig(**SMALL, normalization=kind.__name__))).decoder.layers[0]
    for width in (8, 24):
        with pytest.raises(ConfigError, match=rf"a norm of width 16 is given \[4, 2, {width}\]"):
            kind(16)(zeros(4, 2, width))
        with pytest.raises(ConfigError, match=rf"layers.0 takes hidden states \[.., 16\]; .* \[.., {width}\]"):
            layer(zeros(8, 2, width))


def test_a_weight_that_takes_anothers_place_counts_from_then_on() -> None:
    ids = Tensor(np.arange(16, dtype=np.int32).reshape(2, 8))
    results = []
    for calls_before in (False, True):
        model = GPTModel(ModelStage(TransformerConfig(**SMALL)))
        first, second = (layer.mlp.linear_fc1 for layer in model.decoder.layers)
        if calls_before:
            model(ids)
        second.weight = first.weight
        results.append(model(ids).asnumpy())
    np.testing.assert_array_equal(*results)
