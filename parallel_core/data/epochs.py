"""The order of samples that are shuffled anew in every epoch."""

from __future__ import annotations

import numpy as np


class EpochOrder:
    """Which of `count` samples comes when: all of them once in each epoch, in an order that `seed` and epoch give.

    Args:
        count: samples.
        seed: of the orders.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def place(self, index: int, num_samples: int) -> int:
        """Return which sample is the one of number `index`, of `num_samples` over several epochs.

        Raises:
            IndexError: there is none of that number.
        """
        if not 0 <= index < num_samples:
            raise IndexError(f"sample {index} of {num_samples}")
        epoch, place = divmod(index, self.count)
        if epoch != self._epoch:
            random = np.random.RandomState((self.seed + epoch) % 2**32)
            self._epoch, self._order = epoch, random.permutation(self.count)
        return int(self._order[place])
