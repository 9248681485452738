"""A PanGu-alpha model written as the merged `.ckpt` file that MindSpore's systems load."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from parallel_core.checkpoint.dtypes import storage_dtype
from parallel_core.checkpoint.huggingface.tensors import our_shapes
from parallel_core.checkpoint.huggingface.tokenizer import write_tokenizer
from parallel_core.checkpoint.huggingface.writer import check_names, model_of_source
from parallel_core.checkpoint.layout_files import write_durably
from parallel_core.checkpoint.mindspore.files import swapped, tensor_message
from parallel_core.checkpoint.mindspore.pangu import (
    SETTINGS_NAME,
    described_model,
    sources_of,
    stored_name,
    theirs_shape,
)
from parallel_core.checkpoint.source import TensorSource
from parallel_core.config.model_keys import DEFINING, NAME_OF, has_effect, value_of
from parallel_core.config.schema import TransformerConfig
from parallel_core.errors import CheckpointError, bullet_list

FILE_NAME = "pangu.ckpt"


def write_pangu(source: TensorSource, path: Path, progress: Callable[[int], None]) -> list[str]:
    """Write a model's parameters as one `.ckpt` file with the released names, and what it does not say beside it.

    Padding rows of the vocabulary are left out when its true size is known. `vocab.model` goes along where the
    checkpoint knows of it.

    Args:
        source: the opened checkpoint.
        path: an existing empty directory.
        progress: told after each tensor how many bytes it had.

    Returns:
        What the reader of the directory should know, a sentence each.

    Raises:
        CheckpointError: the model is another one than these files can hold; the settings are named.
    """
    model = model_of_source(source)
    told = {
        "num_attention_heads": model.num_attention_heads,
        "hidden_act": model.hidden_act,
        "top_query_layer": model.top_query_layer,
        "layernorm_epsilon": model.norm_epsilon,
    }
    if model.moe.num_experts:
        told["num_experts_chosen"] = model.moe.moe_router_topk
    _check(source, model)
    check_names(source, {key for key in source.keys() if "@" not in key}, model)  # noqa: SIM118 - of the protocol
    shapes = our_shapes(model)
    parts_of: dict[str, list[tuple[str, int, int, int, bool]]] = {}
    for name, shape in shapes.items():
        for theirs, here, there, count, turned in sources_of(name, shape, model):
            parts_of.setdefault(theirs, []).append((name, here, there, count, turned))
    with (path / FILE_NAME).open("wb") as file:
        for theirs, parts in parts_of.items():
            name, *_, turned = parts[0]
            shape, dtype = theirs_shape(theirs, shapes[name], model, turned), source.info(name).dtype
            out = np.empty(swapped(shape) if turned else shape, storage_dtype(dtype))
            for ours, here, there, count, _ in parts:
                where = [(here, here + count), *((0, n) for n in out.shape[1:])]
                source.read_into(ours, where, out[there : there + count])
            stored = np.ascontiguousarray(out.swapaxes(-1, -2) if turned else out)
            if theirs.endswith((".ffn.mapping.bias", ".ffn.projection.bias")):
                stored = stored.reshape(1, len(stored), 1, -1)  # one for each expert
            _append(file, stored_name(theirs, model), stored, dtype)
            progress(out.nbytes)
        file.flush()
        os.fsync(file.fileno())
    write_durably(path / SETTINGS_NAME, json.dumps(told, indent=2))
    return write_tokenizer(source, path)[1]


def _check(source: TensorSource, model: TransformerConfig) -> None:
    """Raise CheckpointError unless a reader of these files would see this model."""
    if model.top_query_layer == "none":
        raise CheckpointError(f"{source.path}: the model has no query layer, and PanGu-alpha is what is written")
    seen = described_model(model)
    wrong = [
        f"{NAME_OF[field]}={value_of(model, field)!r}, {value_of(seen, field)!r} there"
        for field in DEFINING
        if has_effect(model, field) and value_of(model, field) != value_of(seen, field)
    ]
    if wrong:
        raise CheckpointError(f"{source.path}: these files have no such PanGu-alpha:\n{bullet_list(wrong)}")


def _append(file: BinaryIO, name: str, array: np.ndarray, dtype: str) -> None:
    data = array.reshape(-1).view(np.uint8).data
    for head, part in tensor_message(name, array.shape, dtype, data):
        file.write(head)
        file.write(part)
