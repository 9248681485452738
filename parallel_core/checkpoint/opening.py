"""Opening a checkpoint of whatever format."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from parallel_core.checkpoint.huggingface import HuggingFaceCheckpoint, is_hugging_face
from parallel_core.checkpoint.layout_files import os_errors_named
from parallel_core.checkpoint.lora import MergedAdapter, base_directory, check_base, is_adapter
from parallel_core.checkpoint.megatron.dist_reader import MegatronDistCheckpoint
from parallel_core.checkpoint.megatron.torch_reader import MegatronTorchCheckpoint
from parallel_core.checkpoint.mindspore import (
    MindFormersCheckpoint,
    PanguCheckpoint,
    is_mindformers_directory,
    is_pangu,
)
from parallel_core.checkpoint.native import NativeCheckpoint, find_checkpoint, is_native, require_intact
from parallel_core.checkpoint.peft import is_peft, read_peft
from parallel_core.checkpoint.source import TensorSource
from parallel_core.errors import CheckpointError


def open_checkpoint(path: str | Path, allow_inert: Iterable[str] = (), base: str = "") -> TensorSource:
    """Return a checkpoint as global tensors; the format is recognised by the files in the directory.

    A directory of adapters, native or PEFT, is read as its base model with the adapters merged into it.

    Args:
        path: one checkpoint's own directory (see `find_checkpoint`).
        allow_inert: names of further classes that a Megatron pickle may mention, to be read as inert data.
        base: of adapters, the base model's directory, over the one that they name.

    Raises:
        CheckpointError: it is no checkpoint, or one that cannot be read; a base is given for what has none.
    """
    with os_errors_named(Path(path)):
        source = _open(Path(path), allow_inert, base)
    if base and not isinstance(source, MergedAdapter):
        raise CheckpointError(f"{path} holds a model, which has no base model; leave {base} out")
    return source


def _open_model(adapter: Path, directory: str | Path, allow_inert: Iterable[str]) -> TensorSource:
    if not Path(directory).is_dir():
        raise CheckpointError(
            f"{adapter} is an adapter of {directory}, which is no directory here; write its base model's directory as "
            "base_model_name_or_path in its adapter_config.json"
        )
    base = _open(find_checkpoint(directory, check=False), allow_inert)
    if isinstance(base, MergedAdapter):
        raise CheckpointError(f"{adapter} is an adapter of an adapter; merge {base.path} first (--to native)")
    return base


def _open(path: Path, allow_inert: Iterable[str], base: str = "") -> TensorSource:
    if is_peft(path):
        return read_peft(path, lambda named: _open_model(path, named, allow_inert), base)
    if is_native(path):
        source = NativeCheckpoint(path)
        if not is_adapter(source.common):
            return source
        return MergedAdapter(_open_model(path, base_directory(source, base), allow_inert), source)
    if (path / ".metadata").exists() or (path / "metadata.json").exists():
        return MegatronDistCheckpoint(path, allow_inert)
    if any(path.glob("mp_rank_*")):
        return MegatronTorchCheckpoint(path, allow_inert)
    if is_hugging_face(path):
        return HuggingFaceCheckpoint(path)
    if is_mindformers_directory(path):
        return MindFormersCheckpoint(path)
    if is_pangu(path):
        return PanguCheckpoint(path)
    raise CheckpointError(f"{path} is no checkpoint of a known format")


def require_intact_source(source: TensorSource) -> None:
    """Compare every file of what was opened with its checksum, of adapters those of the base model, too.

    Raises:
        CheckpointError: with what is damaged.
    """
    parts = (source.adapter, source.base) if isinstance(source, MergedAdapter) else (source,)
    for part in parts:
        require_intact(Path(part.path))


def open_adapter(path: Path, chosen_base: str = "") -> tuple[TensorSource | None, TensorSource]:
    """Return the adapter in a directory, native or PEFT, None where it holds a whole model, and the base model.

    Args:
        path: one checkpoint's own directory.
        chosen_base: the base model's directory, over what the adapter names.

    Raises:
        CheckpointError: the base model is not there or another one.
    """
    if is_peft(path):
        merged = read_peft(path, lambda named: _open_model(path, named, ()), chosen_base)
        return merged.adapter, merged.base
    if not is_native(path):
        return None, open_checkpoint(path)
    source = NativeCheckpoint(path)
    if not is_adapter(source.common):
        return None, source
    base = open_checkpoint(find_checkpoint(base_directory(source, chosen_base), check=False))
    check_base(source, base)
    return source, base
