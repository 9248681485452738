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
from parallel_core.layout.derived import BatchSizes
from parallel_core.optimizer.loss_scaler import DynamicLossScaler, LossScaler
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


def megatron_sizes(sizes: BatchSizes, train_samples: int) -> list[int]:
    """Return the batch size of every iteration as Megatron-LM's `update_train_iters` walks through them."""
    found, consumed, ramp = [], 0, sizes.rampup[2] if sizes.rampup else -1
    while consumed <= ramp and consumed <= train_samples:
        found.append(sizes.current(consumed))
        consumed += found[-1]
    return found + [sizes.global_batch_size] * (max(0, train_samples - consumed) // sizes.global_batch_size)


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 5), st.integers(1, 5000), st.integers(1, 5000))
def test_a_sample_count_has_megatrons_number_of_iterations(
    start: int, increment: int, steps: int, ramp: int, train_samples: int
) -> None:
    sizes = BatchSizes(start + steps * increment, 1, 1, (start, increment, ramp) if steps else ())
    expected = megatron_sizes(sizes, train_samples)
    assert sizes.iterations_of(train_samples) == len(expected)
    for iterations in (0, len(expected) // 3, len(expected) // 2, len(expected)):
        assert sizes.samples_of(iterations) == sum(expected[:iterations])
    assert set(expected) <= set(sizes.sizes())


def test_a_ramp_up_of_any_length_is_counted_at_once() -> None:
    """1 to 4 over 10^18 samples: a third of 10^15 samples' distance is never reached, so every batch has one sample."""
    sizes = BatchSizes(4, 1, 1, (1, 1, 10**18))
    assert sizes.iterations_of(10**15) == 10**15 + 1
    with pytest.raises(ConfigError, match="more than 100000; choose a larger increment"):
        BatchSizes(10**15, 1, 1, (1, 1, 100))


def test_sizes_that_do_not_divide_are_refused() -> None:
    """A floor division would train another batch size, and count the schedule's samples wrong."""
    with pytest.raises(ConfigError, match="batch size 15 is not a multiple of micro_batch_size=2 x .* = 4; .* 16"):
        BatchSizes(15, 2, 2)
    with pytest.raises(ConfigError, match="from 8 in steps of 7 does not arrive at 32"):
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
