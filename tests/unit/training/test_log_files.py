"""What a run writes beside its checkpoints goes to files of its own, never through somebody's link."""

from __future__ import annotations

import os

import pytest

from parallel_core.checkpoint.layout_files import write_durably
from parallel_core.context import ParallelContext
from parallel_core.errors import ConfigError
from parallel_core.launch.plan import prepare_log_dir
from parallel_core.training.log import RunLog


def planted(path, target):
    """Put a link, as somebody else would, where a file is about to be written."""
    target.write_text("precious")
    path.symlink_to(target)
    return target


def test_metrics_replace_a_link_and_leave_its_target_alone(tmp_path, capsys):
    precious = planted(tmp_path / "metrics.jsonl", tmp_path / "precious")
    precious.write_text('{"iteration": 1, "loss": 9.0}\n')
    log = RunLog(ParallelContext.solo(), str(tmp_path), 8)
    log.begin(1)  # a resumed run, which keeps what it wrote itself
    log.evaluation("validation", 1, {"lm loss": 2.0})
    log.close()
    assert precious.read_text() == '{"iteration": 1, "loss": 9.0}\n'
    assert '"loss": 9.0' not in (tmp_path / "metrics.jsonl").read_text()
    assert not (tmp_path / "metrics.jsonl").is_symlink()
    assert '"split": "validation"' in (tmp_path / "metrics.jsonl").read_text()


def test_a_log_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    log = RunLog(ParallelContext.solo(), str(tmp_path), 8)
    with pytest.raises(ConfigError, match=f"the metrics cannot be written to {tmp_path}/metrics.jsonl"):
        log.begin(0)


def test_a_line_of_the_log_is_one_line(tmp_path, capsys):
    log = RunLog(ParallelContext.solo(), str(tmp_path), 8)
    log.info("loaded a\nINFO - forged\x1b[31m")
    log.close()
    assert capsys.readouterr().out == "INFO - loaded a\n  INFO - forged\\x1b[31m\n"


@pytest.mark.parametrize("name", ["msrun.log", "worker_0.log", "metrics.jsonl", "error_rank_0.json"])
def test_the_launcher_removes_links_and_leaves_their_targets_alone(tmp_path, name):
    precious = planted(tmp_path / name, tmp_path / "precious")
    prepare_log_dir(tmp_path)
    assert precious.read_text() == "precious" and not (tmp_path / name).is_symlink()


def test_a_partial_file_is_not_written_through_a_link(tmp_path):
    precious = planted(tmp_path / "x.partial", tmp_path / "precious")
    write_durably(tmp_path / "x", "new")
    assert precious.read_text() == "precious" and (tmp_path / "x").read_text() == "new"
    assert not os.path.lexists(tmp_path / "x.partial")
