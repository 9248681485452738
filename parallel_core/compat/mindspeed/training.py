"""The training calls of these scripts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from parallel_core.compat import parallel_state
from parallel_core.compat.mindspeed.config import keep, plain
from parallel_core.compat.mindspeed.data import PretrainingBatches
from parallel_core.compat.mindspeed.stage import building
from parallel_core.config import initialize_megatron
from parallel_core.config.dump import sections_yaml
from parallel_core.config.schema import AllConfig, ModelParallelConfig
from parallel_core.context import ParallelContext
from parallel_core.errors import ConfigError
from parallel_core.pipeline.stage import ForwardStep
from parallel_core.training.datasets import default_datasets_provider
from parallel_core.training.directories import own_directories
from parallel_core.training.forward_step import get_batch
from parallel_core.training.model import ModelProvider
from parallel_core.training.pretrain import DatasetsProvider, TrainingRun
from parallel_core.training.runtime import start_runtime, supported_precision
from parallel_core.transformer.stage import ModelStage

__all__ = ["get_batch", "pretrain", "set_parallel_context", "set_seed"]


def set_parallel_context(parallel_config: ModelParallelConfig) -> ParallelContext:
    """Join the job, create this rank's groups and keep them in `parallel_state`. Collective.

    Args:
        parallel_config: the layout.

    Raises:
        ConfigError: if the layout does not fit the job.
    """
    chunks = parallel_config.virtual_pipeline_model_parallel_size
    start_runtime(ms.get_context("device_target"))
    return parallel_state.initialize_model_parallel(
        parallel_config.tensor_model_parallel_size,
        parallel_config.pipeline_model_parallel_size,
        chunks if chunks > 1 else None,
        context_parallel_size=parallel_config.context_parallel_size,
        hierarchical_context_parallel_sizes=parallel_config.hierarchical_context_parallel_sizes or None,
        expert_model_parallel_size=parallel_config.expert_model_parallel_size,
        distributed_timeout_minutes=parallel_config.distributed_timeout_minutes,
        distributed_backend=parallel_config.distributed_backend,
    )


def set_seed(seed: int) -> None:
    """Seed NumPy and MindSpore for the script's own draws; the model's go by the configuration's seed.

    Raises:
        ConfigError: if it is not an integer in [0, 2^32).
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ConfigError(f"seed={seed!r}: use an integer from 0 to 4294967295")
    np.random.seed(seed)
    ms.set_seed(seed)


def pretrain(
    train_valid_test_datasets_provider: DatasetsProvider | None,
    model_provider_func: ModelProvider,
    model_type: Any = None,
    forward_step_func: ForwardStep | None = None,
    process_non_loss_data_func: Callable[[list[Any], int, Any], None] | None = None,
    extra_args_provider: Callable[[Any], Any] | None = None,
    args_defaults: Mapping[str, Any] | None = None,
    *,
    all_config: AllConfig | None = None,
    train_data_loader: Any = None,
    get_batch_func: Callable[[Any], Any] | None = None,
) -> None:
    """Train a model as the configuration says; every argument is honoured.

    Args:
        train_valid_test_datasets_provider: gives the datasets for the asked numbers of samples; None: the configured
            ones. `train_data_loader` replaces the first of them.
        model_provider_func: builds a pipeline stage's model: `(pre_process, post_process)`, and `vp_stage` and `stage`
            if it takes them.
        model_type: None or encoder_or_decoder.
        forward_step_func: `(data_iterator, model) -> (output, loss_func)`; None: the batch goes to the model, which
            returns its masked mean loss.
        process_non_loss_data_func: see `parallel_core.training.pretrain`.
        extra_args_provider: adds arguments to the command line; without `all_config`.
        args_defaults: values of arguments that nobody gave; without `all_config`.
        all_config: the configuration; None: from the command line.
        train_data_loader: what `build_pretraining_data_loader` returns, or an iterator of NumPy microbatches.
        get_batch_func: takes the data iterator, returns a dict of the model's arguments, or the tuple (tokens, labels,
            loss_mask, attention_mask, position_ids); None: `get_batch`.

    Raises:
        ConfigError: if the configuration or an argument is wrong; nothing has started then.
    """
    if model_type is not None and "encoder_or_decoder" not in str(getattr(model_type, "name", model_type)):
        raise ConfigError(f"model_type={model_type!r}: only encoder_or_decoder (GPT) is built; leave it out")
    if forward_step_func is not None and get_batch_func is not None:
        raise ConfigError("give forward_step_func or get_batch_func: a forward step gets its batches itself")
    if all_config is None:
        all_config = keep(initialize_megatron(extra_args_provider, args_defaults).config)
    elif extra_args_provider is not None or args_defaults:
        raise ConfigError(
            "extra_args_provider and args_defaults belong to the command line, and all_config is already made: give "
            "them to initialize_megatron"
        )
    context = _context_of(all_config)
    config, changed = supported_precision(plain(all_config))
    if config.training_config.deterministic_mode and ms.get_context("deterministic") != "ON":
        ms.set_deterministic(True)
    with own_directories(config, sections_yaml(config), context.rank):
        run = TrainingRun(
            config,
            context,
            _with_stage(model_provider_func),
            forward_step_func or _forward_step(get_batch_func or get_batch),
            process_non_loss_data_func,
            [changed] if changed else [],
        )
        provider = train_valid_test_datasets_provider or default_datasets_provider(config)
        if isinstance(train_data_loader, PretrainingBatches) and not train_data_loader.consumed_samples:
            run.load_data(_with_training_set(provider, train_data_loader.dataset), None)
        else:
            run.load_data(provider, train_data_loader)
        run.train()
        parallel_state.destroy_model_parallel()


def _context_of(config: AllConfig) -> ParallelContext:
    """Return the context in force if it has the configured layout, or a new one."""
    parallel = config.parallel_config
    if not parallel_state.is_initialized():
        return set_parallel_context(parallel)
    context = parallel_state.get_context()
    for name, size, there in (
        ("tensor_model_parallel_size", parallel.tensor_model_parallel_size, context.tp.size),
        ("pipeline_model_parallel_size", parallel.pipeline_model_parallel_size, context.pp.size),
        ("context_parallel_size", parallel.context_parallel_size, context.cp.size),
    ):
        if size != there:
            raise ConfigError(f"all_config has {name}={size}, but parallel_state was initialized with {there}")
    return context


def _with_stage(model_provider_func: ModelProvider) -> ModelProvider:
    """Return the provider, called where `current_stage` knows what is being built."""
    accepted = inspect.signature(model_provider_func).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())

    def provide(pre_process: bool, post_process: bool, stage: ModelStage) -> nn.Cell:
        extra = {"vp_stage": stage.vp_stage, "stage": stage}
        with building(stage):
            return model_provider_func(
                pre_process=pre_process,
                post_process=post_process,
                **{key: value for key, value in extra.items() if takes_all or key in accepted},
            )

    return provide


def _with_training_set(provider: DatasetsProvider, dataset: Any) -> DatasetsProvider:
    def provide(num_samples: tuple[int, int, int]) -> tuple[Any, Any, Any]:
        _, valid, test = provider(num_samples)
        return dataset, valid, test

    return provide


def _forward_step(get_batch_func: Callable[[Any], Any]) -> ForwardStep:
    """Return a forward step for models that return their masked mean loss."""

    def forward_step(data_iterator: Any, model: Any) -> tuple[Tensor, Callable[..., Any]]:
        batch = get_batch_func(data_iterator)
        if not isinstance(batch, Mapping):
            names = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")
            batch = dict(zip(names, batch, strict=True))
        output = model(**batch)
        loss_mask = batch["loss_mask"]

        def loss_func(mean_loss: Tensor, non_loss_data: bool = False) -> Any:
            if non_loss_data:
                return mean_loss
            number = loss_mask.sum()
            total = mean_loss * number
            return total, number, {"lm loss": (total, number)}

        return output, loss_func

    return forward_step
