"""What the kernels' piece compares: every kernel that is selected against its reference, with the time of both."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint

from parallel_core import ops
from parallel_core.ops import ascend, reference, reference_experts
from parallel_core.ops.documents import remember
from parallel_core.ops.registry import KERNELS
from parallel_core.optimizer import flat

Function = Callable[..., Any]


class Sizes(NamedTuple):
    """Sequence, samples, query heads, key heads, head size, experts."""

    S: int
    B: int
    N: int
    G: int
    D: int
    E: int = 4


class Case(NamedTuple):
    """A kernel, its reference, what both get, whether autograd goes through them, and operations where they count."""

    name: str
    kernel: Function
    reference: Function
    inputs: list[Tensor]
    differentiable: bool = True
    flops: float = 0.0


class Maker:
    """Inputs of one type."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype

    def __call__(self, *shape: int, seed: int = 0, kind: Any = None) -> Tensor:
        values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
        return Tensor(values).astype(kind or self.dtype)


def _both(kernel: str, /, **options: Any) -> tuple[Function, Function]:
    """Return a kernel and its reference with options."""
    return partial(KERNELS[kernel].door, **options), partial(KERNELS[kernel].reference, **options)


def _cat(function: Function) -> Function:
    return lambda *x: mint.cat(function(*x), -1)


def differentiable(sizes: Sizes, make: Maker) -> Iterator[Case]:
    """Yield the kernels that autograd goes through."""
    S, B, N, G, D, _ = sizes
    H, scale = N * D, D**-0.5
    angles = np.random.default_rng(1).uniform(0, 6, (S, 1, 1, D // 2)).astype(np.float32)
    tables = [Tensor(f(np.concatenate((angles, angles), -1))) for f in (np.cos, np.sin)]
    x, weight = make(S, B, H), make(H, seed=1)
    qkv = [make(S, B, N, D), make(S, B, G, D, seed=1), make(S, B, G, D, seed=2)]
    yield Case("rms_norm", *_both("rms_norm", eps=1e-5), [x, weight])
    yield Case("add_rms_norm", *map(_cat, _both("add_rms_norm", eps=1e-5)), [x, make(S, B, H, seed=2), weight])
    yield Case("rotary", *_both("rotary", cos=tables[0], sin=tables[1], interleaved=False), qkv[:1])
    for name in ("swiglu", "gelu", "gelu_tanh"):
        yield Case(f"activation {name}", *_both("activation", bias=None, name=name), [make(S, B, 4 * H)])
    flops = 3.5 * 4 * B * N * S * S * D / 2  # two products forward and five backward, of half the scores
    yield Case("causal_attention", *_both("causal_attention", scale=scale), qkv, flops=flops)
    yield Case("causal_attention_packed", *_both("causal_attention_packed", head_size=D, scale=scale),
               [make(S, B, G, (N // G + 2) * D)], flops=flops)  # fmt: skip
    for what, start in seen_parts(S, B).items():
        yield Case(f"causal_attention of {what}", *_both("causal_attention", scale=scale, document_start_BS=start), qkv)
    seen = np.ones((B, S), np.int32)
    seen[:, S - S // 8 :] = 0
    alike = [make(S, B, N, D, seed=seed) for seed in range(3)]
    for what, padding in (("", None), (" with padding", Tensor(seen))):
        both = _both("bidirectional_attention", seen_BS=padding, scale=scale)
        yield Case(f"bidirectional_attention{what}", *both, alike)
    R = D // 2
    pairs = [Tensor(f(np.repeat(angles[..., : R // 2], 2, -1))) for f in (np.cos, np.sin)]
    latent = _both("latent_heads", cos=pairs[0], sin=pairs[1])
    yield Case("latent_heads", *map(_cat, latent), [make(S, B, N, D), make(S, B, N, 2 * D - R), make(S, B, R)])
    if ascend.has_flash_attention():
        bnsd = partial(ascend.flash_attention, scale=scale, input_layout="BNSD")
        yield Case("causal_attention BNSD", bnsd, partial(reference.causal_attention, scale=scale), qkv)


def seen_parts(S: int, B: int) -> dict[str, Tensor]:
    """Return document starts by what they are: unknown to the host, packed documents, a window."""
    rng, at = np.random.default_rng(3), np.arange(S)
    unknown = np.minimum(np.sort(rng.integers(0, S, (B, S)), 1), at).astype(np.int32)
    cuts = np.zeros((B, S), bool)
    cuts[:, 0] = True
    for row in cuts:
        row[rng.integers(1, S, 3)] = True
    packed = np.maximum.accumulate(np.where(cuts, at, 0), 1).astype(np.int32)
    window = np.broadcast_to(np.maximum(at - S // 4, 0), (B, S)).astype(np.int32)
    return {
        "documents": Tensor(unknown),
        "packed documents": remember(Tensor(packed), packed),
        "a window": remember(Tensor(window.copy()), window, S // 4),
    }


def _summed(kernel: Function, shape: tuple[int, ...], **options: Any) -> Function:
    """Return what a kernel that adds to a gradient's memory makes of it in two calls, the first of which overwrites."""

    def run(*inputs: Tensor) -> Tensor:
        buffer = flat.zeros(int(np.prod(shape)), "float32")
        memory: Any = buffer.memory(shape)
        for add in (False, True):
            kernel(memory, *inputs, **options, add=add)
        return Tensor(buffer.numpy().reshape(shape).copy())

    return run


def raw(sizes: Sizes, make: Maker) -> Iterator[Case]:
    """Yield the kernels that functions call in their own forward and backward passes."""
    S, B, N, G, D, E = sizes
    T, H, F = S * B, N * D, 2 * N * D
    x, dy = make(T, H), make(T, F, seed=1)
    both = [_summed(f, (F, H)) for f in (ops.linear_grad_weight_, reference.linear_grad_weight_)]
    yield Case("linear_grad_weight_", *both, [dy, x], False, 2 * 2 * T * H * F)  # two calls
    ids = Tensor(np.random.default_rng(2).integers(0, 64, T).astype(np.int32))
    both = [
        _summed(lambda into, d, f=f, add=True: f(into, d, ids, 8, add), (48, H))
        for f in (ops.embedding_grad_table_, reference.embedding_grad_table_)
    ]
    lookups = [lambda table, f=f: f(ids, table, 8) for f in (ops.embedding, reference.embedding)]
    yield Case("embedding", *lookups, [make(48, H)], False)
    yield Case("embedding_grad_table_", *both, [make(T, H, kind=ms.float32)], False)
    logits, lse, dloss = make(T, 64), make(T, seed=1, kind=ms.float32), make(T, seed=2, kind=ms.float32)
    options = {"log_sum_exp_T": lse, "target_T": ids, "first_row": 8, "dloss_T": dloss, "target_weight": 0.9,
               "uniform_weight": 0.01}  # fmt: skip
    yield Case("vocab_grad_logits", *_both("vocab_grad_logits", **options), [logits], False)
    yield from _of_experts(T, H, F, E, make)
    half, scale = S // 2, D**-0.5
    query, key, value = make(half, B, N, D), make(half, B, G, D, seed=1), make(half, B, G, D, seed=2)
    for what, first in (("on the diagonal", half), ("below it", 0)):
        place = {"start_BS": None, "q_first": half, "k_first": first, "scale": scale}
        yield Case(f"attention_block {what}", *_both("attention_block", **place), [query, key, value], False)
        out, lse = reference.attention_block(*(t.astype(ms.float32) for t in (query, key, value)), **place)
        given = {**place, "log_sum_exp_BNS": lse + 0.5}
        yield Case(f"attention_block_grad {what}", *_both_of_five("attention_block_grad", given),
                   [query, key, value, out.astype(make.dtype), make(half, B, H, seed=3)], False)  # fmt: skip
    parts = [make(half, B, H, kind=ms.float32), make(B, N, half, seed=1, kind=ms.float32), make(half, B, H, seed=2),
             make(B, N, half, seed=3, kind=ms.float32)]  # fmt: skip
    yield Case("join_blocks", *_both("join_blocks"), parts, False)


def _both_of_five(name: str, given: dict[str, Any]) -> list[Function]:
    """Return a kernel and its reference as functions of queries, keys, values, output and its gradient."""
    start, lse = given.pop("start_BS"), given.pop("log_sum_exp_BNS")
    kernel, want = KERNELS[name].door, KERNELS[name].reference
    return [lambda q, k, v, out, d, f=f: f(q, k, v, start, out, d, lse, **given) for f in (kernel, want)]


def _of_experts(T: int, H: int, F: int, E: int, make: Maker) -> Iterator[Case]:
    counts = np.random.default_rng(4).multinomial(T, [1 / E] * E).astype(np.int64)
    with_none = counts.copy()
    with_none[0], with_none[1] = counts[0] + counts[1], 0
    x, dy, weight = make(T, H), make(T, F, seed=1), make(E, F, H, seed=2)
    for what, number in (("", counts), (", one without rows", with_none)):
        for name, inputs in (("grouped_linear", [x, weight]), ("grouped_linear_grad_input", [dy, weight]),
                             ("grouped_linear_grad_weight", [dy, x])):  # fmt: skip
            yield Case(name + what, *_both(name, counts=number), inputs, False, 2 * T * H * F)
        both = [
            _summed(f, (E, F, H), counts=number)
            for f in (ops.grouped_linear_grad_weight_, reference_experts.grouped_linear_grad_weight_)
        ]
        yield Case(f"grouped_linear_grad_weight_{what}", *both, [dy, x], False, 2 * 2 * T * H * F)
    scale = make(T, seed=6, kind=ms.float32)
    yield Case("scaled_activation", *_both("scaled_activation", name="swiglu"), [dy, scale])
    order = np.random.default_rng(5).permutation(T).astype(np.int32)
    yield Case("gather_rows", *_both("gather_rows", index_N=order), [x], False)
    yield Case("sum_rows", *_both("sum_rows", index_TK=order.reshape(-1, 2)), [x], False)


def compare(case: Case) -> tuple[list[float], list[float]]:
    """Return the largest errors of values and gradients, by the largest of each, and the seconds of both functions."""
    results, seconds = [], []
    for function in (case.kernel, case.reference):
        # The plain operators tell what is right in float32, and what they cost in the kernel's type.
        exact = case.inputs if function is case.kernel else [x.astype(ms.float32) for x in case.inputs]
        timed = function
        results.append([_wide(x) for x in _tuple(function(*exact))])
        if case.differentiable:
            weights = _like(function(*exact))
            positions = tuple(range(len(case.inputs)))
            timed = ms.grad(lambda *x, f=function, w=weights: (f(*x) * w.astype(x[0].dtype)).sum(), positions)
            results[-1] += [_wide(x) for x in _tuple(timed(*exact))]
        timed(*case.inputs)
        begun = time.perf_counter()
        for _ in range(5):
            last = timed(*case.inputs)
        _wide(_tuple(last)[0])
        seconds.append((time.perf_counter() - begun) / 5)
    return [float(np.abs(a - b).max() / (np.abs(b).max() + 1e-9)) for a, b in zip(*results)], seconds


def _tuple(x: Any) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


def _wide(x: Tensor) -> np.ndarray:
    return x.astype(ms.float32).asnumpy()


def _like(x: Tensor) -> Tensor:
    return Tensor(np.random.default_rng(9).standard_normal(x.shape).astype(np.float32))


def draws(sizes: Sizes, make: Maker) -> Iterator[tuple[str, Callable[[tuple[int, int]], Tensor]]]:
    """Yield what is drawn by a seed."""
    S, B, N, G, D, _ = sizes
    x, qkv = make(S, B, N * D), [make(S, B, N, D), make(S, B, G, D, seed=1), make(S, B, G, D, seed=2)]
    drop = {"scale": 1.0, "dropout_rate": 0.25}
    yield "dropout", lambda seed: ops.dropout(x, 0.25, seed)
    yield "dropped attention weights", lambda seed: ops.causal_attention(*qkv, **drop, dropout_seed=seed)
    packed = seen_parts(S, B)["packed documents"]
    yield "dropped attention weights of packed documents", lambda seed: ops.causal_attention(
        *qkv, **drop, dropout_seed=seed, document_start_BS=packed
    )
    place = {"q_first": S, "k_first": 0, "start_BS": None}
    yield "dropped weights of a block", lambda seed: ops.attention_block(*qkv, **drop, **place, dropout_seed=seed)[0]
