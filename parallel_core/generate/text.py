"""From tokens to text while they come: characters are never cut, and stop texts never shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_UNFINISHED = "\ufffd"
"""What tokenizers write for the bytes of a character whose last byte is still to come."""


class TextStream:
    """Collects an answer's tokens and knows what of its text is certain.

    Args:
        detokenize: the tokenizer's.
        stop: texts that end the answer.
    """

    def __init__(self, detokenize: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._detokenize, self._stop = detokenize, tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._tokens: list[int] = []
        self._from = 0  # tokens before it no longer change how those after it read
        self._read = 0  # tokens before it have been turned to text
        self._ended = False
        self.text = ""
        """All text so far that is certain; without the stop text once that has come."""
        self.stopped = False
        """Whether a stop text has come."""

    def add(self, token: int) -> None:
        """Take the next token."""
        self._tokens.append(token)
        before = self._detokenize(self._tokens[self._from : self._read])
        now = self._detokenize(self._tokens[self._from :])
        if now.endswith(_UNFINISHED) and len(self._tokens) - self._read < 16:
            return
        self._from, self._read = self._read, len(self._tokens)
        self._extend(now[len(before) :])

    def end(self) -> None:
        """Take what is left of characters that were never finished; nothing more comes."""
        self._ended = True
        if self._read < len(self._tokens) and not self.stopped:
            before = self._detokenize(self._tokens[self._from : self._read])
            self._read = len(self._tokens)
            self._extend(self._detokenize(self._tokens[self._from :])[len(before) :])

    def _extend(self, piece: str) -> None:
        searched = max(0, len(self.text) - self._longest + 1)
        self.text += piece
        found = [place for place in (self.text.find(stop, searched) for stop in self._stop) if place >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    @property
    def certain(self) -> int:
        """How many characters of `text` stay, whatever comes: no stop text can begin among them."""
        end = len(self.text)
        if self._ended or self.stopped:
            return end
        tails = {k: self.text[end - k :] for k in range(1, min(self._longest - 1, end) + 1)}
        return end - max((k for k, tail in tails.items() if any(x.startswith(tail) for x in self._stop)), default=0)
