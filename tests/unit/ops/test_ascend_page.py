"""docs/ascend.md: its list of what is not verified is the code's, and its commands and names exist."""

from __future__ import annotations

import os
import re
import subprocess

from parallel_core.launch import plan
from tests.ascend.pieces import PIECES
from tests.helpers.unverified import PAGE, REPO, page_with, unverified


def test_the_list_of_what_is_not_verified_is_the_codes():
    text = PAGE.read_text(encoding="utf-8")
    assert page_with(unverified(), text) == text, "write it anew: python -m tests.helpers.unverified"
    told = "\n".join(unverified())
    for name in ("HcclGroup", "AscendFlat", "flash_attention", "rms_norm", "seeded_dropout", "JobSpec"):
        assert f"`{name}`" in told


def test_variables_and_flags_of_the_page_exist():
    text = PAGE.read_text(encoding="utf-8")
    arguments = (REPO / "docs" / "arguments.md").read_text(encoding="utf-8")
    for flag in set(re.findall(r"`(--[a-z][a-z0-9_-]+)", text)) - {"--bind_core", "--rank_table_file", "--config"}:
        assert f"`{flag}`" in arguments, flag
    environment = plan.rank_environment(plan.plan_job((str(PAGE),), 2, PAGE.parent, {"DEVICE_TARGET": "Ascend"}),
                                        {"DEVICE_TARGET": "Ascend"}, 60.0)  # fmt: skip
    assert {"HCCL_BUFFSIZE", "HCCL_EXEC_TIMEOUT", "ASCEND_RT_VISIBLE_DEVICES"} <= environment.keys()


def test_the_script_says_that_there_is_no_npu_and_knows_its_pieces():
    script = REPO / "tests" / "ascend" / "run.sh"
    if not any(name.startswith("davinci") for name in os.listdir("/dev")):
        clean = {key: value for key, value in os.environ.items() if key != "DEVICE_TARGET"}
        run = subprocess.run(["bash", str(script)], env=clean, text=True, capture_output=True)
        assert run.returncode == 3 and "there is no NPU here" in run.stderr and not run.stdout
    words = re.search(r"pieces=\((machine.*?)\)", script.read_text(encoding="utf-8"))
    assert words is not None and words[1].split() == list(PIECES)
    assert " ".join(PIECES) in PAGE.read_text(encoding="utf-8")
