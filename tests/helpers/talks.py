"""Conversations small enough to check by hand, and a tokenizer whose tokens are letters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parallel_core.data import GPTDatasetConfig, build_train_valid_test_datasets, parse_blend
from parallel_core.data.chat import chat_template
from parallel_core.data.tokenizer import MegatronTokenizer

_LETTERS = "\0\nabcdefghijklmnopqrstuvwxyz :UAS"


class Letters(MegatronTokenizer):
    """One id a letter; 0 ends a document."""

    vocab_size, eod = len(_LETTERS), 0

    def __init__(self) -> None:
        super().__init__("Letters")

    def tokenize(self, text: str) -> list[int]:
        return [_LETTERS.index(letter) for letter in text]

    def detokenize(self, token_ids: Sequence[int]) -> str:
        return "".join(_LETTERS[token] for token in token_ids)


def talk(*texts: str, **last: Any) -> dict[str, Any]:
    """Return a line of a file: what the user and the assistant say in turn; `last` are fields of the last message."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": [*messages[:-1], {**messages[-1], **last}]}


TALKS = [
    talk("hi", "yo"), talk("what", "that"), talk("a", "b", "c", "d"), talk("one two", "three"), talk("go", "went off"),
    talk("k", "l"), talk("deep", "sea"), talk("m", "no"),
]  # fmt: skip


def write(path: Path, lines: Sequence[Any]) -> Path:
    """Write lines of JSON."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def datasets(path: Path, length: int, sizes: tuple[int | None, int | None, int | None] = (None, 0, 0), **more: Any):
    """Return train, valid and test samples of `length` positions of a file of conversations."""
    tokenizer = Letters()
    given = {"split": "100,0,0", "random_seed": 5, "blend": parse_blend([str(path)]), **more}
    template = given.pop("chat", None) or chat_template(tokenizer, [], "plain")
    config = GPTDatasetConfig(
        sequence_length=length, tokenizer=tokenizer, chat=template, **given
    )
    return build_train_valid_test_datasets(config, sizes)
