"""Ascend's operators on a machine without an NPU, as MindSpore's documentation describes them.

Each one first hands its arguments to MindSpore's own operator, which checks them and then finds that the CPU has no
kernel for it: a call that MindSpore would not take there fails here too. Then it checks what the documentation says of
types and shapes, and computes.
"""

from __future__ import annotations

import ctypes
import functools
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
from parallel_core.ops import ascend, ascend_flat, ascend_kernels, ascend_products, ascend_random, reference

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
    "add_rms_norm": ops.add_rms_norm,
    "RmsNormGrad": auto_generate.RmsNormGrad(),
    "ring_attention_update": ops.ring_attention_update,
    "moe_token_unpermute": ops.moe_token_unpermute,
    "grouped_matmul_v4": auto_generate.grouped_matmul_v4,
    "grouped_matmul_add_": auto_generate.grouped_matmul_add_,
}
_PRIMITIVES = {name: getattr(auto_generate, name) for name in ("FlashAttentionScore", "FlashAttentionScoreGrad")}


_NO_KERNEL = "unregistered", "Create kernelmod", "Not implement exception"


def taken(name: str | tuple[str, int, dict[str, Any]], *args: Any, **kwargs: Any) -> None:
    """Require that MindSpore's operator takes these arguments; a primitive's own come with its name."""
    operator = _REAL[name] if isinstance(name, str) else _PRIMITIVES[name[0]](name[1], **name[2])
    try:
        operator(*args, **kwargs)
    except RuntimeError as error:
        assert any(words in str(error) for words in _NO_KERNEL), f"{name}: {error}"
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
    query: Tensor, key: Tensor, value: Tensor, head_num: int, *, attn_mask: Tensor | None, scalar_value: float,
    input_layout: str, sparse_mode: int, keep_prob: float = 1.0, drop_mask: Tensor | None = None,
    pre_tokens: int = 2**31 - 1, next_tokens: int = 2**31 - 1, actual_seq_qlen: Any = None,
    actual_seq_kvlen: Any = None,
) -> Tensor:  # fmt: skip
    """`ops.flash_attention_score` of queries and keys of one length, in the layouts and sparse modes that are used."""
    given = {"attn_mask": attn_mask, "scalar_value": scalar_value, "input_layout": input_layout}
    tokens = {"pre_tokens": pre_tokens, "next_tokens": next_tokens}
    lengths = {"actual_seq_qlen": actual_seq_qlen, "actual_seq_kvlen": actual_seq_kvlen}
    taken("flash_attention_score", query, key, value, head_num, sparse_mode=sparse_mode, keep_prob=keep_prob,
          drop_mask=drop_mask, **given, **tokens, **lengths)  # fmt: skip
    assert query.dtype == key.dtype == value.dtype and query.dtype in HALVES and key.shape == value.shape
    assert (input_layout == "TND") == (actual_seq_qlen is not None) and actual_seq_qlen == actual_seq_kvlen
    if input_layout == "SBH":
        S, B, H = query.shape
        apart = [x.reshape(S, B, -1, H // head_num).transpose(1, 2, 0, 3) for x in (query, key, value)]
    elif input_layout == "TND":
        apart = [x.transpose(1, 0, 2).expand_dims(0) for x in (query, key, value)]
    else:
        assert input_layout == "BNSD"
        apart = [query, key, value]
    B, N, S, D = apart[0].shape
    G = apart[1].shape[1]
    assert head_num == N and N % G == 0 and D % 16 == 0 and D <= 512
    assert (attn_mask is None or attn_mask.dtype == ms.bool_) and isinstance(scalar_value, float)
    if attn_mask is None:
        assert sparse_mode == 0
        hidden = np.zeros((1, 1, S, S), bool)
    elif sparse_mode == 1:
        assert attn_mask.shape in ((B, 1, S, S), (S, S))
        hidden = attn_mask.asnumpy().reshape(-1, 1, S, S)
    else:
        is_corner(attn_mask)
        hidden = np.triu(np.ones((S, S), bool), 1)[None, None]
        if sparse_mode == 4:
            assert input_layout != "TND" and next_tokens == 0 and pre_tokens >= 0
            hidden = hidden | np.tril(np.ones((S, S), bool), -pre_tokens - 1)
        else:
            assert sparse_mode == 2
    squares = S * S
    if input_layout == "TND":
        lengths_of = np.diff(actual_seq_qlen, prepend=0)
        assert sparse_mode == 2 and actual_seq_qlen[-1] == S and len(lengths_of) <= 1024 and lengths_of.min() > 0
        assert next_tokens == 0 and pre_tokens >= lengths_of.max() and isinstance(actual_seq_qlen, tuple)
        document, squares = np.repeat(np.arange(len(lengths_of)), lengths_of), int((lengths_of**2).sum())
        hidden = hidden | (document[:, None] != document[None])
    query, key, value = (x.astype(ms.float32) for x in apart)
    key, value = (ops.repeat_interleave(x, N // G, 1) for x in (key, value))
    scores = ops.BatchMatMul(transpose_b=True)(query, key) * scalar_value
    weights = ops.Softmax(-1)(ops.masked_fill(scores, Tensor(hidden), Tensor(-1e30, ms.float32)))
    assert (keep_prob == 1.0) == (drop_mask is None)
    if drop_mask is not None:
        shape = (squares * N // 8,) if input_layout == "TND" else (B, N, S, S // 8)
        assert (squares * N if input_layout == "TND" else S) % 8 == 0
        assert drop_mask.shape == shape and drop_mask.dtype == ms.uint8
        bits = np.unpackbits(drop_mask.asnumpy().reshape(-1), bitorder="little").astype(np.float32)
        kept = bits.reshape(B, N, S, S) if input_layout != "TND" else _of_sequences(bits, lengths_of, N, S)
        weights = weights * Tensor(kept / np.float32(keep_prob))
    out = ops.BatchMatMul()(weights, value).astype(apart[0].dtype)
    if input_layout == "TND":
        return out[0].transpose(1, 0, 2)
    return out if input_layout == "BNSD" else out.transpose(2, 0, 1, 3).reshape(S, B, N * D)


_known_corner: Tensor | None = None


def is_corner(mask: Tensor) -> None:
    """Require the mask that stands for a causal one of any size; the same object is looked at once."""
    global _known_corner
    if mask is _known_corner:
        return
    _known_corner = mask
    assert mask.dtype == ms.bool_ and mask.shape == (2048, 2048)
    assert np.array_equal(_real_asnumpy(mask), np.triu(np.ones((2048,) * 2), 1))


def _of_sequences(bits: np.ndarray, lengths: np.ndarray, N: int, T: int) -> np.ndarray:
    """Return factors of weights [1, N, T, T] from bits of one sequence after another, [N, length, length] each."""
    out, place, at = np.zeros((1, N, T, T), np.float32), 0, 0
    for length in lengths.tolist():
        count = N * length * length
        out[0, :, at : at + length, at : at + length] = bits[place : place + count].reshape(N, length, length)
        place, at = place + count, at + length
    return out


class _Blocks:
    """The arguments that FlashAttentionScore and its gradient have, checked as they are documented, and the scores."""

    def __init__(
        self, head_num: int, keep_prob: float = 1.0, scale_value: float = 1.0, pre_tokens: int = 2**31 - 1,
        next_tokens: int = 2**31 - 1, inner_precise: int = 0, input_layout: str = "BSH", sparse_mode: int = 0,
    ) -> None:  # fmt: skip
        assert input_layout == "SBH" and inner_precise in (0, 1, 2) and 0 < keep_prob <= 1
        assert pre_tokens == next_tokens == 2**31 - 1  # in the mode without a mask too, they hide nothing
        self.heads, self.scale, self.mode, self.keep = head_num, scale_value, sparse_mode, keep_prob
        self.given = {
            "keep_prob": keep_prob, "scale_value": scale_value, "pre_tokens": pre_tokens, "next_tokens": next_tokens,
            "inner_precise": inner_precise, "input_layout": input_layout, "sparse_mode": sparse_mode,
        }  # fmt: skip

    def apart(self, x: Tensor, D: int) -> np.ndarray:
        """Return [S, B, H] as float32 [B, heads, S, D], repeated to the query heads."""
        assert x.dtype in HALVES and x.ndim == 3 and x.shape[2] % D == 0 and D % 16 == 0
        array = _numbers(x).astype(np.float32).reshape(x.shape[0], x.shape[1], -1, D).transpose(1, 2, 0, 3)
        return np.repeat(array, self.heads // array.shape[1], 1)

    def scores(self, query: Tensor, key: Tensor, mask: Tensor | None) -> tuple[np.ndarray, Any]:
        assert query.dtype == key.dtype and (self.mode == 0) == (mask is None)
        (S, B, H), T = query.shape, key.shape[0]
        scores = self.scale * self.apart(query, H // self.heads) @ self.apart(key, H // self.heads).swapaxes(-1, -2)
        if mask is None:
            return scores, np.zeros((1, 1, S, T), bool)
        if self.mode == 3:  # counted from the last query and key
            is_corner(mask)
            hidden = np.triu(np.ones((S, T), bool), T - S + 1)
        else:
            assert self.mode == 1 and mask.dtype == ms.bool_ and mask.shape in ((S, T), (B, 1, S, T))
            hidden = _numbers(mask)
        return np.where(hidden, -40000.0, scores), hidden  # a finite number: rows may be all hidden


    def kept(self, mask: Tensor | None, shape: tuple[int, ...]) -> np.ndarray | float:
        """Return the factors of dropout for weights of a shape."""
        assert (self.keep == 1.0) == (mask is None)
        if mask is None:
            return 1.0
        assert mask.dtype == ms.uint8 and mask.shape == (*shape[:3], shape[3] // 8) and shape[3] % 8 == 0
        return np.unpackbits(_numbers(mask), axis=-1, bitorder="little") / np.float32(self.keep)


class FlashAttentionScore(_Blocks):
    """The primitive, which returns the maximum, the sum of exponentials less it, each eight times, and the output."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *, drop_mask: Tensor | None, attn_mask: Tensor | None
    ) -> Any:
        masks = {"drop_mask": drop_mask, "attn_mask": attn_mask}
        taken(("FlashAttentionScore", self.heads, self.given), query, key, value, **masks)
        scores, _ = self.scores(query, key, attn_mask)
        top = scores.max(-1, keepdims=True)
        weights = np.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        dropped = weights / total * self.kept(drop_mask, weights.shape)
        out = (dropped @ self.apart(value, query.shape[2] // self.heads)).transpose(2, 0, 1, 3)
        eight = [Tensor(np.repeat(x, 8, -1).astype(np.float32)) for x in (top, total)]
        return *eight, Tensor(np.zeros((), np.float16)), Tensor(out.reshape(query.shape)).astype(query.dtype)


class FlashAttentionScoreGrad(_Blocks):
    """The gradient of the primitive."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, dy: Tensor, *, drop_mask: Tensor | None,
        atten_mask: Tensor | None, softmax_max: Tensor, softmax_sum: Tensor, attention_in: Tensor,
    ) -> Any:  # fmt: skip
        options = {"softmax_max": softmax_max, "softmax_sum": softmax_sum, "attention_in": attention_in}
        taken(("FlashAttentionScoreGrad", self.heads, self.given), query, key, value, dy, drop_mask=drop_mask,
              atten_mask=atten_mask, **options)  # fmt: skip
        scores, hidden = self.scores(query, key, atten_mask)
        (S, B, H), N = query.shape, self.heads
        D = H // N
        assert softmax_max.shape == softmax_sum.shape == (B, N, S, 8) and softmax_max.dtype == ms.float32
        weights = np.exp(np.where(hidden, -np.inf, scores) - _numbers(softmax_max)[..., :1])
        weights = weights / _numbers(softmax_sum)[..., :1]
        dout, out = self.apart(dy, D), self.apart(attention_in, D)
        kept = self.kept(drop_mask, weights.shape)
        dweights = dout @ self.apart(value, D).swapaxes(-1, -2) * kept
        dscores = weights * (dweights - (dout * out).sum(-1, keepdims=True))
        G = key.shape[2] // D
        grads = (
            dscores @ self.apart(key, D) * self.scale,
            self._shared(dscores.swapaxes(-1, -2) @ self.apart(query, D), G) * self.scale,
            self._shared((weights * kept).swapaxes(-1, -2) @ dout, G),
        )
        flat = (x.transpose(2, 0, 1, 3).reshape(x.shape[2], B, -1).astype(np.float32) for x in grads)
        return *(Tensor(x).astype(query.dtype) for x in flat), Tensor(np.zeros((), np.float16))

    def _shared(self, x: np.ndarray, G: int) -> np.ndarray:
        return x.reshape(x.shape[0], G, -1, *x.shape[2:]).sum(2)


def ring_attention_update(
    prev_attn_out: Tensor, prev_softmax_max: Tensor, prev_softmax_sum: Tensor, cur_attn_out: Tensor,
    cur_softmax_max: Tensor, cur_softmax_sum: Tensor, layout: str = "SBH",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`ops.ring_attention_update` of [S, B, H]."""
    inputs = prev_attn_out, prev_softmax_max, prev_softmax_sum, cur_attn_out, cur_softmax_max, cur_softmax_sum
    taken("ring_attention_update", *inputs)
    (S, B, H), (_, N, _, _) = prev_attn_out.shape, prev_softmax_max.shape
    assert layout == "SBH" and prev_attn_out.dtype == cur_attn_out.dtype and cur_attn_out.shape == (S, B, H)
    for x in (*inputs[1:3], *inputs[4:]):
        values = _numbers(x)
        assert x.dtype == ms.float32 and x.shape == (B, N, S, 8) and (values == values[..., :1]).all()
    assert (_numbers(prev_softmax_max) > 0).all() and (_numbers(cur_softmax_max) > 0).all()
    out, tops, sums, other, other_tops, other_sums = (_numbers(x).astype(np.float64) for x in inputs)
    top = np.maximum(tops, other_tops)
    parts = sums * np.exp(tops - top), other_sums * np.exp(other_tops - top)
    total = parts[0] + parts[1]
    joined = sum(
        (x.reshape(S, B, N, -1) * (part / total)[..., :1].transpose(2, 0, 1, 3)).reshape(S, B, H)
        for x, part in zip((out, other), parts)
    )
    return tuple(Tensor(x.astype(np.float32)) for x in (joined, top, total))  # type: ignore[union-attr,return-value]


def add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.add_rms_norm`: the norm of the sum, the reciprocal of the deviation, the sum."""
    taken("add_rms_norm", x1, x2, gamma, epsilon)
    assert x1.dtype == x2.dtype == gamma.dtype and x1.dtype in FLOATS and x1.shape == x2.shape
    assert 0 < epsilon <= 1 and gamma.ndim <= x1.ndim
    total = x1 + x2
    wide = total.astype(ms.float32)
    rstd = mint.rsqrt((wide * wide).mean(-1, keep_dims=True) + epsilon)
    return reference.rms_norm(total, gamma, epsilon), rstd, total


class RmsNormGrad:
    """The gradient of a norm: for its input, in its type, and for the weight, in float32."""

    def __call__(self, dy: Tensor, x: Tensor, rstd: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        taken("RmsNormGrad", dy, x, rstd, gamma)
        assert dy.dtype == x.dtype == gamma.dtype and dy.shape == x.shape and rstd.dtype == ms.float32
        g, a, r, w = (_numbers(t).astype(np.float32) for t in (dy, x, rstd, gamma))
        normal, scaled = a * r, g * w
        dx = r * (scaled - normal * (scaled * normal).mean(-1, keepdims=True))
        return Tensor(dx).astype(dy.dtype), Tensor((g * normal).reshape(-1, w.size).sum(0).reshape(w.shape))


def moe_token_unpermute(permuted_tokens: Tensor, sorted_indices: Tensor, probs: Tensor) -> Tensor:
    """`ops.moe_token_unpermute`: the weighted sum of each token's rows."""
    taken("moe_token_unpermute", permuted_tokens, sorted_indices, probs)
    index = _numbers(sorted_indices)
    assert sorted_indices.dtype == ms.int32 and sorted(index.tolist()) == list(range(permuted_tokens.shape[0]))
    assert probs.size == index.size and probs.dtype == permuted_tokens.dtype in FLOATS
    rows = _numbers(permuted_tokens).astype(np.float32)[index].reshape(*probs.shape, -1)
    return Tensor((rows * _numbers(probs).astype(np.float32)[..., None]).sum(1)).astype(permuted_tokens.dtype)


def grouped_matmul_v4(
    x: list[Tensor], weight: list[Tensor], *, group_list: Tensor, split_item: int, group_type: int
) -> list[Tensor]:
    """One tensor in and out, groups of rows, by the end of each; x and weight of one type."""
    taken("grouped_matmul_v4", x, weight, group_list=group_list, split_item=split_item, group_type=group_type)
    assert (len(x), len(weight), split_item, group_type) == (1, 1, 3, 0)
    (rows,), (matrices,) = x, weight
    assert rows.dtype == matrices.dtype and rows.ndim == 2 and matrices.ndim == 3
    ends = group_ends(group_list, len(matrices), rows.shape[0])
    assert matrices.shape[1] == rows.shape[1]
    a, b = _numbers(rows).astype(np.float32), _numbers(matrices).astype(np.float32)
    parts = [a[start:end] @ b[i] for i, (start, end) in enumerate(zip([0, *ends], ends))]
    return [Tensor(np.concatenate(parts)).astype(rows.dtype)]


def grouped_matmul_add_(x: Tensor, weight: Tensor, group_list: Tensor, out: Tensor) -> Tensor:
    """16 bits in, float32 out, to which the product over each group's rows is added in place."""
    taken("grouped_matmul_add_", x, weight, group_list, out)
    assert x.dtype == weight.dtype and x.dtype in HALVES and out.dtype == ms.float32
    groups, (K, N) = group_list.shape[0], (x.shape[1], weight.shape[1])
    assert out.shape in ((groups, K, N), (groups * K, N))
    ends = group_ends(group_list, groups, x.shape[0])
    a, b = (_numbers(t).astype(np.float32) for t in (x, weight))
    products = np.stack([a[i:j].T @ b[i:j] for i, j in zip([0, *ends], ends)])
    memory_of(out)[...] += products.reshape(out.shape)
    return out


def group_ends(group_list: Tensor, groups: int, rows: int) -> list[int]:
    """Return where groups end, which all have rows: whether they may be empty is not documented."""
    ends = _numbers(group_list)
    assert group_list.dtype == ms.int64 and ends.shape == (groups,) and ends[-1] == rows
    assert (np.diff(ends, prepend=0) > 0).all()
    return ends.tolist()


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

    def astype(self, dtype: Any) -> Tensor:
        return Tensor(self._array.astype(_numpy_type(dtype)))

    def contiguous(self) -> DeviceMemory:
        return self

    def asnumpy(self) -> np.ndarray:
        _count()
        return self._array.copy()

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

    def __mul__(self, factor: float) -> Tensor:
        return Tensor(self._array * self._array.dtype.type(factor))


def _numpy_type(dtype: Any) -> Any:
    return _real_asnumpy(Tensor([0], ms.bfloat16)).dtype if dtype == ms.bfloat16 else ms.dtype_to_nptype(dtype)


def _numbers(x: Any) -> np.ndarray:
    return x._array if isinstance(x, DeviceMemory) else _real_asnumpy(x)


def memory_of(x: Any) -> np.ndarray:
    """Return the memory of a contiguous tensor, or of a part of a buffer: what is written there, the tensor has.

    It is the tensor's for as long as that lives; of views `asnumpy` gives copies.
    """
    if isinstance(x, DeviceMemory):
        return x._array
    assert x.is_contiguous()
    kind = np.dtype(_numpy_type(x.dtype))
    memory = (ctypes.c_char * (x.size * kind.itemsize)).from_address(x.data_ptr())
    return np.frombuffer(memory, kind).reshape(x.shape)


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
        reference.adam_(var._array, _numbers(gradient), m._array, v._array, **options)


# ---- what a tensor does in place, which a CPU's says it does and does not -----------------------------------------
def _add_(self: Tensor, other: Any) -> Tensor:
    assert other.dtype == self.dtype and other.shape == self.shape
    memory_of(self)[...] += _numbers(other)
    return self


def _copy_(self: Tensor, other: Any) -> Tensor:
    assert other.dtype == self.dtype and other.shape == self.shape
    memory_of(self)[...] = _numbers(other)
    return self


def _zero_(self: Tensor) -> Tensor:
    memory_of(self)[...] = 0
    return self


def _index_add_(self: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    assert dim == 0 and index.dtype == ms.int32 and index.shape == source.shape[:1]
    assert source.dtype == self.dtype and source.shape[1:] == self.shape[1:]
    rows = _numbers(index)
    assert rows.min() >= 0 and rows.max() < self.shape[0]
    np.add.at(memory_of(self), rows, _numbers(source))
    return self


# ---- what goes to the host ------------------------------------------------------------------------------------------
_real_asnumpy = Tensor.asnumpy
_ROUND_TRIPS: Counter[str] | None = None
_PACKAGE = str(Path(parallel_core.__file__).parent)
_DOUBLES = __file__, str(Path(__file__).with_name("hccl_double.py"))


def _count() -> None:
    """Note the place in the package that copies a tensor to the host; a double of an operator may."""
    if _ROUND_TRIPS is None:
        return
    stack = traceback.extract_stack(limit=40)[::-1]
    if any(frame.filename in _DOUBLES and frame.name not in ("_count", "asnumpy", "counted") for frame in stack):
        return
    for frame in stack:
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
    *((ops, double.__name__, double) for double in (
        flash_attention_score, ring_attention_update, rms_norm, add_rms_norm, swiglu, rotary_position_embedding,
        moe_token_unpermute,
    )),
    (ascend, "FlashAttentionScore", FlashAttentionScore),
    (ascend, "FlashAttentionScoreGrad", FlashAttentionScoreGrad),
    (ascend_kernels, "RmsNormGrad", RmsNormGrad),
    (ascend_products, "grouped_matmul_v4", grouped_matmul_v4),
    (ascend_products, "grouped_matmul_add_", grouped_matmul_add_),
    (mint.nn.functional, "gelu", gelu),
    (mint, "scatter_add", scatter_add),
    (ascend_flat, "AdamW", AdamW),
    (ascend_flat.AscendFlat, "zeros", classmethod(_device_zeros)),
    *((Tensor, double.__name__[1:], double) for double in (_add_, _copy_, _zero_, _index_add_)),
)
"""Where each operator is found by those who call it, under which name, and its double."""

_get_context = ms.get_context


def _as_ascend(name: str) -> Any:
    return "Ascend" if name == "device_target" else _get_context(name)


def _by_name(name: str, *args: Any, **kwargs: Any) -> Any:
    """Call the double of this name, so that a test may put another in its place."""
    return globals()[name](*args, **kwargs)


@contextmanager
def on_ascend_double() -> Iterator[None]:
    """Answer for the device and compute what its operators do."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(ms, "get_context", _as_ascend))
        stack.enter_context(mock.patch.object(ms, "set_device"))  # the process has one, which computes
        for place, name, double in DOUBLES:
            found = functools.partial(_by_name, double.__name__) if isinstance(double, FunctionType) else double
            stack.enter_context(mock.patch.object(place, name, double if place is Tensor else found))
        yield
