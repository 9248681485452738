"""Checkpoints in the real model, and what it computes of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from parallel_core.checkpoint import TensorShard, TensorSource, load_shards
from parallel_core.config.model_keys import model_of_settings
from parallel_core.layout.shard import shard_of
from parallel_core.transformer import GPTModel, ModelStage
from parallel_core.transformer.models import make_model


def loaded(source: TensorSource) -> GPTModel:
    """Return the model that a checkpoint's settings describe, with its weights."""
    config = dataclasses.replace(
        model_of_settings(source.common["model_config"]), attention_dropout_rate=0.0, hidden_dropout_rate=0.0
    )
    model = make_model(ModelStage(config))
    wanted = {shard_of(p).name: TensorShard.full(shard_of(p).name, p.shape, "float32") for p in parameters(model)}
    arrays, _ = load_shards(source, wanted, all_keys=list(wanted))
    for parameter in parameters(model):
        parameter.set_data(Tensor(arrays[shard_of(parameter).name]))
    return model


def parameters(model: GPTModel) -> list[ms.Parameter]:
    return list(model.get_parameters())


def logits_of(model: GPTModel, tokens: np.ndarray) -> np.ndarray:
    """Return float32 [B, S, V]."""
    return model(Tensor(tokens.astype(np.int32))).asnumpy()


class MeanLoss(nn.Cell):
    """The mean loss of every next token."""

    def __init__(self, model: GPTModel) -> None:
        super().__init__(auto_prefix=False)
        self.model = model

    def construct(self, tokens: Tensor, labels: Tensor) -> Tensor:
        return self.model(tokens, None, None, labels).mean()


def loss_and_norm(model: GPTModel, tokens: np.ndarray) -> tuple[float, float]:
    """Return the mean loss over shifted tokens and the norm of its gradient over all parameters."""
    inputs, labels = (Tensor(np.ascontiguousarray(x.astype(np.int32))) for x in (tokens[:, :-1], tokens[:, 1:]))
    loss, gradients = ms.value_and_grad(MeanLoss(model), None, parameters(model))(inputs, labels)
    return float(loss.asnumpy()), sum(float((g.asnumpy().astype(np.float64) ** 2).sum()) for g in gradients) ** 0.5


def continued(model: GPTModel, tokens: np.ndarray, count: int) -> np.ndarray:
    """Return `count` further tokens, each the likeliest after all before it."""
    row = tokens
    for _ in range(count):
        row = np.concatenate([row, logits_of(model, row)[:, -1:].argmax(-1)], 1)
    return row[:, tokens.shape[1] :]


def files_of(folder: Path, suffix: str = ".safetensors") -> Iterable[Path]:
    return sorted(file for file in folder.iterdir() if file.name.endswith(suffix))
