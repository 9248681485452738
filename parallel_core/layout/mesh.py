"""Where every rank sits on the parallel axes, as a value. No communicator is created here."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from parallel_core.errors import ConfigError


@dataclass(frozen=True)
class Mesh:
    """Ranks laid out on named axes; `axes` runs from the fastest- to the slowest-varying one.

    Megatron's order is tp, cp, dp, pp: rank = tp + TP * (cp + CP * (dp + DP * pp)).
    """

    axes: tuple[tuple[str, int], ...]

    @classmethod
    def megatron(
        cls,
        world_size: int,
        *,
        tensor_parallel: int = 1,
        context_parallel: int = 1,
        pipeline_parallel: int = 1,
    ) -> Mesh:
        """Return Megatron's layout of `world_size` ranks; data parallelism takes what the other axes leave.

        Raises:
            ConfigError: if `world_size` is not a multiple of the product of the other sizes.
        """
        model = tensor_parallel * context_parallel * pipeline_parallel
        if world_size < 1 or world_size % model:
            raise ConfigError(
                f"world size {world_size} is not a multiple of tensor_model_parallel_size={tensor_parallel} x "
                f"context_parallel_size={context_parallel} x pipeline_model_parallel_size={pipeline_parallel} = "
                f"{model}; start {max(1, round(world_size / model)) * model} processes, or change the sizes"
            )
        return cls(
            (("tp", tensor_parallel), ("cp", context_parallel), ("dp", world_size // model), ("pp", pipeline_parallel))
        )

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return math.prod(size for _, size in self.axes)

    def size(self, *names: str) -> int:
        """Return the number of ranks along the axes `names` together."""
        sizes = dict(self.axes)
        self._check(names)
        return math.prod(sizes[name] for name in names)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Return the position of `rank` on every axis."""
        out = {}
        for name, size in self.axes:
            rank, out[name] = divmod(rank, size)
        return out

    def rank(self, **coordinates: int) -> int:
        """Return the rank at `coordinates` (every axis named)."""
        out = 0
        for name, size in reversed(self.axes):
            out = out * size + coordinates[name]
        return out

    def groups(self, *names: str) -> list[list[int]]:
        """Return all groups that span the axes `names`; each lists its ranks in increasing order.

        >>> Mesh((("tp", 2), ("dp", 2), ("pp", 2))).groups("dp")
        [[0, 2], [1, 3], [4, 6], [5, 7]]
        """
        self._check(names)
        moving = [axis for axis in reversed(self.axes) if axis[0] in names]
        fixed = [axis for axis in reversed(self.axes) if axis[0] not in names]
        return [[self.rank(**f, **m) for m in _positions(moving)] for f in _positions(fixed)]

    def group_of(self, rank: int, *names: str) -> list[int]:
        """Return the ranks of the group along `names` that `rank` belongs to."""
        here = self.coordinates(rank)
        moving = [axis for axis in reversed(self.axes) if axis[0] in names]
        self._check(names)
        return [self.rank(**{**here, **m}) for m in _positions(moving)]

    def _check(self, names: tuple[str, ...]) -> None:
        unknown = sorted(set(names) - {name for name, _ in self.axes})
        if unknown:
            raise ValueError(f"no axis {unknown}; this mesh has {[name for name, _ in self.axes]}")


def _positions(axes: list[tuple[str, int]]) -> list[dict[str, int]]:
    names = [name for name, _ in axes]
    return [dict(zip(names, values)) for values in itertools.product(*(range(size) for _, size in axes))]
