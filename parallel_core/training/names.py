"""Parameter names: a name is a tensor's place in checkpoints, so two tensors of one name would overwrite each other."""

from __future__ import annotations

from collections.abc import Sequence

from mindspore import nn

from parallel_core import startup
from parallel_core.context import ParallelContext
from parallel_core.errors import ConfigError, bullet_list
from parallel_core.layout.shard import shard_of


def check_parameter_names(chunks: Sequence[nn.Cell], context: ParallelContext) -> None:
    """Refuse names that stand for two tensors, and tensors that some ranks of a stage lack; collective.

    The last stage's copy of a shared embedding has the first one's name on purpose.

    Args:
        chunks: this rank's model chunks.
        context: this rank's groups.

    Raises:
        ConfigError: on every rank alike, with the names and where they are.
    """
    startup.note("model")
    # One Parameter used by several layers is one tensor.
    unique = {id(p): shard_of(p) for chunk in chunks for p in chunk.get_parameters()}
    names = sorted(spec.name for spec in unique.values() if not spec.is_copy)
    of_rank = context.world.all_gather_object((context.pp.rank, names))
    problems = name_problems(of_rank)
    if problems:
        raise ConfigError(
            f"the model's parameters cannot be told apart in a checkpoint:\n{bullet_list(problems)}\n"
            "Give each layer a name of its own (name=..., with the layer's number in the whole model), the same on "
            "every rank of its stage."
        )


def name_problems(of_rank: Sequence[tuple[int, Sequence[str]]]) -> list[str]:
    """Return a line for every name that is there twice, and for every one that some ranks of its stage lack.

    Args:
        of_rank: of every rank, its pipeline stage and the names of its parameters, each as often as it occurs.
    """
    problems: list[str] = []
    stage_of: dict[str, int] = {}
    first_rank: dict[int, int] = {}
    for rank, (stage, names) in enumerate(of_rank):
        reference = of_rank[first_rank.setdefault(stage, rank)][1]
        problems += [f"{name}: rank {rank} lacks it, unlike rank {first_rank[stage]} of the same stage"
                     for name in sorted(set(reference) - set(names))]  # fmt: skip
        problems += [f"{name}: rank {first_rank[stage]} lacks it, unlike rank {rank} of the same stage"
                     for name in sorted(set(names) - set(reference))]  # fmt: skip
        if rank != first_rank[stage]:
            continue
        for name in sorted(set(names)):
            if names.count(name) > 1:
                problems.append(f"{name}: {names.count(name)} parameters on pipeline rank {stage}")
            if stage_of.setdefault(name, stage) != stage:
                problems.append(f"{name}: on pipeline ranks {stage_of[name]} and {stage}")
    return problems
