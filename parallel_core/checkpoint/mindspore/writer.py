"""A PanGu-alpha model written as the merged `.ckpt` file that MindSpore's systems load."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from parallel_core.checkpoint.dtypes import storage_dtype
from parallel_core.checkpoint.huggingface.tensors import Part, our_shapes
from parallel_core.checkpoint.huggingface.tokenizer import write_tokenizer
from parallel_core.checkpoint.huggingface.writer import check_names, model_of_source
from parallel_core.checkpoint.layout_files import write_durably
from parallel_core.checkpoint.mindspore.files import swapped, tensor_message
from parallel_core.checkpoint.mindspore.pangu import SETTINGS_NAME, described_model, sources_of, stored_name
from parallel_core.checkpoint.mindspore.slices import stored_shapes
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
    sources = {name: sources_of(name, shape, model) for name, shape in shapes.items()}

    def name_and_form(theirs: str, array: np.ndarray) -> tuple[str, np.ndarray]:
        of_experts = theirs.endswith((".ffn.mapping.bias", ".ffn.projection.bias"))
        return stored_name(theirs, model), array.reshape(1, len(array), 1, -1) if of_experts else array

    write_ckpt_file(path / FILE_NAME, source, shapes, sources, name_and_form, progress)
    write_durably(path / SETTINGS_NAME, json.dumps(told, indent=2))
    return write_tokenizer(source, path)[1]


def write_ckpt_file(
    file: Path,
    source: TensorSource,
    shapes: Mapping[str, tuple[int, ...]],
    sources: Mapping[str, Sequence[Part]],
    name_and_form: Callable[[str, np.ndarray], tuple[str, np.ndarray]],
    progress: Callable[[int], None],
) -> None:
    """Write a model's parameters under other names into one `.ckpt` file, one tensor in memory at a time.

    Args:
        file: the new file.
        source: the opened checkpoint.
        shapes: of our tensors.
        sources: which rows of theirs each of ours consists of.
        name_and_form: from a name of `sources` and its array, what is stored.
        progress: told after each tensor how many bytes it had.
    """
    rows: dict[str, list[tuple[str, Part]]] = {}
    for ours, parts in sources.items():
        for part in parts:
            rows.setdefault(part.name, []).append((ours, part))
    stored = stored_shapes(shapes, sources)
    with file.open("wb") as handle:
        for theirs, of_ours in rows.items():
            turned, dtype = of_ours[0][1].transpose, source.info(of_ours[0][0]).dtype
            out = np.empty(swapped(stored[theirs]) if turned else stored[theirs], storage_dtype(dtype))
            for ours, part in of_ours:
                where = [(part.ours, part.ours + part.rows), *((0, n) for n in out.shape[1:])]
                source.read_into(ours, where, out[part.theirs : part.theirs + part.rows])
            name, array = name_and_form(theirs, np.ascontiguousarray(out.swapaxes(-1, -2) if turned else out))
            for head, data in tensor_message(name, array.shape, dtype, array.reshape(-1).view(np.uint8).data):
                handle.write(head)
                handle.write(data)
            progress(out.nbytes)
        handle.flush()
        os.fsync(handle.fileno())


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
