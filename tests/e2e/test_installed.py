"""The wheel, built from the checkout and installed in an environment of its own, far from it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.helpers.launching import REPO

pytestmark = pytest.mark.slow
_SOURCES = ("parallel_core", "configs", "data", "tools", "README.md", "LICENSE", "pyproject.toml", "setup.py",
            "MANIFEST.in", "pretrain_gpt.py", "pretrain_gpt.sh")  # fmt: skip


def run(command, cwd, **variables):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env={**clean, **variables}, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, f"{command}: {done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    for name in _SOURCES:
        source = REPO / name
        ignored = shutil.ignore_patterns("__pycache__", "prepared")
        shutil.copytree(source, folder / name, ignore=ignored) if source.is_dir() else shutil.copy(source, folder)
    out = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", out, folder], cwd=out)
    (built,) = out.glob("parallel_core-*.whl")
    return built


def test_the_wheel_holds_what_a_run_needs_and_one_top_level_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"parallel_core"}
    share = {name.removeprefix("parallel_core/share/") for name in names if name.startswith("parallel_core/share/")}
    configs = {f"configs/{path.name}" for path in (REPO / "configs").glob("*.yaml")}
    assert {"pretrain_gpt.py", "data/corpus.jsonl", "data/tokenizer.model", "data/README.md"} | configs <= share
    kept = [*REPO.glob("parallel_core/**/csrc/*"), *REPO.glob("parallel_core/config/arguments/*.txt")]
    assert len(kept) > 10 and {str(path.relative_to(REPO)) for path in kept if path.is_file()} <= set(names)


def test_the_installed_package_trains_converts_and_prepares_from_any_folder(wheel, tmp_path):
    environment, work = tmp_path / "venv", tmp_path / "work"
    work.mkdir()
    run([sys.executable, "-m", "venv", environment], cwd=work)
    run([environment / "bin/pip", "install", "--quiet", wheel], cwd=work)
    command = [environment / "bin/parallel-core"]
    said = run([*command, "--version"], cwd=work)
    assert str(environment) in said and "MindSpore 2." in said
    cache = {"PARALLEL_CORE_CACHE": str(tmp_path / "cache"), "DEVICE_TARGET": "CPU"}
    # The default training: no argument of the model, the layout or the data.
    console = run([*command, "train", "--exit-interval", "10", "--save", "ck"], cwd=work, **cache)
    assert "4 ranks ended well" in console and "parallel-core train --" in console, console
    rows = [json.loads(line) for line in (work / "msrun_log/metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row and "split" not in row]
    assert len(losses) == 10 and losses[-1] < losses[0]
    assert (tmp_path / "cache/data/prepared/corpus_text_document.idx").is_file()
    assert "parameters" in run([*command, "convert", "--inspect", "ck"], cwd=work)
    assert "ranks" in run([*command, "plan", "configs/gpt2_13b.yaml", "--world-size", "128"], cwd=work)
    tokenizer = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "10"]
    (work / "text.jsonl").write_text('{"text": "1 2"}\n{"text": "3"}\n')
    run([*command, "preprocess", "--input", "text.jsonl", "--output-prefix", "mine", *tokenizer], cwd=work)
    run([*command, "data", "inspect", "mine_text_document"], cwd=work)
