"""GPT-2's byte-level BPE, read from `vocab.json` and `merges.txt`.

Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), section 2.2.
"""

from __future__ import annotations

import functools
import json
import re
import sys
import unicodedata
from collections.abc import Sequence

from parallel_core.data.tokenizer.base import MegatronTokenizer
from parallel_core.errors import DataError

_END_OF_TEXT = "<|endoftext|>"
# Unicode's White_Space property; Python's own \s also takes the separators U+001C to U+001F
_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_MAX_CACHED_WORDS = 1 << 18


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

    Raises:
        DataError: A file is missing or malformed, or the vocabulary has no `<|endoftext|>`.
    """

    def __init__(self, vocab_file: str, merge_file: str) -> None:
        super().__init__("_GPT2BPETokenizer", vocab_file, merge_file)
        self._ids = _read_vocabulary(vocab_file)
        self._ranks = _read_merges(merge_file)
        self._tokens = {token_id: token for token, token_id in self._ids.items()}
        self._bytes = {character: byte for byte, character in _byte_characters().items()}
        self._cache: dict[str, list[int]] = {}
        self._size = max(self._ids.values()) + 1

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
                if len(self._cache) < _MAX_CACHED_WORDS:
                    self._cache[word] = known
            ids += known
        return ids

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of `token_ids`; bytes that are not UTF-8 become U+FFFD."""
        raw = bytearray()
        for token_id in map(int, token_ids):
            token = self._tokens[token_id]
            if all(character in self._bytes for character in token):
                raw += bytes(self._bytes[character] for character in token)
            else:
                raw += token.encode("utf-8")
        return raw.decode("utf-8", errors="replace")

    def _encode_word(self, word: str) -> list[int]:
        characters = _byte_characters()
        parts = [characters[byte] for byte in word.encode("utf-8")]
        worst = len(self._ranks)
        while len(parts) > 1:
            pairs = list(zip(parts[:-1], parts[1:]))
            best = min(pairs, key=lambda pair: self._ranks.get(pair, worst))
            if best not in self._ranks:
                break
            parts = _merge(parts, best)
        try:
            return [self._ids[part] for part in parts]
        except KeyError as error:
            raise DataError(
                f"the vocabulary has no token {error} although the merges lead to it: vocab.json and merges.txt do not "
                "belong together."
            ) from error


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    position = 0
    while position < len(parts):
        if position + 1 < len(parts) and (parts[position], parts[position + 1]) == pair:
            merged.append(pair[0] + pair[1])
            position += 2
        else:
            merged.append(parts[position])
            position += 1
    return merged


def _read_vocabulary(path: str) -> dict[str, int]:
    try:
        with open(path, encoding="utf-8") as handle:
            content = json.load(handle)
    except (OSError, ValueError) as error:
        raise DataError(f"vocab_file={path!r}: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(token_id, int) for token_id in content.values()):
        raise DataError(f"vocab_file={path!r} must map each token to its id, as GPT-2's vocab.json does.")
    if _END_OF_TEXT not in content:
        raise DataError(f"vocab_file={path!r} has no {_END_OF_TEXT}, which GPT2BPETokenizer ends documents with.")
    return content


def _read_merges(path: str) -> dict[tuple[str, str], int]:
    ranks: dict[tuple[str, str], int] = {}
    try:
        with open(path, encoding="utf-8") as handle:
            for number, line in enumerate(handle, 1):
                if (number == 1 and line.startswith("#version")) or not line.strip():
                    continue
                words = line.split()
                if len(words) != 2:
                    raise DataError(f"merge_file={path!r}, line {number}: expected two words, found {len(words)}.")
                ranks.setdefault((words[0], words[1]), len(ranks))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"merge_file={path!r}: {error}") from error
    return ranks
