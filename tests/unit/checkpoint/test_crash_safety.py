"""Whatever happens while saving, and whatever happens to the files later, the newest intact checkpoint is found."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import random
import shutil
import time

import numpy as np
import pytest
from crash_saver import SHAPE, save, save_until_killed, shards_of

from parallel_core.checkpoint import (
    AsyncSaver,
    CheckpointWriter,
    TensorShard,
    find_checkpoint,
    holds_checkpoint,
    layout_files,
    load_shards,
    open_checkpoint,
    read_tensor,
    verify,
)
from parallel_core.checkpoint import writer as writer_module
from parallel_core.errors import CheckpointError


def newest(root, **options):
    notes = []
    path = find_checkpoint(root, report=notes.append, **options)
    values = read_tensor(open_checkpoint(path), "w")
    assert (values == int(path.name[5:12])).all(), "content of another iteration"
    return int(path.name[5:12]), notes


@pytest.mark.parametrize("kills", [15, pytest.param(100, marks=pytest.mark.slow)])
def test_kill_at_random_moments_leaves_a_loadable_latest(tmp_path, kills):
    """Kills at random moments of a process that saves in a loop; after each, the latest announced save is there."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["crash_saver"])
    rng = random.Random(7)
    start, announced = 1, 0
    for _ in range(kills):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=save_until_killed, args=(tmp_path, start, sender))
        process.start()
        sender.close()
        announced = max(announced, receiver.recv())  # the process is up and one save is complete
        time.sleep(rng.random() * 0.06)
        process.kill()
        process.join()
        with contextlib.suppress(EOFError):
            while True:
                announced = max(announced, receiver.recv())
        iteration, _ = newest(tmp_path)
        assert announced <= iteration <= announced + 1
        start = iteration
    save(tmp_path, iteration + 1, keep=2)  # cleans up everything the kills left
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names[-1] == "latest_checkpointed_iteration.txt" and len(names) == 3


def remove_slowly(path):
    """Remove a directory file by file, through calls that the test can stop between."""
    for file in sorted(path.iterdir()):
        os.unlink(file)
    os.rmdir(path)


def steps_of_a_save(root, monkeypatch, limit):
    """Save iteration 2 and stop, as a crash would, at the `limit`-th call that changes the disk."""
    calls = 0

    class Crash(BaseException):
        pass

    def counted(function):
        def run(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > limit:
                raise Crash
            return function(*args, **kwargs)

        return run

    with monkeypatch.context() as patch:
        for name in ("fsync", "replace", "rename", "unlink"):
            patch.setattr(os, name, counted(getattr(os, name)))
        patch.setattr(shutil, "rmtree", lambda path, ignore_errors=False: remove_slowly(path))
        try:
            save(root, 2, keep=1)
        except Crash:
            return False
    return True


@pytest.mark.parametrize("resave", [False, True], ids=["next", "same-iteration-again"])
def test_a_crash_at_every_single_step(tmp_path, monkeypatch, resave):
    finished, limit = False, 0
    while not finished:
        root = tmp_path / str(limit)
        save(root, 1)
        if resave:
            save(root, 2)
        finished = steps_of_a_save(root, monkeypatch, limit)
        assert all(verify(path) == [] for path in layout_files.list_iterations(root).values())
        iteration, notes = newest(root)
        assert iteration in ((2,) if resave else (1, 2))
        assert iteration == 2 or not notes
        save(root, 3, keep=1)
        assert sorted(p.name for p in root.iterdir()) == ["iter_0000003", "latest_checkpointed_iteration.txt"]
        limit += 1
    assert limit > 10


def test_a_full_disk_keeps_the_previous_one(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "write_safetensors", full)
        with pytest.raises(CheckpointError, match="rank 0 could not write .*No space left"):
            save(tmp_path, 2, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(layout_files.os, "replace", full)
        with pytest.raises(CheckpointError, match="No space left"):
            save(tmp_path, 2, keep=1)
    assert newest(tmp_path) == (1, [])
    save(tmp_path, 2, keep=1)
    assert newest(tmp_path) == (2, [])


def test_a_rank_that_dies_midway_is_named(tmp_path):
    save(tmp_path, 1)
    ranks = [CheckpointWriter(tmp_path, 2, rank, 2) for rank in range(2)]
    ranks[0].begin()
    ranks[0].write_rank_file(shards_of(2, 0, 2))
    with pytest.raises(CheckpointError, match=r"rank\(s\) 1 wrote nothing within 0.1 s"):
        ranks[0].collect_manifests(0.1)
    ranks[1].report_failure("rank 1 lost its device")
    with pytest.raises(CheckpointError, match="rank 1 lost its device"):
        ranks[0].collect_manifests(10)
    with pytest.raises(CheckpointError, match=r"no manifest from rank\(s\) \[1\]"):
        ranks[0].commit([ranks[0].write_rank_file(shards_of(2, 0, 2))], {})
    assert newest(tmp_path)[0] == 1


def test_manifests_of_an_earlier_launch_are_not_taken(tmp_path):
    old = [CheckpointWriter(tmp_path, 2, rank, 2, token="old") for rank in range(2)]
    old[1].write_rank_file(shards_of(0, 1, 2))
    new = CheckpointWriter(tmp_path, 2, 0, 2, token="new")
    new.begin()
    new.write_rank_file(shards_of(2, 0, 2))
    with pytest.raises(CheckpointError, match="wrote nothing"):
        new.collect_manifests(0.1)


def test_keep_checkpoint_max(tmp_path):
    for iteration in range(1, 6):
        save(tmp_path, iteration, keep=2)
        kept = sorted(int(p.name[5:]) for p in tmp_path.glob("iter_*"))
        assert kept == [i for i in (iteration - 1, iteration) if i > 0]
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4")
    save(tmp_path, 3, keep=1)  # went back: what is above is another branch and stays
    assert sorted(int(p.name[5:]) for p in tmp_path.glob("iter_*")) == [3, 4, 5]


DAMAGES = {
    "truncate": lambda f: f.write_bytes(f.read_bytes()[:-1]),
    "empty": lambda f: f.write_bytes(b""),
    "append": lambda f: f.write_bytes(f.read_bytes() + b"\0"),
    "delete": lambda f: f.unlink(),
}


def flip(file, bit):
    raw = bytearray(file.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    file.write_bytes(raw)


@pytest.mark.parametrize("ckpt_format", ["safetensors", "ckpt"])
def test_every_damage_to_every_file_is_found_and_named(tmp_path, ckpt_format):
    pytest.importorskip("mindspore") if ckpt_format == "ckpt" else None
    save(tmp_path / "good", 4)
    path = save(tmp_path / "good", 5, ckpt_format=ckpt_format)
    files = sorted(p.name for p in path.iterdir())
    assert len(files) == 4 and verify(path) == []
    rng = random.Random(3)
    cases = [(name, kind, None) for name in files for kind in DAMAGES]
    cases += [(name, "flip", bit) for name in files for bit in rng.sample(range((path / name).stat().st_size * 8), 40)]
    cases += [(a, "swap", b) for i, a in enumerate(files) for b in files[i + 1 :]]
    for name, kind, detail in cases:
        if kind == "swap" and (path / name).read_bytes() == (path / detail).read_bytes():
            continue  # `.ckpt` files know no slices, so equal values make equal files
        victim = path / name
        backup = {other: (path / other).read_bytes() for other in files}
        if kind == "flip":
            flip(victim, detail)
        elif kind == "swap":
            victim.write_bytes(backup[detail])
            (path / detail).write_bytes(backup[name])
        else:
            DAMAGES[kind](victim)
        problems = verify(path)
        named = [
            n
            for n in {name, detail if kind == "swap" else name}
            if any(str(path / n) in problem for problem in problems)
        ]
        assert named, (name, kind, detail, problems)
        iteration, notes = newest(tmp_path / "good")
        assert iteration == 4 and "iter_0000005 is damaged" in notes[0] and "Loading iter_0000004 instead" in notes[0]
        with pytest.raises(CheckpointError, match="is damaged"):
            find_checkpoint(tmp_path / "good", step=5)
        for other, content in backup.items():
            (path / other).write_bytes(content)
    assert newest(tmp_path / "good") == (5, [])


def test_verification_is_shared_between_ranks(tmp_path):
    path = save(tmp_path, 1, world_size=4)
    flip(path / "model-00002-of-00004.safetensors", 9000)
    found = [verify(path, part, 3) for part in range(3)]
    assert sum(map(len, found)) == 1


def test_trackers(tmp_path):
    with pytest.raises(CheckpointError, match="there is no such directory"):
        find_checkpoint(tmp_path / "nowhere")
    (file := tmp_path / "model.safetensors").touch()
    assert holds_checkpoint(file)  # so that no run begins from random weights instead
    with pytest.raises(CheckpointError, match="model.safetensors: is a file; give the directory that it is in"):
        find_checkpoint(file)
    file.unlink()
    with pytest.raises(CheckpointError, match="no iter_XXXXXXX directory"):
        find_checkpoint(tmp_path)
    for iteration in (1, 2, 3):
        save(tmp_path, iteration)
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    assert newest(tmp_path) == (3, [])
    tracker.write_text("2\n")
    assert newest(tmp_path) == (2, [])
    assert find_checkpoint(tmp_path, step=1).name == "iter_0000001"
    with pytest.raises(CheckpointError, match="--ckpt-step 9: no iter_0000009; it holds iter_0000001, iter_0000002"):
        find_checkpoint(tmp_path, step=9)
    for text in ("", "garbage", "-3", "٣", "99999999999999999999"):
        tracker.write_text(text)
        iteration, notes = newest(tmp_path)
        assert iteration == 3 and "latest_checkpointed_iteration.txt" in notes[0]
    tracker.unlink()
    iteration, notes = newest(tmp_path)
    assert iteration == 3 and "is missing" in notes[0]
    assert find_checkpoint(tmp_path / "iter_0000002") == tmp_path / "iter_0000002"
    for path in tmp_path.glob("iter_*"):
        flip(path / "model-00000-of-00002.safetensors", 8000)
    with pytest.raises(CheckpointError, match="no checkpoint is intact") as caught:
        find_checkpoint(tmp_path)
    assert str(caught.value).count("model-00000-of-00002.safetensors") == 3
    assert find_checkpoint(tmp_path, check=False).name == "iter_0000003"


def test_after_going_back_the_abandoned_branch_comes_last(tmp_path):
    for iteration in (1, 2, 5):
        save(tmp_path, iteration)
    save(tmp_path, 2)
    flip(tmp_path / "iter_0000002" / "model-00000-of-00002.safetensors", 8000)
    assert newest(tmp_path)[0] == 1


def test_async_save_takes_a_copy_and_reports_failures(tmp_path):
    saver = AsyncSaver()
    array = np.ones(SHAPE, np.float32)
    shard = TensorShard.full("w", SHAPE, "float32")
    writer = CheckpointWriter(tmp_path, 1, 0, 1)
    writer.begin()

    def write(copies):
        time.sleep(0.05)
        writer.write_rank_file(copies)
        writer.commit(writer.collect_manifests(10), {})

    saver.start({"w": (shard, array)}, write)
    array[:] = 7
    assert saver.busy
    saver.wait()
    arrays, _ = load_shards(find_checkpoint(tmp_path), {"w": shard})
    assert (arrays["w"] == 1).all()

    def fail(copies):
        raise CheckpointError("disk full")

    saver.start({"w": (shard, array)}, fail)
    with pytest.raises(CheckpointError, match="disk full"):
        saver.start({"w": (shard, array)}, write)
    saver.wait()  # raised once


def test_the_ckpt_container_reads_like_the_other(tmp_path):
    pytest.importorskip("mindspore")
    bits = np.arange(12, dtype=np.uint16).reshape(4, 3)
    writers = [CheckpointWriter(tmp_path, 1, rank, 2, ckpt_format="ckpt", ckpt_prefix="net") for rank in range(2)]
    writers[0].begin()
    manifests = []
    for w in writers:
        shard = TensorShard.split("w", (4, 3), "bfloat16", 0, w.rank, 2)
        values = {"w": (shard, bits[2 * w.rank : 2 * w.rank + 2])}
        if w.rank == 0:
            values["s"] = (TensorShard.full("s", (), "float32"), np.array(2.5, np.float32))
        manifests.append(w.write_rank_file(values))
    path = writers[0].commit(manifests, {})
    assert (path / "net-00001-of-00002.ckpt").exists()
    wanted = {"w": TensorShard.split("w", (4, 3), "bfloat16", 1, 2, 3), "s": TensorShard.full("s", (), "float32")}
    arrays, _ = load_shards(path, wanted)
    np.testing.assert_array_equal(arrays["w"], bits[:, 2:])
    assert arrays["s"] == 2.5
