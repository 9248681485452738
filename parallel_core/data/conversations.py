"""Conversations of a JSON Lines file as token ids, and which of them are the assistant's; read once, then cached."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from parallel_core.data.chat import ChatTemplate
from parallel_core.data.files import open_file, parse_json
from parallel_core.data.index_cache import IndexCache
from parallel_core.data.tokenizer.base import MegatronTokenizer
from parallel_core.errors import ConfigError, DataError

logger = logging.getLogger(__name__)
_FORMAT = 1
_LARGEST_LINE = 1 << 26
_ARRAYS = ("tokens", "answer", "ends")


class Conversations:
    """Conversations by number.

    A line is an object with `messages`, as OpenAI's fine-tuning takes it: `role` and `content`, and `weight` 0 for an
    answer that is not learned. `tools` are given to the template. As in Megatron, one list may hold several
    conversations: each system message begins one. A conversation whose last answer does not end in the end-of-document
    token gets one, which is learned.

    Args:
        path: the file.
        template: from messages to text.
        tokenizer: gives the end-of-document token, and is part of the cache's name.
        eod: that token's id.
        cache_folder: where the ids are kept; None: `cache` beside the file.

    Raises:
        DataError: the file cannot be read, or a line is no conversation; the message names the line.
    """

    def __init__(
        self, path: str, template: ChatTemplate, tokenizer: MegatronTokenizer, eod: int, cache_folder: str | None = None
    ) -> None:
        self._path, self._template, self._eod = path, template, eod
        digest, size = hashlib.sha256(), 0
        with os.fdopen(open_file(path), "rb") as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
                size += len(block)
        self.description = {
            "class": type(self).__name__,
            "format": _FORMAT,
            "dataset_path": path,
            "template_sha256": hashlib.sha256(template.source.encode()).hexdigest(),
            "tokenizer": tokenizer.unique_identifiers,
            "eod": eod,
        }
        text = json.dumps(self.description, indent=4)
        name = hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()
        folder = cache_folder or os.path.join(os.path.dirname(path), "cache", "SFTDataset_tokens")
        self.checksum = digest.hexdigest()
        cache = IndexCache(os.path.join(folder, f"{name}-SFTDataset"), text, self.checksum, _ARRAYS)
        arrays, _ = cache.get(self._build)
        self._tokens, self._answer, self._ends = (arrays[array] for array in _ARRAYS)
        self.sequence_lengths = np.diff(self._ends, prepend=0).astype(np.int32)

    def get(self, index: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """Return token ids of conversation `index`, int32."""
        return self._part(self._tokens, index)[offset : None if length is None else offset + length]

    def answers(self, index: int) -> np.ndarray:
        """Return which tokens of conversation `index` are to be learned, bool."""
        return self._part(self._answer, index)

    def _part(self, values: np.ndarray, index: int) -> np.ndarray:
        return values[int(self._ends[index - 1]) if index else 0 : int(self._ends[index])]

    def _build(self) -> dict[str, np.ndarray]:
        tokens: list[np.ndarray] = []
        answers: list[np.ndarray] = []
        for number, line in _lines(self._path):
            try:
                for messages, tools in _conversations(line):
                    ids, learned = self._encode(messages, tools)
                    tokens.append(ids)
                    answers.append(learned)
            except (ConfigError, DataError, ValueError) as error:
                raise DataError(f"{self._path}:{number}: {error}") from None
        if not tokens:
            raise DataError(f'{self._path}: has no conversations; write {{"messages": [...]}}, one a line.')
        logger.info("%s: %d conversations, %d tokens", self._path, len(tokens), sum(map(len, tokens)))
        ends = np.cumsum([len(ids) for ids in tokens], dtype=np.int64)
        return {"tokens": np.concatenate(tokens), "answer": np.concatenate(answers), "ends": ends}

    def _encode(self, messages: list[Mapping[str, Any]], tools: Any) -> tuple[np.ndarray, np.ndarray]:
        ids, spans = self._template.tokens_and_answers(messages, tools)
        written = [message for message in messages if message["role"] == "assistant"]
        if not spans:
            raise DataError("there is no message of the assistant, which is what is learned.")
        if len(spans) != len(written):
            raise DataError(f"the chat template marks {len(spans)} answers, and the assistant has {len(written)}.")
        empty = next((i for i, (begin, end) in enumerate(spans) if begin >= end), None)
        if empty is not None:
            raise DataError(f"answer {empty} of the assistant is empty.")
        if messages[-1]["role"] == "assistant" and self._eod not in ids[spans[-1][0] :]:
            ids.append(self._eod)
            spans[-1] = (spans[-1][0], len(ids))
        learned = np.zeros(len(ids), np.bool_)
        for message, (begin, end) in zip(written, spans):
            weight = message.get("weight", 1)
            if type(weight) is not int or weight not in (0, 1):
                raise DataError(f"weight {weight!r} of an answer: write 0 or 1.")
            learned[begin:end] = bool(weight)
        return np.array(ids, np.int32), learned


def _lines(path: str) -> Iterator[tuple[int, str]]:
    """Yield numbers, from 1 on, and texts of the lines that are not empty."""
    with os.fdopen(open_file(path), "rb") as handle:
        number = 0
        while line := handle.readline(_LARGEST_LINE + 1):
            number += 1
            if len(line) > _LARGEST_LINE:
                raise DataError(f"{path}:{number}: the line is longer than {_LARGEST_LINE >> 20} MB.")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                raise DataError(f"{path}:{number}: is not UTF-8 at byte {error.start} of the line.") from None
            if text:
                yield number, text


def _conversations(line: str) -> Iterator[tuple[list[Mapping[str, Any]], Any]]:
    """Yield the conversations of a line, and what tools they know of."""
    values = parse_json(line)
    messages = values.get("messages") if isinstance(values, dict) else None
    if not isinstance(messages, list) or not messages:
        raise DataError('write {"messages": [{"role": "user", "content": "..."}, ...]}.')
    current: list[Mapping[str, Any]] = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f'messages[{i}]: write {{"role": "user", "content": "a text"}}.')
        if message["role"] == "system" and current:
            yield current, values.get("tools")
            current = []
        current.append(message)
    yield current, values.get("tools")
