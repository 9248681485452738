"""Samples of fixed length that hold whole conversations, which do not see each other."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from parallel_core.data.config import GPTDatasetConfig, Split
from parallel_core.data.conversations import Conversations
from parallel_core.errors import DataError

logger = logging.getLogger(__name__)
_OPEN = 16


class SFTDataset:
    """Samples of `sequence_length` positions, packed with conversations in an order that the seed shuffles.

    Each epoch is packed on its own, so sample i does not depend on how many are asked for. A conversation of L tokens
    takes L - 1 positions; one that is longer than a sample is cut at its end.

    Args:
        dataset: the conversations.
        dataset_path: their file.
        indices: numbers of the conversations of this split, int32 [D].
        num_samples: samples to have at least; None for one epoch.
        index_split: which split this is.
        config: options of the samples.

    Raises:
        DataError: no answer fits into a sample.
    """

    def __init__(
        self,
        dataset: Conversations,
        dataset_path: str,
        indices: np.ndarray,
        num_samples: int | None,
        index_split: Split,
        config: GPTDatasetConfig,
    ) -> None:
        self.dataset, self.dataset_path, self.indices = dataset, dataset_path, indices
        self.num_samples, self.index_split, self.config = num_samples, index_split, config
        self._room = config.sequence_length
        self._sizes = np.minimum(dataset.sequence_lengths[indices] - 1, self._room)
        self._check_answers_fit()
        self._samples: list[list[int]] = []
        epoch = 0
        while not self._samples or (num_samples is not None and len(self._samples) < num_samples):
            order = np.random.default_rng([config.random_seed, epoch]).permutation(len(indices))
            self._samples += pack(order, self._sizes, self._room)
            if not epoch:
                self.samples_per_epoch = len(self._samples)
            epoch += 1

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        """What decides the samples, in JSON types."""
        return {
            "class": type(self).__name__,
            **{key: value for key, value in self.dataset.description.items() if key != "class"},
            "num_samples": self.num_samples,
            "index_split": self.index_split.name,
            "random_seed": self.config.random_seed,
            "sequence_length": self._room,
            "first": int(self.indices[0]),
            "end": int(self.indices[-1]) + 1,
        }

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Return sample `index`.

        Returns:
            `tokens`, `labels`, `position_ids`, `document_start` int32 [S], `loss_mask` float32 [S]. Positions count in
            each conversation from 0, and `document_start` is where it begins. The loss mask is 1 where the label is
            the assistant's. What is left over at the end is a document without loss.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        room, pad = self._room, self.config.pad_token_id
        tokens = np.full(room, self.config.eod_token_id if pad < 0 else pad, np.int32)
        labels, starts = np.zeros(room, np.int32), np.zeros(room, np.int32)
        loss_mask = np.zeros(room, np.float32)
        at = 0
        for place in self._samples[index]:
            number, size = int(self.indices[place]), int(self._sizes[place])
            text, answer = self.dataset.get(number), self.dataset.answers(number)
            end = at + size
            tokens[at:end], labels[at:end] = text[:size], text[1 : size + 1]
            loss_mask[at:end] = answer[1 : size + 1]
            starts[at:end] = at
            at = end
        starts[at:] = at
        positions = np.arange(room, dtype=np.int32) - starts
        return {
            "tokens": tokens, "labels": labels, "loss_mask": loss_mask, "position_ids": positions,
            "document_start": starts,
        }  # fmt: skip

    def _check_answers_fit(self) -> None:
        long = np.flatnonzero(self.dataset.sequence_lengths[self.indices] > self._room + 1)
        if not len(long):
            return
        lost = sum(not self.dataset.answers(int(self.indices[i]))[1 : self._room + 1].any() for i in long)
        if lost == len(self.indices):
            raise DataError(
                f"{self.dataset_path} ({self.index_split.name}): no answer of its {lost} conversations begins within "
                f"{self._room} tokens; give a longer --seq-length."
            )
        logger.warning(
            "%s (%s): %d of %d conversations are longer than --seq-length %d and cut at their end, %d before the "
            "first answer",
            self.dataset_path, self.index_split.name, len(long), len(self.indices), self._room, lost,
        )  # fmt: skip


def pack(order: Sequence[int] | np.ndarray, sizes: np.ndarray, room: int) -> list[list[int]]:
    """Return lists of numbers whose sizes fill `room` at most, each number once.

    Each one goes to the first list that has room for it among the last few, so order and balance stay what they are.

    Args:
        order: numbers in the order in which they are put down.
        sizes: size of each number, at most `room`.
        room: of a list.
    """
    packed: list[list[int]] = []
    left: list[int] = []
    for number in map(int, order):
        size = int(sizes[number])
        first = max(0, len(packed) - _OPEN)
        place = next((i for i in range(first, len(packed)) if left[i] >= size), len(packed))
        if place == len(packed):
            packed.append([])
            left.append(room)
        packed[place].append(number)
        left[place] -= size
    return packed
