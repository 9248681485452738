"""The native format: any layout loads any layout, and what must not be saved or loaded is refused."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from parallel_core.checkpoint import (
    CheckpointWriter,
    TensorShard,
    compare_model_config,
    find_checkpoint,
    load_shards,
    open_checkpoint,
    share_among_replicas,
)
from parallel_core.checkpoint.dtypes import convert
from parallel_core.errors import CheckpointError, ConfigError
from parallel_core.layout.shard import flat_rectangles


def save(root, iteration, per_rank, common=None, **options):
    """Save what each rank holds, in one process."""
    keep = options.pop("keep_checkpoint_max", 0)
    writers = [CheckpointWriter(root, iteration, rank, len(per_rank), **options) for rank in range(len(per_rank))]
    writers[0].begin()
    manifests = [writer.write_rank_file(shards) for writer, shards in zip(writers, per_rank)]
    return writers[0].commit(manifests, common or {}, keep)


def cut(shard, full):
    """Return the local array of a shard, the slow and obvious way."""
    local = np.zeros(shard.local_shape, full.dtype)
    for box in shard.boxes:
        part = full[tuple(slice(*r) for r in box.globe)]
        local[tuple(slice(*r) for r in box.local)] = part.reshape([b - a for a, b in box.local])
    return local


def layout(name, shape, dtype, dim, parts, tp, dp):
    """Every rank's shards of one tensor: tensor parallel along `dim`, then flat ranges over data parallel ranks."""
    shards = []
    for rank in range(tp):
        whole = (
            TensorShard.full(name, shape, dtype)
            if dim is None
            else TensorShard.split(name, shape, dtype, dim, rank, tp, parts)
        )
        count = math.prod(whole.local_shape)
        cuts = [count * i // dp for i in range(dp + 1)]
        shards += [whole.flat_range(a, b) for a, b in zip(cuts, cuts[1:])] if dp > 1 else [whole]
    return shards


SPLITS = st.tuples(st.sampled_from([(0, 1), (0, 2), (1, 1)]), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 3, 7]))


@settings(max_examples=60, deadline=None)
@given(st.tuples(st.integers(1, 3), st.integers(1, 3)), SPLITS, SPLITS, st.sampled_from(["float32", "bfloat16"]))
def test_any_layout_loads_any_layout(tmp_path_factory, sizes, saved, asked, dtype):
    root = tmp_path_factory.mktemp("c")
    shape = (sizes[0] * 8, sizes[1] * 4)
    full = np.arange(math.prod(shape)).reshape(shape).astype(np.float32 if dtype == "float32" else np.uint16)
    (dim, parts), tp, dp = saved
    path = save(root, 1, [{"w": (s, cut(s, full))} for s in layout("w", shape, dtype, dim, parts, tp, dp)])
    (dim, parts), tp, dp = asked
    for shard in layout("w", shape, dtype, dim, parts, tp, dp):
        arrays, _ = load_shards(path, {"w": shard})
        np.testing.assert_array_equal(arrays["w"], cut(shard, full))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_flat_rectangles_are_the_range_in_order(shape, data):
    total = math.prod(shape)
    start = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(start, total))
    numbers = np.arange(total).reshape(shape)
    rectangles = flat_rectangles(shape, start, stop)
    got = [int(n) for r in rectangles for n in numbers[tuple(slice(*x) for x in r)].ravel()]
    assert got == list(range(start, stop))
    assert len(rectangles) <= 2 * len(shape) - 1


def test_gated_fc1_holds_gates_and_ups_of_the_rank():
    full = np.arange(8)[:, None] * np.ones((1, 3))
    shard = TensorShard.split("fc1", (8, 3), "float64", 0, 1, 2, parts=2)
    assert cut(shard, full)[:, 0].tolist() == [2, 3, 6, 7]


def test_files_are_plain_safetensors_with_slices(tmp_path):
    full = np.arange(12, dtype=np.float32).reshape(4, 3)
    shards = layout("w", (4, 3), "float32", 0, 1, 2, 1)
    path = save(tmp_path, 7, [{"w": (s, cut(s, full))} for s in shards], {"n": 56}, ckpt_prefix="net")
    assert path.name == "iter_0000007"
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "7"
    np.testing.assert_array_equal(load_file(path / "net-00001-of-00002.safetensors")["w"], full[2:])
    assert open_checkpoint(path).common == {"n": 56, "iteration": 7}
    raw = (path / "net-00001-of-00002.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    described = json.loads(header["__metadata__"]["parallel_core"])["w"]
    assert described == {"key": "w", "global_shape": [4, 3], "dtype": "float32", "start": [2, 0], "shape": [2, 3]}


def test_scalars_and_empty_shards(tmp_path):
    scalar = TensorShard.full("s", (), "float32")
    whole = TensorShard.full("w", (6,), "float32")
    per_rank = [
        {"s": (scalar, np.float32(3).reshape(())), "w": (whole.flat_range(0, 6), np.arange(6, dtype=np.float32))},
        {"w": (whole.flat_range(6, 6), np.zeros(0, np.float32))},
    ]
    path = save(tmp_path, 1, per_rank)
    arrays, _ = load_shards(path, {"s": scalar, "w": whole.flat_range(3, 3)})
    assert arrays["s"].shape == () and arrays["s"] == 3 and arrays["w"].shape == (0,)


def test_missing_unexpected_and_wrong_shape_are_listed(tmp_path):
    names = [f"a{i:02d}" for i in range(25)]
    one = np.zeros(4, np.float32)
    path = save(tmp_path, 1, [{n: (TensorShard.full(n, (4,), "float32"), one) for n in [*names, "x"]}])
    wanted = {f"b{i:02d}": TensorShard.full(f"b{i:02d}", (4,), "float32") for i in range(12)}
    wanted["x"] = TensorShard.full("x", (5,), "float32")
    with pytest.raises(CheckpointError) as caught:
        load_shards(path, wanted, all_keys=set(wanted))
    text = str(caught.value)
    assert "12 missing" in text and "25 unexpected" in text and "1 of another shape" in text
    assert "b09" in text and "b10" not in text and "... and 2 more" in text
    assert "x: the checkpoint has [4], the model [5]" in text


def test_a_hole_or_an_overlap_is_not_committed(tmp_path):
    a = TensorShard.split("w", (4, 3), "float32", 0, 0, 2)
    b = TensorShard.split("w", (4, 3), "float32", 0, 1, 2)
    half = np.zeros((2, 3), np.float32)
    save(tmp_path, 1, [{"w": (a, half)}, {"w": (b, half)}])
    with pytest.raises(CheckpointError, match="6 of 12 elements of w are in no file"):
        save(tmp_path, 2, [{"w": (a, half)}, {}])
    with pytest.raises(CheckpointError, match="overlap"):
        save(tmp_path, 2, [{"w": (a, half)}, {"w": (b, half), "w@x": (b, half)}, {"w": (b, half)}])
    assert find_checkpoint(tmp_path).name == "iter_0000001"


def test_dtypes_convert_and_keys_stand_in(tmp_path):
    values = np.array([1.0, 1.00390625, 3.14159265, -0.0, np.inf, 65520.0], np.float32)
    bits = convert(values, "float32", "bfloat16")
    shard = TensorShard.full("w", (6,), "bfloat16")
    path = save(tmp_path, 1, [{"w": (shard, bits), "w@master": (shard.with_dtype("float32"), values)}])
    arrays, report = load_shards(path, {"w": shard.with_dtype("float32")})
    np.testing.assert_array_equal(arrays["w"], values)  # from the master, nothing lost
    assert report.converted == ["w float32 from w@master float32"]
    path = save(tmp_path, 2, [{"w": (shard.with_dtype("float32"), values)}])
    arrays, _ = load_shards(path, {"w": shard, "w@master": shard.with_dtype("float32")})
    np.testing.assert_array_equal(arrays["w"], bits)
    np.testing.assert_array_equal(arrays["w@master"], values)


def test_bfloat16_rounds_to_nearest_even():
    values = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x7F800001, 0xFFFFFFFF], np.uint32).view(
        np.float32
    )
    bits = convert(values, "float32", "bfloat16")
    assert bits[:4].tolist() == [0x3F80, 0x3F82, 0x3F81, 0x7F80]
    assert np.isnan(convert(bits[4:], "bfloat16", "float32")).all()


@pytest.mark.parametrize("rows", [6, 8])
def test_vocabulary_is_repadded(tmp_path, rows):
    name = "embedding.word_embeddings.weight"
    full = np.arange(14, dtype=np.float32).reshape(7, 2)
    whole = TensorShard.full(name, (7, 2), "float32")
    path = save(
        tmp_path, 1, [{name: (whole, full), f"{name}@exp_avg": (whole, full)}], {"model_config": {"vocab_size": 5}}
    )
    expected = np.concatenate([full, full[-1:]])[:rows]
    for rank in range(2):
        shard = TensorShard.split(name, (rows, 2), "float32", 0, rank, 2)
        flat = shard.flat_range(1, math.prod(shard.local_shape))
        arrays, report = load_shards(path, {name: shard, f"{name}@exp_avg": flat})
        np.testing.assert_array_equal(arrays[name], cut(shard, expected))
        moments = np.where(np.arange(rows)[:, None] < 7, expected, 0)
        np.testing.assert_array_equal(arrays[f"{name}@exp_avg"], cut(flat, moments))
        assert len(report.padded) == 2
    with pytest.raises(CheckpointError, match="of another shape"):
        load_shards(path, {name: TensorShard.full(name, (4, 2), "float32")})


def test_report_says_what_was_resliced(tmp_path):
    full = np.arange(32, dtype=np.float32).reshape(8, 4)
    path = save(tmp_path, 1, [{"w": (s, cut(s, full))} for s in layout("w", (8, 4), "float32", 0, 1, 2, 1)])
    same = load_shards(path, {"w": TensorShard.split("w", (8, 4), "float32", 0, 1, 2)})[1]
    assert same.resliced == [] and same.bytes == 64
    other = load_shards(path, {"w": TensorShard.full("w", (8, 4), "float32")})[1]
    assert other.resliced == ["w (2 stored part(s) -> 1 box(es) here)"] and "1 re-sliced" in other.text()


def test_replicas_share_the_bytes():
    sizes = {f"t{i}": 10 * i + 1 for i in range(20)}
    shares = [share_among_replicas(sizes, r, 3) for r in range(3)]
    assert sorted(sum(shares, [])) == sorted(sizes)
    loads = [sum(sizes[k] for k in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes.values())


def test_compare_model_config():
    saved = {"num_layers": 4, "swiglu": True, "betas": [0.9, 0.95], "old": 1, "flag": 1}
    asked = {"num_layers": 5, "swiglu": True, "betas": (0.9, 0.95), "flag": True}
    assert compare_model_config(saved, asked) == [
        "flag: saved 1, asked True",
        "num_layers: saved 4, asked 5",
        "old: saved 1, asked (not set)",
    ]


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="ckpt_format='torch'"):
        CheckpointWriter(tmp_path, 1, 0, 1, ckpt_format="torch")
    with pytest.raises(CheckpointError, match="ckpt_prefix='../x'"):
        CheckpointWriter(tmp_path, 1, 0, 1, ckpt_prefix="../x")
    shard = TensorShard.full("w", (4,), "float32")
    with pytest.raises(CheckpointError, match=r"w: the array has shape \[3\]"):
        save(tmp_path, 1, [{"w": (shard, np.zeros(3, np.float32))}])
    with pytest.raises(CheckpointError, match="expected an array of dtype float32, got float64"):
        save(tmp_path, 1, [{"w": (shard, np.zeros(4))}])
    with pytest.raises(ConfigError, match="cannot be cut"):
        TensorShard.split("w", (6, 2), "float32", 0, 0, 4)


def test_open_checkpoint_refuses_what_is_none(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint of a known format"):
        open_checkpoint(tmp_path)
