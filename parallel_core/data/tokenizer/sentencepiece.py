"""SentencePiece models, with the readings Megatron has of them: as they are, and those of its legacy classes."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

import sentencepiece

from parallel_core.data.files import read_file
from parallel_core.data.tokenizer.base import MegatronTokenizer, library_identity
from parallel_core.errors import DataError


def _load_model(model_file: str) -> sentencepiece.SentencePieceProcessor:
    if not os.path.exists(model_file):
        raise DataError(f"tokenizer_model={model_file!r}: no such file. Give the path of a SentencePiece .model file.")
    content = read_file(model_file)
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=content)
        # names that are not UTF-8 would be an error in the middle of a text
        pieces = [model.id_to_piece(index) for index in range(model.get_piece_size())]
        if not pieces:
            raise ValueError("it has no pieces")
        model.encode_as_ids("a b")
    except (RuntimeError, OSError, ValueError, TypeError, IndexError) as error:
        # the library quotes the file, which need not be text
        raise DataError(
            f"tokenizer_model={model_file!r} is not a SentencePiece model ({str(error)[:200]!r}). For a tokenizer.json "
            "use --tokenizer-type HuggingFaceTokenizer."
        ) from error
    return model


class SentencePieceModel(MegatronTokenizer):
    """A loaded model, picklable so that worker processes can have a copy."""

    def __init__(self, class_name: str, model_file: str, vocab_extra_ids: int) -> None:
        super().__init__(class_name, model_file, vocab_extra_ids=vocab_extra_ids)
        self._model_file = model_file
        self._model = _load_model(model_file)

    @property
    def vocab_size(self) -> int:
        """Number of pieces of the model."""
        return int(self._model.get_piece_size())

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of `text`."""
        return list(self._model.encode_as_ids(text))

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of `token_ids`."""
        return str(self._model.decode_ids([int(token) for token in token_ids]))

    def _piece_or(self, piece_id: int, default: str) -> str:
        return self._model.id_to_piece(piece_id) if 0 <= piece_id < self._model.get_piece_size() else default


class SentencePieceTokenizer(SentencePieceModel):
    """A SentencePiece model plus the special tokens Megatron's legacy class appends when it has no piece of that name.

    Ids after the model's own go, in this order, to those of `<CLS> <SEP> <EOD> <MASK>`, the pad, begin and end pieces
    (`<PAD> <BOS> <EOS>` when the model defines none) and `<extra_id_0>...` that are missing.

    Args:
        model_file: Path of the `.model` file.
        vocab_extra_ids: Number of `<extra_id_i>` tokens.
    """

    def __init__(self, model_file: str, vocab_extra_ids: int = 0) -> None:
        super().__init__("_SentencePieceTokenizer", model_file, vocab_extra_ids)
        names = ["<CLS>", "<SEP>", "<EOD>", "<MASK>"]
        names += [
            self._piece_or(self._model.pad_id(), "<PAD>"),
            self._piece_or(self._model.bos_id(), "<BOS>"),
            self._piece_or(self._model.eos_id(), "<EOS>"),
        ]
        names += [f"<extra_id_{index}>" for index in range(vocab_extra_ids)]
        own_ids = {self._model.id_to_piece(index): index for index in range(self._model.get_piece_size())}
        next_id = len(own_ids)
        self._special: dict[str, int] = {}
        for name in names:
            if name not in own_ids:
                own_ids[name] = next_id
                next_id += 1
            self._special[name] = own_ids[name]
        self._vocab_size = next_id
        self._pad_name = names[4]
        self._special_by_id = {token: name for name, token in self._special.items()}
        # where two begin at one place the first in this order is taken, as Megatron takes it
        self._any_special = re.compile("(" + "|".join(map(re.escape, self._special)) + ")")

    @property
    def vocab_size(self) -> int:
        """Number of pieces of the model plus the appended special tokens."""
        return self._vocab_size

    @property
    def eod(self) -> int:
        """Id of `<EOD>`."""
        return self._special["<EOD>"]

    @property
    def pad(self) -> int | None:
        """Id of the pad piece."""
        return self._special[self._pad_name]

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of `text`; a special token written out in the text becomes its own id."""
        ids: list[int] = []
        for number, part in enumerate(self._any_special.split(text)):
            ids += [self._special[part]] if number % 2 else self._model.encode_as_ids(part)
        return ids

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of `token_ids`, special tokens by their names."""
        pieces: list[str] = []
        plain: list[int] = []
        for token in map(int, token_ids):
            if token in self._special_by_id:
                pieces.append(super().detokenize(plain) + self._special_by_id[token])
                plain = []
            else:
                plain.append(token)
        return "".join(pieces) + super().detokenize(plain)


class GPTSentencePieceTokenizer(SentencePieceModel):
    """A SentencePiece model as it is; documents end with the model's own end-of-sentence id.

    This is what Megatron-core's tokenizer library makes of every SentencePiece type, and the legacy class of this name.

    Args:
        model_file: Path of the `.model` file.
        legacy: Be Megatron's legacy class, which only the identity tells.
    """

    def __init__(self, model_file: str, legacy: bool = False) -> None:
        super().__init__("_GPTSentencePieceTokenizer", model_file, 0)
        if not legacy:
            self.unique_identifiers = library_identity(model_file, legacy=False, special_tokens=None)
        if self._model.eos_id() < 0:
            raise DataError(
                f"tokenizer_model={model_file!r} has no end-of-sentence piece, which would end documents. Train it "
                "with --eos_id, or use --tokenizer-type SentencePieceTokenizer --legacy-tokenizer, which adds <EOD>."
            )

    @property
    def eod(self) -> int:
        """The model's end-of-sentence id."""
        return int(self._model.eos_id())

    @property
    def pad(self) -> int | None:
        """The model's pad id, if it has one."""
        return int(self._model.pad_id()) if self._model.pad_id() >= 0 else None


class Llama2Tokenizer(GPTSentencePieceTokenizer):
    """A SentencePiece model whose texts start with the begin-of-sentence id: Megatron's legacy class of this name.

    Args:
        model_file: Path of the `.model` file.
    """

    def __init__(self, model_file: str) -> None:
        super().__init__(model_file, legacy=True)
        self.unique_identifiers["class"] = "_Llama2Tokenizer"
        if self._model.bos_id() < 0:
            raise DataError(
                f"tokenizer_model={model_file!r} has no begin-of-sentence piece, which Llama2Tokenizer starts texts "
                "with. Leave out --legacy-tokenizer."
            )

    def tokenize(self, text: str) -> list[int]:
        """Return the begin-of-sentence id and the ids of `text`."""
        return [int(self._model.bos_id()), *super().tokenize(text)]
