"""Every kernel, forward and backward: the fused C++ against the plain MindSpore reference, on this machine.

python benchmarks/kernels.py [--threads 1] [--size A|B] [--json FILE]

Milliseconds are the best of several calls, because other programs share the machine. Backward includes what MindSpore's
autograd spends on one gradient call, with either implementation; inside a model that is shared by all its operators.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

import mindspore as ms  # noqa: E402
import numpy as np  # noqa: E402
from mindspore import Tensor  # noqa: E402

from parallel_core import ops  # noqa: E402

SIZES = {"A": (128, 4, 256, 8, 8192), "B": (256, 2, 512, 8, 8192)}
"""Sequence, microbatch, hidden, heads, vocabulary."""

Case = tuple[str, Callable[[], object], float]
"""Name, one call, floating-point operations of it (0: limited by memory)."""


def tensor(*shape: int) -> Tensor:
    return Tensor(np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32))


def differentiable(name: str, function: Callable[..., Tensor], *arrays: Tensor, flops: float = 0.0) -> list[Case]:
    """Return the forward call, and forward + backward."""
    gradient = ms.ops.GradOperation(get_all=True, sens_param=True)(function)
    dout = tensor(*function(*arrays).shape)
    return [
        (name, lambda: function(*arrays), flops),
        (f"{name} + backward", lambda: gradient(*arrays, dout), 3.5 * flops),
    ]


def cases(S: int, B: int, H: int, N: int, V: int) -> list[Case]:
    """Return the kernels at one size."""
    T, D, F = S * B, H // N, 4 * H
    x, wide, bias, residual = tensor(S, B, H), tensor(S, B, F), tensor(F), tensor(S, B, H)
    weight, norm, bias_H = tensor(F, H), tensor(H), tensor(H)
    rows, dy = tensor(T, H), tensor(T, F)
    logits, target = tensor(T, V), Tensor(np.arange(T, dtype=np.int32) * 7 % V)
    loss, table = tensor(T), tensor(V, H)
    mixed, cos, sin = tensor(S, B, N, 3 * D), tensor(S, 1, 1, D), tensor(S, 1, 1, D)
    product, attention = 2.0 * T * H * F, 2.0 * B * N * S * S * D
    n = 12 * H * H * 4
    state = [np.abs(tensor(n).asnumpy()) for _ in range(4)]
    adam = {"step": 2, "lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.01}
    return [
        ("linear [H, 4 H]", lambda: ops.linear(rows, weight, bias), product),
        ("linear, gradient of input", lambda: ops.linear_grad_input(dy, weight), product),
        ("linear, gradient of weight", lambda: ops.linear_grad_weight(dy, rows), product),
        ("linear, gradient of bias", lambda: ops.linear_grad_bias(dy), 0.0),
        *differentiable("layer_norm", lambda *a: ops.layer_norm(*a, 1e-5), x, norm, bias_H),
        *differentiable("rms_norm", lambda *a: ops.rms_norm(*a, 1e-5), x, norm),
        *differentiable("bias + gelu", lambda *a: ops.activation(*a, "gelu"), wide, bias),
        *differentiable("swiglu", lambda a: ops.activation(a, None, "swiglu"), wide),
        *differentiable(
            "bias + dropout + residual", lambda *a: ops.bias_dropout_add(*a, 0.1, (1, 2)), x, bias_H, residual
        ),
        *differentiable("rotary", lambda a: ops.rotary_packed(a, D, cos, sin, False), mixed),
        *differentiable(
            "causal attention", lambda a: ops.causal_attention_packed(a, D, scale=D**-0.5), mixed, flops=attention
        ),
        ("embedding", lambda: ops.embedding(target, table, 0), 0.0),
        ("embedding, gradient", lambda: ops.embedding_grad_table(rows, target, V, 0), 0.0),
        ("cross entropy, statistics", lambda: ops.vocab_statistics(logits, target, 0), 0.0),
        ("cross entropy, gradient", lambda: ops.vocab_grad_logits(logits, loss, target, 0, loss, 1.0, 0.0), 0.0),
        (f"adam, {n} weights", lambda: ops.adam_(*state, **adam), 0.0),
        ("sum of squares", lambda: ops.sum_of_squares(state[1]), 0.0),
    ]


def best(call: Callable[[], object], seconds: float = 0.15) -> float:
    """Return the shortest milliseconds of a call."""
    call()
    shortest, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        start = time.perf_counter()
        call()
        shortest = min(shortest, time.perf_counter() - start)
    return shortest * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="A", choices=sorted(SIZES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    ms.set_context(mode=ms.PYNATIVE_MODE, device_target="CPU", pynative_synchronize=True)
    print(ops.use_kernels("auto", arguments.threads))
    columns = []
    for mode in ("auto", "local"):
        ops.use_kernels(mode, arguments.threads)
        columns.append([(name, best(call), flops) for name, call, flops in cases(*SIZES[arguments.size])])
    rows: list[dict[str, Any]] = []
    print(f"{'kernel':32} {'fused ms':>9} {'plain ms':>9} {'ratio':>7} {'GFLOP/s':>8}")
    for (name, fused, flops), (_, plain, _) in zip(*columns):
        speed = flops / fused / 1e6 if flops else 0.0
        rows.append({"kernel": name, "fused_ms": fused, "plain_ms": plain, "gflop_per_s": speed})
        print(f"{name:32} {fused:9.3f} {plain:9.3f} {plain / fused:6.1f}x {f'{speed:8.1f}' if speed else ''}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
