"""README and docs: links lead somewhere, commands exist and are legal, what is generated is current."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import yaml

from parallel_core.doctor.messages import page
from parallel_core.errors import ConfigError
from parallel_core.launch.layout import check_configuration

REPO = Path(__file__).resolve().parents[3]
PAGES = [REPO / "README.md", REPO / "README.zh.md", *sorted((REPO / "docs").glob("*.md"))]


def text_of(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def commands(file: Path) -> list[str]:
    """Return the commands of a page's code blocks, lines that go on joined, comments left out."""
    joined = text_of(file).replace("\\\n", " ")
    fenced = re.findall(r"^```(?:sh|bash)?\n(.*?)^```", joined, re.M | re.S)
    lines = [line for block in fenced for line in block.splitlines()]
    lines += [line[4:] for line in joined.splitlines() if line.startswith("    ")]
    found = [line.split(" #")[0].strip() for line in lines]
    return [line for line in found if re.match(r"([A-Z_]+=\S+ )*(bash|python|parallel-core) ", line)]


COMMANDS = [(file.name, line) for file in PAGES for line in commands(file)]


def is_whole(line: str) -> bool:
    """Return whether a command stands as it is typed: without "...", and without names for what a user has."""
    return not re.search(r"\.\.\.|\b[A-Z]{2,}(_[A-Z]+)*\b(?![=/.])", re.sub(r"^([A-Z_]+=\S+ )*", "", line))


@pytest.mark.parametrize("file", PAGES, ids=lambda f: f.name)
def test_links_lead_somewhere(file):
    text = text_of(file)
    linked = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in linked if link and not (file.parent / link).exists()] == []
    folders = "docs|examples|configs|tools|benchmarks|tests|parallel_core"
    named = re.findall(rf"`((?:{folders})/[\w./]+\.(?:md|py|yaml|txt|sh))`", text)
    missing = [name for name in named if "NAME" not in name and not (REPO / name).exists()]
    assert missing == []


def test_every_page_is_in_the_sites_navigation():
    def files(node):
        if isinstance(node, str):
            return [node]
        return [name for child in (node.values() if isinstance(node, dict) else node) for name in files(child)]

    listed = files(yaml.safe_load(text_of(REPO / "mkdocs.yml"))["nav"])
    assert sorted(listed) == sorted(file.name for file in (REPO / "docs").glob("*.md"))


def test_the_page_of_messages_is_current():
    again = "run: python -m parallel_core.doctor.messages > docs/messages.md"
    assert text_of(REPO / "docs" / "messages.md") == page(), again


def test_the_pages_have_commands():
    assert len(COMMANDS) > 60
    assert sum(is_whole(line) for _, line in COMMANDS) > 30


@pytest.mark.parametrize(("file", "line"), COMMANDS, ids=[f"{file}-{line[:60]}" for file, line in COMMANDS])
def test_what_a_command_names_exists(file, line):
    words = shlex.split(line)
    program = next(i for i, word in enumerate(words) if word in ("bash", "python", "parallel-core"))
    if words[program + 1] == "-m":
        module = words[program + 2]
        found = importlib.util.find_spec(module)
        assert found is not None or module in ("pip", "venv"), module
    elif words[program] != "parallel-core":
        script = next(word for word in words[program + 1 :] if not word.startswith("-"))
        assert (REPO / script).is_file(), script
    for word in words:
        if word.startswith("configs/") and word.endswith(".yaml"):
            assert (REPO / word).is_file(), word


TRAINING = [
    (file, line) for file, line in COMMANDS if re.search(r"\b(bash|python) pretrain_\w+\.", line) and is_whole(line)
]


@pytest.mark.parametrize(("file", "line"), TRAINING, ids=[f"{file}-{line[:60]}" for file, line in TRAINING])
def test_training_commands_are_legal(file, line, monkeypatch):
    """Each has the layout it says, on the ranks it says."""
    monkeypatch.chdir(REPO)
    words = shlex.split(line)
    program = next(i for i, word in enumerate(words) if word in ("bash", "python"))
    variables = dict(word.split("=") for word in words[:program])
    arguments = words[program + 2 :]
    if not any(word in arguments for word in ("--config", "--num-layers")):
        return  # the program chooses its configuration
    try:
        loaded = check_configuration(arguments, int(variables.get("NPROC", "0")))
    except ConfigError as error:  # all is well but for a file that is the reader's
        assert len(str(error).splitlines()) == 1 and "does not exist" in str(error)
        return
    sizes = loaded.config.parallel_config
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        flag = "--" + name.replace("_", "-")
        if flag in arguments:
            assert str(getattr(sizes, name)) == arguments[arguments.index(flag) + 1]


def blocks(name: str) -> list[str]:
    return re.findall(r"(?:^    .*\n)+", text_of(REPO / name), re.M)


def test_the_chinese_readme_has_the_same_commands():
    assert blocks("README.zh.md") == blocks("README.md")


def test_the_chinese_readme_knows_the_same_variables():
    tables = [re.findall(r"^\| (`[A-Z_]+`(?:[,、] ?`[A-Z_]+`)*) \|", text_of(REPO / name), re.M) for name in
              ("README.md", "README.zh.md")]  # fmt: skip
    english, chinese = ([re.findall(r"`(\w+)`", row) for row in table] for table in tables)
    assert english == chinese and len(english) > 5
