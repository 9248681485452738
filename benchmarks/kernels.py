"""Every kernel, forward and backward: the fused C++ against the plain MindSpore reference, on this machine.

python benchmarks/kernels.py [--threads 1] [--size A|B|G] [--json FILE]
python benchmarks/kernels.py --products [--bf16] [--threads 1] [--size A|B|G] [--json FILE]

With --products, GFLOP/s of every product of a microbatch instead: forward, gradient of input, gradient of weight, over
the operands of several layers in turn, as in a step, so that they are not in the caches of the call before.

Milliseconds are the best of several calls, because other programs share the machine. Backward includes what MindSpore's
autograd spends on one gradient call, with either implementation; inside a model that is shared by all its operators.
"""

from __future__ import annotations

import argparse
import itertools
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

SIZES = {"A": (128, 4, 256, 8, 8192), "B": (256, 2, 512, 8, 8192), "G": (1024, 1, 768, 12, 50304)}
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


def products(S: int, B: int, H: int, V: int, weight_type: Any) -> list[dict[str, Any]]:
    """Return GFLOP/s of the products of every layer with a weight, by their sizes."""
    shapes = {"qkv": (3 * H, H), "proj": (H, H), "fc1": (4 * H, H), "fc2": (H, 4 * H), "logits": (V, H)}
    rows = []
    for name, (O, I) in shapes.items():
        T, layers = S * B, 1 if name == "logits" else 4
        weights = itertools.cycle([tensor(O, I).astype(weight_type) for _ in range(layers)])
        all_x, all_dy = ([tensor(T, n) for _ in range(layers)] for n in (I, O))
        inputs, gradients = itertools.cycle(all_x), itertools.cycle(all_dy)
        w = next(weights)
        kept = itertools.cycle([ops.linear_and_operand(x, w, None)[1] for x in all_x])
        kept_dy = itertools.cycle([ops.linear_grad_input_and_operand(dy, w)[1] for dy in all_dy])
        sums = itertools.cycle([np.zeros((O, I), np.float32) for _ in range(layers)])
        calls: dict[str, Callable[[], object]] = {
            "forward": lambda x=inputs, w=weights: ops.linear(next(x), next(w), None),  # type: ignore[misc]
            "of input": lambda dy=gradients, w=weights: ops.linear_grad_input(next(dy), next(w)),  # type: ignore[misc]
            "of weight": lambda dy=kept_dy, x=kept, dw=sums: ops.linear_grad_weight_(  # type: ignore[misc]
                next(dw), next(dy), next(x), True
            ),
        }
        speeds = {what: 2e-6 * T * O * I / best(call, 0.5) for what, call in calls.items()}
        rows.append({"layer": name, "shape": (T, I, O), "calls": layers, **speeds})
    return rows


def show_products(rows: list[dict[str, Any]]) -> None:
    whats = ("forward", "of input", "of weight")
    print(f"{'layer':7} {'T, I, O':>17} " + " ".join(f"{what:>10}" for what in whats) + "  GFLOP/s")
    work = seconds = 0.0
    for row in rows:
        T, I, O = row["shape"]
        flops = 2e-9 * T * I * O * row["calls"]
        work += flops * len(whats)
        seconds += sum(flops / row[what] for what in whats)
        print(f"{row['layer']:7} {f'{T}, {I}, {O}':>17} " + " ".join(f"{row[what]:10.1f}" for what in whats))
    print(f"all products of {rows[0]['calls']} layers and the logits: {work / seconds:.1f} GFLOP/s")


def against_references(size: str, threads: int) -> list[dict[str, Any]]:
    """Show and return the milliseconds of every kernel and of its reference."""
    columns = []
    for mode in ("auto", "local"):
        ops.use_kernels(mode, threads)
        columns.append([(name, best(call), flops) for name, call, flops in cases(*SIZES[size])])
    rows: list[dict[str, Any]] = []
    print(f"{'kernel':32} {'fused ms':>9} {'plain ms':>9} {'ratio':>7} {'GFLOP/s':>8}")
    for (name, fused, flops), (_, plain, _) in zip(*columns):
        speed = flops / fused / 1e6 if flops else 0.0
        rows.append({"kernel": name, "fused_ms": fused, "plain_ms": plain, "gflop_per_s": speed})
        print(f"{name:32} {fused:9.3f} {plain:9.3f} {plain / fused:6.1f}x {f'{speed:8.1f}' if speed else ''}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="A", choices=sorted(SIZES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--products", action="store_true")
    parser.add_argument("--bf16", action="store_true", help="products of bfloat16 operands, with such weights")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    ms.set_context(mode=ms.PYNATIVE_MODE, device_target="CPU", pynative_synchronize=True)
    print(ops.use_kernels("auto", arguments.threads, bf16_products=arguments.bf16))
    if arguments.products:
        S, B, H, _, V = SIZES[arguments.size]
        rows = products(S, B, H, V, ms.bfloat16 if arguments.bf16 else ms.float32)
        show_products(rows)
    else:
        rows = against_references(arguments.size, arguments.threads)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
