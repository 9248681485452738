"""Whether a run that goes on sees the samples in the order of the run before it."""

from __future__ import annotations

import dataclasses
from typing import Any

from parallel_core.config.schema import AllConfig
from parallel_core.context import ParallelContext
from parallel_core.data import data_order_fingerprint, describe_data_order, explain_data_order_change
from parallel_core.errors import bullet_list
from parallel_core.training.checkpointing import Progress
from parallel_core.training.log import RunLog


def check_data_order(
    dataset: Any, progress: Progress, config: AllConfig, context: ParallelContext, log: RunLog
) -> Progress:
    """Return where a run stands with this data, and say so when the samples come in another order than before.

    Args:
        dataset: the training data; None where it is an iterator.
        progress: where the run stands.
        config: the run.
        context: this rank's groups.
        log: is told.
    """
    data = config.dataset_config
    order = describe_data_order(
        dataset,
        dataloader_type=data.dataloader_type,
        micro_batch_size=data.batch_size,
        data_parallel_size=context.dp.size,
    )
    before = progress.data_order
    if before is not None and data_order_fingerprint(before) != data_order_fingerprint(order):
        changes = bullet_list(explain_data_order_change(before, order))
        if config.training_config.new_dataset:
            log.info("Training goes on with new data (--new-dataset), from its first sample")
        else:
            log.warn(
                "the samples come in another order than in the run this checkpoint is from, so some are seen twice "
                "and some not at all (--new-dataset starts the data afresh):\n" + changes
            )
    if config.training_config.new_dataset:
        earlier = progress.trained_samples
        progress = dataclasses.replace(progress, earlier_samples=earlier, consumed_train_samples=0)
    return dataclasses.replace(progress, data_order=order)
