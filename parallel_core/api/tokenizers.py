"""MindFormers' tokenizers and processors over this project's tokenizers, read from a directory's files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from mindspore import Tensor

from parallel_core.api.models import weights_folder
from parallel_core.data.files import read_json
from parallel_core.data.tokenizer import TokenizerSpec
from parallel_core.data.tokenizer.base import MegatronTokenizer
from parallel_core.data.tokenizer.wordpiece import BertWordPieceTokenizer
from parallel_core.errors import CheckpointError, ConfigError

Text = str | Sequence[str]


class PreTrainedTokenizer:
    """Turns texts into ids: `tokenizer(text)` gives input_ids, token_type_ids and attention_mask.

    A class of one's own has `vocab_size`, `_tokenize`, `_convert_token_to_id`, `_convert_id_to_token` and
    `convert_tokens_to_string`, and names its files in `vocab_files_names`: argument -> name in a directory.

    Args:
        tokenizer: what it is over; None: the class's own words.
        begins: ids before a text; None: BERT's `[CLS]`, else none.
        ends: ids after a text; None: BERT's `[SEP]`, else none.
        tokens: eos_token, pad_token and others of a class of one's own.
    """

    files: ClassVar[tuple[str, ...]] = ()
    type_of_files: ClassVar[str] = ""

    vocab_files_names: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self,
        tokenizer: MegatronTokenizer | None = None,
        begins: Sequence[int] | None = None,
        ends: Sequence[int] | None = None,
        **tokens: Any,
    ) -> None:
        self._tokens = {name: str(value) for name, value in tokens.items() if name.endswith("_token")}
        self._pad: int | None = None
        tokenizer = _OwnWords(self) if tokenizer is None else tokenizer
        self.tokenizer = tokenizer
        bert = isinstance(tokenizer, BertWordPieceTokenizer)
        self._begins = list(begins if begins is not None else [tokenizer.cls] if bert else [])  # type: ignore[attr-defined]
        self._ends = list(ends if ends is not None else [tokenizer.sep] if bert else [])  # type: ignore[attr-defined]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_dir: str | Path) -> PreTrainedTokenizer:
        """Return the tokenizer of a directory.

        Raises:
            CheckpointError: there is no such directory, or it has not the files; they are named.
        """
        folder = weights_folder(pretrained_model_name_or_dir)
        files = cls.files or tuple(cls.vocab_files_names.values())
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(f"{folder} has no {' and no '.join(missing)}, which {cls.__name__} reads")
        if not cls.files:
            own: dict[str, Any] = {argument: str(folder / name) for argument, name in cls.vocab_files_names.items()}
            return cls(**own)
        return cls(cls._spec(folder).build())

    @classmethod
    def _spec(cls, folder: Path) -> TokenizerSpec:
        files = [str(folder / name) for name in cls.files]
        if len(files) == 2:
            return TokenizerSpec(cls.type_of_files, vocab_file=files[0], merge_file=files[1])
        return TokenizerSpec(cls.type_of_files, tokenizer_model=files[0])

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self.tokenizer.vocab_size

    @property
    def eos_token_id(self) -> int:
        """The id that ends a text."""
        return self.tokenizer.end_of_text

    @property
    def pad_token_id(self) -> int:
        """The id that fills a short text: the one that ends a text where there is no other."""
        pad = self.tokenizer.pad if self._pad is None else self._pad
        return self.eos_token_id if pad is None else pad

    @property
    def eos_token(self) -> str:
        """The word that ends a text."""
        return self._tokens.get("eos_token") or self.tokenizer.detokenize([self.eos_token_id])

    @property
    def pad_token(self) -> str:
        """The word that fills a short text."""
        return self._tokens.get("pad_token") or self.tokenizer.detokenize([self.pad_token_id])

    @pad_token.setter
    def pad_token(self, word: str) -> None:
        """Fill short texts with another word of the vocabulary."""
        ids = [self.eos_token_id] if word == self.eos_token else self.tokenizer.tokenize(word)
        if len(ids) != 1:
            raise ConfigError(f"pad_token={word!r} is {len(ids)} ids of this vocabulary; give a word of one")
        self._pad, self._tokens["pad_token"] = ids[0], word

    def add_tokens(self, new_tokens: Sequence[str]) -> int:
        """Return 0: a checkpoint's vocabulary is what it is.

        Raises:
            ConfigError: there are words to add.
        """
        if new_tokens:
            raise ConfigError(f"{len(new_tokens)} words cannot be added: no row of a trained table is theirs")
        return 0

    def prepare_for_model(
        self,
        ids: Sequence[int],
        pair_ids: Sequence[int] | None = None,
        add_special_tokens: bool = True,
        max_length: int | None = None,
        padding: bool | str = False,
        truncate_direction: str = "RIGHT",
        return_overflowing_tokens: bool = False,
        return_attention_mask: bool = True,
    ) -> dict[str, list[int]]:
        """Return `input_ids`, `token_type_ids` and `attention_mask` of ids.

        Args:
            ids: of a text, without what stands around it.
            pair_ids: of a second one.
            add_special_tokens: put the tokenizer's own ids around.
            max_length: ids at most; more are cut off.
            padding: `max_length`: fill on the right up to it.
            truncate_direction: RIGHT or LEFT: where is cut.
            return_overflowing_tokens: give `overflowing_tokens`, what was cut off.
            return_attention_mask: give that too.
        """
        first = [*self._begins, *ids, *self._ends] if add_special_tokens else list(ids)
        second = [*(pair_ids or ()), *(self._ends if pair_ids is not None and add_special_tokens else ())]
        row, kinds = [*first, *second], [0] * len(first) + [1] * len(second)
        over = max(0, len(row) - max_length) if max_length is not None else 0
        left = truncate_direction.upper() == "LEFT"
        cut = row[:over] if left else row[len(row) - over :]
        row, kinds = (row[over:], kinds[over:]) if left else (row[: len(row) - over], kinds[: len(kinds) - over])
        more = max(0, max_length - len(row)) if padding == "max_length" and max_length is not None else 0
        found = {"input_ids": row + [self.pad_token_id] * more, "token_type_ids": kinds + [0] * more}
        if return_attention_mask:
            found["attention_mask"] = [1] * len(row) + [0] * more
        return {**found, "overflowing_tokens": cut} if return_overflowing_tokens else found

    def __len__(self) -> int:
        return self.vocab_size

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of a text."""
        ids = list(self.tokenizer.tokenize(text))
        return [*self._begins, *ids, *self._ends] if add_special_tokens else ids

    def decode(self, token_ids: Any, skip_special_tokens: bool = True) -> str | list[str]:
        """Return the text of ids, or the texts of several.

        Args:
            token_ids: a list, array or Tensor of ids, or of rows of them.
            skip_special_tokens: leave out what ends, fills, or stands around texts.
        """
        ids = token_ids.asnumpy() if isinstance(token_ids, Tensor) else token_ids
        if len(ids) and isinstance(ids[0], (list, tuple, np.ndarray)):
            return [str(self.decode(row, skip_special_tokens)) for row in ids]
        special = {self.eos_token_id, self.pad_token_id, *self._begins, *self._ends} if skip_special_tokens else set()
        return self.tokenizer.detokenize([int(token) for token in ids if int(token) not in special])

    def __call__(
        self,
        text: Text,
        text_pair: str | None = None,
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        max_length: int | None = None,
        truncation: bool = False,
        return_tensors: str | None = None,
    ) -> dict[str, Any]:
        """Return `input_ids`, `token_type_ids` and `attention_mask` of a text, or lists of them.

        Args:
            text: a text, or several.
            text_pair: BERT's second segment.
            add_special_tokens: put the tokenizer's own ids around.
            padding: `max_length`, or True or `longest`: fill on the right.
            max_length: ids at most, with `truncation` or `padding="max_length"`.
            truncation: cut longer texts off.
            return_tensors: `ms` or `np`: int32 [B, S] (a single text is a batch of one); None: lists.

        Raises:
            ConfigError: a text is too long, or lengths differ and arrays are asked for.
        """
        texts = [text] if isinstance(text, str) else list(text)
        if text_pair is not None and (len(texts) != 1 or not self._ends):
            raise ConfigError("text_pair: goes with one text, and a tokenizer of two segments (BERT)")
        rows, second = [], []
        for one in texts:
            ids = self.encode(one, add_special_tokens)
            pair = [*self.tokenizer.tokenize(text_pair), *self._ends] if text_pair is not None else []
            rows.append([*ids, *pair])
            second.append(len(ids) if pair else len(rows[-1]))
        if truncation and max_length is not None:
            rows = [row[:max_length] for row in rows]
        width = max_length if padding == "max_length" and max_length else max(map(len, rows)) if padding else 0
        if any(len(row) > width for row in rows) and width:
            longest = max(map(len, rows))
            raise ConfigError(f"a text has {longest} ids, and max_length is {width}; give truncation=True, or more")
        counts = [len(row) for row in rows]
        rows = [row + [self.pad_token_id] * (width - len(row)) for row in rows]
        found = {
            "input_ids": rows,
            "token_type_ids": [[int(first <= at < n) for at in range(len(row))]
                               for row, n, first in zip(rows, counts, second)],
            "attention_mask": [[int(at < n) for at in range(len(row))] for row, n in zip(rows, counts)],
        }  # fmt: skip
        if return_tensors is None:
            return {name: values[0] for name, values in found.items()} if isinstance(text, str) else found
        if len({len(row) for row in rows}) > 1:
            raise ConfigError("texts of several lengths make no array; give padding=True")
        arrays = {name: np.array(values, np.int32) for name, values in found.items()}
        return {name: Tensor(array) for name, array in arrays.items()} if return_tensors == "ms" else arrays


PreTrainedTokenizerBase = PreTrainedTokenizer


class AddedToken(str):
    """A word of a vocabulary's own; how white space beside it is taken has no effect."""

    def __new__(cls, content: str, lstrip: bool = False, rstrip: bool = False) -> AddedToken:  # noqa: ARG004
        """Return the word."""
        return super().__new__(cls, content)


class _OwnWords(MegatronTokenizer):
    """The words of a tokenizer class of one's own."""

    def __init__(self, owner: Any) -> None:
        super().__init__(type(owner).__name__)
        self._owner = owner

    @property
    def vocab_size(self) -> int:
        return int(self._owner.vocab_size)

    @property
    def eod(self) -> int:
        return int(self._owner._convert_token_to_id(self._owner._tokens["eos_token"]))

    @property
    def pad(self) -> int | None:
        word = self._owner._tokens.get("pad_token")
        return None if word is None else int(self._owner._convert_token_to_id(word))

    def tokenize(self, text: str) -> list[int]:
        return [int(self._owner._convert_token_to_id(word)) for word in self._owner._tokenize(text)]

    def detokenize(self, token_ids: Sequence[int]) -> str:
        words = [self._owner._convert_id_to_token(int(token)) for token in token_ids]
        return str(self._owner.convert_tokens_to_string(words))


class GPT2Tokenizer(PreTrainedTokenizer):
    """Byte-level BPE of vocab.json and merges.txt."""

    files = ("vocab.json", "merges.txt")
    type_of_files = "GPT2BPETokenizer"


class LlamaTokenizer(PreTrainedTokenizer):
    """SentencePiece of tokenizer.model; texts begin with `<s>`."""

    files = ("tokenizer.model",)
    type_of_files = "SentencePieceTokenizer"

    def __init__(
        self, tokenizer: MegatronTokenizer, begins: Sequence[int] | None = None, ends: Sequence[int] | None = None
    ) -> None:
        super().__init__(tokenizer, [1] if begins is None else begins, ends)


class PanguAlphaTokenizer(PreTrainedTokenizer):
    """Words by jieba, then SentencePiece of vocab.model."""

    files = ("vocab.model",)
    type_of_files = "PanguTokenizer"


class BertTokenizer(PreTrainedTokenizer):
    """WordPiece of vocab.txt; `tokenizer_config.json` may say that case is kept."""

    files = ("vocab.txt",)

    @classmethod
    def _spec(cls, folder: Path) -> TokenizerSpec:
        told = folder / "tokenizer_config.json"
        found = read_json(str(told)) if told.is_file() else {}
        lower = bool(found.get("do_lower_case", True)) if isinstance(found, Mapping) else True
        kind = "BertWordPieceLowerCase" if lower else "BertWordPieceCase"
        return TokenizerSpec(kind, vocab_file=str(folder / "vocab.txt"))


TOKENIZERS: tuple[type[PreTrainedTokenizer], ...] = (GPT2Tokenizer, BertTokenizer, PanguAlphaTokenizer, LlamaTokenizer)
"""In the order in which a directory's files are looked for."""


class Processor:
    """A text as a model's input: `processor(text)` gives {"text": int32 [B, max_length]}.

    Args:
        tokenizer: of the texts.
        max_length: ids of a text; longer ones are cut off.
        padding: `max_length` or `longest`.
        return_tensors: `ms` or `np`.
    """

    tokenizer_class: ClassVar[type[PreTrainedTokenizer]] = PreTrainedTokenizer

    def __init__(
        self, tokenizer: PreTrainedTokenizer, max_length: int = 128, padding: str = "max_length",
        return_tensors: str = "ms",
    ) -> None:  # fmt: skip
        self.tokenizer, self.max_length = tokenizer, max_length
        self.padding, self.return_tensors = padding, return_tensors

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_dir: str | Path) -> Processor:
        """Return the processor over a directory's tokenizer."""
        return cls(cls.tokenizer_class.from_pretrained(pretrained_model_name_or_dir))

    def __call__(self, text: Text) -> dict[str, Any]:
        """Return the ids of a text, or of several."""
        made = self.tokenizer(
            text,
            padding=self.padding,
            max_length=self.max_length,
            truncation=True,
            return_tensors=self.return_tensors,
        )
        return {"text": made["input_ids"]}


class GPT2Processor(Processor):
    """GPT-2's."""

    tokenizer_class = GPT2Tokenizer


class BertProcessor(Processor):
    """BERT's."""

    tokenizer_class = BertTokenizer


class LlamaProcessor(Processor):
    """LLaMA's."""

    tokenizer_class = LlamaTokenizer


class PanguAlphaProcessor(Processor):
    """PanGu-alpha's."""

    tokenizer_class = PanguAlphaTokenizer
