"""The parts of a layer that another model may bring: core attention, feed-forward block, positions."""

from __future__ import annotations

from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from parallel_core import ops
from parallel_core.config.schema import TransformerConfig
from parallel_core.errors import ConfigError
from parallel_core.layout.recompute import RecomputePlan
from parallel_core.transformer import GPTModel, ModelStage
from parallel_core.transformer.attention import CoreAttention
from parallel_core.transformer.rope import RotaryEmbedding

SIZES: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "group_query_attention": True, "num_query_groups": 2,
    "vocab_size": 32, "seq_length": 6, "attention_dropout_rate": 0.0, "hidden_dropout_rate": 0.0,
    "position_embedding_type": "rope",
}  # fmt: skip
TOKENS = Tensor(np.arange(12, dtype=np.int32).reshape(2, 6))


@pytest.fixture(autouse=True)
def kernels() -> None:
    ms.set_context(pynative_synchronize=True)
    ops.use_kernels()


def numpy_attention(query: np.ndarray, key: np.ndarray, value: np.ndarray, scale: float) -> np.ndarray:
    S, B, N, _ = query.shape
    per_group, out = N // key.shape[2], np.zeros((S, B, N, value.shape[-1]))
    for b in range(B):
        for n in range(N):
            scores = scale * query[:, b, n] @ key[:, b, n // per_group].T
            scores[np.triu_indices(S, 1)] = -np.inf
            weights = np.exp(scores - scores.max(1, keepdims=True))
            out[:, b, n] = weights / weights.sum(1, keepdims=True) @ value[:, b, n // per_group]
    return out.reshape(S, B, -1)


@pytest.mark.parametrize("value_size", [2, 4, 12])
def test_values_may_have_another_head_size_than_queries(value_size: int) -> None:
    rng = np.random.default_rng(0)
    query, key = rng.standard_normal((6, 2, 4, 4)), rng.standard_normal((6, 2, 2, 4))
    value = rng.standard_normal((6, 2, 2, value_size))
    core = CoreAttention(ModelStage(TransformerConfig(**SIZES)), 0, "core")
    got = core(*(Tensor(x.astype(np.float32)) for x in (query, key, value))).asnumpy()
    np.testing.assert_allclose(got, numpy_attention(query, key, value, 0.5), atol=2e-6)  # fp32, sums of 6


class Recording(nn.Cell):
    """A core attention of another kind: it takes queries, keys and values apart and does what the ordinary one does."""

    def __init__(self, stage: ModelStage, layer_number: int, name: str) -> None:
        super().__init__()
        self.inner, self.name, self.shapes = CoreAttention(stage, layer_number, name), name, []

    def construct(self, query: Tensor, key: Tensor, value: Tensor, document_start: Tensor | None = None) -> Tensor:
        self.shapes.append((query.shape, key.shape, value.shape))
        return self.inner(query, key, value, document_start)


def test_a_layer_takes_another_core_attention() -> None:
    config = TransformerConfig(**SIZES)
    model = GPTModel(ModelStage(config, make_core_attention=Recording))
    logits = model(TOKENS).asnumpy()
    for number, layer in enumerate(model.decoder.layers):
        core = layer.self_attention.core_attention
        assert core.name == f"decoder.layers.{number}.self_attention"
        assert core.shapes == [((6, 2, 4, 4), (6, 2, 2, 4), (6, 2, 2, 4))]
    # one kernel on the same numbers, packed or apart
    np.testing.assert_array_equal(logits, GPTModel(ModelStage(config))(TOKENS).asnumpy())


@pytest.mark.parametrize("recomputes", [False, True])
def test_a_core_attention_is_called_that_is_put_in_its_place_or_looked_at_later(recomputes: bool) -> None:
    config, plan = TransformerConfig(**SIZES), RecomputePlan(core_attention=2 if recomputes else 0)
    model, shapes = GPTModel(ModelStage(config, plan=plan)), []
    logits = model(TOKENS).asnumpy()
    first, second = (layer.self_attention for layer in model.decoder.layers)
    first.core_attention.register_forward_hook(lambda _, inputs, output: shapes.append(output.shape) or None)
    second.core_attention = Recording(ModelStage(config), 1, "another")
    np.testing.assert_array_equal(model(TOKENS).asnumpy(), logits)
    assert shapes == [(6, 2, 16)] and second.core_attention.shapes == [((6, 2, 4, 4), (6, 2, 2, 4), (6, 2, 2, 4))]


class NoMLP(nn.Cell):
    def construct(self, hidden: Tensor) -> tuple[Tensor, None]:
        return hidden * 0.0, None


def test_a_layer_takes_another_feed_forward_block() -> None:
    asked = []

    def make(stage: ModelStage, layer_number: int, *, regather_input: bool = True) -> nn.Cell:
        asked.append(layer_number)
        return NoMLP()

    model = GPTModel(ModelStage(TransformerConfig(**SIZES), make_mlp=make))
    assert asked == [0, 1]
    layer, hidden = model.decoder.layers[0], Tensor(np.ones((6, 2, 16), np.float32))
    branch, _ = layer.self_attention(layer.input_layernorm(hidden), None)
    want = hidden.asnumpy() + branch.asnumpy() + layer.self_attention.linear_proj.bias.asnumpy()
    np.testing.assert_allclose(layer(hidden).asnumpy(), want, rtol=1e-6, atol=1e-6)


def test_rotary_tables_take_positions() -> None:
    rotary = RotaryEmbedding(TransformerConfig(**SIZES))
    whole = [table.asnumpy() for table in rotary.tables(10)]
    positions = np.array([7, 2, 3])
    for table, every in zip(rotary.tables(3, positions), whole):
        np.testing.assert_array_equal(table.asnumpy(), every[positions])
    apart = np.array([[0, 4], [1, 5], [2, 6]])  # [S, B]: two samples that stand at different places
    for table, every in zip(rotary.tables(3, apart), whole):
        assert table.shape == (3, 2, 1, 4)
        np.testing.assert_array_equal(table.asnumpy()[:, :, 0], every[apart][:, :, 0, 0])
    mixed = Tensor(np.random.default_rng(0).standard_normal((3, 2, 2, 16)).astype(np.float32))
    np.testing.assert_array_equal(rotary(mixed, 4, np.arange(3)).asnumpy(), rotary(mixed, 4).asnumpy())
    both = rotary(mixed, 4, apart).asnumpy()
    second = rotary(Tensor(mixed.asnumpy()[:, 1:].copy()), 4, np.array([4, 5, 6])).asnumpy()
    np.testing.assert_array_equal(both[:, 1:], second)
    with pytest.raises(ConfigError, match=r"positions of shape \[2\] for 3 tokens"):
        rotary(mixed, 4, np.arange(2))
