"""The environment of a run: what each variable means, and what is said when it is wrong."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from parallel_core.environment import MEMORY_VARIABLE
from parallel_core.errors import ConfigError
from parallel_core.launch import plan
from parallel_core.launch.plan import device_target, is_listening, master_port, plan_job, prepare_log_dir

SCRIPT = (__file__, "--lr", "1")


def planned(num_ranks: int = 2, **environment: str):
    return plan_job(SCRIPT, num_ranks, Path("logs"), {"DEVICE_TARGET": "CPU", **environment})


def test_defaults():
    spec = planned()
    assert (spec.num_ranks, spec.local_ranks, spec.stop_grace_s) == (2, range(2), 15.0)
    assert spec.environment["DEVICE_TARGET"] == "CPU"
    assert spec.environment["LOG_DIR"] == os.path.abspath("logs")
    assert spec.environment["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert spec.environment["GLOG_v"] == "3"
    assert not spec.environment.keys() & {"HCCL_BUFFSIZE", "ASCEND_RT_VISIBLE_DEVICES"}


def test_what_the_user_set_stays():
    spec = planned(OMP_NUM_THREADS="7", GLOG_v="1", MS_CPU_COMM_OP_TIMEOUT="9", STOP_GRACE_S="2.5")
    assert not spec.environment.keys() & {"OMP_NUM_THREADS", "GLOG_v", "MS_CPU_COMM_OP_TIMEOUT"}
    assert spec.stop_grace_s == 2.5


def test_the_backend_waits_longer_than_the_package():
    spec = plan_job(SCRIPT, 2, Path("logs"), {"DEVICE_TARGET": "CPU"}, comm_timeout_s=90.5)
    assert int(spec.environment["MS_CPU_COMM_OP_TIMEOUT"]) > 90.5


def test_ascend_gets_the_settings_of_its_guide():
    spec = planned(num_ranks=4, DEVICE_TARGET="Ascend", HCCL_BUFFSIZE="300")
    assert spec.environment["HCCL_EXEC_TIMEOUT"] == "600"
    job = SCRIPT, 2, Path("logs")
    timed = plan_job(*job, {"DEVICE_TARGET": "Ascend"}, comm_timeout_s=90.5).environment
    assert timed["HCCL_EXEC_TIMEOUT"] == "91"
    given = {"DEVICE_TARGET": "Ascend", "HCCL_EXEC_TIMEOUT": "1800"}
    assert "HCCL_EXEC_TIMEOUT" not in plan_job(*job, given, comm_timeout_s=90.5).environment
    assert not spec.environment.keys() & {"HCCL_DETERMINISTIC", MEMORY_VARIABLE}
    asked = {"deterministic": True, "max_device_memory": "58GB"}
    told = plan_job(*job, {"DEVICE_TARGET": "Ascend"}, **asked).environment
    assert (told["HCCL_DETERMINISTIC"], told[MEMORY_VARIABLE]) == ("true", "58GB")
    strict = {"DEVICE_TARGET": "Ascend", "HCCL_DETERMINISTIC": "strict"}
    assert "HCCL_DETERMINISTIC" not in plan_job(*job, strict, **asked).environment
    on_cpu = plan_job(*job, {"DEVICE_TARGET": "CPU"}, **asked).environment
    assert not on_cpu.keys() & {"HCCL_DETERMINISTIC", MEMORY_VARIABLE}
    assert spec.environment["ASCEND_RT_VISIBLE_DEVICES"] == "0,1,2,3"
    assert "HCCL_BUFFSIZE" not in spec.environment
    assert "MS_CPU_COMM_OP_TIMEOUT" not in spec.environment


@pytest.mark.parametrize("given", ["", "True", '{"device0":["0-10"]}'])
def test_binding_to_cores_is_msruns(given):
    words = [word for word in planned(BIND_CORE=given).msrun_command() if word.startswith("--bind")]
    assert words == ([f"--bind_core={given}"] if given else [])


def test_the_device_is_ascend_when_its_tool_is_there(monkeypatch):
    monkeypatch.setattr(plan.glob, "glob", lambda pattern: [])
    monkeypatch.setattr(plan.shutil, "which", lambda name: None)
    assert device_target({}) == "CPU"
    monkeypatch.setattr(plan.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert device_target({}) == "Ascend"
    assert device_target({"DEVICE_TARGET": "CPU"}) == "CPU"


def test_several_nodes_share_the_ranks():
    spec = planned(num_ranks=8, NNODES="2", NODE_RANK="1", MASTER_ADDR="10.0.0.1", MASTER_PORT="8848")
    assert spec.local_ranks == range(4, 8)
    command = spec.msrun_command()
    for argument in ("--worker_num=8", "--local_worker_num=4", "--master_addr=10.0.0.1", "--node_rank=1"):
        assert argument in command


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"MASTER_PORT": "x"}, "MASTER_PORT=x is not an integer; write for example MASTER_PORT=8848"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000 is not a port; ports go from 1 to 65535"),
        *(({"BIND_CORE": given}, f"BIND_CORE={given} is nothing that msrun takes; write True, or cores by device: "
           '{"device0":["0-10"]}') for given in ("yes", "[1]")),
        ({"DEVICE_TARGET": "GPU"}, "DEVICE_TARGET=GPU is not a device this package runs on; write Ascend or CPU"),
        ({"STOP_GRACE_S": "-1"}, "STOP_GRACE_S=-1 is not a number of seconds; write for example STOP_GRACE_S=15"),
        ({"STOP_GRACE_S": "nan"}, "STOP_GRACE_S=nan is not a number of seconds; write for example STOP_GRACE_S=15"),
        ({"CLUSTER_TIME_OUT": "0"}, "CLUSTER_TIME_OUT=0 is less than 1; write for example CLUSTER_TIME_OUT=300"),
        ({"NNODES": "3"}, "NPROC=2 is not a multiple of NNODES=3; every node runs as many ranks"),
        ({"NNODES": "2", "NODE_RANK": "2"}, "NODE_RANK=2 does not exist with NNODES=2; nodes count from 0"),
        ({"NNODES": "2"}, "NNODES=2 needs MASTER_ADDR and MASTER_PORT, the same on every node"),
    ],
)
def test_a_wrong_variable_is_named_with_what_to_write(environment, message):
    with pytest.raises(ConfigError) as caught:
        planned(**environment)
    assert str(caught.value) == message


def test_a_script_that_does_not_exist_is_named():
    with pytest.raises(ConfigError, match="no_such.py does not exist; give the path of a training script"):
        plan_job(("no_such.py",), 2, Path("logs"), {})


def test_a_chosen_port_is_free_and_a_given_one_must_be():
    assert not is_listening(master_port({}))
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} is in use"):
            master_port({"MASTER_PORT": str(port)})
        assert master_port({"MASTER_PORT": str(port)}, check=False) == port
    assert master_port({"MASTER_PORT": str(port)}) == port


def test_a_port_that_is_only_closing_may_be_used_again():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        accepted, _ = server.accept()
        accepted.close()  # the side that closes first is left in TIME_WAIT
        client.close()
    assert not is_listening(port)


def test_only_logs_of_an_earlier_run_are_removed(tmp_path):
    for name in ("worker_0.log", "worker_11.log", "error_rank_3.json", "metrics.jsonl", "my_worker_0.log", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "ckpt").mkdir()
    prepare_log_dir(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "msrun.log", "my_worker_0.log", "notes.txt"]


def test_a_node_removes_the_logs_of_its_own_ranks_alone(tmp_path):
    for rank in range(4):
        (tmp_path / f"worker_{rank}.log").touch()
    prepare_log_dir(tmp_path, range(2, 4))
    assert sorted(path.name for path in tmp_path.glob("worker*")) == ["worker_0.log", "worker_1.log"]


def test_a_log_directory_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "logs").touch()
    with pytest.raises(ConfigError, match=r"LOG_DIR=.*logs cannot be used: .*; give a directory that can be written"):
        prepare_log_dir(tmp_path / "logs")
