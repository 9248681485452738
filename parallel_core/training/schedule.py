"""From the configuration to lengths in samples and the optimizer's schedule. Pure Python."""

from __future__ import annotations

from parallel_core.config.schema import AllConfig
from parallel_core.errors import ConfigError
from parallel_core.layout.derived import BatchSizes, decay_length
from parallel_core.optimizer.loss_scaler import DynamicLossScaler, LossScaler
from parallel_core.optimizer.schedules import ScheduleShape


def batch_sizes(config: AllConfig, data_parallel_size: int) -> BatchSizes:
    """Return the run's batch sizes."""
    data = config.dataset_config
    total = data.global_batch_size or data.batch_size * data.micro_batch_num * data_parallel_size
    return BatchSizes(total, data.batch_size, data_parallel_size, data.rampup_batch_size)


def train_iterations(config: AllConfig, sizes: BatchSizes) -> int:
    """Return the iterations of the run, by `training_iters` or `train_samples`; evaluations alone need neither.

    Raises:
        ConfigError: if neither is given.
    """
    training = config.training_config
    if training.train_samples:
        return sizes.iterations_of(training.train_samples)
    if not training.training_iters and not training.skip_train:
        raise ConfigError("the run has no length: give --train-iters or --train-samples")
    return training.training_iters


def schedule_shape(config: AllConfig, sizes: BatchSizes, iterations: int) -> ScheduleShape:
    """Return the learning rate and weight decay schedule, all lengths in samples (Megatron-LM's rules)."""
    optimizer, training = config.optimizer_config, config.training_config
    batch = sizes.global_batch_size
    if training.train_samples:
        decay = decay_length(optimizer.lr_decay_samples, training.train_samples)
        wsd, warmup, total = optimizer.lr_wsd_decay_samples, optimizer.lr_warmup_samples, training.train_samples
    else:
        decay = decay_length(optimizer.lr_decay_iters, iterations) * batch
        wsd, warmup = optimizer.lr_wsd_decay_iters * batch, optimizer.lr_warmup_iters * batch
        total = iterations * batch
    return ScheduleShape(
        init_lr=optimizer.lr_warmup_init,
        max_lr=optimizer.learning_rate,
        min_lr=optimizer.min_lr,
        warmup_samples=optimizer.lr_warmup_fraction * decay if optimizer.lr_warmup_fraction else warmup,
        decay_samples=decay,
        lr_style=optimizer.lr_decay_style,
        wsd_samples=wsd,
        wsd_style=optimizer.lr_wsd_decay_style,
        start_wd=optimizer.start_weight_decay,
        end_wd=optimizer.end_weight_decay,
        wd_samples=total,
        wd_style=optimizer.weight_decay_incr_style,
    )


def loss_scaler(config: AllConfig) -> LossScaler:
    """Return the loss scaler: constant if `loss_scale` is given, dynamic for float16, else none."""
    training = config.training_config
    if training.loss_scale:
        return LossScaler(training.loss_scale)
    if training.fp16 or config.model_config.compute_dtype == "float16":
        return DynamicLossScaler(
            training.loss_scale_value, training.min_loss_scale, training.loss_scale_window, training.hysteresis
        )
    return LossScaler(1.0)
