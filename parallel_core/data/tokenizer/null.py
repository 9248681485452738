"""A tokenizer for text that is already a list of token ids."""

from __future__ import annotations

import re
from collections.abc import Sequence

from parallel_core.data.tokenizer.base import MAX_VOCAB_SIZE, MegatronTokenizer, library_identity
from parallel_core.errors import ConfigError, DataError

# longer numbers are no ids, and Python's own int() takes underscores and digits of every script
_NUMBER = re.compile(r"-?[0-9]{1,18}")


class NullTokenizer(MegatronTokenizer):
    """Reads decimal ids separated by spaces; one further id, `vocab_size` as given, ends a document.

    Args:
        vocab_size: Number of ids without the end-of-document id (the property `vocab_size` is one more).
        legacy: Be Megatron's legacy class, which only the identity tells.

    Raises:
        ConfigError: `vocab_size` is out of range.
    """

    def __init__(self, vocab_size: int, legacy: bool = False) -> None:
        if not 0 <= vocab_size < MAX_VOCAB_SIZE:
            raise ConfigError(f"vocab_size={vocab_size} must be 0 to {MAX_VOCAB_SIZE - 1}.")
        super().__init__("_NullTokenizer", None, vocab_size=vocab_size)
        if not legacy:
            self.unique_identifiers = library_identity(None, vocab_size=vocab_size)
        self._vocab_size_without_eod = vocab_size

    @property
    def vocab_size(self) -> int:
        """Number of ids including the end of document."""
        return self._vocab_size_without_eod + 1

    @property
    def eod(self) -> int:
        """The last id."""
        return self._vocab_size_without_eod

    def tokenize(self, text: str) -> list[int]:
        """Return the numbers in `text`."""
        words = text.split()
        wrong = next((word for word in words if not _NUMBER.fullmatch(word)), None)
        if wrong is not None:
            raise DataError(
                f"NullTokenizer reads token ids separated by spaces, but the text has {wrong[:60]!r}. "
                "Choose a --tokenizer-type that reads text."
            )
        return [int(word) for word in words]

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the ids as text."""
        return " ".join(str(int(token)) for token in token_ids)
