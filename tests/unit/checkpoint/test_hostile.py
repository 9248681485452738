"""Files meant to do harm or simply damaged: refused by name, nothing run, nothing written."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel_core.checkpoint import CheckpointWriter, TensorShard, open_checkpoint, read_tensor
from parallel_core.checkpoint.megatron.safe_pickle import safe_loads
from parallel_core.checkpoint.megatron.torch_zip import load_torch_zip
from parallel_core.checkpoint.native import verify
from parallel_core.checkpoint.safetensors_file import read_header
from parallel_core.convert.cli import main
from parallel_core.errors import CheckpointError

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "checkpoint"


class Runs:
    """A pickle that runs a command when it is loaded carelessly."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def torch_zip(path, data, extra=(), compression=zipfile.ZIP_STORED, storages=None):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("a/data.pkl", data)
        for key, content in (storages or {}).items():
            archive.writestr(f"a/data/{key}", content)
        for name, content in extra:
            archive.writestr(name, content)


def megatron_dir(tmp_path, data, **options):
    rank = tmp_path / "m" / "iter_0000001" / "mp_rank_00"
    rank.mkdir(parents=True)
    (tmp_path / "m" / "latest_checkpointed_iteration.txt").write_text("1")
    torch_zip(rank / "model_optim_rng.pt", data, **options)
    return tmp_path / "m"


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
@pytest.mark.parametrize(
    ("module", "function", "arguments"),
    [
        ("os", "system", ("touch {}",)),
        ("subprocess", "call", (["touch", "{}"],)),
        ("builtins", "eval", ("open('{}', 'w')",)),
        ("builtins", "exec", ("open('{}', 'w')",)),
        ("pathlib", "Path", ("{}",)),
    ],
)
def test_code_is_never_run(tmp_path, capsys, protocol, module, function, arguments):
    marker = tmp_path / "ran"
    target = getattr(__import__(module), function)
    args = tuple([part.format(marker) for part in a] if isinstance(a, list) else a.format(marker) for a in arguments)
    load = megatron_dir(tmp_path, pickle.dumps({"args": Runs(target, *args)}, protocol))
    assert main(["--load", str(load), "--save", str(tmp_path / "out")]) == 2
    text = capsys.readouterr().err
    assert "model_optim_rng.pt" in text and f".{function}'" in text and "nothing was run" in text
    assert not marker.exists() and not (tmp_path / "out").exists()


HOSTILE_PICKLES = {
    "getattr": b"\x80\x02cbuiltins\ngetattr\n.",
    "module getattr chain": b"\x80\x04\x8c\x0bcollections\x8c\x17OrderedDict.__class__.x\x93.",
    "import by stack": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x02ls\x85R.",
    "extension code": b"\x80\x02\x82\x01.",
    "old INST": b"(ios\nsystem\n.",
    "huge memo": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "huge bytes": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x.",
    "truncated": b"\x80\x02}q\x00(",
    "empty": b"",
    "wrong type": b"\x80\x02K\x05K\x06\x86R.",
    "unhashable key": b"\x80\x02}]K\x01s.",
    "deep tuple as a key": b"\x80\x02})" + b"\x85" * 1_000_000 + b"Ns.",
    "deep tuple through the memo": b"\x80\x02})q\x00" + b"h\x00\x85q\x000" * 300_000 + b"h\x00Ns.",
    "deep nesting": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
}


@pytest.mark.parametrize("name", HOSTILE_PICKLES)
def test_hostile_pickles(tmp_path, capsys, name):
    load = megatron_dir(tmp_path, HOSTILE_PICKLES[name])
    assert main(["--load", str(load), "--save", str(tmp_path / "out")]) == 2
    assert "model_optim_rng.pt" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_unknown_class_can_be_let_in_as_data():
    data = b"\x80\x02csome.module\nThing\n)\x81}X\x01\x00\x00\x00aK\x05sb."
    with pytest.raises(CheckpointError, match="--allow-inert some.module.Thing"):
        safe_loads(data, "file")
    assert safe_loads(data, "file", allow_inert=["some.module.Thing"]).a == 5


def tensor_pickle(size, stride, offset=0, numel=4, key="0"):
    """Return a pickle of one float32 tensor with any numbers in it."""
    from parallel_core.checkpoint.megatron.pickle_emitter import GlobalName, PickleEmitter

    emitter = PickleEmitter()
    emitter._emit(GlobalName("torch._utils", "_rebuild_tensor_v2"))
    emitter._out += b"("
    emitter._emit(("storage", GlobalName("torch", "FloatStorage"), key, "cpu", numel))
    emitter._out += b"Q"
    for item in (offset, tuple(size), tuple(stride), False, {}):
        emitter._emit(item)
    return bytes(emitter._out) + b"tR."


@pytest.mark.parametrize(
    ("size", "stride", "offset", "numel", "key"),
    [
        ((5,), (1,), 0, 4, "0"),
        ((2, 2), (4, 1), 0, 4, "0"),
        ((4,), (1,), 1, 4, "0"),
        ((1 << 40,), (0,), 0, 4, "0"),
        ((2,), (-1,), 1, 4, "0"),
        ((-1,), (1,), 0, 4, "0"),
        ((2,), (1,), -1, 4, "0"),
        ((2, 2), (1,), 0, 4, "0"),
        ((1 << 62, 1 << 62), (1, 1), 0, 4, "0"),
        ((4,), (1,), 0, 1 << 50, "0"),
        ((4,), (1,), 0, 4, "7"),
        ((4,), (1,), 0, 4, "../../etc/passwd"),
    ],
)
def test_absurd_tensors(tmp_path, size, stride, offset, numel, key):
    path = tmp_path / "x.pt"
    torch_zip(path, tensor_pickle(size, stride, offset, numel, key), storages={"0": bytes(16)})
    with pytest.raises(CheckpointError, match="x.pt"):
        load_torch_zip(path)


def test_a_good_tensor_passes_the_same_checks(tmp_path):
    path = tmp_path / "x.pt"
    values = np.arange(4, dtype=np.float32)
    torch_zip(path, tensor_pickle((2, 2), (1, 2)), storages={"0": values.tobytes()})
    np.testing.assert_array_equal(load_torch_zip(path).blob.read(), values.reshape(2, 2).T)


def test_zip_tricks(tmp_path):
    path = tmp_path / "x.pt"
    good = pickle.dumps({}, 2)
    torch_zip(path, good, extra=[("a/data/0", b"0" * 10_000_000)], compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed"):
        load_torch_zip(path)
    with pytest.warns(UserWarning, match="Duplicate name"):
        torch_zip(path, good, extra=[("a/data.pkl", good)])
    with pytest.raises(CheckpointError, match="there twice"):
        load_torch_zip(path)
    torch_zip(path, good, extra=[("b/data.pkl", good)])
    with pytest.raises(CheckpointError, match="2 data.pkl"):
        load_torch_zip(path)
    torch_zip(path, good, extra=[("a/byteorder", b"big")])
    with pytest.raises(CheckpointError, match="big-endian"):
        load_torch_zip(path)
    path.write_bytes(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.")
    with pytest.raises(CheckpointError, match="before 1.6"):
        load_torch_zip(path)
    two = io.BytesIO()
    with zipfile.ZipFile(two, "w") as archive:
        archive.writestr("a/data.pkl", good)
        archive.writestr("a/data/0", b"x" * 40)
    raw = bytearray(two.getvalue())
    at = raw.rindex(b"PK\x01\x02")
    raw[at + 42 : at + 46] = struct.pack("<I", 0)  # the second entry now claims the first one's bytes
    path.write_bytes(bytes(raw))
    with pytest.raises(CheckpointError, match="overlaps another|there twice|no header"):
        load_torch_zip(path)
    raw = bytearray(two.getvalue())
    raw[at + 20 : at + 28] = struct.pack("<II", 1 << 20, 1 << 20)  # ... or more bytes than there are
    path.write_bytes(bytes(raw))
    with pytest.raises(CheckpointError, match="leaves the file"):
        load_torch_zip(path)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_megatron_files_never_surprise(tmp_path_factory, data):
    """Any cut or change of bytes gives the same values, other values, or a CheckpointError: nothing else."""
    source = GOLDEN / "llama/ckpt_torch_dist_dp2distopt/iter_0000010"
    target = tmp_path_factory.mktemp("d") / "c"
    shutil.copytree(source, target)
    file = target / data.draw(st.sampled_from([".metadata", "common.pt", "__0_0.distcp"]))
    raw = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw)))]
    else:
        for _ in range(data.draw(st.integers(1, 5))):
            raw[data.draw(st.integers(0, min(len(raw), 50_000) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(raw)
    try:
        opened = open_checkpoint(target)
        for key in opened.keys():  # noqa: SIM118
            read_tensor(opened, key)
    except CheckpointError:
        pass
    finally:
        shutil.rmtree(target.parent)


@pytest.mark.parametrize("name", ["mp_rank_01", "mp_rank_00", "mp_rank_00/model_optim_rng.pt"])
def test_a_missing_rank_is_named(tmp_path, name):
    shutil.copytree(GOLDEN / "llama/ckpt_torch_tp2pp1/iter_0000010", tmp_path / "c")
    victim = tmp_path / "c" / name
    shutil.rmtree(victim) if victim.is_dir() else victim.unlink()
    with pytest.raises(CheckpointError, match=name.split("/")[-1] if name != "mp_rank_00" else "rank 0's directory"):
        open_checkpoint(tmp_path / "c")


def test_a_missing_distcp_file_is_named(tmp_path):
    shutil.copytree(GOLDEN / "llama/ckpt_torch_dist_dp2distopt/iter_0000010", tmp_path / "c")
    (tmp_path / "c" / "__1_0.distcp").unlink()
    assert main(["--load", str(tmp_path / "c"), "--save", str(tmp_path / "out"), "--quiet"]) == 2
    assert not (tmp_path / "out").exists()


def test_distcp_paths_stay_inside(tmp_path, capsys):
    shutil.copytree(GOLDEN / "llama/ckpt_torch_dist_dp2distopt/iter_0000010", tmp_path / "c")
    file = tmp_path / "c" / ".metadata"
    file.write_bytes(file.read_bytes().replace(b"__0_0.distcp", b"../../passwd"))
    assert main(["--load", str(tmp_path / "c"), "--save", str(tmp_path / "out")]) == 2
    assert "outside its directory: '../../passwd'" in capsys.readouterr().err


def native(tmp_path):
    writer = CheckpointWriter(tmp_path, 1, 0, 1)
    writer.begin()
    shard = TensorShard.full("w", (4, 4), "float32")
    return writer.commit([writer.write_rank_file({"w": (shard, np.eye(4, dtype=np.float32))})], {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i["tensors"]["w"]["pieces"][0].update(file="../../x"), "not among the listed files"),
        (lambda i: i["files"].update({"/etc/passwd": {"bytes": 1, "crc32": "0"}}), "outside its directory"),
        (lambda i: i["tensors"]["w"].update(shape=[1 << 40, 1 << 40]), "no array can have"),
        (lambda i: i["tensors"]["w"].update(shape=[1] * 70), "70 dims, which no array can have"),
        (lambda i: i["tensors"]["w"].update(shape=[0, 10**30]), "beyond 64 bits"),
        (lambda i: i["tensors"]["w"].update(shape=[-4, 4]), "a list of integers of at least 0"),
        (lambda i: i["tensors"]["w"].update(dtype=["float32"]), "a line of text belongs"),
        (lambda i: i["tensors"]["w"].update(dtype="object"), "cannot be stored"),
        (lambda i: i["tensors"]["w"]["pieces"][0].update(offset=-8), "an integer of at least 0"),
        (lambda i: i["tensors"]["w"]["pieces"].clear(), "are in no file"),
        (lambda i: i["tensors"]["w"]["pieces"].extend(i["tensors"]["w"]["pieces"]), "overlap"),
        (lambda i: i.update(format="else"), "is damaged"),
        (lambda i: i.update(format_version=99), "format version 99"),
        (lambda i: i.update(common=[]), "where a mapping belongs"),
        (lambda i: i.pop("container"), "container is nothing, where a line of text belongs"),
        (lambda i: i.update(files={"x": 5}), "files: x is damaged: 5 where a mapping belongs"),
        (lambda i: i.update(tensors=[]), "where a mapping belongs"),
        (lambda i: i["tensors"]["w"]["pieces"][0].update(offset=1 << 40), "leaves model-00000-of-00001"),
    ],
)
def test_a_hostile_index(tmp_path, change, message):
    path = native(tmp_path)
    index = json.loads((path / "checkpoint.json").read_text())
    change(index)
    (path / "checkpoint.json").write_text(json.dumps(index))
    assert verify(path) != []
    with pytest.raises(CheckpointError, match=message):
        read_tensor(open_checkpoint(path), "w")


@pytest.mark.parametrize(
    "header",
    [
        {"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4 << 40]}},
        {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 12]}},
        {"w": {"dtype": "F32", "shape": [-4], "data_offsets": [0, -16]}},
        {"w": {"dtype": "F99", "shape": [4], "data_offsets": [0, 16]}},
        {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
         "v": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}},
        {"w": {"dtype": "F32"}},
        [1, 2],
    ],
)  # fmt: skip
def test_hostile_safetensors_headers(tmp_path, header):
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    with pytest.raises(CheckpointError, match="x.safetensors"):
        read_header(path)
    path.write_bytes(struct.pack("<Q", 1 << 60) + text)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_header(path)
