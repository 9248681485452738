"""How many ranks a configuration asks for, and whether `NPROC` agrees."""

from __future__ import annotations

from parallel_core.config.load import LoadedConfig, load_config, required_world_size
from parallel_core.config.schema import AllConfig, ModelParallelConfig
from parallel_core.errors import ConfigError
from parallel_core.tracking.writers import require_packages


def check_configuration(arguments: list[str], num_ranks: int) -> LoadedConfig:
    """Return the configuration, resolved for the number of ranks to start (its `world_size`).

    Args:
        arguments: `--config FILE --megatron-flag value …`.
        num_ranks: what `NPROC` says; 0 when it is unset.

    Raises:
        ConfigError: if the configuration breaks a rule, needs a package that is not installed, or the layout
            does not fit `num_ranks`.
    """
    loaded = load_config(arguments)
    require_packages(loaded.config.training_config.tracking)
    needed = required_world_size(loaded.config)
    if num_ranks % needed:
        raise ConfigError(_mismatch(loaded.config.parallel_config, num_ranks, needed))
    return loaded if num_ranks in (0, loaded.world_size) else load_config(arguments, world_size=num_ranks)


def _mismatch(sizes: ModelParallelConfig, num_ranks: int, needed: int) -> str:
    factors = {
        "tensor_model_parallel_size": sizes.tensor_model_parallel_size,
        "pipeline_model_parallel_size": sizes.pipeline_model_parallel_size,
        "context_parallel_size": sizes.context_parallel_size,
    }
    product = " x ".join(f"{name}={size}" for name, size in factors.items() if size > 1)
    above = (num_ranks // needed + 1) * needed
    choices = [f"NPROC={above} (data parallel {above // needed})"]
    if above > needed:
        choices.insert(0, f"NPROC={above - needed} (data parallel {above // needed - 1})")
    return (
        f"NPROC={num_ranks} asks for {num_ranks} rank{'s' if num_ranks > 1 else ''}, but {product} needs a multiple "
        f"of {needed}: use {' or '.join(choices)}, or keep {num_ranks} and choose sizes whose product divides it"
    )


def describe_layout(config: AllConfig, num_ranks: int) -> str:
    """Return the layout in a few words, such as `tensor 2 x pipeline 2`; empty for one rank."""
    sizes = config.parallel_config
    model = sizes.tensor_model_parallel_size * sizes.pipeline_model_parallel_size * sizes.context_parallel_size
    axes = {
        "tensor": sizes.tensor_model_parallel_size,
        "context": sizes.context_parallel_size,
        "data": num_ranks // model,
        "pipeline": sizes.pipeline_model_parallel_size,
    }
    return " x ".join(f"{name} {size}" for name, size in axes.items() if size > 1)
