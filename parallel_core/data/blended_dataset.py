"""Several datasets as one, in Megatron's order."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from parallel_core.data.blending import build_blending_indices, build_exhaustive_blending_indices
from parallel_core.data.config import GPTDatasetConfig, normalize
from parallel_core.data.gpt_dataset import GPTDataset, Sample
from parallel_core.data.index_cache import Described, IndexCache
from parallel_core.data.indices import check_index_memory
from parallel_core.data.masked_words import MaskedWordsDataset
from parallel_core.data.sft_dataset import SFTDataset
from parallel_core.errors import DataError


class BlendedDataset(Described):
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
        self,
        datasets: Sequence[GPTDataset | MaskedWordsDataset | SFTDataset],
        weights: Sequence[float],
        size: int | None,
        config: GPTDatasetConfig,
    ) -> None:
        if len(datasets) != len(weights) or not datasets:
            raise DataError(f"a blend of {len(datasets)} datasets has {len(weights)} weights; give one for each.")
        self.datasets = list(datasets)
        self.index_split = datasets[0].index_split
        self.weights = list(weights) if size is None else normalize(weights)
        self.size = size
        self.config = config
        (self.dataset_index, self.dataset_sample_index), self.built_anew_on_cache_miss = self._load_or_build()
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
        total = sum(map(int, self.weights)) if self.size is None else self.size
        check_index_memory((2 + 8) * total, total)
        if self.size is None:
            return build_exhaustive_blending_indices([int(weight) for weight in self.weights])
        return build_blending_indices(self.weights, self.size)

    def _load_or_build(self) -> tuple[tuple[np.ndarray, np.ndarray], bool]:
        """Return the indices and whether they were built and not found in the cache."""
        folder = self.config.path_to_cache
        if folder is None:
            return self._build(), False
        base = os.path.join(folder, f"{self.unique_description_hash}-{type(self).__name__}-{self.index_split.name}")
        # the description says everything that the indices of a blend depend on
        cache = IndexCache(base, self.unique_description, "description", ("dataset_index", "dataset_sample_index"))
        arrays, built = cache.get(lambda: dict(zip(("dataset_index", "dataset_sample_index"), self._build())))
        return (arrays["dataset_index"], arrays["dataset_sample_index"]), built
