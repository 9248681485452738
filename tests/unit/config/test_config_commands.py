"""`python -m parallel_core.config`: each command, its messages, and what it needs to run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from config_helpers import GOLDEN, ROOT

from parallel_core.config import table
from parallel_core.config.__main__ import main
from parallel_core.config.reference import arguments_page

TINY = str(ROOT / "configs" / "gpt_tiny.yaml")


def run(capsys, *words) -> tuple[int, str, str]:
    code = main(list(words))
    out, err = capsys.readouterr()
    return code, out, err


def test_show(capsys):
    code, out, _ = run(capsys, "show", TINY, "--lr", "2")
    assert code == 0
    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in out.splitlines() if not line.startswith("note")}
    assert rows["optimizer_config.learning_rate"] == ["2.0", "--lr"]
    assert rows["model_config.ffn_hidden_size"] == ["512", "derived: widths"]
    assert rows["model_config.num_layers"][1].endswith("gpt_tiny.yaml:5") and set(rows) == set(table.DIRECT)


@pytest.mark.parametrize("form", ["flags", "flat", "megatron", "nested", "sections"])
def test_convert(capsys, form, tmp_path):
    code, out, _ = run(capsys, "convert", "--to", form, TINY)
    assert code == 0 and "128" in out
    if form != "flags":
        (tmp_path / "again.yaml").write_text(out)
        assert run(capsys, "diff", TINY, str(tmp_path / "again.yaml"))[1] == "the same configuration\n"


def test_convert_to_what(capsys):
    assert run(capsys, "convert", "--to", "toml", TINY)[0] == 2


def test_explain(capsys):
    _, out, _ = run(capsys, "explain", "--rotary-base", "moe_latent_size", "use_mcore_models")
    assert "rotary_base: base of the rotary frequencies" in out and "model_config.rotary_base" in out
    assert "default in Megatron-LM: 10000.0" in out
    assert "moe_latent_size: refused unless it asks for nothing; not built: experts in a latent space" in out
    assert "ignored; there is one implementation here" in out
    code, _, err = run(capsys, "explain", "rotary_bas")
    assert code == 1 and err == "rotary_bas: unknown argument; did you mean rotary_base?\n"
    assert all(main(["explain", argument.name]) == 0 for argument in table.TABLE)


def test_diff(capsys, tmp_path):
    wider = Path(TINY).read_text().replace("hidden_size: 128", "hidden_size: 256")
    (tmp_path / "b.yaml").write_text(wider)
    _, out, _ = run(capsys, "diff", TINY, str(tmp_path / "b.yaml"))
    assert [line.split(":")[0] for line in out.splitlines()] == [
        "model_config.ffn_hidden_size", "model_config.hidden_size", "model_config.kv_channels"]
    assert run(capsys, "diff", TINY)[0] == 2


def test_plan_and_its_errors(capsys):
    code, out, _ = run(capsys, "plan", TINY, "--world-size", "8", "--global-batch-size", "32")
    assert code == 0 and "dp 2" in out
    code, _, err = run(capsys, "plan", TINY, "--world-size", "6")
    assert code == 1 and "6 processes are not a multiple of 2 x 2 x 1 = 4" in err and "Traceback" not in err


def test_usage(capsys):
    assert run(capsys)[0] == 2 and run(capsys, "--help")[0] == 0 and run(capsys, "sow")[0] == 2


def test_the_arguments_page_is_current():
    written = (ROOT / "docs" / "arguments.md").read_text(encoding="utf-8")
    assert written == arguments_page(), "run: python -m parallel_core.config docs > docs/arguments.md"


def test_the_page_has_every_argument():
    page = arguments_page()
    assert [argument.name for argument in table.TABLE if f"`{argument.name}`" not in page] == []


def test_no_mindspore_is_needed():
    code = "import sys; from parallel_core.config.__main__ import main; " \
           f"main(['plan', {str(GOLDEN / 'seed_001.yaml')!r}]); assert 'mindspore' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
