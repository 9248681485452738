"""PanGu-alpha's tokenizer: Chinese text cut into words by jieba, then a SentencePiece model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache

from parallel_core.bundled import cache_folder
from parallel_core.data.tokenizer.sentencepiece import SentencePieceModel
from parallel_core.errors import ConfigError, DataError

_MARKS = str.maketrans({" ": "\u2582", "\n": "\u2583"})
"""What stands for a space and a newline of the text, since spaces in the model's input part words."""
_TEXT = str.maketrans({" ": None, "\u2582": " ", "\u2583": "\n"})
_PAD, _END_OF_TEXT = "<pad>", "<eot>"


class PanguTokenizer(SentencePieceModel):
    """Words joined by single spaces, encoded by the model; the text's own spaces and newlines are pieces of their own.

    Documents end with `<pad>`, which training also pads with; a generated text ends with `<eot>`. The
    model normalises as it likes, so full-width punctuation comes back half-width, and tabs are lost.

    Args:
        model_file: path of the published `vocab.model`, or one with pieces `<pad>` and `<eot>`.
        segment: cuts a text into words; None: jieba's accurate mode.

    Raises:
        ConfigError: jieba is wanted and not installed.
        DataError: the model lacks one of the two pieces.
    """

    def __init__(self, model_file: str, segment: Callable[[str], Iterable[str]] | None = None) -> None:
        super().__init__("PanguTokenizer", model_file, 0)
        self._segment = segment or _jieba()
        pieces = {name: int(self._model.piece_to_id(name)) for name in (_PAD, _END_OF_TEXT)}
        missing = [name for name, found in pieces.items() if self._piece_or(found, "") != name]
        if missing:
            raise DataError(
                f"tokenizer_model={model_file!r} has no piece {' and no '.join(missing)}; PanguTokenizer reads the "
                "published vocab.model, for another model use --tokenizer-type SentencePieceTokenizer"
            )
        self._pad, self._end = pieces[_PAD], pieces[_END_OF_TEXT]

    @property
    def eod(self) -> int:
        """Id of `<pad>`, 6 in the published model."""
        return self._pad

    @property
    def pad(self) -> int | None:
        """Id of `<pad>`."""
        return self._pad

    @property
    def end_of_text(self) -> int:
        """Id of `<eot>`, 9 in the published model."""
        return self._end

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of `text`."""
        return super().tokenize(" ".join(word.translate(_MARKS) for word in self._segment(text)))

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of `token_ids`."""
        return super().detokenize(token_ids).translate(_TEXT)


@cache
def _jieba() -> Callable[[str], Iterable[str]]:
    """Return jieba's cut, whose dictionary takes about a second to load, once in a process."""
    try:
        import jieba  # an extra: only this tokenizer needs it
    except ImportError:
        raise ConfigError(
            "tokenizer_type PanguTokenizer cuts words with jieba: pip install 'parallel_core[pangu]'"
        ) from None
    jieba.setLogLevel("WARNING")
    words = jieba.Tokenizer()
    # It keeps a marshalled dictionary, by default where anybody may leave one.
    folder = cache_folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    words.tmp_dir = str(folder)
    return words.cut
