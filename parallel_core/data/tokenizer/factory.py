"""From `--tokenizer-type` to a tokenizer."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields

from parallel_core.data.tokenizer.base import MegatronTokenizer
from parallel_core.data.tokenizer.gpt2_bpe import GPT2BPETokenizer
from parallel_core.data.tokenizer.huggingface import HuggingFaceTokenizer
from parallel_core.data.tokenizer.null import NullTokenizer
from parallel_core.data.tokenizer.pangu import PanguTokenizer
from parallel_core.data.tokenizer.sentencepiece import (
    GPTSentencePieceTokenizer,
    Llama2Tokenizer,
    SentencePieceTokenizer,
)
from parallel_core.data.tokenizer.wordpiece import BertWordPieceTokenizer
from parallel_core.errors import ConfigError

# which argument names the files of which type
TOKENIZER_TYPES: dict[str, tuple[str, ...]] = {
    "SentencePieceTokenizer": ("tokenizer_model",),
    "GPTSentencePieceTokenizer": ("tokenizer_model",),
    "Llama2Tokenizer": ("tokenizer_model",),
    "GPT2BPETokenizer": ("vocab_file", "merge_file"),
    "HuggingFaceTokenizer": ("tokenizer_model",),
    "PanguTokenizer": ("tokenizer_model",),
    "BertWordPieceLowerCase": ("vocab_file",),
    "BertWordPieceCase": ("vocab_file",),
    "NullTokenizer": ("vocab_size",),
}


@dataclass(frozen=True)
class TokenizerSpec:
    """The arguments of `build_tokenizer`, so that every process can make its own tokenizer."""

    tokenizer_type: str
    tokenizer_model: str | None = None
    vocab_file: str | None = None
    merge_file: str | None = None
    vocab_size: int | None = None
    vocab_extra_ids: int = 0
    legacy_tokenizer: bool = False
    tokenizer_hf_include_special_tokens: bool | None = None

    def build(self) -> MegatronTokenizer:
        """Return the tokenizer; see `build_tokenizer`."""
        return build_tokenizer(**{field.name: getattr(self, field.name) for field in fields(self)})

    @staticmethod
    def add_arguments(parser: argparse._ArgumentGroup, *, required: bool) -> None:
        """Add Megatron's tokenizer arguments to a command line."""
        add = parser.add_argument
        add("--tokenizer-type", choices=list(TOKENIZER_TYPES), required=required, help="kind of tokenizer")
        add("--tokenizer-model", help="SentencePiece model or tokenizer.json")
        add("--vocab-file", help="vocab.json of GPT2BPETokenizer, vocab.txt of BertWordPiece...")
        add("--merge-file", help="merges.txt of GPT2BPETokenizer")
        add("--vocab-size", type=int, help="number of ids of NullTokenizer")
        add("--legacy-tokenizer", action="store_true", help="Megatron's legacy class of that type")
        add("--vocab-extra-ids", type=int, default=0, help="<extra_id_i> tokens of the legacy SentencePieceTokenizer")
        name = "--tokenizer-hf-{}include-special-tokens"
        add(name.format(""), action="store_true", default=None, help="HuggingFaceTokenizer: own tokens around texts")
        add(
            name.format("no-"),
            action="store_false",
            dest="tokenizer_hf_include_special_tokens",
            default=None,
            help="HuggingFaceTokenizer: no such tokens (the default)",
        )
        add("--tokenizer-hf-use-fast", action="store_true", help="accepted: fast tokenizers are what is read")
        add("--tokenizer-sentencepiece-legacy", action="store_true", help="accepted: ids are the same without it")

    @classmethod
    def from_arguments(cls, args: argparse.Namespace) -> TokenizerSpec:
        """Return what a command line with `add_arguments` asks for."""
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})


def build_tokenizer(
    tokenizer_type: str,
    *,
    tokenizer_model: str | None = None,
    vocab_file: str | None = None,
    merge_file: str | None = None,
    vocab_size: int | None = None,
    vocab_extra_ids: int = 0,
    legacy_tokenizer: bool = False,
    tokenizer_hf_include_special_tokens: bool | None = None,
) -> MegatronTokenizer:
    """Return the tokenizer Megatron's arguments name.

    As in Megatron-core 0.16.1, the three SentencePiece types are the model as it is, and a Hugging Face tokenizer puts
    no special tokens around texts; `legacy_tokenizer` chooses the classes of before.

    Args:
        tokenizer_type: One of `TOKENIZER_TYPES`.
        tokenizer_model: Path of a SentencePiece model or of a `tokenizer.json` (or the folder that holds it).
        vocab_file: Path of GPT-2's `vocab.json`, or of BERT's `vocab.txt`.
        merge_file: Path of GPT-2's `merges.txt`.
        vocab_size: Number of ids of the null tokenizer, without the end of document.
        vocab_extra_ids: Number of `<extra_id_i>` tokens of the legacy `SentencePieceTokenizer`.
        legacy_tokenizer: Megatron's legacy classes: SentencePieceTokenizer appends special tokens, Llama2Tokenizer
            begins texts with the begin-of-sentence id, HuggingFaceTokenizer includes special tokens.
        tokenizer_hf_include_special_tokens: Of `HuggingFaceTokenizer`: put its own special tokens around texts.

    Raises:
        ConfigError: The type is unknown, or an argument it needs is missing.
        DataError: A file is missing or not what it should be.
    """
    if tokenizer_type not in TOKENIZER_TYPES:
        known = ", ".join(TOKENIZER_TYPES)
        raise ConfigError(f"tokenizer_type={tokenizer_type!r} is not supported. Use one of {known}.")
    given = {
        "tokenizer_model": tokenizer_model,
        "vocab_file": vocab_file,
        "merge_file": merge_file,
        "vocab_size": vocab_size,
    }
    missing = [name for name in TOKENIZER_TYPES[tokenizer_type] if given[name] is None]
    if missing:
        flags = " and ".join("--" + name.replace("_", "-") for name in missing)
        raise ConfigError(f"tokenizer_type={tokenizer_type!r} needs {flags}.")
    _check_options(tokenizer_type, vocab_extra_ids, legacy_tokenizer, tokenizer_hf_include_special_tokens)
    if tokenizer_type == "NullTokenizer":
        return NullTokenizer(int(vocab_size or 0), legacy_tokenizer)
    if tokenizer_type == "GPT2BPETokenizer":
        return GPT2BPETokenizer(str(vocab_file), str(merge_file), legacy_tokenizer)
    if tokenizer_type == "PanguTokenizer":
        return PanguTokenizer(str(tokenizer_model))
    if tokenizer_type in ("BertWordPieceLowerCase", "BertWordPieceCase"):
        return BertWordPieceTokenizer(str(vocab_file), tokenizer_type == "BertWordPieceLowerCase")
    if tokenizer_type == "HuggingFaceTokenizer":
        return HuggingFaceTokenizer(
            str(tokenizer_model), bool(tokenizer_hf_include_special_tokens), legacy_tokenizer
        )
    if legacy_tokenizer and tokenizer_type == "SentencePieceTokenizer":
        return SentencePieceTokenizer(str(tokenizer_model), vocab_extra_ids)
    if legacy_tokenizer and tokenizer_type == "Llama2Tokenizer":
        return Llama2Tokenizer(str(tokenizer_model))
    return GPTSentencePieceTokenizer(str(tokenizer_model), legacy_tokenizer)


def _check_options(tokenizer_type: str, vocab_extra_ids: int, legacy: bool, include: bool | None) -> None:
    if vocab_extra_ids < 0:
        raise ConfigError(f"vocab_extra_ids={vocab_extra_ids} must be 0 or more.")
    if vocab_extra_ids and not (legacy and tokenizer_type == "SentencePieceTokenizer"):
        has = tokenizer_type if tokenizer_type != "SentencePieceTokenizer" else f"{tokenizer_type} without it"
        raise ConfigError(
            f"vocab_extra_ids={vocab_extra_ids} is for SentencePieceTokenizer with --legacy-tokenizer; {has} has a "
            "fixed vocabulary."
        )
    if include and tokenizer_type != "HuggingFaceTokenizer":
        raise ConfigError(
            f"tokenizer_hf_include_special_tokens is for HuggingFaceTokenizer, not for {tokenizer_type}; leave it out."
        )
    if legacy and tokenizer_type == "PanguTokenizer":
        raise ConfigError("legacy_tokenizer asks for Megatron's class, which has no PanguTokenizer; leave it out")
    if include is False and legacy and tokenizer_type == "HuggingFaceTokenizer":
        raise ConfigError(
            "legacy_tokenizer asks for the class that always includes special tokens, and "
            "--tokenizer-hf-no-include-special-tokens for none; give one of them."
        )
