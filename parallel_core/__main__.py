"""`parallel-core COMMAND ...`, also `python -m parallel_core COMMAND ...`: every command under one name."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple


class Command(NamedTuple):
    """What a word of the command line runs."""

    module: str
    """Has `main(argv) -> exit status or None`."""
    words: tuple[str, ...]
    """Arguments that go before the user's."""
    meaning: str


COMMANDS = {
    "train": Command("parallel_core.launch.train", (), "train on the ranks that the layout needs"),
    "plan": Command("parallel_core.config.__main__", ("plan",), "ranks, layers, schedule and memory; no device"),
    "config": Command("parallel_core.config.__main__", (), "show, convert, explain and compare configurations"),
    "convert": Command("parallel_core.convert.cli", (), "checkpoints from and to Megatron-LM and Hugging Face"),
    "preprocess": Command("parallel_core.prepare.preprocess_data", (), "text into the files that training reads"),
    "merge": Command("parallel_core.prepare.merge_datasets", (), "several prepared texts into one"),
    "tokenizer": Command("parallel_core.prepare.train_tokenizer", (), "train a SentencePiece tokenizer"),
    "data": Command("parallel_core.data.__main__", (), "look into prepared texts"),
    "report": Command("parallel_core.report.__main__", (), "one HTML page about runs"),
    "schedule": Command("parallel_core.report.pipeline", (), "draw a pipeline schedule"),
    "generate": Command("parallel_core.generate.command", (), "continue texts with the model of a checkpoint"),
    "evaluate": Command("parallel_core.evaluate.command", (), "perplexity of a file, choices among answers"),
    "qa": Command("parallel_core.question_answering.command", (), "answers of an encoder, and how right they are"),
    "serve": Command("parallel_core.serve.command", (), "the model of a checkpoint behind HTTP"),
    "memory": Command("parallel_core.report.memory", (), "memory by formula and by measurement"),
    "doctor": Command("parallel_core.doctor.__main__", (), "what this machine lacks, and other nodes"),
}
"""The commands, in the order in which they are listed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status; 2 with the list of commands when there is no such one."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--version"]:
        from parallel_core.versions import describe_versions

        print(describe_versions())
        return 0
    if not words or words[0] not in COMMANDS:
        asked = words[:1] in (["-h"], ["--help"], ["help"])
        print(_usage() if asked or not words else f"parallel-core: no command {words[0]!r}\n\n{_usage()}",
              file=sys.stdout if asked else sys.stderr)  # fmt: skip
        return 0 if asked else 2
    command = COMMANDS[words[0]]
    # argparse takes its program's name from here.
    sys.argv[0] = f"parallel-core {words[0]}"
    return importlib.import_module(command.module).main([*command.words, *words[1:]]) or 0


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.meaning}" for name, command in COMMANDS.items()]
    return "\n".join([
        "usage: parallel-core COMMAND ...    (parallel-core COMMAND --help)", "", *lines, "",
        f"  {'--version':{width}}  package, MindSpore, kernels",
    ])  # fmt: skip


if __name__ == "__main__":
    # `-m` puts the current folder first, where a file called yaml.py would be taken for the library.
    if sys.path[0] == os.getcwd():
        del sys.path[0]
    sys.exit(main())
