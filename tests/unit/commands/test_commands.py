"""`parallel-core`: every listed command is there, and the files it needs are in a built package."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys

import pytest

from parallel_core import __version__, bundled
from parallel_core.__main__ import COMMANDS, main
from parallel_core.errors import ConfigError
from tests.helpers.launching import REPO


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_main_and_a_help(name, capsys):
    command = COMMANDS[name]
    assert callable(importlib.import_module(command.module).main)
    if command.words:
        return
    try:
        status = main([name, "--help"])
    except SystemExit as exit:
        status = exit.code
    assert status in (0, None) and "usage" in capsys.readouterr().out.lower() or name == "train"


def test_commands_are_listed_and_unknown_ones_refused(capsys):
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(re.search(rf"^  {name} ", listed, re.M) for name in COMMANDS)
    assert main(["trian"]) == 2
    assert "no command 'trian'" in capsys.readouterr().err


def test_the_version_tells_package_mindspore_and_kernels():
    command = [sys.executable, "-m", "parallel_core", "--version"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith(f"parallel_core {__version__} (")
    assert re.search(r"^MindSpore 2\.", done.stdout, re.M) and re.search(r"^kernels: \S", done.stdout, re.M)


def test_a_bundled_configuration_is_found_from_any_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["config", "show", "configs/gpt_tiny.yaml"]) == 0
    assert str(REPO / "configs/gpt_tiny.yaml") in capsys.readouterr().out
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/gpt_tiny.yaml").write_text("num_layer: 3\n")
    assert main(["config", "show", "configs/gpt_tiny.yaml"]) == 1
    assert "num_layer" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["gpt_tiny.yaml", "configs/../README.md", "/configs/a.yaml", "configs/none.yaml"])
def test_nothing_else_is_taken_for_a_bundled_configuration(name):
    assert bundled.bundled_config(name) is None
    from parallel_core.config.load import load_config

    with pytest.raises(ConfigError, match="no such file|cannot be read|is no file"):
        load_config(["--config", "nowhere/" + name])


def test_a_package_with_its_own_files_uses_those(tmp_path, monkeypatch):
    monkeypatch.setattr(bundled, "_PACKAGE", tmp_path / "parallel_core")
    (tmp_path / "parallel_core/share/configs").mkdir(parents=True)
    (tmp_path / "parallel_core/share/configs/a.yaml").touch()
    assert not bundled.is_checkout() and bundled.bundled_config("configs/a.yaml") is not None
    assert bundled.bundled_program().parent == tmp_path / "parallel_core/share"


def test_what_the_package_shares_is_in_the_checkout():
    text = (REPO / "setup.py").read_text()
    patterns = re.search(r"^SHARED = \((.*)\)$", text, re.M).group(1).replace('"', "").split(", ")
    found = {str(path.relative_to(REPO)) for pattern in patterns for path in REPO.glob(pattern)}
    assert all(list(REPO.glob(pattern)) for pattern in patterns)
    assert {"pretrain_gpt.py", "configs/gpt_tiny.yaml", "data/corpus.jsonl", "data/tokenizer.model"} <= found
