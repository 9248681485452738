"""The commands of the pages for newcomers, run as they stand, in a copy of the checkout."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys

import pytest

from tests.helpers.launching import REPO, launcher_environment
from tests.unit.documents.test_documents import commands, is_whole

FOLDERS = ("parallel_core", "configs", "data", "tools", "examples")
PROGRAMS = ("pretrain_gpt.sh", "pretrain_gpt.py", "pyproject.toml")
PAGES = ("getting_started.md", "from_megatron.md", "from_mindspeed.md", "parallelism.md", "walkthrough.md")


@pytest.fixture
def checkout(tmp_path):
    for name in FOLDERS + PROGRAMS:
        copy = shutil.copytree if (REPO / name).is_dir() else shutil.copy
        copy(REPO / name, tmp_path / name)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run_in_order(page, checkout):
    environment = launcher_environment(checkout / "msrun_log", PYTHONPATH=str(checkout))
    environment.pop("LOG_DIR", None)
    lines = [line for line in commands(REPO / "docs" / page) if is_whole(line) and "-m venv" not in line]
    if page == "getting_started.md":
        lines.insert(0, "bash pretrain_gpt.sh")
    for line in lines:
        line = re.sub(r"\bpython ", f"{sys.executable} ", line)
        options = {"cwd": checkout, "env": environment, "capture_output": True, "text": True}
        done = subprocess.run(line, shell=True, timeout=900, **options)
        fails = "--lr 1e30" in line  # the walk shows what is said then
        assert done.returncode == int(fails), f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    if page == "getting_started.md":
        assert (checkout / "runs/a/report.html").stat().st_size > 10_000
        assert len((checkout / "runs/a/metrics.jsonl").read_text().splitlines()) >= 60


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="no mkdocs: pip install -e '.[docs]'")
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
