"""BERT's WordPiece: words and punctuation apart, each word as the longest pieces that a vocabulary has."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np

from parallel_core.data.files import read_text
from parallel_core.data.tokenizer.base import MegatronTokenizer
from parallel_core.errors import DataError

_LONGEST_WORD = 100
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_CJK = (
    (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F), (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF), (0x2F800, 0x2FA1F),
)  # fmt: skip


class BertWordPieceTokenizer(MegatronTokenizer):
    """A `vocab.txt` with a piece on each line; ids are `transformers`' BertTokenizer's, which text never names.

    Brackets in a text are brackets: `[MASK]` there is three tokens, and only this class's own ids are special.

    Args:
        vocab_file: path of the vocabulary, a piece on each line, those that continue a word with `##` before them.
        lower_case: fold case and leave accents out (BertWordPieceLowerCase); else text is as it is (BertWordPieceCase).

    Raises:
        DataError: the file cannot be read, names a piece twice, or lacks one of the special ones.
    """

    def __init__(self, vocab_file: str, lower_case: bool = True) -> None:
        kind = "BERT Lower Case" if lower_case else "BERT Upper Case"
        super().__init__("_BertWordPieceTokenizer", vocab_file, name=kind, vocab_extra_ids=0)
        self.lower_case, self.vocab_file = lower_case, vocab_file
        pieces = read_text(vocab_file).split("\n")
        if pieces and not pieces[-1]:
            pieces.pop()
        self._pieces = [piece.rstrip("\r") for piece in pieces]
        self._ids = {piece: number for number, piece in enumerate(self._pieces)}
        if len(self._ids) != len(self._pieces):
            twice = next(piece for number, piece in enumerate(self._pieces) if self._ids[piece] != number)
            raise DataError(f"{vocab_file} has the piece {twice!r} twice. It is damaged, or not a vocabulary.")
        missing = [piece for piece in _SPECIAL if piece not in self._ids]
        if missing:
            raise DataError(
                f"{vocab_file} has no {' and no '.join(missing)}. It is not BERT's vocab.txt, a piece on each line."
            )
        self._pad, self._unknown, self.cls, self.sep, self.mask = (self._ids[piece] for piece in _SPECIAL)
        self.continues: np.ndarray = np.array([piece.startswith("##") for piece in self._pieces])
        """bool [vocab_size]: whether a piece continues a word."""

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""
        return len(self._pieces)

    @property
    def eod(self) -> int:
        """Id of `[SEP]`."""
        return self.sep

    @property
    def pad(self) -> int | None:
        """Id of `[PAD]`."""
        return self._pad

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of `text`, without any around it."""
        return [piece for word in basic_words(text, self.lower_case) for piece in self._pieces_of(word)]

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the pieces as text: words with a space between them."""
        return self.text_of(token_ids)

    def text_of(self, token_ids: Sequence[int]) -> str:
        """Return pieces joined by spaces, those that continue a word without."""
        return " ".join(self._pieces[token] for token in token_ids).replace(" ##", "")

    def _pieces_of(self, word: str) -> list[int]:
        if len(word) > _LONGEST_WORD:
            return [self._unknown]
        found, begin = [], 0
        while begin < len(word):
            mark = "##" if begin else ""
            ends = range(len(word), begin, -1)
            end = next((end for end in ends if mark + word[begin:end] in self._ids), None)
            if end is None:
                return [self._unknown]
            found.append(self._ids[mark + word[begin:end]])
            begin = end
        return found


def basic_words(text: str, lower_case: bool) -> list[str]:
    """Return the words of a text: parted at spaces, around punctuation and around Chinese characters.

    Args:
        text: any text; control characters are left out.
        lower_case: fold case, and leave accents out.
    """
    cleaned = unicodedata.normalize("NFC", "".join(_cleaned(text)))
    words = []
    for word in cleaned.split():
        if lower_case:
            decomposed = unicodedata.normalize("NFD", word.lower())
            word = "".join(c for c in decomposed if unicodedata.category(c) != "Mn")
        words += "".join(f" {c} " if is_punctuation(c) else c for c in word).split()
    return words


def _cleaned(text: str) -> Iterator[str]:
    for c in text:
        if c in "\x00\ufffd" or (unicodedata.category(c).startswith("C") and c not in "\t\n\r"):
            continue
        if c in " \t\n\r" or unicodedata.category(c) == "Zs":
            yield " "
        elif any(low <= ord(c) <= high for low, high in _CJK):
            yield f" {c} "
        else:
            yield c


def is_punctuation(c: str) -> bool:
    """Tell whether a character stands alone: all of ASCII but letters, digits and spaces, and Unicode's punctuation."""
    code = ord(c)
    if 33 <= code <= 47 or 58 <= code <= 64 or 91 <= code <= 96 or 123 <= code <= 126:
        return True
    return unicodedata.category(c).startswith("P")
