"""A job that lacks memory: that it did, what held it, and what would fit."""

from __future__ import annotations

import signal
import subprocess

import pytest

from parallel_core.config.fitting import fullest, settings_that_fit
from parallel_core.config.load import load_config
from parallel_core.launch.host_memory import HostMemory, host_memory, killed_for_memory
from parallel_core.launch.memory import describe_memory, explain_memory, lacks_memory
from parallel_core.launch.outcome import RankFailure
from parallel_core.launch.report import FailureReport
from tests.helpers.launching import REPO, launcher_environment

WORDS = f"""
    --config {REPO}/configs/gpt_tiny.yaml --pipeline-model-parallel-size 1 --hidden-size 1024 --num-layers 24
    --ffn-hidden-size 4096 --num-attention-heads 16 --micro-batch-size 8 --global-batch-size 32
""".split()
MIB, GIB = 1 << 20, 1 << 30
SAID = [
    "Unable to allocate 1.20 TiB for an array with shape (5, 6) and data type float32",
    "Memory not enough: current free memory size[1024] is smaller than required size[2048]",
    "Device(id:0) memory isn't enough and alloc failed, kernel name: MatMul, alloc size: 1073741824B.",
    "Allocate memory failed, alloc size 4096",
    "Malloc for kernel output failed, Memory isn't enough, node: Default/Add",
    "Out of memory!!! Request memory size: 123",
    "terminate called after throwing an instance of 'std::bad_alloc'",
    "[Errno 12] Cannot allocate memory",
]
OTHER = ["memory of rank 0: parameters 3 MB", "it does memory copy failed", "allocated buckets; the save failed"]


def failure(message: str, kind: str = "RuntimeError") -> RankFailure:
    return RankFailure(0, 0.0, 1, FailureReport(0, 0.0, kind, message, "", 1, False))


def test_what_says_that_memory_was_lacking():
    assert lacks_memory(failure("", "MemoryError"), [], 0).startswith("MemoryError")
    for text in SAID:
        assert text in lacks_memory(failure(text), [], 0)
        assert text in lacks_memory(RankFailure(0, 0.0, -signal.SIGABRT), ["INFO - x", text, "Fatal"], 0)
    for text in OTHER:
        assert not lacks_memory(failure(text), [text], 3) and not lacks_memory(RankFailure(0, 0.0, -6), [text], 0)
    killed = RankFailure(0, 0.0, -signal.SIGKILL)
    assert lacks_memory(killed, [], 0) == "" and "killed 2 processes for want of memory" in lacks_memory(killed, [], 2)
    assert lacks_memory(RankFailure(0, 0.0, -signal.SIGSEGV), [], 2) == ""


@pytest.mark.parametrize("version", [1, 2])
def test_limits_and_kills_of_the_container_and_of_those_around_it(tmp_path, version):
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal:  8388608 kB\nMemFree: 1 kB\nMemAvailable:  4194304 kB\n")
    (proc / "vmstat").write_text("pgfault 12\noom_kill 2\n")
    inner = (groups / "memory" if version == 1 else groups) / "a" / "b"
    inner.mkdir(parents=True)
    if version == 1:
        (proc / "self/cgroup").write_text("3:cpu:/\n2:memory,x:/a/b\n")
        (inner / "memory.limit_in_bytes").write_text(f"{2**63 - 4096}\n")  # none
        (inner.parent / "memory.limit_in_bytes").write_text(f"{3 * GIB}\n")
        (inner.parent / "memory.usage_in_bytes").write_text(f"{GIB}\n")
        (inner / "memory.oom_control").write_text("oom_kill_disable 0\noom_kill 3\n")
    else:
        (proc / "self/cgroup").write_text("0::/a/b\n")
        (inner / "memory.max").write_text("max\n")
        (inner.parent / "memory.max").write_text(f"{3 * GIB}\n")
        (inner.parent / "memory.current").write_text(f"{GIB}\n")
        (inner / "memory.events").write_text("low 0\noom 1\noom_kill 3\n")
    found = host_memory(proc, groups)
    assert found == HostMemory(8 * GIB, 4 * GIB, (3 * GIB, GIB))
    assert found.for_job() == (3 * GIB, "the container's limit")
    assert killed_for_memory(proc, groups) == 5
    assert HostMemory(8 * GIB, 1, None).for_job() == (8 * GIB, "all that the machine has")


def test_three_settings_that_fit_are_legal_and_need_less():
    config = load_config(WORDS, world_size=4).config
    now = fullest(config, 4, fused=True)[0].total
    for share in (0.9, 0.5, 0.3):
        found = settings_that_fit(WORDS, config, 4, share * now, fused=True)
        assert len(found) == 3 and len({one.flags for one in found}) == 3
        for one in found:
            changed = load_config([*WORDS, *one.flags], world_size=one.ranks).config
            assert fullest(changed, one.ranks, fused=True)[0] == one.memory and one.memory.total <= share * now
            assert changed.dataset_config.global_batch_size == 32
    assert found[-1].ranks > 4  # so little is to be had on more ranks
    assert settings_that_fit(WORDS, config, 4, 0.001 * now, fused=True) == []


@pytest.mark.slow
def test_what_is_said_of_a_job(tmp_path):
    config = load_config(WORDS, world_size=4).config

    def said(container: int | None) -> str:
        host = HostMemory(64 * GIB, GIB, None if container is None else (container, 0))
        return "\n".join(describe_memory("why", WORDS, config, (4, 4), host, {1: 3 * GIB}, fused=True))

    small = said(9 * GIB)
    assert "a rank may have 2.25 GiB: the container's limit, 9.00 GiB, for 4 ranks here" in small
    assert "weights 0.5" in small and "optimizer 1.1" in small and "rank 1 3.00 GiB" in small
    assert small.count("    # ") == 3 and "--tensor-model-parallel-size 4" in small
    assert "by that it fits: other processes" in said(None)
    assert "NPROC=" in said(4 * GIB) and "no layout of up to 32 ranks fits" in said(GIB)
    plain = explain_memory(tmp_path, ["x.py"], {}, (4, range(4)), [failure(SAID[0])], {}, 0)
    assert len(plain) == 1 and SAID[0] in plain[0]
    assert explain_memory(tmp_path, ["x.py"], {}, (4, range(4)), [failure("another error")], {}, 0) == []


@pytest.mark.slow
def test_a_rank_without_memory_says_what_would_fit(tmp_path):
    """A model that needs more than the address space that the ranks have."""
    large = "--hidden-size 2048 --ffn-hidden-size 8192 --num-layers 16 --log-interval 1 --seq-length 64".split()
    words = ["--config", f"{REPO}/configs/gpt_tiny.yaml", "--pipeline-model-parallel-size", "1", *large]
    command = ["bash", "-c", 'ulimit -v 9000000; exec bash "$@"', "x", str(REPO / "pretrain_gpt.sh"), *words]
    done = subprocess.run(command, cwd=tmp_path, env=launcher_environment(tmp_path / "logs"), capture_output=True,
                          text=True, timeout=900)  # fmt: skip
    assert done.returncode, done.stdout
    report = (tmp_path / "logs/crash_report.txt").read_text()
    for text in (done.stdout + done.stderr, report):
        assert "out of memory (" in text and "the address space that ulimit -v leaves a process" in text, text
        assert "these would fit, what costs least time first" in text
