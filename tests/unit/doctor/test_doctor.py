"""What the doctor finds on machines that lack something, and between nodes."""

from __future__ import annotations

import importlib.metadata
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import namedtuple

import pytest

from parallel_core.doctor import __main__ as command
from parallel_core.doctor import machine
from parallel_core.doctor import nodes as between
from parallel_core.doctor.ascend_versions import cann_versions, versions_fit
from parallel_core.doctor.finding import BAD, GOOD, NOTE, Finding
from parallel_core.launch.host_memory import HostMemory
from tests.helpers.launching import REPO


def states(findings):
    return {finding.what: finding.state for finding in findings}


def test_this_machine_is_examined_and_every_problem_comes_with_what_to_do():
    command_line = [sys.executable, "-m", "parallel_core.doctor", "--quick", "--json"]
    done = subprocess.run(command_line, cwd=REPO, capture_output=True, text=True, timeout=120)
    findings = json.loads(done.stdout)
    assert done.returncode == any(one["state"] == BAD for one in findings), done.stdout
    looked_at = {one["what"] for one in findings}
    assert {"Python", "mindspore", "cores", "memory", "shared memory", "ports", "Ascend"} <= looked_at
    assert all(one["advice"] for one in findings if one["state"] != GOOD)


def test_wrong_and_missing_packages_are_named_with_the_command(monkeypatch):
    def version(name):
        if name == "safetensors":
            raise importlib.metadata.PackageNotFoundError(name)
        return {"numpy": "2.1.0", "mindspore": "2.10.0", "pyyaml": "6.0", "sentencepiece": "0.2.0"}[name]

    monkeypatch.setattr(machine.importlib.metadata, "version", version)
    found = {finding.what: finding for finding in machine.packages()}
    assert found["numpy"].state == BAD and found["numpy"].advice == "pip install 'numpy>=1.24,<2.0'"
    assert found["safetensors"].state == BAD and found["mindspore"].state == GOOD


def test_cores_memory_and_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "_cpu_quota", lambda: 0.5)
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    assert states(machine.cores()) == {"cores": NOTE, "OMP_NUM_THREADS": NOTE}
    monkeypatch.setattr(machine, "host_memory", lambda: HostMemory(64 << 30, 64 << 30, (3 << 30, 2 << 30)))
    (finding,) = machine.memory()
    assert finding.state == BAD and "1.0 GB of 3.0 GB free (the container's)" in finding.found
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: usage(1 << 30))
    assert states(machine.disk(tmp_path)) == {"disk": BAD} and not list(tmp_path.iterdir())
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: usage(1 << 40))
    monkeypatch.setattr(machine, "_SLOW_DISK", 1e18)
    assert states(machine.disk(tmp_path)) == {"disk": NOTE}
    assert states(machine.disk(tmp_path / "none")) == {"disk": BAD}


def test_processes_that_cannot_see_each_other(monkeypatch):
    assert states(machine.shared_memory()) == {"shared memory": GOOD}
    monkeypatch.setattr(machine, "_OPEN_ANOTHERS", "raise PermissionError('no')")
    (finding,) = machine.shared_memory()
    assert finding.state == NOTE and "PermissionError: no" in finding.found and "MCCL" in finding.advice


def test_a_port_in_use(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        assert states(machine.ports()) == {"ports": BAD}
    monkeypatch.delenv("MASTER_PORT")
    assert states(machine.ports()) == {"ports": GOOD}


def test_ascend_by_its_files(monkeypatch, tmp_path):
    monkeypatch.delenv("ASCEND_HOME_PATH", raising=False)
    monkeypatch.delenv("DEVICE_TARGET", raising=False)
    devices = tmp_path / "dev"
    devices.mkdir()
    assert states(machine.ascend(tmp_path, devices)) == {"Ascend": GOOD}
    for name in ("davinci0", "davinci1", "davinci_manager"):
        (devices / name).touch()
    assert states(machine.ascend(tmp_path, devices)) == {
        "Ascend": GOOD, "driver": BAD, "CANN": BAD, "CANN's environment": BAD}  # fmt: skip
    (tmp_path / "driver").mkdir()
    (tmp_path / "driver/version.info").write_text("Version=24.1.rc2\n")
    toolkit = tmp_path / "ascend-toolkit/latest"
    toolkit.mkdir(parents=True)
    (toolkit / "version.cfg").write_text("runtime_running_version=[7.6.0.1:8.0.RC3]\n")
    monkeypatch.setenv("ASCEND_HOME_PATH", str(toolkit))
    found = {finding.what: finding for finding in machine.ascend(tmp_path, devices)}
    assert found["Ascend"].found == "2 NPU(s): davinci0, davinci1" and found["driver"].found == "24.1.rc2"
    assert found["CANN"].found == "7.6.0.1:8.0.RC3" and "CANN's environment" not in found
    assert found["CANN, MindSpore"].state == BAD and "takes CANN 8.2" in found["CANN, MindSpore"].advice
    monkeypatch.setenv("DEVICE_TARGET", "Ascend")
    assert states(machine.ascend(tmp_path, tmp_path / "none")) == {"Ascend": BAD}


@pytest.mark.parametrize(("driver", "cann", "want"), [
    ("25.5.0", "8.5.0", {"CANN, MindSpore": GOOD}),
    ("25.2.0", "8.5.0", {"CANN, MindSpore": GOOD, "driver, CANN": NOTE}),
    ("26.0.rc1", "7.8.0.1:8.2.RC1", {"CANN, MindSpore": GOOD}),
    ("25.0.rc1", "8.1.RC1", {"CANN, MindSpore": BAD}),
    ("25.0.rc1", "unknown", {}),
])  # fmt: skip
def test_versions_that_go_together(driver, cann, want, tmp_path):
    file = tmp_path / "check.py"
    file.write_text('class A:\n  self.version = ["1"]\nclass AscendEnvChecker(A):\n  self.version = ["8.2", "8.5"]\n')
    assert states(versions_fit(driver, cann, file)) == want
    assert cann_versions(file) == [(8, 2), (8, 5)] and cann_versions(tmp_path / "none") == []
    assert (8, 5) in cann_versions()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def as_node(monkeypatch):
    """Run `nodes` in threads, each with variables of its own."""
    local = threading.local()

    class Os:
        @property
        def environ(self):
            return local.variables

    monkeypatch.setattr(between, "os", Os())

    def start(rank, port, wait_s, found, ahead=0.0, count=2):
        def run():
            local.variables = {"NNODES": str(count), "NODE_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                               "MASTER_PORT": str(port)}  # fmt: skip
            found.extend(between.nodes(wait_s, lambda: time.time() + ahead))

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    return start


@pytest.mark.parametrize("ahead", [0.0, 30.0])
def test_two_nodes_reach_each_other_and_compare_clocks(as_node, ahead):
    first, second, port = [], [], free_port()
    threads = [as_node(0, port, 20, first), as_node(1, port, 20, second, ahead)]
    for thread in threads:
        thread.join()
    assert [one.what for one in first if one.state == GOOD] == ["node 1"]
    assert [one.what for one in second if one.state == GOOD] == ["node 0"] and "MB/s" in second[0].found
    skews = [one.found for one in (*first, *second) if "clock" in one.found]
    assert skews == (["its clock is 30.0 s ahead", "its clock is 30.0 s behind"] if ahead else [])


def test_other_versions_and_missing_nodes(as_node, monkeypatch):
    first, port = [], free_port()
    about = between._about
    monkeypatch.setattr(between, "_about", lambda node, clock: {**about(node, clock), "version": f"0.{node}"})
    threads = [as_node(0, port, 1.5, first, count=3), as_node(2, port, 1.5, second := [], count=3)]
    for thread in threads:
        thread.join()
    assert states(first) == {"node 2": BAD, "node 1": BAD} and "did not call within 1.5 s" in first[-1].found
    assert any("version 0.0 there, 0.2 here" in one.found for one in second)
    alone = []
    as_node(1, free_port(), 0.3, alone).join()
    assert states(alone) == {"node 0": BAD} and "cannot be reached" in alone[0].found


def test_the_exit_status_and_the_last_line(monkeypatch, capsys):
    monkeypatch.setattr(command, "examine", lambda *words: iter([Finding("a", GOOD, "b"), Finding("c", BAD, "d", "e")]))
    assert command.main([]) == 1
    assert "1 of 2 would keep a run from working" in capsys.readouterr().out
    monkeypatch.setattr(command, "examine", lambda *words: iter([Finding("a", NOTE, "b", "c")]))
    assert command.main([]) == 0 and capsys.readouterr().out.endswith("ready to train, with 1 note(s)\n")


@pytest.mark.slow
def test_the_whole_examination(tmp_path):
    done = subprocess.run([sys.executable, "-m", "parallel_core.doctor", "--folder", str(tmp_path)], cwd=REPO,
                          env={**os.environ, "PYTHONPATH": str(REPO)}, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0 and "a job of two in" in done.stdout and "ready to train" in done.stdout, done.stdout
