"""Small models of this project with any option, and checkpoints of them as a run writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from hf_models import parameters
from mindspore import Tensor

from parallel_core.checkpoint import CheckpointWriter, TensorShard
from parallel_core.config import AllConfig, load_config
from parallel_core.config.vocabulary import stored_settings
from parallel_core.layout.shard import shard_of
from parallel_core.transformer import GPTModel, ModelStage

BASE = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --micro-batch-size 1 --vocab-size 90 "
    "--make-vocab-size-divisible-by 32 --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.3 --mock-data"
)
LLAMA = (
    "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear "
    "--untie-embeddings-and-output-weights --group-query-attention --num-query-groups 2"
)


def config_of(words: str) -> AllConfig:
    return load_config(f"{BASE} {words}".split()).config


def model_of(config: AllConfig) -> GPTModel:
    """Return a model whose biases and norms are not trivial."""
    model, rng = GPTModel(ModelStage(config.model_config)), np.random.default_rng(0)
    for parameter in parameters(model):
        if parameter.ndim == 1:
            parameter.set_data(parameter + Tensor(0.2 * rng.standard_normal(parameter.shape).astype(np.float32)))
    return model


def save(root: Path, config: AllConfig, model: GPTModel | None = None, **common: Any) -> Path:
    """Write a native checkpoint as a run of `config` does, with the model's weights or with one small tensor."""
    arrays = {shard_of(p).name: p.asnumpy() for p in parameters(model)} if model else {"x": np.zeros(1, np.float32)}
    writer = CheckpointWriter(root, 3, 0, 1)
    writer.begin()
    shards = {name: (TensorShard.full(name, value.shape, "float32"), value) for name, value in arrays.items()}
    told = {"iteration": 3, "model_config": stored_settings(config), "config": config.to_dict(), **common}
    return writer.commit([writer.write_rank_file(shards)], told)
