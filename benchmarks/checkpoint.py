"""Conversion and load throughput against copying the same bytes, and peak memory, on a model of a chosen size.

    python benchmarks/checkpoint.py [--gigabytes 1.2] [--directory DIR] [--processes 2]

Writes a random LLaMA-like bf16 model with optimizer state as a native checkpoint, then times: a plain copy of its
bytes, saving, loading one rank's shard of several layouts, and the conversions. Each step runs in a process of its
own, whose peak memory is printed beside its largest tensor (for conversions) or its shard (for loading).
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from parallel_core.checkpoint import (  # noqa: E402
    CheckpointWriter,
    TensorShard,
    find_checkpoint,
    load_shards,
    open_checkpoint,
    verify,
)
from parallel_core.checkpoint.megatron.export import Target  # noqa: E402
from parallel_core.checkpoint.megatron.names import num_stacked_parts, tensor_parallel_dim  # noqa: E402
from parallel_core.checkpoint.safetensors_file import StreamTensor  # noqa: E402
from parallel_core.convert.convert import to_megatron, to_native  # noqa: E402

HIDDEN, FFN, HEADS, GROUPS, VOCAB = 1024, 2816, 16, 8, 32000
Shapes = dict[str, tuple[int, ...]]


def shapes_of(num_layers: int) -> Shapes:
    """Return a LLaMA-like model's parameters."""
    shapes: Shapes = {"embedding.word_embeddings.weight": (VOCAB, HIDDEN), "output_layer.weight": (VOCAB, HIDDEN)}
    for i in range(num_layers):
        layer = f"decoder.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = (HIDDEN,)
        shapes[f"{layer}.self_attention.linear_proj.weight"] = (HIDDEN, HIDDEN)
        shapes[f"{layer}.self_attention.linear_qkv.weight"] = ((HEADS + 2 * GROUPS) * HIDDEN // HEADS, HIDDEN)
        shapes[f"{layer}.pre_mlp_layernorm.weight"] = (HIDDEN,)
        shapes[f"{layer}.mlp.linear_fc1.weight"] = (2 * FFN, HIDDEN)
        shapes[f"{layer}.mlp.linear_fc2.weight"] = (HIDDEN, FFN)
    return {**shapes, "decoder.final_layernorm.weight": (HIDDEN,)}


def write_model(root: Path, num_layers: int) -> None:
    """Write the model natively, with optimizer state, tensor by tensor."""
    block = np.random.default_rng(0).integers(0, 1 << 16, 1 << 20, dtype=np.uint16)

    def tensor(shape: tuple[int, ...], dtype: str) -> StreamTensor:
        def parts() -> Iterator[np.ndarray]:
            yield np.resize(block if dtype == "bfloat16" else (block & 0x3FFF).astype(np.float32), shape)

        return StreamTensor(shape, dtype, parts)

    tensors = {}
    for name, shape in shapes_of(num_layers).items():
        tensors[name] = tensor(shape, "bfloat16")
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            tensors[f"{name}@{kind}"] = tensor(shape, "float32")
    config = {
        "num_layers": num_layers, "hidden_size": HIDDEN, "ffn_hidden_size": FFN, "num_attention_heads": HEADS,
        "num_query_groups": GROUPS, "swiglu": True, "normalization": "RMSNorm", "position_embedding_type": "rope",
        "add_bias_linear": False, "untie_embeddings_and_output_weights": True,
    }  # fmt: skip
    writer = CheckpointWriter(root, 1, 0, 1)
    writer.begin()
    writer.commit([writer.write_stream(tensors)], {"model_config": config, "adam_step": 1})


def wanted(path: Path, tp: int, dp: int) -> dict[str, TensorShard]:
    """Return what rank 0 holds under tensor parallelism and a distributed optimizer."""
    source, result = open_checkpoint(path), {}
    for key in source.keys():  # noqa: SIM118
        info, name = source.info(key), key.partition("@")[0]
        dim = tensor_parallel_dim(name)
        shard = TensorShard.full(name, info.shape, info.dtype)
        if dim is not None and tp > 1:
            shard = TensorShard.split(name, info.shape, info.dtype, dim, 0, tp, num_stacked_parts(name, True))
        result[key] = shard.flat_range(0, int(np.prod(shard.local_shape)) // dp) if "@" in key else shard
    return result


def load(path: Path, tp: int, dp: int) -> int:
    """Load rank 0's shard and return its bytes."""
    return load_shards(path, wanted(path, tp, dp))[1].bytes


def _measured(function: Callable[..., Any], args: tuple[Any, ...], pipe: Any) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    result = function(*args)
    seconds = time.perf_counter() - start
    pipe.send((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, result))


def measure(function: Callable[..., Any], *args: Any) -> tuple[float, float, Any]:
    """Return seconds, growth of peak memory in MB, and the result, of a call in a new process."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(function, args, sender))
    process.start()
    seconds, peak_kb, result = receiver.recv()
    process.join()
    return seconds, peak_kb / 1e3, result


def copy(source: Path, target: Path) -> None:
    """Copy a directory's bytes and flush them, as a save does."""
    import os

    shutil.copytree(source, target)
    for file in target.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def convert(load_dir: Path, save_dir: Path, target_format: str, tp: int, processes: int) -> None:
    """Convert to native (`target_format` "native") or to Megatron."""
    source = open_checkpoint(find_checkpoint(load_dir, check=False))
    if target_format == "native":
        to_native(source, save_dir, processes=processes, quiet=True)
    else:
        target = Target(tensor_parallel=tp, distributed_optimizer=True)
        to_megatron(source, save_dir, target, target_format=target_format, processes=processes, quiet=True)


def main() -> None:
    """Run every step and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.2)
    parser.add_argument("--directory", type=Path, help="where to work (default: a temporary directory)")
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    per_layer = 14 * sum(int(np.prod(shape)) for name, shape in shapes_of(1).items() if "layers" in name)
    fixed = 14 * 2 * VOCAB * HIDDEN
    num_layers = max(1, round((args.gigabytes * 1e9 - fixed) / per_layer))
    with tempfile.TemporaryDirectory(dir=args.directory) as name:
        run(Path(name), num_layers, args.processes)


def run(work: Path, num_layers: int, processes: int) -> None:
    """Time the steps in `work`."""
    native = work / "native"
    largest = 4 * VOCAB * HIDDEN / 1e6

    def report(what: str, size: float, seconds: float, peak: float, bound: str) -> None:
        rate = size / 1e6 / seconds
        line = f"{what:<44} {size / 1e9:5.2f} GB {seconds:7.2f} s {rate:7.0f} MB/s  peak +{peak:5.0f} MB  {bound}"
        print(line, flush=True)

    seconds, peak, _ = measure(write_model, native, num_layers)
    path = native / "iter_0000001"
    total = sum(file.stat().st_size for file in path.iterdir())
    bound = f"largest tensor {largest:.0f} MB"
    report("save native, streaming, with checksums", total, seconds, peak, bound)
    seconds, peak, _ = measure(copy, path, work / "copy")
    report("plain copy of the same bytes", total, seconds, peak, "")
    seconds, peak, problems = measure(verify, path)
    report("verify checksums", total, seconds, peak, "; ".join(problems))
    for tp, dp in ((1, 1), (2, 1), (2, 4)):
        seconds, peak, size = measure(load, path, tp, dp)
        report(f"load rank 0 of tp{tp} dp{dp}, its own shard", size, seconds, peak, f"shard {size / 1e6:.0f} MB")
    for target_format, tp in (("torch", 2), ("torch_dist", 1)):
        save = work / f"megatron_{target_format}"
        seconds, peak, _ = measure(convert, native, save, target_format, tp, processes)
        report(f"native -> megatron {target_format} tp{tp}", total, seconds, peak, bound)
        seconds, peak, _ = measure(convert, save, work / f"back_{target_format}", "native", 1, processes)
        report(f"megatron {target_format} tp{tp} -> native", total, seconds, peak, bound)
        shutil.rmtree(save)
        shutil.rmtree(work / f"back_{target_format}")


if __name__ == "__main__":
    main()
