"""One process imports for all ranks and forks them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from parallel_core.comm.meeting import Meeting
from parallel_core.errors import CommError
from parallel_core.launch.fork import imported_at_top
from parallel_core.launch.plan import plan_job
from tests.helpers.launching import run_launcher

SCRIPT = """
import json, os, sys
import mindspore as ms
from parallel_core.context import ParallelContext
from parallel_core.config.schema import ModelParallelConfig
from parallel_core.launch.processes import environment_of
from parallel_core.training.runtime import start_runtime

rank, size = start_runtime()
context = ParallelContext.create(ModelParallelConfig(distributed_backend=sys.argv[1]), rank, size)
total = context.world.all_reduce(ms.Tensor([float(rank + 1)])).asnumpy().tolist()
shown = environment_of(os.getpid())
said = {"total": total, "kind": type(context.world).__name__, "session": os.getsid(0) == os.getpid(),
        "shown": [shown[name] for name in ("MS_ROLE", "RANK_ID", "MS_NODE_ID", "DEVICE_ID")],
        "draw": float(__import__("numpy").random.rand())}
open(os.path.join(os.environ["LOG_DIR"], f"said_{rank}.json"), "w").write(json.dumps(said))
context.destroy()
"""


@pytest.mark.parametrize(("backend", "kind"), [
    ("auto", "ShmGroup"), pytest.param("mccl", "McclGroup", marks=pytest.mark.slow),
])  # fmt: skip
def test_forked_ranks_are_themselves_and_find_each_other(tmp_path, backend, kind):
    script, log_dir = tmp_path / "script.py", tmp_path / "logs"
    script.write_text(SCRIPT)
    status, console = run_launcher(log_dir, str(script), backend, NPROC="2")
    assert status == 0, console
    said = [json.loads((log_dir / f"said_{rank}.json").read_text()) for rank in range(2)]
    for rank, one in enumerate(said):
        assert (one["total"], one["kind"], one["session"]) == ([3.0], kind, True)
        assert one["shown"] == ["MS_WORKER", str(rank), str(rank), str(rank)]
    assert said[0]["draw"] != said[1]["draw"]


def test_what_is_imported_once_is_what_the_script_imports_first(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import os, numpy.linalg\nfrom parallel_core.ops import build\nimport neighbour\n"
                      "def later():\n    import mindspore\nfrom . import own\n")  # fmt: skip
    assert list(imported_at_top(script)) == ["numpy.linalg", "parallel_core.ops"]
    script.write_text("no python")
    assert not list(imported_at_top(script)) and not list(imported_at_top(tmp_path / "missing.py"))


@pytest.mark.parametrize("environment", [
    {"DEVICE_TARGET": "Ascend"}, {"BIND_CORE": "True"},
    {"NNODES": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "8848"},
])  # fmt: skip
def test_msrun_starts_what_cannot_be_forked(environment):
    spec = plan_job((__file__,), 2, Path("logs"), {"DEVICE_TARGET": "CPU", **environment})
    assert spec.start_command() == spec.msrun_command()
    assert plan_job((__file__,), 2, Path("logs"), {"DEVICE_TARGET": "CPU"}).start_command() != spec.msrun_command()


def test_who_does_not_come_to_the_meeting_is_named():
    descriptor = os.memfd_create("meeting")
    first, second = (Meeting(descriptor, rank, 2, 0.05) for rank in range(2))
    with pytest.raises(CommError, match=r"rank 1 has not come within 0.05 s \(CLUSTER_TIME_OUT\), seen on rank 0"):
        first.all_gather_object("here")
    assert second.all_gather_object({"late": [1]}) == ["here", {"late": [1]}]
    os.close(descriptor)
