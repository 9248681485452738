"""Every call of MindSpore in the package fits a MindSpore: the installed one, and others that a variable names."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from parallel_core.config.schema import ProfileConfig
from parallel_core.launch.job import JobSpec
from parallel_core.training import profiler
from tests.helpers import mindspore_calls

PACKAGE = Path(__file__).resolve().parents[3] / "parallel_core"
OTHERS = "PARALLEL_CORE_OTHER_MINDSPORES"
"""Pythons, separated by colons, each of an environment with another MindSpore."""


def test_every_call_fits_the_installed_mindspore():
    assert mindspore_calls.misfits(PACKAGE) == []
    names = {call.name for file in PACKAGE.rglob("*.py") for call in mindspore_calls.calls_in(file)}
    assert {"mindspore.mint.distributed.isend", "mindspore.ops.rms_norm", "mindspore.mint.rand",
            "mindspore.ops.auto_generate.AdamW", "mindspore.communication.create_group"} <= names  # fmt: skip


def test_what_is_given_as_a_dictionary_or_to_msrun_is_known(monkeypatch):
    monkeypatch.setattr(profiler.profiler, "tensorboard_trace_handler", dict)
    assert tuple(profiler.profile_options(ProfileConfig(), PACKAGE)) == mindspore_calls.PROFILE
    job = JobSpec(("x.py",), 4, PACKAGE, 9000, num_nodes=2, bind_core="True")
    flags = [word[2:].split("=")[0] for word in job.msrun_command() if word.startswith("--")]
    assert set(flags) == set(mindspore_calls.MSRUN)


def test_what_does_not_fit_is_told(tmp_path):
    (tmp_path / "wrong.py").write_text(
        "import mindspore as ms\nfrom mindspore import mint, ops\nfrom mindspore.ops.auto_generate import AdamW\n"
        "ops.no_such_operator(1)\nops.rms_norm(1, 2, eps=3)\nops.swiglu(1, 2, 3)\nmint.narrow(1, 2)\n"
        "AdamW()(1)\ndef f(x):\n    adam = AdamW()\n    return adam(1, step=x)\nms.Generator().manual_seed(1)\n"
    )
    found = [line.split(": ", 1)[1].removeprefix("mindspore.") for line in mindspore_calls.misfits(tmp_path)]
    assert found[0].startswith("ops.no_such_operator does not exist") and len(found) == 6
    assert found[1:4] == ["ops.rms_norm has no argument eps", "ops.swiglu takes 2 arguments, not 3",
                          "mint.narrow lacks start, length"]  # fmt: skip
    assert all("auto_generate.AdamW lacks m" in line or "auto_generate.AdamW lacks" in line for line in found[4:])


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get(OTHERS), reason=f"{OTHERS} names no other MindSpore")
@pytest.mark.parametrize("python", [python for python in os.environ.get(OTHERS, "").split(os.pathsep) if python])
def test_every_call_fits_other_mindspores(python):
    command = [python, mindspore_calls.__file__, str(PACKAGE)]
    run = subprocess.run(command, env={**os.environ, "GLOG_v": "3"}, text=True, capture_output=True)
    assert run.returncode == 0, run.stdout + run.stderr
