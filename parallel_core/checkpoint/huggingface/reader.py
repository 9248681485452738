"""A Hugging Face directory as global tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from parallel_core.checkpoint.huggingface.architecture import Architecture
from parallel_core.checkpoint.huggingface.files import CONFIG_NAME, stored_tensors
from parallel_core.checkpoint.huggingface.tables import ARCHITECTURES, NOT_BUILT
from parallel_core.checkpoint.huggingface.tensors import OUTPUT, WORD_EMBEDDINGS, Part, our_shapes
from parallel_core.checkpoint.huggingface.values import Wrong, read_json
from parallel_core.checkpoint.source import Blob, Piece, PieceSource, TensorInfo
from parallel_core.config.model_keys import model_settings
from parallel_core.config.schema import TransformerConfig
from parallel_core.errors import CheckpointError, bullet_list

_COMPARED_ROWS = 1024


class HuggingFaceCheckpoint(PieceSource):
    """A Hugging Face model directory as global tensors; iteration 0, no optimizer state."""

    def __init__(self, path: str | Path) -> None:
        """Read `config.json` and the headers of the safetensors files.

        Raises:
            CheckpointError: the model is of another kind, or a tensor is missing, unexpected, misshapen or damaged.
        """
        path = Path(path)
        found = read_json(path / CONFIG_NAME)
        architecture = _architecture(path / CONFIG_NAME, found)
        try:
            model = architecture.read(found)
        except Wrong as error:
            lines = str(error).splitlines()
            told = f" {lines[0]}" if len(lines) == 1 else f" {len(lines)} settings:\n{bullet_list(lines, 20)}"
            raise CheckpointError(f"{path / CONFIG_NAME} ({architecture.model_type}):{told}") from None
        stored = stored_tensors(path)
        if model.num_layers > len(stored):
            raise CheckpointError(
                f"{path / CONFIG_NAME} has {model.num_layers} layers, the files hold {len(stored)} tensors"
            )
        model = architecture.tensors.without_absent_depths(model, stored)
        blobs = _named(path, architecture, stored, model)
        shapes, parts = our_shapes(model), architecture.tensors.parts(model)
        tensors = {name: _assembled(path, name, parts[name], blobs, shape) for name, shape in shapes.items()}
        super().__init__(path, "hugging face", tensors, _common(found, architecture, model))


def _architecture(file: Path, found: Mapping[str, Any]) -> Architecture:
    model_type = found.get("model_type")
    if isinstance(model_type, str) and model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    known = ", ".join(ARCHITECTURES)
    reason = NOT_BUILT.get(model_type) if isinstance(model_type, str) else None
    why = f" needs {reason}, which is not built;" if reason else " is not known here;"
    raise CheckpointError(f"{file}: model_type {model_type!r}{why} {known} are read")


def _common(found: Mapping[str, Any], architecture: Architecture, model: TransformerConfig) -> dict[str, Any]:
    rates = {
        field: found[key]
        for field, keys in (
            ("attention_dropout_rate", ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")),
            ("hidden_dropout_rate", ("hidden_dropout", "resid_pdrop", "hidden_dropout_prob")),
        )
        for key in keys
        if type(found.get(key)) in (int, float) and 0 <= found[key] < 1
    }
    kept = {key: value for key, value in found.items() if key in architecture.neutral}
    return {
        "iteration": 0,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "model_config": {**model_settings(model), "vocab_size": model.vocab_size},
        "config": {"model_config": rates},
        "hugging_face": {"model_type": architecture.model_type, "config": kept},
    }


def _named(
    path: Path, architecture: Architecture, stored: Mapping[str, Blob], model: TransformerConfig
) -> dict[str, Blob]:
    """Return the stored tensors by the names the table has, every one of them and no other."""
    _check_sizes(path, architecture, stored, model)
    table = architecture.tensors
    wanted = {part.name: name for name, parts in table.parts(model).items() for part in parts}
    blobs: dict[str, Blob] = {}
    left: list[str] = []
    for stored_name, blob in stored.items():
        old, new = next(((old, new) for old, new in table.older.items() if stored_name.endswith(old)), ("", ""))
        name = stored_name.removesuffix(old) + new
        full = name if name in wanted else table.prefix + name
        if full in wanted and full in blobs:
            raise CheckpointError(f"{path}: {full} is stored twice, with and without {table.prefix!r}")
        if full in wanted:
            blobs[full] = blob
        elif table.ignored.fullmatch(name) is None:
            left.append(name)
    for copy, ours in table.copied(model).items():
        name = copy if copy in left else copy.removeprefix(table.prefix)
        if name in left:
            left.remove(name)
            original = table.top.get(ours if model.untie_embeddings_and_output_weights else WORD_EMBEDDINGS, "")
            if not _equal(stored[name], blobs.get(original)):
                raise CheckpointError(f"{path}: {name} is another than {original}, which it has to repeat")
    head = table.top[OUTPUT]
    if head in left and not model.untie_embeddings_and_output_weights:
        left.remove(head)
        if not _equal(stored[head], blobs.get(table.top[WORD_EMBEDDINGS])):
            raise CheckpointError(
                f"{path}: {head} is another than {table.top[WORD_EMBEDDINGS]}; set tie_word_embeddings to false"
            )
    missing = [f"missing {name} (for {ours})" for name, ours in wanted.items() if name not in blobs]
    if left or missing:
        raise CheckpointError(
            f"{path}: {len(left)} tensors of no known place, {len(missing)} missing:\n{bullet_list([*left, *missing])}"
        )
    return blobs


def _check_sizes(
    path: Path, architecture: Architecture, stored: Mapping[str, Blob], model: TransformerConfig
) -> None:
    """Refuse sizes that no stored tensor can have, before anything is laid out by them."""
    longest = max((max(blob.shape, default=0) for blob in stored.values()), default=0)
    for name, size in (
        ("vocab_size", model.vocab_size),
        ("hidden_size", model.hidden_size),
        ("the width of the MLP", model.ffn_hidden_size),
        ("the width of all query heads", model.num_attention_heads * model.kv_channels),
        ("the width of all key heads", model.num_query_groups * model.kv_channels),
    ):
        if size > longest:
            raise CheckpointError(
                f"{path / CONFIG_NAME} ({architecture.model_type}): {name} is {size}, the longest stored dim {longest}"
            )


def _equal(one: Blob, other: Blob | None) -> bool:
    """Tell whether two stored matrices hold the same bits, a block of rows in memory at a time."""
    if other is None or (one.shape, one.dtype) != (other.shape, other.dtype) or len(one.shape) != 2:
        return False
    for start in range(0, one.shape[0], _COMPARED_ROWS):
        rows = [(start, min(start + _COMPARED_ROWS, one.shape[0])), (0, one.shape[1])]
        first, second = (blob.crop(rows).read().view(np.uint8) for blob in (one, other))
        if not np.array_equal(first, second):
            return False
    return True


def _assembled(
    path: Path, name: str, parts: list[Part], blobs: Mapping[str, Blob], shape: tuple[int, ...]
) -> tuple[TensorInfo, list[Piece]]:
    rows: dict[str, int] = {}
    for part in parts:
        rows[part.name] = rows.get(part.name, 0) + part.rows
    for theirs, count in rows.items():
        wanted = (count, *shape[2 if parts[0].expert is not None else 1 :])
        turned = any(part.transpose for part in parts)
        if blobs[theirs].shape != (wanted[::-1] if turned else wanted):
            raise CheckpointError(
                f"{path}: {theirs} has shape {list(blobs[theirs].shape)}, config.json needs "
                f"{list(wanted[::-1] if turned else wanted)}"
            )
    dtypes = sorted({blobs[part.name].dtype for part in parts})
    if len(dtypes) > 1:
        raise CheckpointError(f"{path}: {name} would be of several types ({', '.join(dtypes)})")
    return TensorInfo(shape, dtypes[0]), list(_pieces(parts, blobs))


def _pieces(parts: list[Part], blobs: Mapping[str, Blob]) -> Iterator[Piece]:
    for part in parts:
        blob = blobs[part.name].transposed() if part.transpose else blobs[part.name]
        cut = blob.crop([(part.theirs, part.theirs + part.rows), *((0, n) for n in blob.shape[1:])])
        start = (part.ours, *(0 for _ in blob.shape[1:]))
        if part.expert is None:
            yield Piece(start, cut.shape, cut)
        else:
            one = Blob(cut.path, cut.offset, cut.dtype, (1, *cut.shape), (0, *cut.strides))
            yield Piece((part.expert, *start), one.shape, one)
