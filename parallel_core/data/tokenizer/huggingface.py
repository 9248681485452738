"""`tokenizer.json` files, through the optional `tokenizers` library."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from parallel_core.data.tokenizer.base import MegatronTokenizer
from parallel_core.errors import ConfigError, DataError

_EOD_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<EOD>", "<eod>", "[EOS]")


class HuggingFaceTokenizer(MegatronTokenizer):
    """A fast Hugging Face tokenizer read from a local file; nothing is downloaded.

    The end-of-document token is `eos_token` of a `tokenizer_config.json` beside the file, else the first of the usual
    names that the vocabulary has.

    Args:
        path: A `tokenizer.json`, or the folder that holds it.

    Raises:
        ConfigError: The `tokenizers` library is not installed.
        DataError: There is no such file, it cannot be read, or no token ends a document.
    """

    def __init__(self, path: str) -> None:
        super().__init__("_HuggingFaceTokenizer", path)
        try:
            import tokenizers
        except ImportError as error:
            raise ConfigError(
                "tokenizer_type='HuggingFaceTokenizer' needs the tokenizers library: "
                "pip install 'parallel_core[tokenizers]' (or pip install tokenizers)."
            ) from error
        file = os.path.join(path, "tokenizer.json") if os.path.isdir(path) else path
        if not os.path.isfile(file):
            raise DataError(f"tokenizer_model={path!r}: {file} does not exist. Give a tokenizer.json or its folder.")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(file)
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{file} is not a tokenizer.json: {error}") from error
        settings = _settings_beside(file)
        self._eod = self._find(settings.get("eos_token"), _EOD_NAMES)
        if self._eod is None:
            raise DataError(
                f"{file} has none of {', '.join(_EOD_NAMES)} to end documents with. Name it as eos_token in a "
                "tokenizer_config.json beside it."
            )
        self._pad = self._find(settings.get("pad_token"), ("<pad>", "<PAD>", "[PAD]", "<|pad|>"))

    def _find(self, named: Any, usual: Sequence[str]) -> int | None:
        if isinstance(named, dict):  # an added token written with its options
            named = named.get("content")
        for name in [named] if named else usual:
            token = self._tokenizer.token_to_id(name)
            if token is not None:
                return int(token)
        return None

    @property
    def vocab_size(self) -> int:
        """Number of ids including added tokens."""
        # ids may have holes: the highest one decides how many rows an embedding needs
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def eod(self) -> int:
        """Id of the end-of-document token."""
        return int(self._eod or 0)

    @property
    def pad(self) -> int | None:
        """Id of the pad token, if there is one."""
        return self._pad

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of `text`, without special tokens around it."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of `token_ids`."""
        return str(self._tokenizer.decode([int(token) for token in token_ids], skip_special_tokens=False))


def _settings_beside(file: str) -> dict[str, Any]:
    path = os.path.join(os.path.dirname(file), "tokenizer_config.json")
    if not os.path.isfile(path):
        return {}
    try:
        with open(path, encoding="utf-8") as handle:
            return dict(json.load(handle))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}") from error
