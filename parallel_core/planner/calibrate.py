"""`python -m parallel_core.config calibrate`: measures this machine and writes a device file for the planner.

As many ranks as the machine has cores measure at the same time, as they compute in a run: products by shape, attention
by length, kernels that go over memory, the update, transfers by size, and the host's time to start kernels, which is
what short runs of tiny models take.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from parallel_core.config.schema import (
    AllConfig,
    DatasetConfig,
    ModelParallelConfig,
    TrainingConfig,
    TransformerConfig,
)
from parallel_core.errors import ConfigError
from parallel_core.files import create_file
from parallel_core.launch.host_memory import host_memory
from parallel_core.planner.device import FOLDER, Device, device_text, load_device
from parallel_core.planner.layer_time import BACKWARD_OF_ATTENTION, PASSES_BACKWARD, Shape
from parallel_core.planner.step_time import BYTES_OF_ADAM, BYTES_OF_NORM
from parallel_core.report.short_run import ShortRun, run_on_ranks, write_report

_OUTPUT = "PARALLEL_CORE_CALIBRATION_OUTPUT"
"""Set in the measuring job: where its ranks leave what they found."""

Measurements = dict[str, Any]
"""What one rank found, by name; seconds."""

PRODUCTS = [(t, i, o) for t in (128, 512) for i, o in ((64, 192), (256, 256), (256, 1024), (1024, 256), (512, 1536))]
PRODUCTS += [(256, 256, 8192), (32, 256, 1024), (1024, 512, 512)]
"""Rows, inner size and columns."""
ATTENTION = [(64, 8, 8, 32), (128, 4, 8, 32), (256, 2, 8, 64), (1024, 1, 4, 64)]
"""Sequence, samples, heads and head size."""
TRANSFERS = (1 << 12, 1 << 19, 1 << 24)
"""Bytes."""
_LAYERS, _MICROBATCHES = (2, 6), (2, 6)


def main(argv: Sequence[str]) -> int:
    """Measure, write the file, and return the exit status; in the measuring job, be a rank."""
    if _OUTPUT in os.environ:
        be_a_rank()
        return 0
    parser = argparse.ArgumentParser(prog="python -m parallel_core.config calibrate", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--output", default="device.yaml", help="the device file (default: device.yaml)")
    parser.add_argument("--ranks", type=int, default=os.cpu_count() or 1, help="ranks of a node (default: its cores)")
    options = parser.parse_args(list(argv))
    if options.ranks < 1:
        raise ConfigError(f"--ranks {options.ranks}: use a number above zero")
    if os.environ.get("DEVICE_TARGET", "CPU") != "CPU":
        raise ConfigError(
            f"DEVICE_TARGET={os.environ['DEVICE_TARGET']}: calibrate measures a CPU; for Ascend, copy "
            f"{FOLDER / 'ascend910b.yaml'} and put in your own figures"
        )
    if not options.output.endswith((".yaml", ".yml")):
        raise ConfigError(f"--output {options.output}: name a .yaml file")
    start = time.perf_counter()
    device = calibrate(options.ranks, Path(options.output).stem)
    try:
        with create_file(options.output) as file:
            file.write(device_text(device))
    except OSError as error:
        raise ConfigError(f"--output {options.output}: cannot be written: {error.strerror}") from None
    print(device_text(device), end="")
    print(f"{options.output}: written after {time.perf_counter() - start:.0f} s; use it with plan --search --device "
          f"{options.output}", file=sys.stderr)  # fmt: skip
    return 0


def calibrate(ranks: int, name: str) -> Device:
    """Return this machine as a device, measured with so many ranks at once.

    Raises:
        ConfigError: if the measuring job fails.
    """
    threads = str(max(1, (os.cpu_count() or 1) // ranks))
    variables = {"DEVICE_TARGET": "CPU", "OMP_NUM_THREADS": threads}
    return device_of(run_on_ranks(__file__, [], ranks, _OUTPUT, **variables), name)


# ---- from measurements to a device ----------------------------------------------------------------------------------
def device_of(found: Sequence[Measurements], name: str) -> Device:
    """Return the device whose formulas give what the ranks measured; links between nodes are the bundled CPU's."""
    mean = _mean(found)
    ranks = len(found)
    peak, half = fit_products([(tuple(shape), seconds) for shape, seconds in mean["products"]])
    narrow = [(tuple(shape), seconds) for shape, seconds in mean["bfloat16 products"]]
    narrow_peak = _peak(narrow, half)
    rate, length = fit_attention([(operations, size, seconds) for operations, size, seconds in mean["attention"]])
    device = replace(
        load_device("cpu"),
        name=name,
        ranks_per_node=ranks,
        memory_gb=round(mean["memory"] / 2**30 / ranks, 1),
        product_tflops={"float32": peak, "float16": peak, "bfloat16": narrow_peak},
        product_half=half,
        attention_tflops=dict.fromkeys(("float32", "float16", "bfloat16"), rate),
        attention_half=length,
        memory_gb_per_s=round(mean["passes"], 3),
        update_gb_per_s=round(mean["update"], 3),
    )
    if ranks > 1:
        device = replace(device, inside={kind: fit_link(points) for kind, points in mean["transfers"].items()})
    dispatch: dict[str, Any] = _dispatch(mean["runs"], device)
    return replace(device, **dispatch)


def _mean(found: Sequence[Any]) -> Any:
    """Return the ranks' mean of every number in equal trees."""
    first = found[0]
    if isinstance(first, dict):
        return {key: _mean([one[key] for one in found]) for key in first}
    if isinstance(first, list):
        return [_mean(list(items)) for items in zip(*found)]
    return statistics.fmean(found)


def fit_products(measured: Sequence[tuple[Shape, float]]) -> tuple[float, Shape]:
    """Return the rate in TFLOP/s and the sizes at half of it that are closest to the measured seconds, in ratio."""
    best: tuple[float, Shape] = (float("inf"), (0.0, 0.0, 0.0))
    sizes = (0.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
    for half in ((a, b, c) for a in sizes for b in sizes for c in sizes):
        rates = np.log([_rate(shape, seconds, half) for shape, seconds in measured])
        best = min(best, (float(rates.std()), half))
    return _peak(measured, best[1]), best[1]


def _rate(shape: Shape, seconds: float, half: Shape) -> float:
    """Return the rate of large products that a measured one implies, in TFLOP/s."""
    share = 1.0
    for size, at_half in zip(shape, half):
        share *= size / (size + at_half)
    return 2.0 * shape[0] * shape[1] * shape[2] / seconds / share / 1e12


def _peak(measured: Sequence[tuple[Shape, float]], half: Shape) -> float:
    return round(float(np.exp(np.mean(np.log([_rate(shape, s, half) for shape, s in measured])))), 5)


def fit_attention(measured: Sequence[tuple[float, float, float]]) -> tuple[float, float]:
    """Return TFLOP/s of long sequences and the length at half of it, from (operations, length, seconds)."""
    best = (float("inf"), 0.0, 0.0)
    for half in (0.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0):
        rates = np.log([operations / seconds * (size + half) / size / 1e12 for operations, size, seconds in measured])
        best = min(best, (float(rates.std()), half, float(np.exp(rates.mean()))))
    return round(best[2], 5), best[1]


def fit_link(points: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Return (microseconds, gigabytes a second) of a line through (bytes sent, seconds), nowhere negative."""
    sent, seconds = np.array(points).T
    slope = max(1e-12, float((seconds[-1] - seconds[0]) / (sent[-1] - sent[0])))
    return round(max(0.0, float(seconds[0] - slope * sent[0])) * 1e6, 2), round(1e-9 / slope, 4)


def _dispatch(runs: Measurements, device: Device) -> dict[str, float]:
    """Return the host's times that the short runs of `_tiny` imply; what they compute and send is next to nothing."""
    fewer, more = _LAYERS
    apart = (more - fewer) * _MICROBATCHES[0]
    layer = max(0.0, (runs["deep"] - runs["plain"]) / apart)
    microbatch = (runs["long"] - runs["plain"]) / (_MICROBATCHES[1] - _MICROBATCHES[0]) - fewer * layer
    step = runs["plain"] - _MICROBATCHES[0] * (microbatch + fewer * layer)
    experts = (runs["experts deep"] - runs["experts"]) / apart - layer
    out = {"layer_us": layer, "experts_us": experts, "microbatch_us": microbatch, "step_us": step, "ring_us": 0.0}
    if "ring" in runs:
        others = device.ranks_per_node - 1
        passed = (3 * others + 1) * device.inside["point_to_point"][0] * 1e-6
        out["ring_us"] = ((runs["ring deep"] - runs["ring"]) / apart - layer - passed) / others
    return {name: round(max(0.0, seconds) * 1e6, 1) for name, seconds in out.items()}


# ---- on a rank ------------------------------------------------------------------------------------------------------
def be_a_rank() -> None:
    """Measure everything and leave it for `run_on_ranks`."""
    from parallel_core import ops
    from parallel_core.comm.factory import group_factory
    from parallel_core.comm.interface import SoloGroup
    from parallel_core.training.runtime import start_runtime

    rank, world = start_runtime()
    group = group_factory("auto", 120.0, rank, world)("world", list(range(world))) if world > 1 else SoloGroup()
    kernels = ops.use_kernels("auto")
    if not kernels.startswith("fused"):
        raise ConfigError(f"calibrate measures the compiled kernels, which a run uses: {kernels}")
    found: Measurements = {"memory": float(host_memory().free), "products": _products(group)}
    ops.use_kernels("auto", bf16_products=True)
    found["bfloat16 products"] = _products(group)
    ops.use_kernels("auto")
    found |= {"attention": _attention(group), "passes": _passes(group), "update": _update(group)}
    if world > 1:
        found["transfers"] = _transfers(group, rank, world)
    found["runs"] = _runs(rank, world)
    write_report(_OUTPUT, rank, found)
    group.barrier()


def _seconds(call: Callable[[], object], group: Any, least: float = 0.2) -> float:
    """Return the fewest seconds of a call while all ranks call it: what others do on the machine only adds."""
    call(), call(), group.barrier()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 5 or time.perf_counter() - begin < least:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def _tensor(*shape: int) -> Any:
    from mindspore import Tensor

    return Tensor(np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32))


def _products(group: Any) -> list[Any]:
    """Return ((rows, inner, columns), seconds) of forward passes and both gradients; operands are not in the cache."""
    from parallel_core import ops

    found: list[Any] = []
    for rows, inner, columns in PRODUCTS:
        copies = max(2, min(12, (1 << 23) // (4 * inner * columns)))
        weights = itertools.cycle([_tensor(columns, inner) for _ in range(copies)])
        x, dy, into = _tensor(rows, inner), _tensor(rows, columns), np.zeros((columns, inner), np.float32)
        _, kept = ops.linear_and_operand(x, next(weights), None)
        _, kept_dy = ops.linear_grad_input_and_operand(dy, next(weights))
        calls: list[tuple[tuple[int, int, int], Callable[[], object]]] = [
            ((rows, inner, columns), lambda x=x, w=weights: ops.linear(x, next(w), None)),  # type: ignore[misc]
            ((rows, columns, inner), lambda dy=dy, w=weights: ops.linear_grad_input(dy, next(w))),  # type: ignore[misc]
            ((columns, rows, inner), functools.partial(ops.linear_grad_weight_, into, kept_dy, kept, True)),
        ]
        found += [[list(shape), _seconds(call, group)] for shape, call in calls]
    return found


def _attention(group: Any) -> list[list[float]]:
    """Return (operations, length, seconds) of forward and backward together."""
    import mindspore as ms

    from parallel_core import ops

    found = []
    for length, samples, heads, size in ATTENTION:
        mixed = _tensor(length, samples, heads, 3 * size)

        def attention(x: Any, size: int = size) -> Any:
            return ops.causal_attention_packed(x, size, scale=size**-0.5)

        gradient = ms.ops.GradOperation(get_all=True, sens_param=True)(attention)
        out = _tensor(*attention(mixed).shape)
        operations = (1 + BACKWARD_OF_ATTENTION) * 2.0 * length * samples * heads * length * size
        seconds = _seconds(lambda x=mixed, g=gradient, dout=out: g(x, dout), group)  # type: ignore[misc]
        found.append([operations, float(length), seconds])
    return found


def _passes(group: Any) -> float:
    """Return gigabytes a second of norms and activations, counted as the planner counts them."""
    import mindspore as ms

    from parallel_core import ops

    x, wide, weight, bias = _tensor(128, 4, 256), _tensor(128, 4, 1024), _tensor(256), _tensor(1024)
    gradient = ms.ops.GradOperation(get_all=True, sens_param=True)
    norm = gradient(lambda a, w: ops.layer_norm(a, w, w, 1e-5))
    act = gradient(lambda a, b: ops.activation(a, b, "gelu"))
    seconds = _seconds(lambda: norm(x, weight, x), group) + _seconds(lambda: act(wide, bias, wide), group)
    return float((1 + PASSES_BACKWARD) * 2 * 4 * (x.size + wide.size) / seconds / 1e9)


def _update(group: Any) -> float:
    """Return gigabytes a second of Adam's update and the gradients' norm."""
    from parallel_core import ops

    count = 1 << 23
    param, grad, first, second = (np.abs(_tensor(count).asnumpy()) for _ in range(4))
    options: dict[str, Any] = {"step": 2, "lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.01}
    seconds = _seconds(lambda: ops.adam_(param, grad, first, second, **options), group)
    seconds += _seconds(lambda: ops.sum_of_squares(grad), group)
    return float((BYTES_OF_ADAM + BYTES_OF_NORM) * count / seconds / 1e9)


def _transfers(group: Any, rank: int, world: int) -> dict[str, list[list[float]]]:
    """Return (bytes that a rank sends, seconds) of every kind of transfer."""
    found: dict[str, list[list[float]]] = {}
    for size in TRANSFERS:
        count = size // 4 // world * world
        x, part = _tensor(count), _tensor(count // world)
        sent = 4.0 * count * (world - 1) / world
        calls: dict[str, tuple[float, Callable[[], object]]] = {
            "all_reduce": (2 * sent, lambda x=x: group.all_reduce_(x)),  # type: ignore[misc]
            "all_gather": (sent, lambda part=part: group.all_gather(part)),  # type: ignore[misc]
            "reduce_scatter": (sent, lambda x=x: group.reduce_scatter(x)),  # type: ignore[misc]
            "all_to_all": (sent, lambda x=x: group.all_to_all(x, 0, 0)),  # type: ignore[misc]
            "point_to_point": (4.0 * count, lambda x=x: group.shift_start(x).wait()),  # type: ignore[misc]
        }
        for kind, (moved, call) in calls.items():
            found.setdefault(kind, []).append([moved, _fixed(call, group)])
    return found


def _fixed(call: Callable[[], object], group: Any, calls: int = 20) -> float:
    """Return the fewest seconds of so many calls, the same number on every rank."""
    call(), call(), group.barrier()
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def _tiny(layers: int, microbatches: int, experts: bool = False, ring: int = 1) -> AllConfig:
    """Return a model whose kernels compute next to nothing."""
    model: dict[str, Any] = {"num_layers": layers, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 64}
    model |= {"seq_length": 32, "attention_dropout_rate": 0.0, "hidden_dropout_rate": 0.0}
    if experts:
        from parallel_core.config.experts import MoEConfig

        model["moe"] = MoEConfig(num_experts=4, moe_router_topk=2, moe_ffn_hidden_size=32)
    return AllConfig(
        model_config=TransformerConfig(**model),
        parallel_config=ModelParallelConfig(context_parallel_size=ring),
        training_config=TrainingConfig(training_iters=3),
        dataset_config=DatasetConfig(batch_size=1, micro_batch_num=microbatches, global_batch_size=microbatches),
    )


def _runs(rank: int, world: int) -> dict[str, float]:
    """Return the seconds of an iteration of tiny models, by name; but for the ring, each rank trains alone."""
    few, many = _MICROBATCHES
    runs = {
        "plain": _tiny(_LAYERS[0], few),
        "deep": _tiny(_LAYERS[1], few),
        "long": _tiny(_LAYERS[0], many),
        "experts": _tiny(_LAYERS[0], few, experts=True),
        "experts deep": _tiny(_LAYERS[1], few, experts=True),
    }
    found = {name: _iteration(ShortRun(config, 0, 1)) for name, config in runs.items()}
    if 1 < world <= 8:
        for name, layers in (("ring", _LAYERS[0]), ("ring deep", _LAYERS[1])):
            found[name] = _iteration(ShortRun(_tiny(layers, few, ring=world), rank, world))
    return found


def _iteration(run: ShortRun, iterations: int = 30) -> float:
    """Return the fewest seconds of an iteration."""
    times = []
    for number in range(3 + iterations):
        run.context.world.barrier()
        start = time.perf_counter()
        run.iterate()
        if number >= 3:
            times.append(time.perf_counter() - start)
    run.close()
    return min(times)


if __name__ == "__main__":
    from parallel_core.launch.entry import run_as_rank

    run_as_rank(be_a_rank)
