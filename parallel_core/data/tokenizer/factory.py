"""From `--tokenizer-type` to a tokenizer."""

from __future__ import annotations

from parallel_core.data.tokenizer.base import MegatronTokenizer
from parallel_core.data.tokenizer.gpt2_bpe import GPT2BPETokenizer
from parallel_core.data.tokenizer.huggingface import HuggingFaceTokenizer
from parallel_core.data.tokenizer.null import NullTokenizer
from parallel_core.data.tokenizer.sentencepiece import (
    GPTSentencePieceTokenizer,
    Llama2Tokenizer,
    SentencePieceTokenizer,
)
from parallel_core.errors import ConfigError

# which argument names the files of which type
TOKENIZER_TYPES: dict[str, tuple[str, ...]] = {
    "SentencePieceTokenizer": ("tokenizer_model",),
    "GPTSentencePieceTokenizer": ("tokenizer_model",),
    "Llama2Tokenizer": ("tokenizer_model",),
    "GPT2BPETokenizer": ("vocab_file", "merge_file"),
    "HuggingFaceTokenizer": ("tokenizer_model",),
    "NullTokenizer": ("vocab_size",),
}


def build_tokenizer(
    tokenizer_type: str,
    *,
    tokenizer_model: str | None = None,
    vocab_file: str | None = None,
    merge_file: str | None = None,
    vocab_size: int | None = None,
    vocab_extra_ids: int = 0,
) -> MegatronTokenizer:
    """Return the tokenizer Megatron's arguments name.

    Args:
        tokenizer_type: One of `TOKENIZER_TYPES`.
        tokenizer_model: Path of a SentencePiece model or of a `tokenizer.json` (or the folder that holds it).
        vocab_file: Path of GPT-2's `vocab.json`.
        merge_file: Path of GPT-2's `merges.txt`.
        vocab_size: Number of ids of the null tokenizer, without the end of document.
        vocab_extra_ids: Number of `<extra_id_i>` tokens of `SentencePieceTokenizer`.

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
    if vocab_extra_ids and tokenizer_type != "SentencePieceTokenizer":
        raise ConfigError(
            f"vocab_extra_ids={vocab_extra_ids} is for SentencePieceTokenizer; {tokenizer_type} has a fixed vocabulary."
        )
    if tokenizer_type == "NullTokenizer":
        return NullTokenizer(int(vocab_size or 0))
    if tokenizer_type == "GPT2BPETokenizer":
        return GPT2BPETokenizer(str(vocab_file), str(merge_file))
    if tokenizer_type == "SentencePieceTokenizer":
        return SentencePieceTokenizer(str(tokenizer_model), vocab_extra_ids)
    one_file = {
        "GPTSentencePieceTokenizer": GPTSentencePieceTokenizer,
        "Llama2Tokenizer": Llama2Tokenizer,
        "HuggingFaceTokenizer": HuggingFaceTokenizer,
    }
    return one_file[tokenizer_type](str(tokenizer_model))
