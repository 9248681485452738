"""The data calls of these scripts, which take everything from the current configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from parallel_core import data
from parallel_core.compat import parallel_state
from parallel_core.compat.mindspeed.config import current_config, plain
from parallel_core.training.datasets import default_datasets_provider
from parallel_core.training.schedule import batch_sizes, train_iterations


def get_train_valid_test_num_samples() -> tuple[int, int, int]:
    """Return how many samples the run asks of the training, validation and test split."""
    config = current_config()
    training = config.training_config
    sizes = batch_sizes(config, parallel_state.get_data_parallel_world_size())
    return data.train_valid_test_num_samples(
        global_batch_size=sizes.global_batch_size,
        train_iters=train_iterations(config, sizes),
        eval_interval=training.eval_interval or None,
        eval_iters=training.eval_iters,
        train_samples=training.train_samples or None,
    )


def train_valid_test_datasets_provider(train_val_test_num_samples: tuple[int, int, int]) -> tuple[Any, Any, Any]:
    """Return the configured GPT datasets for the asked numbers of samples."""
    return default_datasets_provider(plain(current_config()))(train_val_test_num_samples)


class PretrainingBatches:
    """This rank's NumPy microbatches of a dataset, read when they are asked for.

    `pretrain` takes the dataset out of it, so that a resumed run goes on with the sample it stopped at.

    Attributes:
        dataset: samples by number.
        consumed_samples: samples of all ranks to leave out at the start.
    """

    def __init__(self, dataset: Any, consumed_samples: int) -> None:
        self.dataset, self.consumed_samples = dataset, consumed_samples
        self._loader: Any = None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        """Return the next microbatch."""
        if self._loader is None:
            settings = current_config().dataset_config
            self._loader = data.build_pretraining_data_loader(
                self.dataset,
                self.consumed_samples,
                micro_batch_size=settings.batch_size,
                data_parallel_rank=parallel_state.get_data_parallel_rank(),
                data_parallel_size=parallel_state.get_data_parallel_world_size(),
                dataloader_type=settings.dataloader_type,
                num_workers=settings.num_workers,
                drop_last=settings.drop_remainder,
            )
        return next(self._loader)

    def close(self) -> None:
        """Stop reading ahead."""
        close = getattr(self._loader, "close", None)
        if close is not None:
            close()


def build_pretraining_data_loader(dataset: Any, consumed_samples: int) -> PretrainingBatches | None:
    """Return this rank's microbatches of `dataset` after `consumed_samples`; None of None."""
    return None if dataset is None else PretrainingBatches(dataset, consumed_samples)
