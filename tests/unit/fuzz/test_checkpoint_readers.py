"""Mutated checkpoints of every format but Hugging Face's: opened, read, described, converted and resumed from."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pickle
import random
import socket
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from parallel_core.checkpoint import CheckpointWriter, TensorShard, find_checkpoint, open_checkpoint, read_tensor
from parallel_core.checkpoint.common import checked_common
from parallel_core.checkpoint.layout_files import sealed_checksums
from parallel_core.checkpoint.megatron.export import Target as Layout
from parallel_core.checkpoint.megatron.pickle_emitter import write_torch_zip
from parallel_core.checkpoint.megatron.safe_pickle import safe_loads
from parallel_core.checkpoint.safetensors_file import StreamTensor, read_header
from parallel_core.convert.comparison import compare
from parallel_core.convert.convert import to_megatron, to_native
from parallel_core.convert.inspection import describe
from parallel_core.data import explain_data_order_change
from parallel_core.errors import CheckpointError, ParallelCoreError
from parallel_core.optimizer.loss_scaler import DynamicLossScaler
from parallel_core.optimizer.schedules import OptimizerParamScheduler, ScheduleShape
from tests.helpers.fuzzing import Target, fuzz, mutate_bytes, mutate_value

H, HEADS, VOCAB = 8, 2, 16
SHAPES = {
    "embedding.word_embeddings.weight": (VOCAB, H),
    "decoder.layers.0.input_layernorm.weight": (H,),
    "decoder.layers.0.self_attention.linear_qkv.weight": (3 * H, H),
    "decoder.layers.0.self_attention.linear_proj.weight": (H, H),
    "decoder.layers.0.pre_mlp_layernorm.weight": (H,),
    "decoder.layers.0.mlp.linear_fc1.weight": (2 * H, H),
    "decoder.layers.0.mlp.linear_fc2.weight": (H, 2 * H),
    "decoder.final_layernorm.weight": (H,),
}
SCHEDULE = ScheduleShape(init_lr=0.0, max_lr=1e-3, min_lr=1e-4, warmup_samples=10, decay_samples=100)
COMMON = {
    "consumed_train_samples": 6,
    "adam_step": 3,
    "model_config": {"num_layers": 1, "hidden_size": H, "num_attention_heads": HEADS, "ffn_hidden_size": 2 * H,
                     "vocab_size": VOCAB, "padded_vocab_size": VOCAB, "normalization": "RMSNorm", "swiglu": False,
                     "add_bias_linear": False, "position_embedding_type": "rope", "rotary_base": 10000},
    "mesh": {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1},
    "loss_scaler": {"scale": 64.0, "growth_tracker": 3, "hysteresis_tracker": 2},
    "opt_param_scheduler": OptimizerParamScheduler(SCHEDULE).state_dict(),
    "rng": {"seed": 1, "numpy": ["MT19937", list(range(624)), 5]},
    "data_order": {"class": "GPTDataset", "path": "x", "num_epochs": 1, "weights": [0.5, 0.5]},
    "config": {"optimizer_config": {"lr": 1e-3, "adam_beta1": 0.9}},
}  # fmt: skip


def _arrays():
    state = {}
    for i, (name, shape) in enumerate(SHAPES.items()):
        for j, kind in enumerate(("", "@exp_avg", "@exp_avg_sq")):
            state[name + kind] = np.full(shape, i + j / 4, np.float32)
    return state


def _files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@functools.cache
def valid(kind: str) -> dict[str, bytes]:
    """Return a small checkpoint of one format, by file name."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        writer = CheckpointWriter(root / "native", 3, 0, 1)
        writer.begin()
        shards = {k: (TensorShard.full(k.split("@")[0], v.shape, "float32"), v) for k, v in _arrays().items()}
        path = writer.commit([writer.write_rank_file(shards)], COMMON)
        source = open_checkpoint(path)
        if kind != "native":
            layout = Layout(distributed_optimizer=kind == "torch_distributed")
            written = "torch_dist" if kind == "torch_dist" else "torch"
            to_megatron(source, root / kind, layout, target_format=written, quiet=True)
        return _files(root / kind)


def put(files: dict[str, bytes], folder: Path) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def use(root: Path, check: bool) -> None:
    """Do with a checkpoint what a user can do with one; whatever cannot be done is refused by name."""
    source = open_checkpoint(find_checkpoint(root, check=check, report=str))
    describe(source)
    for key in source.keys():  # noqa: SIM118 - a method of TensorSource
        read_tensor(source, key)
    with contextlib.suppress(ParallelCoreError):
        compare(source, source)
    with contextlib.suppress(ParallelCoreError):
        again = open_checkpoint(to_native(source, root / "again", quiet=True))
        assert again.common["iteration"] == source.common.get("iteration", 0)
        find_checkpoint(root / "again")
    for name, written in (("t", "torch"), ("d", "torch_dist")):
        with contextlib.suppress(ParallelCoreError):
            to_megatron(source, root / name, Layout(), target_format=written, quiet=True)


def damaged_file(kind: str) -> Target:
    def make(rng: random.Random):
        files = dict(valid(kind))
        name = rng.choice(sorted(files))
        files[name] = mutate_bytes(rng, files[name])
        return files, rng.random() < 0.5

    def read(made, folder):
        files, check = made
        put(files, folder)
        use(folder, check)

    return Target(make, read)


def _index_of(files: dict[str, bytes]) -> str:
    return next(name for name in files if name.endswith("checkpoint.json"))


def _make_index(rng: random.Random):
    files = dict(valid("native"))
    name = _index_of(files)
    files[name] = json.dumps(mutate_value(rng, json.loads(files[name]))).encode()
    sums = []
    for file in files:  # checksums as intact as a writer of harm makes them
        if "/" in file and not file.endswith("checksums.txt"):
            sums.append(f"{zlib.crc32(files[file]):08x} {len(files[file])} {Path(file).name}")
    files[name.replace("checkpoint.json", "checksums.txt")] = sealed_checksums(sums).encode()
    return files


def _read_files(files, folder):
    put(files, folder)
    use(folder, check=True)


def _tensor(shape):
    return StreamTensor.of(np.ones(shape, np.float32), "float32")


def _torch_state(kind: str):
    """Return the value in one rank's file, which `write_torch_zip` writes again."""
    model = {name: _tensor(shape) for name, shape in SHAPES.items()}
    if kind == "legacy":
        model = {"language_model": {"encoder": {
            "layers.0.attention.query_key_value.weight": _tensor((3 * H, H)),
            "final_layernorm.weight": _tensor((H,))}}}  # fmt: skip
    flat = list((model if kind == "new" else model["language_model"]["encoder"]).items())
    in_groups = [[item for item in flat if ("norm" in item[0]) == is_norm] for is_norm in (False, True)]
    order = in_groups[0] + in_groups[1]
    moments = {i: {"exp_avg": value, "exp_avg_sq": value, "step": 3} for i, (_, value) in enumerate(order)}
    split = len(in_groups[0])
    groups = [
        {"params": list(range(split)), "wd_mult": 1.0, "step": 3},
        {"params": list(range(split, len(order))), "wd_mult": 0.0, "step": 3},
    ]
    return {
        "args": {**COMMON["model_config"], "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1,
                 "untie_embeddings_and_output_weights": False, "data_parallel_size": 1},
        "model": model,
        "iteration": 3,
        "checkpoint_version": 1.0 if kind == "legacy" else 3.0,
        "optimizer": {"optimizer": {"state": moments, "param_groups": groups}, "grad_scaler": {"scale": 2.0}},
        "opt_param_scheduler": {"max_lr": 1e-3, "num_steps": 5, "lr_decay_style": "cosine"},
        "rng_state": [{"random_rng_state": (3, (1, 2), None), "np_rng_state": ("MT19937", [7] * 624, 1)}],
    }  # fmt: skip


def torch_state(kind: str) -> Target:
    def make(rng: random.Random):
        return mutate_value(rng, _torch_state(kind)) if rng.random() < 0.98 else _torch_state(kind)

    def read(value, folder):
        rank = folder / "iter_0000003" / "mp_rank_00"
        rank.mkdir(parents=True)
        try:
            with (rank / "model_optim_rng.pt").open("wb") as handle:
                write_torch_zip(handle, value)
        except (CheckpointError, ValueError, OverflowError, TypeError, RecursionError):
            return  # no pickle of ours holds that
        (folder / "latest_checkpointed_iteration.txt").write_text("3")
        use(folder, check=True)

    return Target(make, read)


def _value_with_sharing(rng: random.Random):
    """Return a value in which parts are shared, nested and used as keys, as deep and often as it comes."""
    values = [0, "a", (), [], {}, b"x", 1.5, None, True, 10**300]
    for _ in range(rng.choice((3, 20, 60))):
        a, b = rng.choice(values[-4:]), rng.choice(values[-4:])
        kind = rng.randrange(5)
        made = [[a, b], (a, b), {"k": a, "l": b}, [a] * rng.choice((2, 9)), {"k": (b, b)}][kind]
        values.append(made)
        if rng.random() < 0.1:
            with contextlib.suppress(TypeError):
                values.append({a: b})
    return pickle.dumps({"args": values[-1], "model": values[-2]}, protocol=rng.choice((0, 1, 2, 4)))


def _read_pickle(data, folder):
    from parallel_core.checkpoint.megatron.common_state import plain

    plain(safe_loads(data, "file"))


def _resume(common, folder):
    common = checked_common(common, "checkpoint")
    if common.get("opt_param_scheduler"):
        scheduler = OptimizerParamScheduler(SCHEDULE)
        scheduler.load_state_dict(common["opt_param_scheduler"], use_checkpoint=True)
        scheduler.get_lr(), scheduler.get_wd()
    if common.get("loss_scaler") and "growth_tracker" in common["loss_scaler"]:
        DynamicLossScaler(2.0, 1.0, 10, 2).load_state_dict(common["loss_scaler"])
    if "seed" in common.get("rng", {}):
        kind, keys, position, *_ = common["rng"]["numpy"]
        np.random.set_state((kind, np.array(keys, np.uint32), position, 0, 0.0))
        np.random.rand(1000)
    explain_data_order_change(common.get("data_order", {}), {"class": "GPTDataset", "weights": [1.0]})
    json.dumps(common)


def _header(rng: random.Random):
    name = next(name for name in valid("native") if name.endswith(".safetensors"))
    data = valid("native")[name]
    length = int.from_bytes(data[:8], "little")
    text = json.dumps(mutate_value(rng, json.loads(data[8 : 8 + length]))).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def _read_header(data, folder):
    (folder / "x").write_bytes(data)
    for blob in read_header(folder / "x")[0].values():
        blob.read()


def _make_special(rng: random.Random):
    kind = rng.choice(("native", "torch", "torch_distributed", "torch_dist"))
    what = rng.choice(("pipe", "endless", "directory", "empty", "missing", "socket"))
    return kind, rng.choice(sorted(valid(kind))), what


def _read_special(made, folder):
    """Something that is no file in the place of one."""
    kind, name, what = made
    put(valid(kind), folder)
    path = folder / name
    path.unlink()
    if what == "pipe":
        os.mkfifo(path)
    elif what == "endless":
        path.symlink_to("/dev/zero")
    elif what == "directory":
        path.mkdir()
    elif what == "empty":
        path.touch()
    elif what == "socket":
        os.chdir(path.parent)  # a socket's name has 108 bytes at most
        socket.socket(socket.AF_UNIX).bind(path.name)
        os.chdir("/")
    use(folder, check=False)


TARGETS = {
    "special files": Target(_make_special, _read_special),
    "native files": damaged_file("native"),
    "native index": Target(_make_index, _read_files),
    "torch files": damaged_file("torch"),
    "torch files of the distributed optimizer": damaged_file("torch_distributed"),
    "torch state": torch_state("new"),
    "legacy torch state": torch_state("legacy"),
    "torch_dist files": damaged_file("torch_dist"),
    "pickles": Target(_value_with_sharing, _read_pickle),
    "mutated pickles": Target(lambda rng: mutate_bytes(rng, _value_with_sharing(rng)), _read_pickle),
    "common": Target(lambda rng: mutate_value(rng, COMMON), _resume),
    "safetensors header": Target(_header, _read_header),
}


@pytest.mark.parametrize("name", TARGETS)
def test_a_reader_returns_or_raises_a_named_error(name):
    fuzz(__file__, name, 60)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_a_reader_returns_or_raises_a_named_error_for_long(name):
    fuzz(__file__, name, 6000, first=60)


def test_what_is_mutated_is_valid(tmp_path):
    """Nothing above means anything if the unmutated inputs are refused."""
    for kind in ("native", "torch", "torch_distributed", "torch_dist"):
        put(valid(kind), tmp_path / kind)
        use(tmp_path / kind, check=True)
        assert (tmp_path / kind / "t" / "iter_0000003").is_dir()
    _resume(COMMON, tmp_path)
    for kind in ("new", "legacy"):
        (tmp_path / kind).mkdir()
        TARGETS["torch state" if kind == "new" else "legacy torch state"].read(_torch_state(kind), tmp_path / kind)
        assert (tmp_path / kind / "again" / "iter_0000003").is_dir()
