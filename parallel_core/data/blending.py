"""Megatron's greedy blend: at every step the dataset that lags most behind its weight gives the next sample.

The choice at step k is the first maximum of `w_j * max(k, 1) - count_j`, in float64, and each choice depends on all
before it. To be fast without leaving that definition, a whole block is *guessed* (greedy sequences nearly repeat after
a lag at which every `w_j * lag` is close to an integer), all its choices are checked at once with the exact formula,
and only where a guess is wrong is it replaced step by step until the counts meet the guess again. A bad guess costs
time, never exactness.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from parallel_core.errors import DataError

_FIRST_BLOCK = 64
_MAX_CELLS = 1 << 20
_LIST_IS_FASTER_UP_TO = 40
_MAX_DATASETS = np.iinfo(np.int16).max


def build_blending_indices(weights: Sequence[float], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return for each of `size` samples of a blend its dataset and its number within that dataset.

    Args:
        weights: Shares of the datasets, sum 1.
        size: Number of samples.

    Returns:
        int16 [size] dataset, int64 [size] sample of that dataset.

    Raises:
        DataError: There are more datasets than int16 can number.
    """
    dataset_index = _GreedyBlend(np.array(weights, np.float64), size, None).run()
    return dataset_index, sample_numbers(dataset_index, len(weights))


def build_exhaustive_blending_indices(sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the blend that takes each dataset's samples exactly once; a used-up dataset is no longer chosen.

    Args:
        sizes: Number of samples of each dataset; their shares of the sum are the weights.

    Returns:
        int16 [sum(sizes)] dataset, int64 [sum(sizes)] sample of that dataset.
    """
    available = np.array(sizes, np.int64)
    total = int(available.sum())
    weights = available.astype(np.float64) / float(max(total, 1))
    dataset_index = _GreedyBlend(weights, total, available).run()
    return dataset_index, sample_numbers(dataset_index, len(sizes))


def sample_numbers(dataset_index: np.ndarray, num_datasets: int) -> np.ndarray:
    """Return how many earlier entries of `dataset_index` equal each entry, int64."""
    numbers = np.empty(len(dataset_index), np.int64)
    # a stable sort groups each dataset's entries in order; one pass whatever the number of datasets
    order = np.argsort(dataset_index, kind="stable")
    counts = np.bincount(dataset_index, minlength=num_datasets) if len(dataset_index) else np.zeros(1, np.int64)
    firsts = np.repeat(np.cumsum(counts) - counts, counts)
    numbers[order] = np.arange(len(dataset_index)) - firsts
    return numbers


class _GreedyBlend:
    """One greedy run; `available` (or None) limits how often each dataset may be chosen.

    With weights proportional to what is available the limits bind only through rounding, at the end of long blends.
    """

    def __init__(self, weights: np.ndarray, size: int, available: np.ndarray | None) -> None:
        if len(weights) > _MAX_DATASETS:
            raise DataError(
                f"a blend of {len(weights)} datasets: at most {_MAX_DATASETS} can be numbered. "
                "Merge small ones (python -m parallel_core.prepare.merge_datasets)."
            )
        self.weights = weights
        self.size = size
        self.available = available
        self.spent = np.zeros(len(weights), bool) if available is None else available == 0
        self.counts = np.zeros(len(weights), np.int64)
        self.chosen = np.zeros(size, np.int16)
        self.done = 0
        self.lag, self.lag_error, self.lags_seen = 1, np.inf, 0

    def run(self) -> np.ndarray:
        while self.done < self.size:
            if self.done < _FIRST_BLOCK:
                stop = min(self.size, _FIRST_BLOCK)
                guess = np.full(stop - self.done, -1, np.int16)
            else:
                # what is known doubles with each block, and with it the lags that can be looked up
                block = min(2 * self.done, max(_FIRST_BLOCK, _MAX_CELLS // len(self.weights)))
                stop = min(self.size, self.done + block)
                self._improve_lag()
                guess = np.resize(self.chosen[self.done - self.lag : self.done], stop - self.done)
            self._commit(self._checked(guess))
        return self.chosen

    def _improve_lag(self) -> None:
        if self.done < 2 * self.lags_seen:
            return
        first = self.lags_seen + 1
        last = min(self.done, first + 4 * _MAX_CELLS // len(self.weights))
        lags = np.arange(first, last + 1)
        errors = np.zeros(len(lags))
        for weight in self.weights:
            turns = weight * lags
            np.maximum(errors, np.abs(turns - np.rint(turns)), out=errors)
        best = int(np.argmin(errors))
        if errors[best] < self.lag_error:
            self.lag, self.lag_error = int(lags[best]), float(errors[best])
        self.lags_seen = self.done

    def _checked(self, guess: np.ndarray) -> np.ndarray:
        """Return the greedy choices for the next `len(guess)` steps."""
        num_steps, num_datasets = len(guess), len(self.weights)
        taken = np.zeros((num_steps + 1, num_datasets), np.int64)
        known = np.flatnonzero(guess >= 0)
        taken[known + 1, guess[known]] = 1
        taken[0] = self.counts
        counts_before = np.cumsum(taken, axis=0)
        steps = np.maximum(np.arange(self.done, self.done + num_steps, dtype=np.float64), 1.0)
        errors = steps[:, None] * self.weights - counts_before[:-1]
        errors[:, self.spent] = -np.inf
        # a row whose counts are right has the right choice here, whatever was guessed
        wrong = np.flatnonzero(np.argmax(errors, axis=1) != guess)
        choices, guessed, position = guess.copy(), guess.tolist(), 0
        while True:
            next_wrong = np.searchsorted(wrong, position)
            if next_wrong == len(wrong):
                return choices
            start = int(wrong[next_wrong])
            repaired = self._repaired(guessed, counts_before[start], start)
            position = start + len(repaired)
            choices[start:position] = repaired

    def _repaired(self, guessed: list[int], counts_array: np.ndarray, start: int) -> list[int]:
        """Step on from `start` until as often as guessed has been chosen of every dataset; return the choices."""
        active = np.flatnonzero(~self.spent)
        choose = self._chooser(self.weights[active], counts_array[active].astype(np.float64))
        numbers = active.tolist()
        lead: dict[int, int] = {}  # how much oftener than guessed a dataset has been chosen, where it differs
        choices: list[int] = []
        for position in range(start, len(guessed)):
            choice = numbers[choose(max(float(self.done + position), 1.0))]
            choices.append(choice)
            for dataset, change in ((choice, 1), (guessed[position], -1)):
                lead[dataset] = lead.get(dataset, 0) + change
                if not lead[dataset]:
                    del lead[dataset]
            if not lead:
                break
        return choices

    @staticmethod
    def _chooser(weights: np.ndarray, counts: np.ndarray) -> Callable[[float], int]:
        """Return a function of the step that makes the greedy choice and counts it."""
        if len(weights) > _LIST_IS_FASTER_UP_TO:
            errors = np.empty_like(weights)

            def choose_with_arrays(step: float) -> int:
                np.multiply(weights, step, errors)
                np.subtract(errors, counts, errors)
                choice = int(errors.argmax())
                counts[choice] += 1.0
                return choice

            return choose_with_arrays
        weight_list, count_list = weights.tolist(), counts.tolist()

        def choose_with_lists(step: float) -> int:
            values = [weight * step - count for weight, count in zip(weight_list, count_list)]
            choice = values.index(max(values))
            count_list[choice] += 1.0
            return choice

        return choose_with_lists

    def _commit(self, choices: np.ndarray) -> None:
        counts = self.counts + np.bincount(choices, minlength=len(self.weights))
        if self.available is not None and np.any(counts[~self.spent] >= self.available[~self.spent]):
            # the first dataset to be used up changes the choice after it: keep the block up to there
            ends = [
                int(np.flatnonzero(choices == dataset)[self.available[dataset] - self.counts[dataset] - 1])
                for dataset in np.flatnonzero(~self.spent & (counts >= self.available))
            ]
            choices = choices[: min(ends) + 1]
            counts = self.counts + np.bincount(choices, minlength=len(self.weights))
            self.spent = counts >= self.available
        self.chosen[self.done : self.done + len(choices)] = choices
        self.done += len(choices)
        self.counts = counts
