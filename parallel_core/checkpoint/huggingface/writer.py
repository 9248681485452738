"""A checkpoint written as a Hugging Face directory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from parallel_core.checkpoint.dtypes import convert, storage_dtype
from parallel_core.checkpoint.huggingface.architecture import Architecture
from parallel_core.checkpoint.huggingface.files import CONFIG_NAME, INDEX_NAME, SINGLE_NAME
from parallel_core.checkpoint.huggingface.tables import ARCHITECTURES
from parallel_core.checkpoint.huggingface.tensors import OUTPUT, OUTPUT_BIAS, WORD_EMBEDDINGS, Part, is_norm, our_shapes
from parallel_core.checkpoint.huggingface.tokenizer import write_tokenizer
from parallel_core.checkpoint.huggingface.values import Wrong
from parallel_core.checkpoint.layout_files import write_durably
from parallel_core.checkpoint.safetensors_file import StreamTensor, write_safetensors
from parallel_core.checkpoint.source import TensorSource
from parallel_core.config.model_keys import model_of_settings
from parallel_core.config.schema import TransformerConfig
from parallel_core.errors import CheckpointError, ConfigError, bullet_list


def write_hugging_face(
    source: TensorSource, path: Path, progress: Callable[[int], None], max_file_bytes: int = 5_000_000_000
) -> list[str]:
    """Write a model's parameters as a Hugging Face directory, one tensor in memory at a time.

    Padding rows of the vocabulary are left out when its true size is known. Norm weights that are kept minus one are
    written whole where the architecture keeps them so. Tokenizer files go along where the checkpoint knows of some.

    Args:
        source: the opened checkpoint.
        path: an existing empty directory.
        progress: told after each tensor how many bytes it had.
        max_file_bytes: size at which a new file begins.

    Returns:
        What the reader of the directory should know, a sentence each.

    Raises:
        CheckpointError: no architecture that is written has such a model; the settings are named.
    """
    model = model_of_source(source)
    names = {key for key in source.keys() if "@" not in key}  # noqa: SIM118 - a method of the protocol
    architecture, written, offset = _choose(source, model)
    check_names(source, names, model)
    dtype = source.info(WORD_EMBEDDINGS).dtype
    table = architecture.tensors
    tensors = _their_tensors(source, table.parts(model), offset, progress)
    for copy, ours in table.copied(model).items():
        tensors[copy] = tensors[table.top[ours if model.untie_embeddings_and_output_weights else WORD_EMBEDDINGS]]
    _write_files(path, tensors, max_file_bytes)
    ids, notes = write_tokenizer(source, path)
    kept = _kept(source, architecture)
    config = {**kept, **ids, **written, "torch_dtype": dtype, "dtype": dtype}
    write_durably(path / CONFIG_NAME, json.dumps(config, indent=2))
    return notes


def architecture_of(source: TensorSource) -> tuple[TransformerConfig, Architecture]:
    """Return a checkpoint's model, and the architecture that has it.

    Raises:
        CheckpointError: no architecture that is written has such a model.
    """
    model = model_of_source(source)
    return model, _choose(source, model)[0]


def model_of_source(source: TensorSource) -> TransformerConfig:
    """Return what a checkpoint holds, with the vocabulary's true size.

    Raises:
        CheckpointError: it does not say what model it is.
    """
    settings = source.common.get("model_config")
    if not isinstance(settings, Mapping) or not settings.get("num_layers"):
        raise CheckpointError(f"{source.path}: the checkpoint does not say what model it is (no `model_config`)")
    try:
        model = model_of_settings(settings)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{source.path}: `model_config`: {error}") from None
    rows, true_size = source.info(WORD_EMBEDDINGS).shape[0], settings.get("vocab_size")
    if isinstance(true_size, int) and not isinstance(true_size, bool) and 0 < true_size <= rows:
        rows = true_size
    untied = OUTPUT in source.keys()  # noqa: SIM118 - a method of the protocol
    return replace(model, vocab_size=rows, untie_embeddings_and_output_weights=untied)


def _choose(source: TensorSource, model: TransformerConfig) -> tuple[Architecture, dict[str, Any], float]:
    """Return the architecture that has this model, what its config says, and what is added to stored norm weights."""
    hint = (source.common.get("hugging_face") or {}).get("model_type")
    first = [ARCHITECTURES[hint]] if hint in ARCHITECTURES else []
    refusals: list[tuple[int, str, str]] = []
    for architecture in [*first, *ARCHITECTURES.values()]:
        stored_so = bool(architecture.fixed["apply_layernorm_1p"])
        try:
            written = architecture.write(replace(model, apply_layernorm_1p=stored_so))
            return architecture, written, float(model.apply_layernorm_1p) - float(stored_so)
        except Wrong as error:
            lines = str(error).splitlines()
            refusals.append((len(lines), architecture.model_type, "; ".join(lines)))
    _, nearest, lines_of = min(refusals, key=lambda refusal: refusal[0])
    raise CheckpointError(
        f"{source.path}: no architecture that is written for Hugging Face has this model; {nearest} is nearest, but "
        f"for: {lines_of}"
    )


def check_names(source: TensorSource, names: set[str], model: TransformerConfig) -> None:
    """Return if a checkpoint holds the tensors of a model, and no others.

    Raises:
        CheckpointError: it holds others, or of another shape.
    """
    shapes = our_shapes(model)
    foreign, missing = sorted(names - shapes.keys()), sorted(shapes.keys() - names)
    if foreign or missing:
        lines = [*foreign, *(f"missing {name}" for name in missing)]
        raise CheckpointError(
            f"{source.path}: {len(foreign)} tensors are not of the model that its settings describe, {len(missing)} "
            f"are missing:\n{bullet_list(lines)}"
        )
    for name, shape in shapes.items():
        found = source.info(name).shape
        padded = name in (WORD_EMBEDDINGS, OUTPUT, OUTPUT_BIAS) and found[1:] == shape[1:] and found > shape
        if found != shape and not padded:
            raise CheckpointError(f"{source.path}: {name} has shape {list(found)}, its settings need {list(shape)}")


def _kept(source: TensorSource, architecture: Architecture) -> dict[str, Any]:
    """Return what the config.json that this model came from said beside what defines the model."""
    kept = (source.common.get("hugging_face") or {}).get("config") or {}
    dropped = ("transformers_version", "auto_map", "_name_or_path")
    return {key: value for key, value in kept.items() if key in architecture.neutral and key not in dropped}


def _their_tensors(
    source: TensorSource, table: Mapping[str, list[Part]], offset: float,
    progress: Callable[[int], None],
) -> dict[str, StreamTensor]:  # fmt: skip
    """Return their tensors by name, each put together from our rows when it is written."""
    rows_of: dict[str, list[tuple[str, Part]]] = {}
    for name, parts in table.items():
        for part in parts:
            rows_of.setdefault(part.name, []).append((name, part))
    result = {}
    for theirs, pairs in rows_of.items():
        first, turned = pairs[0][0], pairs[0][1].transpose
        info = source.info(first)
        below = info.shape[2 if pairs[0][1].expert is not None else 1 :]
        shape = (sum(part.rows for _, part in pairs), *below)
        added = offset if is_norm(first) else 0.0
        stored = shape[::-1] if turned else shape
        read = _reader(source, pairs, shape, info.dtype, added, progress)
        result[theirs] = StreamTensor.reading(stored, info.dtype, read)
    return result


def _reader(
    source: TensorSource, pairs: list[tuple[str, Part]], shape: tuple[int, ...], dtype: str, added: float,
    progress: Callable[[int], None],
) -> Callable[[], np.ndarray]:  # fmt: skip
    def read() -> np.ndarray:
        out = np.empty(shape, storage_dtype(dtype))
        for ours, part in pairs:
            target = out[part.theirs : part.theirs + part.rows]
            where = [(part.ours, part.ours + part.rows), *((0, n) for n in shape[1:])]
            if part.expert is not None:
                where, target = [(part.expert, part.expert + 1), *where], target[None]
            source.read_into(ours, where, target)
        if added:
            out = convert(convert(out, dtype, "float32") + np.float32(added), "float32", dtype)
        progress(out.nbytes)
        return out.T if pairs[0][1].transpose and out.ndim == 2 else out

    return read


def _write_files(path: Path, tensors: Mapping[str, StreamTensor], max_file_bytes: int) -> None:
    files = list(_files(tensors, max_file_bytes))
    where: dict[str, str] = {}
    for i, members in enumerate(files):
        file = SINGLE_NAME if len(files) == 1 else f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        write_safetensors(path / file, {name: tensors[name] for name in members}, {"format": "pt"})
        where.update(dict.fromkeys(members, file))
    if len(files) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        write_durably(path / INDEX_NAME, json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2))


def _files(tensors: Mapping[str, StreamTensor], max_file_bytes: int) -> Iterable[list[str]]:
    members: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if members and size + tensor.nbytes > max_file_bytes:
            yield members
            members, size = [], 0
        members.append(name)
        size += tensor.nbytes
    yield members
