"""Nodes as Slurm and files of hosts name them."""

from __future__ import annotations

import pytest

from parallel_core.errors import ConfigError
from parallel_core.launch.__main__ import main
from parallel_core.launch.cluster import expand, read_hosts, with_slurm
from parallel_core.launch.plan import plan_job

STEP = {
    "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NODEID": "1", "SLURM_JOB_ID": "4711000",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}  # fmt: skip


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("a", ["a"]),
        ("a,b", ["a", "b"]),
        ("node[1-3]", ["node1", "node2", "node3"]),
        ("a,node[01-03,7]-ib,z", ["a", "node01-ib", "node02-ib", "node03-ib", "node7-ib", "z"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
    ],
)
def test_slurms_lists_are_expanded(nodes, expected):
    assert list(expand(nodes)) == expected


WRONG = ["", "[", "a[1", "a[]", "a[3-1]", "a[1-999999999]", "a b", "a[1-2-3]", "$(x)", "a,,b"]


@pytest.mark.parametrize("nodes", WRONG)
def test_what_is_no_list_is_refused(nodes):
    with pytest.raises(ConfigError, match="SLURM_STEP_NODELIST"):
        list(expand(nodes))


def test_a_step_of_slurm_needs_no_variable(tmp_path):
    script = tmp_path / "train.py"
    script.touch()
    spec = plan_job((str(script),), 8, tmp_path / "logs", STEP)
    assert (spec.num_nodes, spec.node_rank, spec.master_addr) == (2, 1, "gpu07")
    assert spec.master_port == 10_000 + 2 * (4711000 % 10_000)
    assert spec.local_ranks == range(4, 8)


def test_what_the_user_sets_stays():
    given = {**STEP, "NNODES": "1"}
    assert with_slurm(given) == given
    assert with_slurm({**STEP, "MASTER_PORT": "9000"})["MASTER_PORT"] == "9000"
    assert with_slurm({"SLURM_JOB_ID": "1", "SLURM_NNODES": "2"}) == {"SLURM_JOB_ID": "1", "SLURM_NNODES": "2"}


def test_a_task_for_each_rank_is_refused():
    with pytest.raises(ConfigError, match="SLURM_STEP_NUM_TASKS=16 on 2 nodes: .* --ntasks-per-node=1"):
        with_slurm({**STEP, "SLURM_STEP_NUM_TASKS": "16"})


def test_a_file_of_hosts_gives_the_lines(tmp_path, capsys):
    file = tmp_path / "hosts"
    file.write_text("# two of them\na.example slots=4\n\nb.example slots=4  # the other\n")
    same = "MASTER_ADDR=a.example MASTER_PORT=9000 ASCEND_RT_VISIBLE_DEVICES=0,1,2,3 bash run.sh"
    assert main(["hostfile", str(file), "--port", "9000", "--command", "bash run.sh"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "# a.example: ranks 0 to 3",
        f"NPROC=8 NNODES=2 NODE_RANK=0 {same}",
        "# b.example: ranks 4 to 7",
        f"NPROC=8 NNODES=2 NODE_RANK=1 {same}",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "names no host"),
        ("a slots=0\n", "a has no slots"),
        ("a\na\n", "is there twice"),
        ("a slots=2\nb slots=4\n", "every node runs as many ranks"),
        ("a; rm -rf /\n", "is no host"),
        ("a slots=x\n", "is no host"),
    ],
)
def test_a_wrong_file_of_hosts_is_told_so(tmp_path, text, words):
    file = tmp_path / "hosts"
    file.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_hosts(file, 8)
