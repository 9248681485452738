"""GPT samples of fixed length, cut from the documents of an indexed dataset in Megatron's order."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from typing import Any, NamedTuple, Protocol

import numpy as np

from parallel_core.data.config import GPTDatasetConfig, Split
from parallel_core.data.index_cache import Described, IndexCache
from parallel_core.data.indexed_dataset import open_token_ids
from parallel_core.data.indices import (
    EpochPlan,
    build_document_index,
    build_sample_index,
    build_shuffle_index,
    check_index_memory,
    num_samples_in,
    plan_epochs,
)
from parallel_core.data.masks import (
    attention_mask_from_document_starts,
    document_starts,
    loss_mask_and_positions,
)
from parallel_core.data.tokenizer.base import MegatronTokenizer
from parallel_core.errors import DataError

Sample = dict[str, np.ndarray]


class SequenceSource(Protocol):
    """What a GPT dataset reads tokens from: `IndexedDataset` and the mock one."""

    sequence_lengths: np.ndarray

    def get(self, index: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Return a part of a sequence."""


class SampleIndices(NamedTuple):
    """The three arrays that say which tokens sample i has."""

    document_index: np.ndarray
    """int32 [M]: documents in order, over all epochs."""
    sample_index: np.ndarray
    """int32 [N + 1, 2]: position in `document_index` and token offset of every sample."""
    shuffle_index: np.ndarray
    """uint32 [N]: order of samples."""


class MockSequences:
    """Megatron's synthetic documents: 100000 of them, each `1, 2, ..., L - 1, eod` with a random length below 4096.

    Args:
        tokenizer: Gives the end-of-document id; counting restarts before it reaches the vocabulary size.
    """

    size = 100_000
    max_sequence_length = 4096

    def __init__(self, tokenizer: MegatronTokenizer) -> None:
        generator = np.random.default_rng(seed=0)
        self.sequence_lengths = generator.integers(1, self.max_sequence_length, self.size, dtype=np.int32)
        self._eod = tokenizer.eod
        # Megatron counts on past a small vocabulary and its embedding fails; here ids wrap to stay legal
        self._counting = np.arange(1, self.max_sequence_length + 1, dtype=np.int64) % max(tokenizer.vocab_size, 1)

    def get(self, index: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Return `length` tokens of document `index` from `offset` on."""
        total = int(self.sequence_lengths[index])
        document = self._counting[:total].copy()
        document[-1] = self._eod
        return document[offset : total if length is None else offset + length]


class Samples(ABC):
    """What samples are, wherever their tokens come from: inputs, labels, masks and positions of one text each.

    Args:
        dataset_path: Where the tokens are, for messages; None for mock data.
        index_split: Which split this is.
        config: Options of the samples.
    """

    def __init__(self, dataset_path: str | None, index_split: Split, config: GPTDatasetConfig) -> None:
        self.dataset_path = dataset_path
        self.index_split = index_split
        self.config = config
        self._extra = int(config.add_extra_token_to_sequence)

    @abstractmethod
    def __len__(self) -> int:
        """Return how many samples there are."""

    def __getitem__(self, index: int) -> Sample:
        """Return sample `index`.

        Returns:
            `tokens`, `labels`, `position_ids` int32 [S], `loss_mask` float32 [S]; with `reset_attention_mask`
            `document_start` int32 [S], the first position each position may attend to; with `create_attention_mask`
            `attention_mask` bool [1, S, S], True where attention is forbidden.

        Raises:
            DataError: A token id is outside the vocabulary.
        """
        text = self._text(index)
        config = self.config
        pad = config.pad_token_id
        if self._extra:
            tokens, labels = text[:-1].copy(), text[1:].copy()
        else:
            tokens, labels = text.copy(), np.append(text[1:], np.int32(pad))
        eod = config.eod_token_id
        needs_starts = config.reset_attention_mask or config.reset_position_ids
        starts = document_starts(tokens, eod) if needs_starts else None
        loss_mask, position_ids = loss_mask_and_positions(
            tokens,
            eod,
            reset_position_ids=config.reset_position_ids,
            eod_mask_loss=config.eod_mask_loss,
            starts=starts,
        )
        padding = labels == pad
        loss_mask[padding] = 0.0
        labels[padding] = 0
        tokens[tokens == pad] = 0
        sample = {"tokens": tokens, "labels": labels, "loss_mask": loss_mask, "position_ids": position_ids}
        if config.reset_attention_mask and starts is not None:
            sample["document_start"] = starts
        if config.create_attention_mask:
            reset_starts = sample.get("document_start", np.zeros(len(tokens), np.int32))
            sample["attention_mask"] = attention_mask_from_document_starts(reset_starts)
        return sample

    @abstractmethod
    def _text(self, index: int) -> np.ndarray:
        """Return the tokens of a sample, int32 [S + 1] ([S] without the extra token)."""

    def _check_vocabulary(self, text: np.ndarray, index: int) -> None:
        vocab_size = self.config.tokenizer.vocab_size
        if text.size and (int(text.max()) >= vocab_size or int(text.min()) < 0):
            wrong = text[(text >= vocab_size) | (text < 0)]
            raise DataError(
                f"{self.dataset_path or 'mock data'}: token id {int(wrong[0])} in sample {index} is outside the "
                f"vocabulary of {vocab_size} ids. The data was made with another tokenizer than this run's: give the "
                "one it was preprocessed with."
            )


class GPTDataset(Described, Samples):
    """Samples of `sequence_length` tokens of one dataset, shuffled and repeated as Megatron does.

    Building takes the indices from the cache when it has them, else builds and stores them under a lock, so that any
    number of processes may build the same dataset at once.

    Args:
        dataset: Where the tokens are.
        dataset_path: Path prefix of the dataset; None for mock data.
        indices: Sequences this split consists of, int32 [D].
        num_samples: Samples to have at least; None for one epoch.
        index_split: Which split this is.
        config: Options of the samples.

    Raises:
        DataError: The split has no tokens.
    """

    def __init__(
        self,
        dataset: SequenceSource,
        dataset_path: str | None,
        indices: np.ndarray,
        num_samples: int | None,
        index_split: Split,
        config: GPTDatasetConfig,
    ) -> None:
        super().__init__(dataset_path, index_split, config)
        self.dataset = dataset
        self.indices = indices
        self.num_samples = num_samples
        self._drop_last = config.drop_last_partial_validation_sequence if index_split is Split.valid else True
        tokens_per_epoch = int(np.sum(dataset.sequence_lengths[indices], dtype=np.int64))
        try:
            self.plan: EpochPlan = plan_epochs(tokens_per_epoch, num_samples, config.sequence_length, self._extra)
            self._check_memory()
        except DataError as error:
            raise DataError(f"{dataset_path or 'mock data'} ({index_split.name}): {error}") from error
        built, self.built_anew_on_cache_miss = self._load_or_build()
        self.document_index, self.sample_index, self.shuffle_index = built

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        """What identifies the cached indices, with Megatron's keys in Megatron's order."""
        config = self.config
        identifiers = config.identifiers(type(self).__name__, self.dataset_path, self.num_samples, self.index_split)
        if not config.drop_last_partial_validation_sequence:
            identifiers["drop_last_partial_validation_sequence"] = False
        if not config.add_extra_token_to_sequence:
            identifiers["add_extra_token_to_sequence"] = False
        return identifiers

    @property
    def samples_per_epoch(self) -> int:
        """Samples in one pass over the split's tokens; 1 at least."""
        return max(1, self.plan.tokens_per_epoch // self.config.sequence_length)

    def __len__(self) -> int:
        return int(self.sample_index.shape[0]) - 1

    def _text(self, index: int) -> np.ndarray:
        """Return the tokens of a sample, padded at the end when there are too few, int32."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        row = int(self.shuffle_index[index])
        first, first_offset = map(int, self.sample_index[row])
        last, last_offset = map(int, self.sample_index[row + 1])
        documents = self.document_index
        if first == last:
            parts = [self.dataset.get(int(documents[first]), first_offset, last_offset - first_offset + self._extra)]
        else:
            parts = [self.dataset.get(int(documents[first]), first_offset)]
            parts += [self.dataset.get(int(documents[position])) for position in range(first + 1, last)]
            parts.append(self.dataset.get(int(documents[last]), 0, last_offset + self._extra))
        wanted = self.config.sequence_length + self._extra
        text = np.concatenate(parts)
        self._check_vocabulary(text, index)  # in the stored type: a cast could wrap a wrong id into a legal one
        text = text.astype(np.int32, copy=False)
        padding = np.full(max(0, wanted - len(text)), self.config.pad_token_id, np.int32)
        return np.concatenate((text, padding))

    def _check_memory(self) -> None:
        num_tokens = self.plan.num_epochs * self.plan.tokens_per_epoch
        total = num_samples_in(num_tokens, self.config.sequence_length, self._drop_last, self._extra)
        check_index_memory(4 * self.plan.num_epochs * len(self.indices) + 12 * max(total, 0), max(total, 0))

    def _build(self) -> SampleIndices:
        random_state = np.random.RandomState(self.config.random_seed)
        plan = self.plan
        document_index = build_document_index(
            self.indices, plan.num_epochs, random_state, plan.separate_final_epoch
        )
        sample_index = build_sample_index(
            self.dataset.sequence_lengths,
            document_index,
            self.config.sequence_length,
            plan,
            self._drop_last,
            self._extra,
        )
        total = len(sample_index) - 1
        separate_at = plan.num_samples_sans_final_epoch if plan.separate_final_epoch else total
        return SampleIndices(document_index, sample_index, build_shuffle_index(separate_at, total, random_state))

    def _cache_folder(self) -> str | None:
        if self.config.path_to_cache is not None:
            return self.config.path_to_cache
        if self.dataset_path is None:
            return None
        return os.path.join(os.path.dirname(self.dataset_path), "cache", f"{type(self).__name__}_indices")

    def _load_or_build(self) -> tuple[SampleIndices, bool]:
        """Return the indices and whether they were built and not found in the cache."""
        folder = self._cache_folder()
        if folder is None:
            return self._build(), False
        base = os.path.join(folder, f"{self.unique_description_hash}-{type(self).__name__}-{self.index_split.name}")
        # Megatron's hash does not change when the data is made again under the same name; the lengths' does
        lengths = np.ascontiguousarray(self.dataset.sequence_lengths[self.indices])
        source = hashlib.sha256(lengths.tobytes()).hexdigest()
        cache = IndexCache(base, self.unique_description, source, SampleIndices._fields)
        arrays, built = cache.get(lambda: self._build()._asdict())
        return SampleIndices(**arrays), built


def open_sequences(path_prefix: str | None, config: GPTDatasetConfig) -> SequenceSource:
    """Return the dataset at `path_prefix`, or the mock one when it is None."""
    if path_prefix is None:
        return MockSequences(config.tokenizer)
    return open_token_ids(path_prefix, mmap=config.mmap_bin_files)
