"""Ascend's operators on a machine without an NPU, as MindSpore's documentation describes them.

Each one first hands its arguments to MindSpore's own operator, which checks them and then finds that the CPU has no
kernel for it: a call that MindSpore would not take there fails here too. Then it checks what the documentation says of
types and shapes, and computes.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FunctionType
from typing import Any
from unittest import mock

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint, ops
from mindspore.ops import auto_generate

import parallel_core
from parallel_core.ops import ascend_flat, ascend_random, reference

# Where operators run later, so does the refusal.
ms.set_context(mode=ms.PYNATIVE_MODE, device_target="CPU", pynative_synchronize=True)

HALVES = ms.float16, ms.bfloat16
FLOATS = *HALVES, ms.float32

_REAL: dict[str, Callable[..., Any]] = {
    "rand": mint.rand,
    "DropoutGenMaskExt": auto_generate.DropoutGenMaskExt(),
    "flash_attention_score": ops.flash_attention_score,
    "rms_norm": ops.rms_norm,
    "swiglu": ops.swiglu,
    "rotary_position_embedding": ops.rotary_position_embedding,
    "gelu": mint.nn.functional.gelu,
    "AdamW": auto_generate.AdamW(),
    "scatter_add": mint.scatter_add,
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


def flash_attention_score(
    query: Tensor, key: Tensor, value: Tensor, head_num: int, *, attn_mask: Tensor, scalar_value: float,
    input_layout: str, sparse_mode: int, keep_prob: float = 1.0, drop_mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`ops.flash_attention_score` of whole sequences, in the layouts and sparse modes that are used."""
    given = {"attn_mask": attn_mask, "scalar_value": scalar_value, "input_layout": input_layout}
    taken("flash_attention_score", query, key, value, head_num, sparse_mode=sparse_mode, keep_prob=keep_prob,
          drop_mask=drop_mask, **given)  # fmt: skip
    assert query.dtype == key.dtype == value.dtype and query.dtype in HALVES and key.shape == value.shape
    if input_layout == "SBH":
        S, B, H = query.shape
        apart = [x.reshape(S, B, -1, H // head_num).transpose(1, 2, 0, 3) for x in (query, key, value)]
    else:
        assert input_layout == "BNSD"
        apart = [query, key, value]
    B, N, S, D = apart[0].shape
    G = apart[1].shape[1]
    assert head_num == N and N % G == 0 and D % 16 == 0 and D <= 512
    assert attn_mask.dtype == ms.bool_ and isinstance(scalar_value, float)
    hidden = np.triu(np.ones((S, S), bool), 1)[None, None]
    if sparse_mode == 2:
        assert attn_mask.shape == (2048, 2048) and np.array_equal(attn_mask.asnumpy(), np.triu(np.ones((2048,) * 2), 1))
    else:
        assert sparse_mode == 1 and attn_mask.shape in ((B, 1, S, S), (S, S))
        hidden = attn_mask.asnumpy().reshape(-1, 1, S, S)
    query, key, value = (x.astype(ms.float32) for x in apart)
    key, value = (ops.repeat_interleave(x, N // G, 1) for x in (key, value))
    scores = ops.BatchMatMul(transpose_b=True)(query, key) * scalar_value
    weights = ops.Softmax(-1)(ops.masked_fill(scores, Tensor(hidden), Tensor(-1e30, ms.float32)))
    assert (keep_prob == 1.0) == (drop_mask is None)
    if drop_mask is not None:
        assert S % 8 == 0 and drop_mask.shape == (B, N, S, S // 8) and drop_mask.dtype == ms.uint8
        kept = np.unpackbits(drop_mask.asnumpy(), axis=-1, bitorder="little").astype(np.float32)
        weights = weights * Tensor(kept / np.float32(keep_prob))
    out = ops.BatchMatMul()(weights, value).astype(apart[0].dtype)
    return out if input_layout == "BNSD" else out.transpose(2, 0, 1, 3).reshape(S, B, N * D)


def rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """`ops.rms_norm`: the norm and the reciprocal of the deviation."""
    taken("rms_norm", x, gamma, epsilon)
    assert x.dtype == gamma.dtype and x.dtype in FLOATS and 0 < epsilon <= 1 and gamma.ndim <= x.ndim
    return reference.rms_norm(x, gamma, epsilon), x.astype(ms.float32).mean(-1)


def swiglu(input: Tensor, dim: int = -1) -> Tensor:
    """`ops.swiglu` over the last dim."""
    taken("swiglu", input, dim)
    assert input.dtype in FLOATS and dim == -1 and input.shape[-1] % 2 == 0
    return reference.ACTIVATIONS["swiglu"](input)


def gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    """`mint.nn.functional.gelu`."""
    taken("gelu", input, approximate=approximate)
    return reference.ACTIVATIONS[{"none": "gelu", "tanh": "gelu_tanh"}[approximate]](input)


def rotary_position_embedding(x: Tensor, cos: Tensor, sin: Tensor, mode: int = 0) -> Tensor:
    """`ops.rotary_position_embedding` of [S, B, N, D], with the layouts of the tables that its page lists."""
    taken("rotary_position_embedding", x, cos, sin, mode)
    (S, B, N, D), shape = x.shape, cos.shape
    assert x.dtype == cos.dtype == sin.dtype and x.dtype in FLOATS and mode in (0, 1) and cos.shape == sin.shape
    assert shape in ([(S, 1, 1, D), (S, B, 1, D), (S, B, N, D)] if mode == 0 else [(S, 1, 1, D)])
    assert D < 896 and D % 2 == 0 and max(B, N) < 1000
    return reference.rotary(x, cos.astype(ms.float32), sin.astype(ms.float32), bool(mode))


def scatter_add(input: Tensor, dim: int, index: Tensor, src: Tensor) -> Tensor:
    """`mint.scatter_add`, without a gradient."""
    taken("scatter_add", input, dim, index, src)
    assert index.dtype == ms.int64 and src.dtype == input.dtype
    assert index.shape == src.shape and index.ndim == input.ndim
    array, rows = input.asnumpy().copy(), index.asnumpy()
    assert dim == 1 and rows.min() >= 0 and rows.max() < array.shape[1]
    np.add.at(array, (np.arange(len(rows))[:, None], rows), src.asnumpy())
    return Tensor(array)


# ---- memory ---------------------------------------------------------------------------------------------------------
class DeviceMemory:
    """A 1-D device tensor whose views see what is written in place, which a CPU tensor's do not."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    @property
    def dtype(self) -> Any:
        return ms.bfloat16 if self._array.dtype.name == "bfloat16" else getattr(ms, self._array.dtype.name)

    shape = property(lambda self: self._array.shape)
    size = property(lambda self: self._array.size)
    nbytes = property(lambda self: self._array.nbytes)
    itemsize = property(lambda self: self._array.itemsize)

    def narrow(self, dim: int, start: int, length: int) -> DeviceMemory:
        """`Tensor.narrow`: a view."""
        assert dim == 0 and start >= 0 and start + length <= self.size
        return DeviceMemory(self._array[start : start + length])

    def view(self, shape: tuple[int, ...]) -> Tensor:
        """`Tensor.view`, as a tensor that shares the memory."""
        return Tensor.from_numpy(self._array.reshape(shape))

    def reshape(self, *shape: int) -> DeviceMemory:
        return DeviceMemory(self._array.reshape(shape))

    def astype(self, dtype: Any) -> DeviceMemory:
        return DeviceMemory(self._array.astype(_numpy_type(dtype)))

    def asnumpy(self) -> np.ndarray:
        _count()
        return self._array.copy()

    def sum(self) -> Tensor:
        return Tensor(self._array.sum(dtype=np.float64).astype(np.float32))

    def _write(self, values: np.ndarray) -> DeviceMemory:
        self._array[:] = values
        return self

    def copy_(self, other: Any) -> DeviceMemory:
        assert other.dtype == self.dtype and other.shape == self.shape
        return self._write(_numbers(other))

    def add_(self, other: Any) -> DeviceMemory:
        return self._write(self._array + _numbers(other))

    def sub_(self, other: Any) -> DeviceMemory:
        return self._write(self._array - _numbers(other))

    def mul_(self, factor: float) -> DeviceMemory:
        return self._write(self._array * self._array.dtype.type(factor))

    def __add__(self, other: Any) -> DeviceMemory:
        return DeviceMemory(self._array + _numbers(other))

    def __mul__(self, other: Any) -> DeviceMemory:
        number = isinstance(other, (int, float))
        return DeviceMemory(self._array * (self._array.dtype.type(other) if number else _numbers(other)))


def _numpy_type(dtype: Any) -> Any:
    return _real_asnumpy(Tensor([0], ms.bfloat16)).dtype if dtype == ms.bfloat16 else ms.dtype_to_nptype(dtype)


def _numbers(x: Any) -> np.ndarray:
    return x._array if isinstance(x, DeviceMemory) else _real_asnumpy(x)


def _device_zeros(cls: type, numel: int, dtype: str) -> ascend_flat.AscendFlat:
    return ascend_flat.AscendFlat(DeviceMemory(np.zeros(numel, _numpy_type(getattr(ms, dtype)))))  # type: ignore[arg-type]


class AdamW:
    """The fused update; it counts from 0."""

    def __call__(self, var: Any, m: Any, v: Any, max_v: Any, gradient: Any, step: Tensor, *constants: Any) -> None:
        taken("AdamW", *(Tensor(_numbers(x)) for x in (var, m, v, max_v, gradient)), step, *constants)
        (lr, beta1, beta2, decay, eps, amsgrad, maximize), count = constants, int(_real_asnumpy(step)[0]) + 1
        assert step.shape == (1,) and step.dtype == ms.float32 and max_v is v and not (amsgrad or maximize)
        assert all(x.dtype == ms.float32 and x.shape == var.shape for x in (var, m, v, gradient))
        options = {"step": count, "lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": decay}
        reference.adam_(var._array, gradient._array, m._array, v._array, **options)


# ---- what goes to the host ------------------------------------------------------------------------------------------
_real_asnumpy = Tensor.asnumpy
_ROUND_TRIPS: Counter[str] | None = None
_PACKAGE = str(Path(parallel_core.__file__).parent)


def _count() -> None:
    """Note the place in the package that copies a tensor to the host; a double of an operator may."""
    if _ROUND_TRIPS is None:
        return
    for frame in traceback.extract_stack()[::-1]:
        if frame.filename == __file__ and frame.name not in ("_count", "asnumpy", "counted"):
            return
        if frame.filename.startswith(_PACKAGE):
            _ROUND_TRIPS[f"{Path(frame.filename).relative_to(_PACKAGE)}: {frame.name}"] += 1
            return


@contextmanager
def round_trips() -> Iterator[Counter[str]]:
    """Count, by the function that asks, how often a tensor is read on the host, which waits for all that is running."""
    global _ROUND_TRIPS

    def counting(name: str) -> Any:
        real = getattr(Tensor, name)

        def counted(self: Tensor, *args: Any) -> Any:
            _count()
            return real(self, *args)

        return mock.patch.object(Tensor, name, counted)

    _ROUND_TRIPS = Counter()
    with ExitStack() as stack:
        for name in ("asnumpy", "item", "tolist", "__float__", "__int__", "__bool__", "__index__"):
            stack.enter_context(counting(name))
        try:
            yield _ROUND_TRIPS
        finally:
            _ROUND_TRIPS = None


DOUBLES: tuple[tuple[Any, str, Any], ...] = (
    (mint, "rand", rand),
    (ascend_random, "DropoutGenMaskExt", DropoutGenMaskExt),
    (ops, "flash_attention_score", flash_attention_score),
    (ops, "rms_norm", rms_norm),
    (ops, "swiglu", swiglu),
    (ops, "rotary_position_embedding", rotary_position_embedding),
    (mint.nn.functional, "gelu", gelu),
    (mint, "scatter_add", scatter_add),
    (ascend_flat, "AdamW", AdamW),
    (ascend_flat.AscendFlat, "zeros", classmethod(_device_zeros)),
)
"""Where each operator is found by those who call it, under which name, and its double."""

_get_context = ms.get_context


def _as_ascend(name: str) -> Any:
    return "Ascend" if name == "device_target" else _get_context(name)


@contextmanager
def on_ascend_double() -> Iterator[None]:
    """Answer for the device and compute what its operators do."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(ms, "get_context", _as_ascend))
        for place, name, double in DOUBLES:
            stack.enter_context(mock.patch.object(place, name, lambda *x, n=double.__name__, **k: globals()[n](*x, **k))
                                if isinstance(double, FunctionType) else mock.patch.object(place, name, double))
        yield
