"""Parameters that know which part of which global tensor they are."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor

from parallel_core.errors import ConfigError
from parallel_core.layout.shard import TensorShard

InitMethod = Callable[[tuple[int, ...]], np.ndarray]
"""Takes the shape of the full, unsharded tensor and returns its float32 values."""

def make_parameter(shard: TensorShard, init_method: InitMethod, dtype: str = "float32") -> Parameter:
    """Return a parameter with this rank's part of the full initial value, and `shard` as its attribute."""
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"{shard.name}: params_dtype={dtype!r}; give 'float32', 'bfloat16' or 'float16'")
    local = shard.take(np.asarray(init_method(shard.global_shape), np.float32))
    parameter = Parameter(Tensor(local).astype(getattr(ms, dtype)), name=shard.name.rsplit(".", 1)[-1])
    parameter.shard = shard.with_dtype(dtype)
    return parameter


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
