"""MindFormers' streamers: an answer's text while it comes, printed or given to another thread."""

from __future__ import annotations

import queue
from typing import Any

import numpy as np

from parallel_core.api.tokenizers import PreTrainedTokenizer
from parallel_core.errors import ParallelCoreError
from parallel_core.generate.text import TextStream

_CJK = ((0x3040, 0x30FF), (0x3400, 0x9FFF), (0xAC00, 0xD7AF), (0xF900, 0xFAFF), (0x20000, 0x2FA1F))


class TextStreamer:
    """Prints an answer's words as they are finished; characters are never cut.

    Args:
        tokenizer: of the text.
        skip_prompt: leave out what the answer continues.
        skip_special_tokens: leave out ids that end or fill texts.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizer, skip_prompt: bool = False, skip_special_tokens: bool = True
    ) -> None:
        self.tokenizer, self.skip_prompt = tokenizer, skip_prompt
        self._special = {tokenizer.eos_token_id, tokenizer.pad_token_id} if skip_special_tokens else set()
        self._begin()

    def _begin(self) -> None:
        self._stream, self._shown, self._is_prompt = TextStream(self.tokenizer.tokenizer.detokenize), 0, True

    def put(self, ids: Any) -> None:
        """Take the prompt's ids, then those of each token.

        Raises:
            ParallelCoreError: they are of several prompts.
        """
        row = np.asarray(ids)
        if row.ndim > 1 and row.shape[0] != 1:
            raise ParallelCoreError(f"a streamer takes one text, not {row.shape[0]}")
        is_prompt, self._is_prompt = self._is_prompt, False
        if is_prompt and self.skip_prompt:
            return
        for token in row.reshape(-1).tolist():
            if token not in self._special:
                self._stream.add(int(token))
        text = self._stream.text[self._shown :]
        self._tell(text[: _finished(text)])

    def end(self) -> None:
        """Show what is left; the next `put` begins another text."""
        self._stream.end()
        self._tell(self._stream.text[self._shown :], ended=True)
        self._begin()

    def _tell(self, text: str, ended: bool = False) -> None:
        self._shown += len(text)
        if text or ended:
            self.on_finalized_text(text, ended)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print a part of the text; a class of one's own does something else with it."""
        print(text, flush=True, end="\n" if stream_end else "")


class TextIteratorStreamer(TextStreamer):
    """Gives an answer's text part by part to whoever iterates, in another thread than `generate`.

    Args:
        tokenizer: of the text.
        skip_prompt: leave out what the answer continues.
        timeout: seconds to wait for a part, after which TimeoutError is raised; None: any.
        skip_special_tokens: leave out ids that end or fill texts.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizer,
        skip_prompt: bool = False,
        timeout: float | None = None,
        skip_special_tokens: bool = True,
    ) -> None:
        super().__init__(tokenizer, skip_prompt, skip_special_tokens)
        self.timeout = timeout
        self._parts: queue.Queue[str | None] = queue.Queue()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand a part over."""
        if text:
            self._parts.put(text)
        if stream_end:
            self._parts.put(None)

    def __iter__(self) -> TextIteratorStreamer:
        return self

    def __next__(self) -> str:
        """Return the next part.

        Raises:
            StopIteration: the text has ended, also by an error in `generate`.
            TimeoutError: nothing has come within `timeout`.
        """
        try:
            part = self._parts.get(timeout=self.timeout)
        except queue.Empty:
            raise TimeoutError(f"no text has come within {self.timeout} s") from None
        if part is None:
            raise StopIteration
        return part


def _finished(text: str) -> int:
    """Return how much of a text may be shown: to its last space or line end, all where it ends in a CJK character."""
    if text and any(low <= ord(text[-1]) <= high for low, high in _CJK):
        return len(text)
    return max(text.rfind(" "), text.rfind("\n")) + 1
