"""A tokenizer for text that is already a list of token ids."""

from __future__ import annotations

from collections.abc import Sequence

from parallel_core.data.tokenizer.base import MegatronTokenizer
from parallel_core.errors import DataError


class NullTokenizer(MegatronTokenizer):
    """Reads decimal ids separated by spaces; one further id, `vocab_size` as given, ends a document.

    Args:
        vocab_size: Number of ids without the end-of-document id (the property `vocab_size` is one more).
    """

    def __init__(self, vocab_size: int) -> None:
        super().__init__("_NullTokenizer", None, vocab_size=vocab_size)
        self._vocab_size_without_eod = int(vocab_size)

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
        try:
            return [int(word) for word in text.split()]
        except ValueError as error:
            raise DataError(
                f"NullTokenizer reads token ids separated by spaces, but the text starts {text[:60]!r} ({error}). "
                "Choose a --tokenizer-type that reads text."
            ) from error

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the ids as text."""
        return " ".join(str(int(token)) for token in token_ids)
