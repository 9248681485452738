"""Batch-size ramp-up, and schedules' lengths in samples."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel_core.config.schema import (
    AllConfig,
    DatasetConfig,
    ModelParallelConfig,
    OptimizerConfig,
    TrainingConfig,
    TransformerConfig,
)
from parallel_core.errors import ConfigError
from parallel_core.optimizer.loss_scaler import DynamicLossScaler, LossScaler
from parallel_core.training.microbatches import BatchSizes
from parallel_core.training.schedule import batch_sizes, loss_scaler, schedule_shape, train_iterations


def config(**sections: dict[str, Any]) -> AllConfig:
    model = {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 16, "seq_length": 4}
    return AllConfig(
        model_config=TransformerConfig(**{**model, **sections.get("model", {})}),
        parallel_config=ModelParallelConfig(),
        training_config=TrainingConfig(**sections.get("training", {})),
        dataset_config=DatasetConfig(**sections.get("data", {})),
        optimizer_config=OptimizerConfig(**sections.get("optimizer", {})),
    )


def test_a_ramp_up_grows_in_equal_distances() -> None:
    """From 8 by 8 to 32 over 120 samples: three steps, one every 40 samples."""
    sizes = BatchSizes(32, 2, 2, (8, 8, 120))
    assert [sizes.current(n) for n in (0, 39, 40, 79, 80, 119, 120, 121, 10**6)] == [8, 8, 16, 16, 24, 24, 32, 32, 32]
    assert [sizes.num_microbatches(n) for n in (0, 40, 120)] == [2, 4, 8]
    assert BatchSizes(32, 2, 2).current(0) == 32


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 5), st.integers(1, 500), st.integers(0, 2000))
def test_iterations_of_a_sample_count_are_those_that_fit(
    start: int, increment: int, steps: int, ramp: int, train_samples: int
) -> None:
    sizes = BatchSizes(start + steps * increment, 1, 1, (start, increment, ramp) if steps else ())
    consumed = iterations = 0
    while consumed + sizes.current(consumed) <= train_samples:
        consumed += sizes.current(consumed)
        iterations += 1
    assert sizes.iterations_of(train_samples) == iterations


def test_sizes_that_do_not_divide_are_refused() -> None:
    """A floor division would train another batch size, and count the schedule's samples wrong."""
    with pytest.raises(ConfigError, match="batch size 15 is not a multiple of micro_batch_size=2 x .* = 4; .* 16"):
        BatchSizes(15, 2, 2)
    with pytest.raises(ConfigError, match="is not reached from 8 in steps of 7"):
        BatchSizes(32, 1, 1, (8, 7, 100))
    with pytest.raises(ConfigError, match="batch size 10 is not a multiple"):
        BatchSizes(12, 2, 2, (8, 2, 100))


def test_lengths_in_iterations_become_samples() -> None:
    run = config(
        training={"training_iters": 50},
        data={"batch_size": 2, "global_batch_size": 8},
        optimizer={"lr_warmup_iters": 5, "lr_wsd_decay_iters": 10, "lr_decay_style": "WSD", "lr_decay_iters": 40},
    )
    sizes = batch_sizes(run, 2)
    shape = schedule_shape(run, sizes, train_iterations(run, sizes))
    assert (shape.warmup_samples, shape.decay_samples, shape.wsd_samples, shape.wd_samples) == (40, 320, 80, 400)


def test_lengths_in_samples_stay_samples_and_a_fraction_is_of_the_decay() -> None:
    run = config(
        training={"train_samples": 1000},
        data={"batch_size": 2, "global_batch_size": 8},
        optimizer={"lr_warmup_fraction": 0.1, "lr_decay_samples": 900},
    )
    sizes = batch_sizes(run, 2)
    assert train_iterations(run, sizes) == 125
    shape = schedule_shape(run, sizes, 125)
    assert (shape.warmup_samples, shape.decay_samples, shape.wd_samples) == (90.0, 900, 1000)


def test_the_global_batch_size_follows_from_the_microbatches_when_not_given() -> None:
    assert batch_sizes(config(data={"batch_size": 2, "micro_batch_num": 3}), 4).global_batch_size == 24
    with pytest.raises(ConfigError, match="give --train-iters or --train-samples"):
        train_iterations(config(), BatchSizes(1, 1, 1))


def test_which_loss_scaler_is_used() -> None:
    """A given scale is constant, whatever the dtype; float16 has a dynamic one by default."""
    half = {"params_dtype": "float16", "compute_dtype": "float16"}
    assert loss_scaler(config()).scale == 1.0
    dynamic = loss_scaler(config(model=half, training={"loss_scale_value": 64.0, "hysteresis": 1}))
    assert isinstance(dynamic, DynamicLossScaler)
    dynamic.update(True)
    assert dynamic.scale == 32.0
    fixed = loss_scaler(config(model=half, training={"loss_scale": 0.5}))
    assert type(fixed) is LossScaler and fixed.scale == 0.5


def test_the_decoupled_learning_rate_ends_where_the_other_does_unless_told_otherwise() -> None:
    assert OptimizerConfig(min_lr=1e-5, decoupled_lr=1e-3).decoupled_min_lr == 1e-5
    assert OptimizerConfig(min_lr=1e-5, decoupled_lr=1e-3, decoupled_min_lr=0.0).decoupled_min_lr == 0.0
