"""Every file of every kind of checkpoint, damaged in every way, is named or was of no use: never silently used."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from crash_saver import save

from parallel_core.checkpoint import find_checkpoint, open_checkpoint, read_tensor
from parallel_core.checkpoint.lora import MergedAdapter
from parallel_core.checkpoint.opening import require_intact_source
from parallel_core.errors import CheckpointError
from tests.helpers.damage import WAYS, damage, flip
from tests.helpers.one_process import run

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
MEGATRON = GOLDEN / "checkpoint/llama"
CHECKSUMS = {
    "native": None,
    "megatron": MEGATRON / "ckpt_torch_tp2pp1/iter_0000010",
    "megatron-dist": MEGATRON / "ckpt_torch_dist_dp2distopt/iter_0000010",
}
"""Formats whose files have checksums: of these a single changed bit is found, too."""
WITHOUT_USE = {"metadata.json"}
"""Files that nothing is read from."""


def values(path: Path) -> dict[str, bytes]:
    source = open_checkpoint(find_checkpoint(path))
    require_intact_source(source)
    return {key: read_tensor(source, key).tobytes() for key in source.keys()}  # noqa: SIM118 - of TensorSource


def check(good: Path, tmp_path: Path, flips: int) -> None:
    right, rng = values(good), random.Random(5)
    for file in sorted(path for path in good.rglob("*") if path.is_file()):
        ways = [*WAYS, *(rng.randrange(8 * file.stat().st_size) for _ in range(flips))]
        for way in ways:
            copy = tmp_path / "copy" / good.name
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(good, copy)
            victim = copy / file.relative_to(good)
            damage(victim, way)
            try:
                found = values(copy)
            except CheckpointError as error:
                said = str(error)
                named = victim.name in said or victim.parent.name in said or good.name in said
                assert named, (file.name, way, said)
            else:
                assert found == right, (file.name, way)
                assert file.name in WITHOUT_USE or not isinstance(way, str), (file.name, way)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CHECKSUMS)
def test_formats_with_checksums(kind, tmp_path):
    check(CHECKSUMS[kind] or save(tmp_path / "saved", 5), tmp_path, 25)


@pytest.mark.slow
def test_an_adapter_and_its_base_model(tmp_path):
    run(tmp_path / "first", f"--save {tmp_path}/base")
    run(tmp_path / "second", f"--load {tmp_path}/base --lora-rank 4 --save {tmp_path}/adapter")
    path = find_checkpoint(tmp_path / "adapter")
    assert isinstance(open_checkpoint(path), MergedAdapter)
    check(path, tmp_path, 25)
    base = Path(open_checkpoint(path).base.path)
    for file in sorted(base.iterdir()):
        before = file.read_bytes()
        flip(file, 8 * (len(before) // 2))
        with pytest.raises(CheckpointError, match=base.name):
            values(path)
        file.write_bytes(before)
