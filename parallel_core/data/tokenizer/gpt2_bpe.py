"""GPT-2's byte-level BPE, read from `vocab.json` and `merges.txt`.

Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), section 2.2.
"""

from __future__ import annotations

import functools
import heapq
import re
import sys
import unicodedata
from collections.abc import Mapping, Sequence

from parallel_core.data.files import read_json, read_text
from parallel_core.data.tokenizer.base import MegatronTokenizer, check_ids, library_identity
from parallel_core.errors import DataError

_END_OF_TEXT = "<|endoftext|>"
# Unicode's White_Space property; Python's own \s also takes the separators U+001C to U+001F
_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_MAX_CACHED_WORDS = 1 << 18
_MAX_CACHED_LENGTH = 64


@functools.lru_cache(maxsize=1)
def _byte_characters() -> dict[int, str]:
    """Return the printable character GPT-2's files write each byte as."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    characters = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in characters]
    characters.update({byte: chr(256 + index) for index, byte in enumerate(others)})
    return characters


def _character_class(major: str) -> str:
    """Return the inside of a regex class of all characters whose Unicode category starts with `major`."""
    ranges: list[str] = []
    start: int | None = None
    for code in range(sys.maxunicode + 2):
        inside = code <= sys.maxunicode and unicodedata.category(chr(code))[0] == major
        if inside and start is None:
            start = code
        elif not inside and start is not None:
            ranges.append(f"\\U{start:08x}-\\U{code - 1:08x}")
            start = None
    return "".join(ranges)


@functools.lru_cache(maxsize=1)
def _word_pattern() -> re.Pattern[str]:
    """Return GPT-2's splitting rule: contractions, words, numbers and symbols with a leading space, white space."""
    letters, numbers = _character_class("L"), _character_class("N")
    return re.compile(
        r"'s|'t|'re|'ve|'m|'ll|'d"
        rf"| ?[{letters}]+| ?[{numbers}]+| ?[^{_SPACE}{letters}{numbers}]+"
        rf"|[{_SPACE}]+(?![^{_SPACE}])|[{_SPACE}]+"
    )


class GPT2BPETokenizer(MegatronTokenizer):
    """GPT-2's tokenizer; `<|endoftext|>` ends documents.

    Args:
        vocab_file: Path of `vocab.json`, token text to id.
        merge_file: Path of `merges.txt`, one pair a line, most important first.
        legacy: Be Megatron's legacy class, which only the identity tells.

    Raises:
        DataError: A file is missing or malformed, or the vocabulary has no `<|endoftext|>`.
    """

    def __init__(self, vocab_file: str, merge_file: str, legacy: bool = False) -> None:
        super().__init__("_GPT2BPETokenizer", vocab_file, merge_file)
        if not legacy:
            self.unique_identifiers = library_identity(
                "GPT2BPETokenizer",
                additional_special_tokens=[],
                vocab_file=vocab_file,
                merges_file=merge_file,
                use_fast=False,
                trust_remote_code=False,
                include_special_tokens=False,
            )
        self._ids = _read_vocabulary(vocab_file)
        self._ranks = _read_merges(merge_file)
        self._tokens = {token_id: token for token, token_id in self._ids.items()}
        self._bytes = {character: byte for byte, character in _byte_characters().items()}
        self._cache: dict[str, list[int]] = {}
        self._size = check_ids(vocab_file, self._ids.values())

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self._size

    @property
    def eod(self) -> int:
        """Id of `<|endoftext|>`."""
        return self._ids[_END_OF_TEXT]

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of `text`."""
        ids: list[int] = []
        for word in _word_pattern().findall(text):
            known = self._cache.get(word)
            if known is None:
                known = self._encode_word(word)
                if len(self._cache) < _MAX_CACHED_WORDS and len(word) <= _MAX_CACHED_LENGTH:
                    self._cache[word] = known
            ids += known
        return ids

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of `token_ids`; bytes that are not UTF-8 become U+FFFD."""
        raw = bytearray()
        for token_id in map(int, token_ids):
            token = self._tokens.get(token_id, "\ufffd")  # a hole between the vocabulary's ids
            if all(character in self._bytes for character in token):
                raw += bytes(self._bytes[character] for character in token)
            else:
                raw += token.encode("utf-8")
        return raw.decode("utf-8", errors="replace")

    def _encode_word(self, word: str) -> list[int]:
        characters = _byte_characters()
        parts = merge_pairs([characters[byte] for byte in word.encode("utf-8")], self._ranks)
        try:
            return [self._ids[part] for part in parts]
        except KeyError as error:
            raise DataError(
                f"the vocabulary has no token {error} although the merges lead to it: vocab.json and merges.txt do not "
                "belong together."
            ) from error


def merge_pairs(symbols: Sequence[str], ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Return `symbols` after byte pair encoding: the pair of lowest rank is joined wherever it is, again and again.

    A heap holds the pairs that are next to each other, so a word of n symbols takes n log n steps.

    Args:
        symbols: What to join.
        ranks: Order of the pairs that may be joined.
    """
    parts: list[str | None] = list(symbols)
    before = list(range(-1, len(parts) - 1))
    after = list(range(1, len(parts) + 1))
    heap: list[tuple[int, int, str, str]] = []

    def offer(left: int, right: int) -> None:
        if left >= 0 and right < len(parts):
            pair = (str(parts[left]), str(parts[right]))
            if pair in ranks:
                heapq.heappush(heap, (ranks[pair], left, *pair))

    for position in range(len(parts) - 1):
        offer(position, position + 1)
    while heap:
        rank = heap[0][0]
        joined = []
        # all of one rank first, from left to right: a pair that only now comes to be is of a later round
        while heap and heap[0][0] == rank:
            _, left, first, second = heapq.heappop(heap)
            right = after[left]
            if parts[left] != first or right >= len(parts) or parts[right] != second:
                continue  # one of the two has been joined to something else
            parts[left], parts[right] = first + second, None
            after[left] = after[right]
            if after[left] < len(parts):
                before[after[left]] = left
            joined.append(left)
        for left in joined:
            offer(before[left], left)
            offer(left, after[left])
    return [part for part in parts if part is not None]


def _read_vocabulary(path: str) -> dict[str, int]:
    try:
        content = read_json(path)
    except DataError as error:
        raise DataError(f"vocab_file={path!r}: {error}") from error
    if not isinstance(content, dict) or not all(type(token_id) is int for token_id in content.values()):
        raise DataError(f"vocab_file={path!r} must map each token to its id, as GPT-2's vocab.json does.")
    if _END_OF_TEXT not in content:
        raise DataError(f"vocab_file={path!r} has no {_END_OF_TEXT}, which GPT2BPETokenizer ends documents with.")
    try:
        "".join(content).encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"vocab_file={path!r} has a token with a lone surrogate, which no text can hold.") from error
    return content


def _read_merges(path: str) -> dict[tuple[str, str], int]:
    ranks: dict[tuple[str, str], int] = {}
    try:
        lines = read_text(path).split("\n")
    except DataError as error:
        raise DataError(f"merge_file={path!r}: {error}") from error
    for number, line in enumerate(lines, 1):
        if (number == 1 and line.startswith("#version")) or not line.strip():
            continue
        words = line.split()
        if len(words) != 2:
            raise DataError(f"merge_file={path!r}, line {number}: expected two words, found {len(words)}.")
        ranks.setdefault((words[0], words[1]), len(ranks))
    return ranks
