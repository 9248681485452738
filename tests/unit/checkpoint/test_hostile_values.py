"""Small inputs with large consequences, and damage that only a checksum or a rule about values shows."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel_core.checkpoint import CheckpointWriter, TensorShard, find_checkpoint, open_checkpoint, read_tensor
from parallel_core.checkpoint.common import checked_common
from parallel_core.checkpoint.layout_files import sealed_checksums
from parallel_core.checkpoint.megatron import safe_pickle
from parallel_core.checkpoint.megatron.integrity import verify_zips
from parallel_core.checkpoint.megatron.safe_pickle import safe_loads
from parallel_core.checkpoint.megatron.torch_zip import damaged_entries
from parallel_core.checkpoint.native import verify
from parallel_core.checkpoint.safetensors_file import file_digest
from parallel_core.checkpoint.source import check_tiling
from parallel_core.convert.cli import main
from parallel_core.errors import CheckpointError

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "checkpoint"


def native(root, common=None):
    writer = CheckpointWriter(root, 1, 0, 1)
    writer.begin()
    shard = TensorShard.full("w", (4, 4), "float32")
    return writer.commit([writer.write_rank_file({"w": (shard, np.ones((4, 4), np.float32))})], common or {})


def rewrite(path, change):
    """Change the index, and make the checksums fit again, as whoever means harm does."""
    index = path / "checkpoint.json"
    text = change(index.read_text())
    index.write_text(text)
    files = [file for file in path.iterdir() if file.name != "checksums.txt"]
    lines = [f"{d.crc32} {d.bytes} {f.name}" for f, d in ((file, file_digest(file)) for file in files)]
    (path / "checksums.txt").write_text(sealed_checksums(lines))


def test_a_piece_in_a_file_that_is_not_listed(tmp_path):
    path = native(tmp_path)
    name = "model-00000-of-00001.safetensors"
    shutil.copy(path / name, path / "other.bin")
    index = json.loads((path / "checkpoint.json").read_text())
    index["tensors"]["w"]["pieces"][0]["file"] = "other.bin"
    (path / "checkpoint.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="other.bin, which is not among the listed files"):
        open_checkpoint(path)


def test_a_key_that_is_there_twice(tmp_path):
    path = native(tmp_path)
    rewrite(path, lambda text: text.replace('"container":', '"iteration":1,"container":', 1))
    assert "the key 'iteration' is there twice" in verify(path)[0]
    with pytest.raises(CheckpointError, match="the key 'iteration' is there twice"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("common", "message"),
    [
        ({"iteration": -1}, "iteration is -1"),
        ({"iteration": True}, "iteration is True"),
        ({"iteration": 10**18}, "iteration is 10"),
        ({"adam_step": "3"}, "adam_step is '3'"),
        ({"consumed_train_samples": float("inf")}, "consumed_train_samples is inf"),
        ({"model_config": []}, "model_config is damaged: .* where a mapping belongs"),
        ({"model_config": {"num_layers": 10**9}}, "num_layers is 1000000000"),
        ({"megatron_args": {"tensor_model_parallel_size": 10**12}}, "tensor_model_parallel_size is 1000000000000"),
        ({"opt_param_scheduler": {"max_lr": 1e-3}}, "num_steps is nothing"),
        ({"opt_param_scheduler": {"num_steps": 1, "max_lr": "x"}}, "max_lr is 'x'"),
        ({"loss_scaler": {"scale": float("nan")}}, "scale is nan"),
        ({"loss_scaler": {"scale": 1.0, "growth_tracker": []}}, r"growth_tracker is \[\]"),
        ({"rng": {"seed": 1}}, "numpy is nothing"),
        ({"rng": {"seed": 1, "numpy": ["MT19937", [1, 2], 624]}}, "624 words"),
        ({"rng": {"seed": 1, "numpy": ["MT19937", [1] * 624, 10**6]}}, "624 words"),
        ({"rng": {"seed": 1, "numpy": ["MT19937", [-1] * 624, 1]}}, "624 words"),
        ({"rng": {"seed": 1, "numpy": ["PCG64", [1] * 624, 1]}}, "624 words"),
        ({"x": json.loads("[" * 70 + "]" * 70)}, "nested more than 64 deep"),
        ({"x": 10**40}, "a number of 133 bits, beyond 64 bits"),
        ({"x": "\ud800"}, "no text that can be written"),
        ([], "where a mapping belongs"),
    ],
)
def test_what_is_no_tensor_is_checked_before_anything_uses_it(common, message):
    with pytest.raises(CheckpointError, match=message):
        checked_common(common, "DIR")


def test_a_state_of_numpys_generator_passes():
    kind, keys, position, *_ = np.random.RandomState(1).get_state()
    common = {"rng": {"seed": 1, "numpy": [kind, keys.tolist(), position]}, "data_order": None, "x": [1, None, "é"]}
    assert checked_common(common, "DIR") == {key: value for key, value in common.items() if value is not None}


# ---- pieces ---------------------------------------------------------------------------------------------------------
@settings(max_examples=300, deadline=None)
@given(st.data())
def test_tiling_is_what_counting_every_element_says(data):
    shape = data.draw(st.lists(st.integers(1, 4), min_size=0, max_size=3))
    count = data.draw(st.integers(0, 6))
    pieces = []
    for _ in range(count):
        start = [data.draw(st.integers(0, n - 1)) for n in shape]
        pieces.append((start, [data.draw(st.integers(0, n - first)) for n, first in zip(shape, start)]))
    if data.draw(st.booleans()):  # a real tiling, cut at random, now and then with one piece moved
        pieces = [([0] * len(shape), list(shape))]
        for _ in range(data.draw(st.integers(0, 4)) if shape else 0):
            start, extent = pieces.pop(data.draw(st.integers(0, len(pieces) - 1)))
            dim = data.draw(st.integers(0, len(shape) - 1))
            at = data.draw(st.integers(0, extent[dim]))
            for first, length in ((0, at), (at, extent[dim] - at)):
                pieces.append(
                    ([*start[:dim], start[dim] + first, *start[dim + 1 :]], [*extent[:dim], length, *extent[dim + 1 :]])
                )
        if data.draw(st.booleans()):
            pieces.append(pieces.pop(data.draw(st.integers(0, len(pieces) - 1))))
    hits = np.zeros(shape, int)
    for start, extent in pieces:
        hits[tuple(slice(first, first + n) for first, n in zip(start, extent))] += 1
    if (hits == 1).all():
        check_tiling("w", shape, pieces, "DIR")
    else:
        with pytest.raises(CheckpointError, match="are in no file|overlap"):
            check_tiling("w", shape, pieces, "DIR")


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_many_pieces_along_any_axis(axis):
    """Comparing all pairs of these would take hours."""
    shape = [2, 2, 2]
    shape[axis] = 60_000
    extent = [*shape]
    extent[axis] = 1
    pieces = [([i if dim == axis else 0 for dim in range(3)], extent) for i in range(60_000)]
    check_tiling("w", shape, pieces, "DIR")
    pieces[30_000] = pieces[0]
    with pytest.raises(CheckpointError, match="overlap"):
        check_tiling("w", shape, pieces, "DIR")


# ---- pickles --------------------------------------------------------------------------------------------------------
def doubled(item: bytes, pair: bytes, times: int = 64) -> bytes:
    """Return a pickle of `item`, put twice into a pair, that twice into another, ...; `pair` makes one of a mark on."""
    text = item + b"q\x00"
    for i in range(times):
        text = text + b"(h" + bytes([i]) + b"h" + bytes([i]) + pair + b"q" + bytes([i + 1])
    return b"\x80\x02" + text


INERT = b"csignal\nSignals\n)\x81}X\x01\x00\x00\x00a"
BOMBS = {
    "tuples": doubled(b")", b"t") + b".",
    "lists": doubled(b"]", b"l") + b".",
    "tuples as a key": b"\x80\x02}" + doubled(b")", b"t")[2:] + b"K\x01s.",
    "tuples as a key of many": b"\x80\x02}(" + doubled(b")", b"t")[2:] + b"K\x01u.",
    "tuples in a set": b"\x80\x04\x8f(" + doubled(b")", b"t")[2:] + b"\x90.",
    "tuples in a frozen set": b"\x80\x04(" + doubled(b")", b"t")[2:] + b"\x91.",
    "an object that holds them, as a key": doubled(b"]", b"l") + b"0}" + INERT + b"h\x40sbK\x01s.",
    "a name made of them": doubled(b"]", b"l") + b"ctorch.serialization\n_get_layout\nh\x40\x85R.",
    "a key of OrderedDict": doubled(b")", b"t") + b"ccollections\nOrderedDict\n]h\x40K\x01\x86a\x85R.",
    "a storage": doubled(b")", b"t")
    + b"0(X\x07\x00\x00\x00storageh\x40X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ.",
    "a shape of lists": doubled(b"]", b"l") + b"ctorch\nSize\nh\x40\x85R.",
    "a shape that multiplies a list": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R(K\x01]K\x01a"
    b"\x8a\x05\x00\xe4\x0bT\x02\x86cnumpy\ndtype\nX\x02\x00\x00\x00u1\x85R\x89C\x00tb.",
    "a list in itself": b"\x80\x02]q\x00h\x00a.",
    "a mapping in itself": b"\x80\x02}q\x00K\x01h\x00s.",
    "a number of 5000 digits": b"\x80\x02L" + b"9" * 4000 + b"L\n.",
    "one text many times": b"\x80\x02X\x10\x27\x00\x00" + b"x" * 10_000 + b"q\x000](" + b"h\x00" * 20_000 + b"e.",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_shared_structure_does_not_multiply_out(name):
    with pytest.raises(CheckpointError, match="FILE"):
        safe_loads(BOMBS[name], "FILE")


def test_values_that_are_shared_a_little_are_read():
    value = safe_loads(doubled(b"]", b"l", times=5) + b".", "FILE")
    assert value == safe_loads(doubled(b"]", b"l", times=5) + b".", "FILE") and len(value) == 2


@pytest.mark.parametrize("name", [*safe_pickle._CALLABLES])
@pytest.mark.parametrize("state", [b"}X\x01\x00\x00\x00xK\x05s", b"N}X\x0c\x00\x00\x00__defaults__K\x07\x85s\x86"])
def test_a_pickle_does_not_change_the_reader(name, state):
    module, _, attribute = name.rpartition(".")
    before = {key: dict(getattr(value, "__dict__", {})) for key, value in safe_pickle._CALLABLES.items()}
    defaults = {key: getattr(value, "__defaults__", None) for key, value in safe_pickle._CALLABLES.items()}
    with pytest.raises(CheckpointError):
        safe_loads(b"\x80\x02c" + module.encode() + b"\n" + attribute.encode() + b"\n" + state + b"b.", "FILE")
    assert before == {key: dict(getattr(value, "__dict__", {})) for key, value in safe_pickle._CALLABLES.items()}
    assert defaults == {key: getattr(value, "__defaults__", None) for key, value in safe_pickle._CALLABLES.items()}


# ---- checksums of torch's zips --------------------------------------------------------------------------------------
def flipped(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << (at % 8)
    path.write_bytes(data)


@pytest.mark.parametrize("which", ["gpt2/ckpt_torch_tp1pp1_no_optim", "llama/ckpt_torch_dist_dp2distopt"])
def test_every_flipped_bit_of_a_tensor_is_found(tmp_path, which):
    root = tmp_path / "c"
    shutil.copytree(GOLDEN / which, root)
    path = find_checkpoint(root)
    intact = open_checkpoint(path)
    keys = intact.keys()
    values = {key: read_tensor(intact, key) for key in keys}
    assert verify_zips(path) == []
    rng = np.random.default_rng(0)
    files = sorted([*path.glob("mp_rank_*/*.pt"), *path.glob("*.distcp")])
    silent = 0
    for file in itertools.islice(itertools.cycle(files), 60):
        good = file.read_bytes()
        flipped(file, int(rng.integers(len(good))))
        if not verify_zips(path):  # then it was in a gap, or in a name that nothing reads: the values are the same
            silent += 1
            again = open_checkpoint(path)
            assert all(np.array_equal(read_tensor(again, key), values[key], equal_nan=False) for key in keys)
        file.write_bytes(good)
    assert silent < 6


def test_a_damaged_tensor_of_torch_is_named_and_an_older_checkpoint_is_loaded(tmp_path, capsys):
    shutil.copytree(GOLDEN / "gpt2/ckpt_torch_tp1pp1_no_optim", tmp_path / "c")
    newest = tmp_path / "c/iter_0000010"
    shutil.copytree(newest, tmp_path / "c/iter_0000005")
    file = newest / "mp_rank_00/model_optim_rng.pt"
    flipped(file, file.stat().st_size // 2)
    assert main(["--inspect", str(tmp_path / "c")]) == 0
    text = capsys.readouterr()
    assert "has another checksum than was written" in text.err and "Loading iter_0000005 instead" in text.err
    assert main(["--inspect", str(newest)]) == 2


def test_files_without_checksums_are_read(tmp_path):
    """As `torch.serialization.set_crc32_options(False)` leaves them; one that lacks its own alone is damaged."""
    import zipfile

    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(3):
            archive.writestr(f"a/data/{i}", bytes([i + 1]) * 10)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    directory = data.index(b"PK\x01\x02")
    for number, _ in enumerate(entries):
        data[directory + 16 : directory + 20] = bytes(4)
        path.write_bytes(data)
        assert damaged_entries(path) == ([f"a/data/{i}" for i in range(number + 1)] if number < 2 else [])
        directory = data.index(b"PK\x01\x02", directory + 4) if number < 2 else directory
