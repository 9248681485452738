"""The launcher's configuration reaches the ranks as it was resolved."""

from __future__ import annotations

import json

import pytest
from config_helpers import argv
from hypothesis import HealthCheck, given, settings
from test_config_round_trip import configurations

from parallel_core.config import load_config
from parallel_core.config.handover import load_run_config, write_handover
from parallel_core.environment import HANDOVER_VARIABLE
from parallel_core.errors import ConfigError


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=configurations())
def test_what_is_read_is_what_was_resolved(tmp_path, monkeypatch, case):
    words, world = case
    loaded = load_config(words, world_size=world)
    write_handover(loaded, words, tmp_path / "resolved.json")
    monkeypatch.setenv(HANDOVER_VARIABLE, str(tmp_path / "resolved.json"))
    assert load_run_config(words, world_size=world) == loaded


@pytest.fixture
def handed_over(tmp_path, monkeypatch):
    """A command line whose YAML file changed after the launcher had read it."""
    file = tmp_path / "run.yaml"
    file.write_text("num_layers: 2\nwindow_size: [8, 0]\n")
    words = argv("--config", str(file), without=("num_layers",))
    write_handover(load_config(words, world_size=2), words, tmp_path / "resolved.json")
    monkeypatch.setenv(HANDOVER_VARIABLE, str(tmp_path / "resolved.json"))
    file.write_text("num_layers: 6\n")
    return words


def test_a_file_that_changes_meanwhile_is_not_read_again(handed_over):
    assert load_run_config(handed_over, world_size=2).config.model_config.num_layers == 2
    assert load_run_config(handed_over).config.model_config.num_layers == 2


def test_what_the_launcher_did_not_resolve_is_resolved_here(handed_over):
    def provider(parser):
        parser.add_argument("--mine", type=int, default=3)
        return parser

    assert load_run_config([*handed_over, "--seed", "5"], world_size=2).config.model_config.num_layers == 6
    assert load_run_config(handed_over, world_size=1).config.model_config.num_layers == 6
    assert load_run_config(handed_over, world_size=2, extra_args_provider=provider).args.mine == 3
    assert load_run_config(handed_over, world_size=2, args_defaults={"save": "x"}).config.training_config.output_dir


@pytest.mark.parametrize("text", ["", "[]", "{}", "null"])
def test_a_damaged_file_is_named(handed_over, tmp_path, text):
    (tmp_path / "resolved.json").write_text(text)
    with pytest.raises(ConfigError, match="resolved.json: the launcher's configuration cannot be read"):
        load_run_config(handed_over, world_size=2)


def test_damaged_sections_are_named(handed_over, tmp_path):
    content = json.loads((tmp_path / "resolved.json").read_text())
    del content["config"]["model_config"]["num_layers"]
    (tmp_path / "resolved.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_run_config(handed_over, world_size=2)
