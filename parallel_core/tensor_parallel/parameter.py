"""Parameters that know which part of which global tensor they are."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor

from parallel_core.errors import ConfigError

InitMethod = Callable[[tuple[int, ...]], np.ndarray]
"""Takes the shape of the full, unsharded tensor and returns its float32 values."""

Box = tuple[tuple[slice, ...], tuple[slice, ...]]
"""The same rectangle in local and in global coordinates."""


@dataclass(frozen=True)
class ShardSpec:
    """A rank's part of a global tensor.

    Attributes:
        name: global name, Megatron-core's, with global layer numbers.
        global_shape: shape of the full tensor.
        partition_dim: the dim that is cut over tensor parallel ranks; None: every rank has the whole.
        partition_stride: parts stacked along `partition_dim` that are each cut (2 for a gated MLP's [gate; up]).
        rank: position in the tensor parallel group.
        size: size of the tensor parallel group.
        partial_gradient: the gradient of each rank covers only its part of the sequence or of the heads, so it must be
            summed over the tensor parallel group.
        is_embedding_or_output: decoupled learning rates apply.
        shared_embedding: held by the first and by the last pipeline stage; their gradients are summed.
        is_copy: the last stage's copy of a shared embedding; the first stage's is the one that counts in norms and
            checkpoints.
    """

    name: str
    global_shape: tuple[int, ...]
    partition_dim: int | None = None
    partition_stride: int = 1
    rank: int = 0
    size: int = 1
    partial_gradient: bool = False
    is_embedding_or_output: bool = False
    shared_embedding: bool = False
    is_copy: bool = False

    def __post_init__(self) -> None:
        if self.partition_dim is not None and self.global_shape[self.partition_dim] % (
            self.size * self.partition_stride
        ):
            raise ConfigError(
                f"{self.name}: dim {self.partition_dim} of {list(self.global_shape)} cannot be cut into "
                f"{self.partition_stride} x {self.size} equal parts; choose a size that "
                f"{self.size * self.partition_stride} divides"
            )

    @property
    def is_sharded(self) -> bool:
        """Whether this rank holds less than the whole tensor."""
        return self.partition_dim is not None and self.size > 1

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of this rank's part."""
        shape = list(self.global_shape)
        if self.partition_dim is not None:
            shape[self.partition_dim] //= self.size
        return tuple(shape)

    def boxes(self) -> tuple[Box, ...]:
        """Return this rank's part as rectangles, in local and in global coordinates."""
        whole = tuple(slice(0, n) for n in self.global_shape)
        if self.partition_dim is None:
            return ((whole, whole),)
        dim, out = self.partition_dim, []
        block = self.global_shape[dim] // self.partition_stride
        part = block // self.size
        for i in range(self.partition_stride):
            local, global_ = list(whole), list(whole)
            local[dim] = slice(i * part, (i + 1) * part)
            start = i * block + self.rank * part
            global_[dim] = slice(start, start + part)
            out.append((tuple(local), tuple(global_)))
        return tuple(out)

    def cut(self, full: np.ndarray) -> np.ndarray:
        """Return this rank's part of `full` as a C-contiguous copy."""
        if tuple(full.shape) != self.global_shape:
            raise ConfigError(f"{self.name}: expected shape {list(self.global_shape)}, got {list(full.shape)}")
        out = np.empty(self.local_shape, full.dtype)
        for local, global_ in self.boxes():
            out[local] = full[global_]
        return out


def make_parameter(spec: ShardSpec, init_method: InitMethod, dtype: str = "float32") -> Parameter:
    """Return a parameter with this rank's part of the full initial value, and `spec` as its attribute `shard`."""
    local = spec.cut(np.asarray(init_method(spec.global_shape), np.float32))
    parameter = Parameter(Tensor(local).astype(getattr(ms, dtype)), name=spec.name.rsplit(".", 1)[-1])
    parameter.shard = spec
    return parameter


def shard_of(parameter: Parameter) -> ShardSpec:
    """Return the parameter's `shard`; a parameter made elsewhere is taken as whole on every rank."""
    spec = getattr(parameter, "shard", None)
    if spec is None:
        spec = ShardSpec(parameter.name, tuple(parameter.shape))
        parameter.shard = spec
    return spec


# ---- initial values -------------------------------------------------------------------------------------------------
def init_method_normal(std: float, seed: int = 1234) -> InitMethod:
    """Return an init method drawing N(0, std^2); successive calls draw on, the same on every rank with this seed."""
    rng = np.random.Generator(np.random.Philox(seed))
    return lambda shape: rng.standard_normal(shape, np.float32) * np.float32(std)


def named_normal(std: float, seed: int, name: str) -> InitMethod:
    """Return an init method drawing N(0, std^2) from a stream of its own for `name`.

    The value of a tensor depends on the seed and its global name alone: neither on the layout nor on the order in
    which a rank builds its layers.
    """
    return lambda shape: _generator(seed, name).standard_normal(shape, np.float32) * np.float32(std)


def named_xavier_uniform(seed: int, name: str) -> InitMethod:
    """Return an init method drawing U(-a, a), a = sqrt(6 / (rows + columns)), from a stream of its own for `name`."""

    def init(shape: tuple[int, ...]) -> np.ndarray:
        bound = (6.0 / (shape[0] + shape[-1])) ** 0.5
        return ((_generator(seed, name).random(shape, np.float32) * 2 - 1) * bound).astype(np.float32)

    return init


def constant(value: float) -> InitMethod:
    """Return an init method that fills with `value`."""
    return lambda shape: np.full(shape, value, np.float32)


def _generator(seed: int, name: str) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(name.encode())]))
