"""`tokenizer.json` files, through the optional `tokenizers` library."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from parallel_core.data.files import read_json, why_not_a_file
from parallel_core.data.tokenizer.base import MegatronTokenizer, check_ids, library_identity
from parallel_core.errors import ConfigError, DataError

_EOD_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<EOD>", "<eod>", "[EOS]")
_PAD_NAMES = ("<pad>", "<PAD>", "[PAD]", "<|pad|>")
_Result = TypeVar("_Result")


class HuggingFaceTokenizer(MegatronTokenizer):
    """A fast Hugging Face tokenizer read from a local file; nothing is downloaded.

    The token that ends a document is the `eos_token` (else the `sep_token`) that `tokenizer_config.json` or
    `special_tokens_map.json` beside the file name, else the first of the usual names that the vocabulary has.

    Args:
        path: A `tokenizer.json`, or the folder that holds it.
        include_special_tokens: Put the tokens of the file's own template around a text (Llama's `<s>`, for example).
        legacy: Be Megatron's legacy class: special tokens are included in any case.

    Raises:
        ConfigError: The `tokenizers` library is not installed.
        DataError: There is no such file, it cannot be read, or no token ends a document.
    """

    def __init__(self, path: str, include_special_tokens: bool = False, legacy: bool = False) -> None:
        super().__init__("_HuggingFaceTokenizer", path)
        if not legacy:
            self.unique_identifiers = library_identity(
                path,
                vocab_file=None,
                merges_file=None,
                additional_special_tokens=[],
                use_fast=False,
                trust_remote_code=False,
                include_special_tokens=include_special_tokens,
            )
        self._include_special_tokens = include_special_tokens or legacy
        try:
            import tokenizers
        except ImportError as error:
            raise ConfigError(
                "tokenizer_type='HuggingFaceTokenizer' needs the tokenizers library: "
                "pip install 'parallel_core[tokenizers]' (or pip install tokenizers)."
            ) from error
        file = os.path.join(path, "tokenizer.json") if os.path.isdir(path) else path
        problem = why_not_a_file(file)
        if problem:
            raise DataError(f"tokenizer_model={path!r}: {file} {problem}. Give a tokenizer.json or its folder.")
        self._file = self.file = file
        self._tokenizer: Any = self._ask(lambda: tokenizers.Tokenizer.from_file(file), "is not a tokenizer.json")
        self._ids: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self._size = check_ids(file, self._ids.values())
        names = special_tokens_beside(file)
        eod = self._find(names.get("eos_token") or names.get("sep_token"), _EOD_NAMES)
        if eod is None:
            raise DataError(
                f"{file} has none of {', '.join(_EOD_NAMES)} to end documents with. Name it as eos_token in a "
                "tokenizer_config.json beside it."
            )
        self._eod = eod
        self._pad = self._find(names.get("pad_token"), _PAD_NAMES)

    def _find(self, named: str | None, usual: Sequence[str]) -> int | None:
        if named is not None and named not in self._ids:
            # transformers would append it, and the embedding would need a row that the file does not tell of
            raise DataError(
                f"{self._file} has no token {named!r}, which the files beside it name as a special token. Add it to "
                "the added_tokens, or name one that it has."
            )
        return next((self._ids[name] for name in ([named] if named else usual) if name in self._ids), None)

    def _ask(self, call: Callable[[], _Result], problem: str) -> _Result:
        """Return what the library returns; its errors are bare Exceptions, and panics of Rust not even that."""
        try:
            return call()
        except Exception as error:
            raise DataError(f"{self._file} {problem}: {str(error)[:300]!r}") from error
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            raise DataError(f"{self._file} {problem}: the tokenizers library failed ({str(error)[:300]!r})") from error

    @property
    def vocab_size(self) -> int:
        """Number of ids including added tokens; ids may have holes, and an embedding needs a row up to the highest."""
        return self._size

    @property
    def eod(self) -> int:
        """Id of the end-of-document token."""
        return self._eod

    @property
    def pad(self) -> int | None:
        """Id of the pad token, if there is one."""
        return self._pad

    @property
    def leaves_out_special_tokens(self) -> bool:
        """Whether the file's template has special tokens that are not put around texts."""
        return not self._include_special_tokens and int(self._tokenizer.num_special_tokens_to_add(is_pair=False)) > 0

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of `text`.

        Raises:
            DataError: The file's model cannot read the text (it has no token for unknown words, for example).
        """
        special = self._include_special_tokens
        encoding = self._ask(lambda: self._tokenizer.encode(text, add_special_tokens=special), "cannot read a text")
        return list(encoding.ids)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of `token_ids`."""
        ids = [int(token) for token in token_ids]
        return str(self._ask(lambda: self._tokenizer.decode(ids, skip_special_tokens=False), "cannot decode ids"))


def special_tokens_beside(file: str) -> dict[str, str]:
    """Return the special tokens by their names (`eos_token`, ...) that the files beside a `tokenizer.json` give.

    As in transformers, `tokenizer_config.json` is the authority once it lists its added tokens; before that,
    `special_tokens_map.json` is. The other one fills in what is not named.

    Raises:
        DataError: A file is no JSON object, or a token is not written as one.
    """
    config, special = (_object_in(file, name) for name in ("tokenizer_config.json", "special_tokens_map.json"))
    first, second = (config, special) if "added_tokens_decoder" in config else (special, config)
    names = {}
    for key in ("eos_token", "sep_token", "pad_token"):
        for settings in (second, first):
            token = settings.get(key)
            token = token.get("content") if isinstance(token, dict) else token  # a token written with its options
            if token is not None and not isinstance(token, str):
                raise DataError(f"{os.path.dirname(file) or '.'}: {key} is {str(token)[:60]!r} and not a text.")
            if token:
                names[key] = token
    return names


def _object_in(file: str, name: str) -> dict[str, Any]:
    path = os.path.join(os.path.dirname(file), name)
    if not os.path.lexists(path):
        return {}
    content = read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path} is a {type(content).__name__} instead of a JSON object.")
    return content
