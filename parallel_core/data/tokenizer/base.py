"""What every tokenizer of this package offers, under Megatron's names."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence


class MegatronTokenizer(ABC):
    """Turns text into token ids and back, and knows the ids that training needs.

    `unique_identifiers` is what Megatron writes into the description of a cached index, so that caches of the two
    programs meet under the same hash.

    Args:
        class_name: Megatron's name of the tokenizer class, part of the identity.
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
    def pad(self) -> int | None:
        """The id that fills a short sequence, or None when the vocabulary has none."""
        return None

    @abstractmethod
    def tokenize(self, text: str) -> list[int]:
        """Return the ids of `text`."""

    @abstractmethod
    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of `token_ids`."""


def vocab_size_with_padding(
    vocab_size: int, make_vocab_size_divisible_by: int = 128, tensor_model_parallel_size: int = 1
) -> int:
    """Return the embedding's number of rows: `vocab_size` rounded up as Megatron rounds it.

    The multiple is `make_vocab_size_divisible_by * tensor_model_parallel_size`, so it depends on the layout:
    50257 gives 50304 at tensor parallel size 1 and 50432 at 4.
    """
    multiple = make_vocab_size_divisible_by * tensor_model_parallel_size
    return -(-vocab_size // multiple) * multiple
