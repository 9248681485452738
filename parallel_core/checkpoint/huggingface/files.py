"""Which files of a Hugging Face directory hold its weights."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from parallel_core.checkpoint.huggingface.values import read_json
from parallel_core.checkpoint.layout_files import TRACKER_NAME
from parallel_core.checkpoint.safetensors_file import read_header
from parallel_core.checkpoint.source import Blob
from parallel_core.errors import CheckpointError, bullet_list

CONFIG_NAME = "config.json"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
_OTHERS = {
    "pytorch_model*.bin*": "PyTorch pickles",
    "tf_model*.h5": "TensorFlow weights",
    "flax_model*.msgpack": "Flax weights",
    "*.gguf": "GGUF files",
}
_CONVERT = (
    "convert them first, where transformers is installed: python -c \"from transformers import AutoModelForCausalLM as "
    "M; M.from_pretrained('{path}').save_pretrained('NEW_DIR')\""
)


def is_hugging_face(path: Path) -> bool:
    """Tell whether a directory is a Hugging Face model's, whatever form its weights have, if they are there at all."""
    return (path / CONFIG_NAME).exists() and not (path / TRACKER_NAME).exists()


def stored_tensors(path: Path) -> dict[str, Blob]:
    """Return every tensor of the model, unread, by the name it is stored under.

    The index says which file holds which tensor; without one there is `model.safetensors`, or a complete set of shards.
    Other files are left alone.

    Raises:
        CheckpointError: a file is missing, ambiguous, damaged or of another kind; it is named.
    """
    if (path / "adapter_config.json").exists():
        raise CheckpointError(f"{path / 'adapter_config.json'}: an adapter belongs to this model; merge it first")
    if (path / INDEX_NAME).exists():
        return _by_index(path)
    if (path / SINGLE_NAME).exists():
        return _header(path / SINGLE_NAME)
    blobs: dict[str, Blob] = {}
    for file in _shards(path):
        found = _header(file)
        twice = blobs.keys() & found.keys()
        if twice:
            raise CheckpointError(f"{file}: {sorted(twice)[0]} is in another shard too, and there is no {INDEX_NAME}")
        blobs.update(found)
    return blobs


def _by_index(path: Path) -> dict[str, Blob]:
    where = read_json(path / INDEX_NAME).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise CheckpointError(f"{path / INDEX_NAME}: weight_map takes an object, the name of a file for each tensor")
    names = sorted(set(where.values()))
    strange = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
    if strange:
        raise CheckpointError(f"{path / INDEX_NAME}: {strange[0]!r} is not the name of a safetensors file beside it")
    if SINGLE_NAME not in names and (path / SINGLE_NAME).exists():
        raise CheckpointError(
            f"{path} holds {SINGLE_NAME} and {INDEX_NAME}, which names other files; remove the one that is stale"
        )
    missing = [name for name in names if not (path / name).exists()]
    if missing:
        raise CheckpointError(f"{path}: {len(missing)} of {len(names)} shards are missing:\n{bullet_list(missing)}")
    headers = {name: _header(path / name) for name in names}
    lost = [f"{tensor} in {file}" for tensor, file in where.items() if tensor not in headers[file]]
    if lost:
        raise CheckpointError(f"{path}: {len(lost)} tensors are not where {INDEX_NAME} says:\n{bullet_list(lost)}")
    return {tensor: headers[file][tensor] for tensor, file in where.items()}


def _shards(path: Path) -> Iterator[Path]:
    """Yield the shards of a directory without an index, which must be one complete set."""
    found = {file.name: _SHARD.fullmatch(file.name) for file in path.glob("model-*.safetensors")}
    totals = {match[2] for match in found.values() if match}
    if len(totals) > 1:
        raise CheckpointError(f"{path} holds shards of several saves ({', '.join(sorted(found))}), and no {INDEX_NAME}")
    if totals:
        total = totals.pop()
        wanted = [f"model-{number:05d}-of-{total}.safetensors" for number in range(1, int(total) + 1)]
        missing = [name for name in wanted if name not in found]
        if missing:
            raise CheckpointError(f"{path}: {len(missing)} of {total} shards are missing:\n{bullet_list(missing)}")
        yield from (path / name for name in wanted)
        return
    for pattern, what in _OTHERS.items():
        files = sorted(file.name for file in path.glob(pattern))
        if files:
            how = _CONVERT.format(path=path) if what != "GGUF files" else "take the model's safetensors files"
            raise CheckpointError(f"{path} holds {what} ({files[0]}), which are not read; {how}")
    others = sorted(file.name for file in path.glob("*.safetensors"))
    only = f", only {', '.join(others)}" if others else ""
    raise CheckpointError(f"{path} holds neither {SINGLE_NAME} nor {INDEX_NAME}{only}")


def _header(file: Path) -> dict[str, Blob]:
    if not file.is_file():
        raise CheckpointError(f"{file} is not a file")
    return read_header(file)[0]
