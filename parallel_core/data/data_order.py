"""What determines the order of samples, as a description and a hash to keep in a checkpoint.

Megatron derives the order from the number of samples asked for, so another `--train-iters`, blend or split changes it
without a word. Here only what really changes the order counts: as long as another `--train-iters` leaves the number of
epochs the same, the samples come in the same order and the hash stays the same.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from parallel_core.data.blended_dataset import BlendedDataset
from parallel_core.data.gpt_dataset import GPTDataset
from parallel_core.data.masked_words import MaskedWordsDataset
from parallel_core.data.record_dataset import RecordDataset
from parallel_core.data.sft_dataset import SFTDataset
from parallel_core.data.squad import SpanDataset

_FORMAT = 1
_BLOCK = 1 << 20


def describe_data_order(
    dataset: object,
    *,
    dataloader_type: str = "single",
    micro_batch_size: int = 1,
    data_parallel_size: int = 1,
    data_sharding: bool = True,
) -> dict[str, Any]:
    """Return everything that decides which sample comes when, in JSON types.

    Paths are in it for people to read; the hash leaves them out, so data may be moved. The `single` order does not
    depend on the layout. The `cyclic` one does: on micro_batch_size x data_parallel_size through the length of an
    epoch, and with `data_sharding` on both through the ranks' shares.

    Args:
        dataset: The training dataset; None (no data on this rank) and unknown types give their name and length.
        dataloader_type: `single`, `cyclic` or `external`.
        micro_batch_size: Samples per micro-batch of one rank.
        data_parallel_size: Number of data parallel ranks.
        data_sharding: Of the cyclic sampler.
    """
    sampler: dict[str, Any] = {"dataloader_type": dataloader_type}
    if dataloader_type == "cyclic":
        sampler["data_sharding"] = data_sharding
        sampler["micro_batch_size"] = micro_batch_size
        sampler["data_parallel_size"] = data_parallel_size
        sampler["num_samples"] = len(dataset) if hasattr(dataset, "__len__") else None
    return {"format": _FORMAT, "sampler": sampler, "dataset": _describe(dataset)}


def data_order_fingerprint(description: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a description of `describe_data_order`, hexadecimal; paths do not count."""
    return hashlib.sha256(json.dumps(_without_paths(description), sort_keys=True).encode("utf-8")).hexdigest()


def explain_data_order_change(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Return one line per difference between two descriptions; none when the order is the same."""
    return _differences("", _without_paths(saved), _without_paths(current))


def _describe(dataset: object) -> dict[str, Any]:
    if isinstance(dataset, BlendedDataset):
        return {
            "class": "BlendedDataset",
            "exhaustive": dataset.size is None,
            "weights": [float(weight) for weight in dataset.weights],
            "datasets": [_describe(part) for part in dataset.datasets],
        }
    if isinstance(dataset, GPTDataset):
        plan, config = dataset.plan, dataset.config
        return {
            "class": "GPTDataset",
            "path": dataset.dataset_path,
            "lengths_sha256": _sequence_lengths_hash(dataset.dataset.sequence_lengths),
            "tokens_sha256": _tokens_hash(dataset.dataset_path),
            "split": dataset.index_split.name,
            "first_sequence": int(dataset.indices[0]),
            "end_sequence": int(dataset.indices[-1]) + 1,
            "random_seed": config.random_seed,
            "sequence_length": config.sequence_length,
            "add_extra_token_to_sequence": config.add_extra_token_to_sequence,
            "num_epochs": plan.num_epochs,
            "separate_final_epoch": plan.separate_final_epoch,
        }
    if isinstance(dataset, RecordDataset):
        return dataset.describe_order()
    if isinstance(dataset, SFTDataset):
        return {
            "class": "SFTDataset",
            "path": dataset.dataset_path,
            "conversations_sha256": dataset.dataset.checksum,
            "lengths_sha256": _sequence_lengths_hash(dataset.dataset.sequence_lengths),
            "split": dataset.index_split.name,
            "first_sequence": int(dataset.indices[0]),
            "end_sequence": int(dataset.indices[-1]) + 1,
            "random_seed": dataset.config.random_seed,
            "sequence_length": dataset.config.sequence_length,
        }
    if isinstance(dataset, SpanDataset):
        return dataset.order()
    if isinstance(dataset, MaskedWordsDataset):
        return {
            **{key: value for key, value in dataset.unique_identifiers.items() if not key.startswith("dataset_path")},
            "path": dataset.dataset_path,
            "lengths_sha256": _sequence_lengths_hash(dataset.dataset.sequence_lengths),
            "tokens_sha256": _tokens_hash(dataset.dataset_path),
            "num_samples": len(dataset),  # whole epochs, shuffled together
        }
    length = len(dataset) if hasattr(dataset, "__len__") else None
    return {"class": type(dataset).__name__, "length": length}


def _sequence_lengths_hash(lengths: np.ndarray) -> str:
    digest = hashlib.sha256(str(len(lengths)).encode())
    for start in range(0, len(lengths), _BLOCK):
        digest.update(np.ascontiguousarray(lengths[start : start + _BLOCK]).tobytes())
    return digest.hexdigest()


def _tokens_hash(path_prefix: str | None) -> str | None:
    """Return a hash of the size and of 16 spread blocks of the token file: quick at any size, blind to rare edits."""
    if path_prefix is None:
        return None
    path = path_prefix + ".bin"
    size = os.path.getsize(path)
    digest = hashlib.sha256(str(size).encode())
    block = 1 << 16
    with open(path, "rb") as handle:
        for number in range(16):
            handle.seek(max(0, size - block) * number // 15)
            digest.update(handle.read(block))
    return digest.hexdigest()


def _without_paths(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_paths(item) for key, item in value.items() if key != "path"}
    if isinstance(value, (list, tuple)):
        return [_without_paths(item) for item in value]
    return value


def _differences(place: str, saved: Any, current: Any) -> list[str]:
    if isinstance(saved, Mapping) and isinstance(current, Mapping):
        lines: list[str] = []
        for key in sorted(set(saved) | set(current)):
            inner = f"{place}.{key}" if place else key
            lines += _differences(inner, saved.get(key), current.get(key))
        return lines
    if isinstance(saved, list) and isinstance(current, list) and len(saved) == len(current):
        lines = []
        for number, (old, new) in enumerate(zip(saved, current)):
            lines += _differences(f"{place}[{number}]", old, new)
        return lines
    return [] if saved == current else [f"{place}: saved {_short(saved)}, now {_short(current)}"]


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)} entries"
    text = repr(value)
    return text if len(text) <= 40 else text[:16] + "..." + text[-1]
