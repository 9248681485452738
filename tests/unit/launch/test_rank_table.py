"""Rank tables of HCCL: the launch line of each node, several tables as one, and what is said of wrong ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from parallel_core.errors import ConfigError
from parallel_core.launch.__main__ import main
from parallel_core.launch.plan import plan_job
from parallel_core.launch.rank_table import launch_lines, read_rank_tables

ADDRESSES = [f"10.155.111.{140 + i}" for i in range(4)]


def entry(address: str, first: int, devices: int = 8) -> dict[str, Any]:
    listed = [{"device_id": str(d), "device_ip": f"192.{d % 4 + 1}.27.{6 + d // 4}", "rank_id": str(first + d)}
              for d in range(devices)]  # fmt: skip
    return {"server_id": address, "device": listed, "host_nic_ip": "reserve"}


def table(*servers: dict[str, Any], **more: Any) -> dict[str, Any]:
    count = str(len(servers))
    return {"version": "1.0", "server_count": count, "server_list": list(servers), "status": "completed", **more}


def written(folder: Path, content: object, name: str = "hccl.json") -> Path:
    (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder / name


def test_four_servers_of_eight_devices_give_a_line_each(tmp_path, capsys):
    file = written(tmp_path, table(*(entry(address, 8 * i) for i, address in enumerate(ADDRESSES))))
    assert main(["rank-table", str(file), "--command", "bash pretrain_pangu.sh --config c.yaml"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0::2] == [f"# {address}: ranks {8 * i} to {8 * i + 7}" for i, address in enumerate(ADDRESSES)]
    assert lines[1::2] == [
        f"NPROC=32 NNODES=4 NODE_RANK={i} MASTER_ADDR=10.155.111.140 MASTER_PORT=8848 "
        "ASCEND_RT_VISIBLE_DEVICES=0,1,2,3,4,5,6,7 bash pretrain_pangu.sh --config c.yaml"
        for i in range(4)
    ]


def test_a_line_is_what_the_launcher_takes(tmp_path):
    """Its variables, read by a shell, plan that node's ranks on the table's devices."""
    file = written(tmp_path, table(*(entry(address, 4 * i, 4) for i, address in enumerate(ADDRESSES))))
    for i, (server, line) in enumerate(launch_lines(read_rank_tables([file]), 8848, "env")):
        shown = subprocess.run(["sh", "-c", line], capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
        environment = dict(pair.split("=", 1) for pair in shown.stdout.splitlines())
        spec = plan_job((__file__,), int(environment["NPROC"]), Path("logs"), environment)
        assert (spec.local_ranks, spec.num_nodes) == (range(4 * i, 4 * i + 4), 4)
        assert (spec.master_addr, server.address) == (ADDRESSES[0], ADDRESSES[i])


def test_sixteen_devices_of_a_server_are_sixteen_ranks(tmp_path):
    """Numbers of two digits, which the tables' own tool could not read."""
    ((_, line),) = launch_lines(read_rank_tables([written(tmp_path, table(entry(ADDRESSES[0], 0, 16)))]), 8848, "x")
    assert line == f"NPROC=16 ASCEND_RT_VISIBLE_DEVICES={','.join(map(str, range(16)))} x"


def test_tables_of_single_servers_are_joined_in_their_order_and_numbered_anew(tmp_path):
    files = [written(tmp_path, table(entry(a, 0)), f"{a}.json") for a in (ADDRESSES[2], ADDRESSES[0])]
    servers = read_rank_tables(files)
    assert [(s.address, s.first_rank) for s in servers] == [(ADDRESSES[2], 0), (ADDRESSES[0], 8)]
    joined = written(tmp_path, table(entry(ADDRESSES[0], 8), entry(ADDRESSES[2], 0)))
    assert [(s.address, s.devices) for s in read_rank_tables([joined])] == [(s.address, s.devices) for s in servers]


def test_one_server_needs_no_master_and_devices_stand_in_the_order_of_ranks(tmp_path):
    server = entry(ADDRESSES[0], 0, 2)
    for device, number in zip(server["device"], ("5", 3)):
        device["device_id"] = number
    server["device"].reverse()
    ((_, line),) = launch_lines(read_rank_tables([written(tmp_path, table(server))]), 8848, "x")
    assert line == "NPROC=2 ASCEND_RT_VISIBLE_DEVICES=5,3 x"


def _with_device(**values: object) -> dict[str, Any]:
    server = entry(ADDRESSES[0], 0)
    server["device"][3] |= values
    return table(server)


WRONG = {
    "no JSON": ("{", r"hccl\.json"),
    "no table": ({"a": 1}, "has no server_list"),
    "a list": ([], "has no server_list"),
    "an unfinished one": (table(entry("a", 0), status="initializing"), "its status is 'initializing'"),
    "another count": (table(entry("a", 0), server_count="2"), "server_count is '2' and server_list has 1"),
    "no devices": (table({"server_id": "a", "device": []}), "server a has no device list"),
    "an address that a shell runs": (table(entry("a;reboot", 0)), "server_id 'a;reboot' is no address"),
    "a rank twice": (_with_device(rank_id="2"), "server 10.155.111.140 has rank 2 twice"),
    "a device twice": (_with_device(device_id="2"), "server 10.155.111.140 has device 2 twice"),
    "a rank that is no number": (_with_device(rank_id="-1"), "rank_id is '-1'"),
    "a rank left out": (_with_device(rank_id="8"), "ranks 0 to 8 without rank 3"),
    "ranks that begin later": (table(entry("a", 8)), "server a begins with rank 8 instead of 0"),
    "a rank on two servers": (table(entry("a", 0), entry("b", 7)), "server b begins with rank 7 instead of 8"),
    "servers of two sizes": (table(entry("a", 0), entry("b", 8, 4)), "server b has 4 devices and a 8"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_table_is_named(case, tmp_path, capsys):
    content, said = WRONG[case]
    file = written(tmp_path, content)
    if isinstance(content, str):
        file.write_text(content)
    with pytest.raises(ConfigError, match=said):
        read_rank_tables([file])
    assert main(["rank-table", str(file)]) == 2
    assert str(file) in capsys.readouterr().err


def test_the_same_server_in_two_tables_and_a_missing_file_are_named(tmp_path):
    first, second = (written(tmp_path, table(entry("a", 0)), f"{n}.json") for n in (1, 2))
    with pytest.raises(ConfigError, match=r"2\.json: server a is in .*1\.json already"):
        read_rank_tables([first, second])
    with pytest.raises(ConfigError, match="No such file"):
        read_rank_tables([tmp_path / "none.json"])


def test_tables_are_read_without_mindspore(tmp_path):
    file = written(tmp_path, table(entry("a", 0)))
    code = (
        "import sys; sys.modules['mindspore'] = None; from parallel_core.launch.__main__ import main; "
        f"sys.exit(main(['rank-table', {str(file)!r}]))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


# ---- the arguments of run_distribute.sh ------------------------------------------------------------------------------
SEED = "run_gpt2_13b.yaml"
RUN = f"python run_mindformer.py --config {SEED} --use_parallel True --run_mode"


@pytest.mark.parametrize(("ranks", "node"), [("[0,8]", 0), ("[8,16)", 1), ("[ 16, 24 )", 2), ("24,32", 3)])
def test_each_of_four_servers_has_its_line_for_the_arguments_of_run_distribute(ranks, node, tmp_path, capsys):
    file = written(tmp_path, table(*(entry(address, 8 * i) for i, address in enumerate(ADDRESSES))))
    assert main(["run-distribute", str(file), SEED, ranks, "train", "32"]) == 0
    assert capsys.readouterr().out == (
        f"NPROC=32 NNODES=4 NODE_RANK={node} MASTER_ADDR=10.155.111.140 MASTER_PORT=8848 "
        f"ASCEND_RT_VISIBLE_DEVICES=0,1,2,3,4,5,6,7 {RUN} train\n"
    )


@pytest.mark.parametrize(("devices", "shown"), [("[4,8]", "4,5,6,7"), ("[0,16)", ",".join(map(str, range(16))))])
def test_on_one_machine_the_range_is_of_devices_of_two_digits_too(devices, shown, tmp_path, capsys):
    file = written(tmp_path, table(entry(ADDRESSES[0], 0, 16)))
    assert main(["run-distribute", str(file), SEED, devices, "finetune"]) == 0
    number = shown.count(",") + 1
    assert capsys.readouterr().out == f"NPROC={number} ASCEND_RT_VISIBLE_DEVICES={shown} {RUN} finetune\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["[0,8]", "train", "16"], "has 32 ranks and RANK_SIZE is 16"),
        (["[4,12]", "train", "32"], "[4,12] are the ranks of no server"),
        (["[0,8]", "train"], "the table has 4 servers; give RANK_SIZE"),
        (["[8,0]", "train", "32"], "is no range of devices"),
        (["[0,8]", "export", "32"], "export is no mode"),
        (["[0,8]", "predict", "32"], "predict needs a text"),
    ],
)
def test_arguments_of_run_distribute_that_cannot_be_are_named(words, said, tmp_path, capsys):
    file = written(tmp_path, table(*(entry(address, 8 * i) for i, address in enumerate(ADDRESSES))))
    assert main(["run-distribute", str(file), SEED, *words]) == 2
    assert said in capsys.readouterr().err
