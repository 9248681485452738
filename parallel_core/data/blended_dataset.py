"""Several datasets as one, in Megatron's order."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from parallel_core.data.blending import build_blending_indices, build_exhaustive_blending_indices
from parallel_core.data.config import GPTDatasetConfig, normalize
from parallel_core.data.files import atomic_save_array, atomic_write, exclusive_lock
from parallel_core.data.gpt_dataset import GPTDataset, Sample
from parallel_core.errors import DataError

logger = logging.getLogger(__name__)


class BlendedDataset:
    """A blend of datasets by weight.

    Args:
        datasets: The parts, all of one split.
        weights: Their shares; with `size=None` their whole numbers of samples.
        size: Samples of the blend; None takes every sample of every part once.
        config: Says where indices are cached.

    Raises:
        DataError: A part has fewer samples than the blend takes from it.
    """

    def __init__(
        self, datasets: Sequence[GPTDataset], weights: Sequence[float], size: int | None, config: GPTDatasetConfig
    ) -> None:
        if len(datasets) != len(weights) or not datasets:
            raise DataError(f"a blend of {len(datasets)} datasets has {len(weights)} weights; give one for each.")
        self.datasets = list(datasets)
        self.index_split = datasets[0].index_split
        self.weights = list(weights) if size is None else normalize(weights)
        self.size = size
        self.config = config
        self.built_anew_on_cache_miss = False
        self.dataset_index, self.dataset_sample_index = self._load_or_build()
        used = np.bincount(np.asarray(self.dataset_index, np.int64), minlength=len(self.datasets))
        for dataset, count in zip(self.datasets, used):
            if count > len(dataset):
                raise DataError(
                    f"the blend takes {count} samples of {dataset.dataset_path} ({self.index_split.name}), which has "
                    f"{len(dataset)}. Raise mid_level_dataset_surplus (now "
                    f"{config.mid_level_dataset_surplus}) a little."
                )

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        """What identifies the cached indices, with Megatron's keys in Megatron's order."""
        return {
            "class": type(self).__name__,
            "datasets": [dataset.unique_identifiers for dataset in self.datasets],
            "split": self.index_split.name,
            "weights": self.weights,
            "size": self.size,
        }

    @property
    def unique_description(self) -> str:
        """`unique_identifiers` as indented JSON."""
        return json.dumps(self.unique_identifiers, indent=4)

    @property
    def unique_description_hash(self) -> str:
        """MD5 of `unique_description`, the first part of the cached files' names."""
        return hashlib.md5(self.unique_description.encode("utf-8"), usedforsecurity=False).hexdigest()

    def __len__(self) -> int:
        return int(self.dataset_index.shape[0])

    def __getitem__(self, index: int) -> Sample:
        """Return sample `index` of the blend: the part's sample and its `dataset_id`, int32 scalar."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        dataset_id = int(self.dataset_index[index])
        sample = self.datasets[dataset_id][int(self.dataset_sample_index[index])]
        return {"dataset_id": np.array(dataset_id, np.int32), **sample}

    def _build(self) -> tuple[np.ndarray, np.ndarray]:
        if self.size is None:
            return build_exhaustive_blending_indices([int(weight) for weight in self.weights])
        return build_blending_indices(self.weights, self.size)

    def _load_or_build(self) -> tuple[np.ndarray, np.ndarray]:
        folder = self.config.path_to_cache
        if folder is None:
            return self._build()
        base = os.path.join(folder, f"{self.unique_description_hash}-{type(self).__name__}-{self.index_split.name}")
        try:
            with exclusive_lock(base + ".lock"):
                return self._load(base) or self._build_and_save(base)
        except OSError as error:
            logger.warning("the blend's indices are not cached: %s cannot be written (%s)", folder, error)
            return self._build()

    def _load(self, base: str) -> tuple[np.ndarray, np.ndarray] | None:
        if not os.path.isfile(f"{base}-description.txt"):
            return None
        try:
            dataset_index = np.load(f"{base}-dataset_index.npy", mmap_mode="r", allow_pickle=False)
            sample_index = np.load(f"{base}-dataset_sample_index.npy", mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        size = sum(int(weight) for weight in self.weights) if self.size is None else self.size
        return (dataset_index, sample_index) if dataset_index.shape == sample_index.shape == (size,) else None

    def _build_and_save(self, base: str) -> tuple[np.ndarray, np.ndarray]:
        self.built_anew_on_cache_miss = True
        built = self._build()
        for name, array in zip(("dataset_index", "dataset_sample_index"), built):
            atomic_save_array(f"{base}-{name}.npy", array)
        with atomic_write(f"{base}-description.txt") as handle:
            handle.write(self.unique_description.encode("utf-8"))
        return built
