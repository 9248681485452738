"""Ascend's operators on a machine without an NPU, as MindSpore's documentation describes them.

Each one first hands its arguments to MindSpore's own operator, which checks them and then finds that the CPU has no
kernel for it: a call that MindSpore would not take there fails here too. Then it checks what the documentation says of
types and shapes, and computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint
from mindspore.ops import auto_generate

from parallel_core.ops import ascend_random

# Where operators run later, so does the refusal.
ms.set_context(mode=ms.PYNATIVE_MODE, device_target="CPU", pynative_synchronize=True)

HALVES = ms.float16, ms.bfloat16
FLOATS = *HALVES, ms.float32

_REAL: dict[str, Callable[..., Any]] = {
    "rand": mint.rand,
    "DropoutGenMaskExt": auto_generate.DropoutGenMaskExt(),
}


def taken(name: str, *args: Any, **kwargs: Any) -> None:
    """Require that MindSpore's operator takes these arguments."""
    try:
        _REAL[name](*args, **kwargs)
    except RuntimeError as error:
        assert "unregistered" in str(error) or "Create kernelmod" in str(error), f"{name}: {error}"
    else:
        raise AssertionError(f"{name} runs on this CPU: no double is needed")


def rand(*size: Any, generator: ms.Generator, dtype: Any = None) -> Tensor:
    """`mint.rand`: the same numbers for the generator's seed."""
    taken("rand", *size, generator=generator, dtype=dtype)
    assert dtype in (None, ms.float32)
    draws = np.random.Generator(np.random.Philox(int(generator.initial_seed())))
    return Tensor(draws.random(size[0] if isinstance(size[0], tuple) else size, np.float32))


class DropoutGenMaskExt:
    """Bits of which a share p is 0, 128 at a time, as uint8."""

    def __call__(self, shape: tuple[int, ...], p: float, seed: Tensor, offset: Tensor, dtype: Any) -> Tensor:
        taken("DropoutGenMaskExt", shape, p, seed, offset, dtype)
        assert dtype in FLOATS and int(offset) == 0
        draws = np.random.Generator(np.random.Philox(int(seed)))
        bits = draws.random(-(-int(np.prod(shape)) // 128) * 128, np.float32) >= p
        return Tensor(np.packbits(bits, bitorder="little"))


_get_context = ms.get_context


def _as_ascend(name: str) -> Any:
    return "Ascend" if name == "device_target" else _get_context(name)


@contextmanager
def on_ascend_double() -> Iterator[None]:
    """Answer for the device and compute what its operators do."""
    with ExitStack() as stack:
        patch = mock.patch.object
        stack.enter_context(patch(ms, "get_context", _as_ascend))
        stack.enter_context(patch(ascend_random.mint, "rand", rand))
        stack.enter_context(patch(ascend_random, "DropoutGenMaskExt", DropoutGenMaskExt))
        yield
