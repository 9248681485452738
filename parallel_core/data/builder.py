"""Train, valid and test datasets from a configuration."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from parallel_core.data.blended_dataset import BlendedDataset
from parallel_core.data.config import Blend, GPTDatasetConfig, Split, SplitMatrix, normalize
from parallel_core.data.conversations import Conversations
from parallel_core.data.gpt_dataset import GPTDataset, SequenceSource, open_sequences
from parallel_core.data.indexed_dataset import open_token_ids
from parallel_core.data.masked_words import MaskedWordsConfig, MaskedWordsDataset
from parallel_core.data.record_dataset import RecordDataset, is_mindrecord, open_records
from parallel_core.data.sft_dataset import SFTDataset
from parallel_core.errors import ConfigError

logger = logging.getLogger(__name__)
Part = GPTDataset | SFTDataset | MaskedWordsDataset
Dataset = Part | BlendedDataset | RecordDataset
Sizes = tuple[int | None, int | None, int | None]
_WHOLE: tuple[float, float] = (0.0, 1.0)


def train_valid_test_num_samples(
    *,
    global_batch_size: int,
    train_iters: int | None,
    eval_interval: int | None,
    eval_iters: int,
    train_samples: int | None = None,
) -> tuple[int, int, int]:
    """Return how many samples a run asks of each split, as Megatron counts them.

    Args:
        global_batch_size: Samples per iteration.
        train_iters: Iterations of the run (with `train_samples` only the number of evaluations follows from it).
        eval_interval: Iterations between evaluations; None or 0 for none on the way.
        eval_iters: Batches of one evaluation.
        train_samples: Samples of the run, if it is measured in samples.
    """
    if train_iters is None:
        if train_samples is None:
            raise ConfigError("neither train_iters nor train_samples is given; one of them sets the length of the run.")
        train_iters = train_samples // global_batch_size
    train = train_samples if train_samples is not None else train_iters * global_batch_size
    evaluations = train_iters // eval_interval + 1 if eval_interval else 1
    return train, evaluations * eval_iters * global_batch_size, eval_iters * global_batch_size


def build_train_valid_test_datasets(
    config: GPTDatasetConfig, num_samples: Sequence[int | None]
) -> tuple[Dataset | None, Dataset | None, Dataset | None]:
    """Return the three datasets; one is None when its split is empty.

    Args:
        config: What they are made from.
        num_samples: Samples asked of train, valid and test; None for one epoch.

    Raises:
        ConfigError: A weighted blend is to give one epoch, which weights cannot define.
        DataError: A file is missing or damaged, or a split has no tokens.
    """
    sizes: Sizes = (num_samples[0], num_samples[1], num_samples[2])
    if config.mock:
        return _as_triple(_split_dataset(None, config, config.split_matrix, sizes))
    if config.blend is not None:
        return _as_triple(_build_blend(config.blend, config, config.split_matrix, sizes))
    built: list[Dataset | None] = [None, None, None]
    for split, blend in zip(Split, config.blend_per_split or ()):
        if blend is not None:
            matrix = [_WHOLE if other is split else None for other in Split]
            own_size = [sizes[split.value] if other is split else 0 for other in Split]
            triple = _build_blend(blend, config, _as_triple(matrix), _as_triple(own_size))
            built[split.value] = triple[split.value]
    return _as_triple(built)


def _as_triple(values: Sequence) -> tuple:
    return values[0], values[1], values[2]


def _split_dataset(
    path_prefix: str | None, config: GPTDatasetConfig, matrix: SplitMatrix | None, sizes: Sizes
) -> list[Part | None]:
    sequences: SequenceSource
    if isinstance(config, MaskedWordsConfig):
        if path_prefix is None:
            raise ConfigError("mock data has no sentences to mask words of; give --data-path")
        kind: Any = MaskedWordsDataset
        sequences = documents = open_token_ids(path_prefix, mmap=config.mmap_bin_files)
        count = len(documents.document_indices) - 1
    elif config.chat is not None and path_prefix is not None:
        kind = SFTDataset
        sequences = Conversations(
            path_prefix, config.chat, config.tokenizer, config.eod_token_id, config.path_to_cache
        )
    else:
        kind, sequences = GPTDataset, open_sequences(path_prefix, config)
    if kind is not MaskedWordsDataset:
        count = len(sequences.sequence_lengths)
    datasets: list[Part | None] = [None, None, None]
    for split, (first, end) in _shares(count, path_prefix, matrix):
        indices = np.arange(first, end, dtype=np.int32)
        datasets[split.value] = kind(sequences, path_prefix, indices, sizes[split.value], split, config)
    return datasets


def _record_datasets(
    path: str, config: GPTDatasetConfig, matrix: SplitMatrix | None, sizes: Sizes
) -> list[RecordDataset | None]:
    records = open_records(path, config)
    datasets: list[RecordDataset | None] = [None, None, None]
    for split, bounds in _shares(len(records), path, matrix):
        datasets[split.value] = RecordDataset(records, path, bounds, sizes[split.value], split, config)
    return datasets


def _shares(
    count: int, path: str | None, matrix: SplitMatrix | None
) -> Iterator[tuple[Split, tuple[int, int]]]:
    """Yield the splits that have some of `count` sequences, with the first one and the one after the last."""
    for split, bounds in zip(Split, matrix or (None, None, None)):
        if bounds is None:
            continue
        first, end = int(round(bounds[0] * float(count))), int(round(bounds[1] * float(count)))
        if first == end:
            logger.warning(
                "the %s split of %s is empty: shares %s of %d sequences round to none",
                split.name,
                path or "mock data",
                bounds,
                count,
            )
            continue
        yield split, (first, end)


def sizes_per_dataset(weights: Sequence[float], sizes: Sizes, surplus: float = 0.0) -> list[Sizes]:
    """Return for each dataset the samples it gives to each split: `ceil(ceil(size * weight) * (1 + surplus))`."""
    return [
        _as_triple(
            [
                None if size is None else int(math.ceil(math.ceil(size * weight) * (1 + surplus)))
                for size in sizes
            ]
        )
        for weight in weights
    ]


def _build_blend(
    blend: Blend, config: GPTDatasetConfig, matrix: SplitMatrix | None, sizes: Sizes
) -> Sequence[Dataset | None]:
    records = [prefix for prefix in blend.prefixes if config.chat is None and is_mindrecord(prefix)]
    if records and (len(blend.prefixes) > 1 or blend.weights is not None):
        raise ConfigError(
            f"{records[0]} holds MindRecord files, which are read in their own order and not blended: give one file or "
            "folder alone, without a weight, or prepare them (preprocess_data --input-format mindrecord)."
        )
    if records and isinstance(config, MaskedWordsConfig):
        raise ConfigError(f"{records[0]} holds MindRecord files, which have no sentences to mask words of")
    if records:
        return _record_datasets(records[0], config, matrix, sizes)
    if len(blend.prefixes) == 1 and blend.weights is None:
        return _split_dataset(blend.prefixes[0], config, matrix, sizes)
    matrix = matrix or (None, None, None)
    weights = normalize(blend.weights) if blend.weights is not None else None
    if weights is None:
        buffers: list[Sizes] = [(None, None, None)] * len(blend.prefixes)
    else:
        for split, bounds, size in zip(Split, matrix, sizes):
            if bounds is not None and size is None:
                raise ConfigError(
                    f"{split.name} has weights {list(blend.weights or ())} but no number of samples; weights share out "
                    "a number. Give one (train_iters, eval_iters), or leave the weights out for one epoch."
                )
        buffers = sizes_per_dataset(weights, sizes, config.mid_level_dataset_surplus)
    with ThreadPoolExecutor(max(1, config.num_dataset_builder_threads)) as pool:
        parts = list(
            pool.map(lambda item: _split_dataset(item[0], config, matrix, item[1]), zip(blend.prefixes, buffers))
        )
    return [
        None if matrix[split.value] is None else _blend_of([part[split.value] for part in parts], weights, sizes, split)
        for split in Split
    ]


def _blend_of(
    parts: Sequence[Part | None], weights: list[float] | None, sizes: Sizes, split: Split
) -> BlendedDataset | None:
    present = [part for part in parts if part is not None]
    if not present:
        return None
    if len(present) != len(parts):
        raise ConfigError(
            f"{len(parts) - len(present)} of {len(parts)} datasets of the blend have no sequences for {split.name}: "
            "they are too small for this split. Use more data, another split, or data paths per split."
        )
    size = sizes[split.value]
    if weights is not None:
        target = sum(per_dataset[split.value] or 0 for per_dataset in sizes_per_dataset(weights, sizes))
        return BlendedDataset(present, weights, target, present[0].config)
    lengths = [len(part) for part in present]
    return BlendedDataset(present, lengths, None if size is None else min(size, sum(lengths)), present[0].config)
