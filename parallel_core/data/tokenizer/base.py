"""What every tokenizer of this package offers, under Megatron's names."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

from parallel_core.errors import DataError

_LIBRARY_CLASS = "megatron.core.tokenizers.text.models.default_tokenizer.DefaultTokenizerText"
MAX_VOCAB_SIZE = 2**31 - 1
"""Token ids are stored and trained on as int32."""


class MegatronTokenizer(ABC):
    """Turns text into token ids and back, and knows the ids that training needs.

    `unique_identifiers` is what Megatron writes into the description of a cached index, so that caches of the two
    programs meet under the same hash. It begins as that of Megatron's legacy classes (`--legacy-tokenizer`); readers
    that act as Megatron-core's tokenizer library take `library_identity`.

    Args:
        class_name: Megatron's name of the legacy class, part of the identity.
        paths: Files the tokenizer was read from (`None` for the null tokenizer), part of the identity.
        options: Further parts of the identity, stored as text.
    """

    def __init__(self, class_name: str, *paths: str | None, **options: object) -> None:
        self.unique_identifiers: dict[str, object] = {"class": class_name, "tokenizer_path": list(paths)}
        self.unique_identifiers.update({name: str(value) for name, value in options.items()})

    @property
    def unique_description(self) -> str:
        """The identity as indented JSON."""
        return json.dumps(self.unique_identifiers, indent=4)

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of ids, before any padding: every id is in `[0, vocab_size)`."""

    @property
    @abstractmethod
    def eod(self) -> int:
        """The id that ends a document. 0 is a legal value."""

    @property
    def end_of_text(self) -> int:
        """The id that ends a generated text: by default the one that ends a document."""
        return self.eod

    @property
    def pad(self) -> int | None:
        """The id that fills a short sequence, or None when the vocabulary has none."""
        return None

    @abstractmethod
    def tokenize(self, text: str) -> list[int]:
        """Return the ids of `text`."""

    @abstractmethod
    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of `token_ids`."""


def library_identity(path: str | None, **options: object) -> dict[str, object]:
    """Return the identity of a tokenizer of Megatron-core 0.16.1's library.

    Args:
        path: What Megatron calls the tokenizer's path.
        options: The arguments Megatron passes on, in its order; stored as text.
    """
    identity: dict[str, object] = {"class": _LIBRARY_CLASS, "tokenizer_path": path}
    return identity | {name: str(value) for name, value in options.items()}


def check_ids(path: str, token_ids: Iterable[int]) -> int:
    """Return the size of the vocabulary whose ids a file gives, which is its highest id and one.

    Raises:
        DataError: There are none, one is given twice, is no int32, or they are so sparse that most would be no token.
    """
    ids = list(token_ids)
    if not ids:
        raise DataError(f"{path} has no tokens.")
    low, high = min(ids), max(ids)
    if low < 0 or high >= MAX_VOCAB_SIZE:
        wrong = str(low if low < 0 else high)[:30]
        raise DataError(f"{path} gives a token the id {wrong}; ids are 0 to {MAX_VOCAB_SIZE - 1}.")
    if len(set(ids)) != len(ids):
        raise DataError(f"{path} gives one id to several tokens. It is damaged, or not a vocabulary.")
    if high >= 16 * len(ids) + 1024:  # an embedding has a row for every id up to the highest
        raise DataError(f"{path} has {len(ids)} tokens and an id of {high}. It is damaged, or not a vocabulary.")
    return high + 1
