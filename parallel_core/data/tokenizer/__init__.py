"""Tokenizers by Megatron's names."""

from __future__ import annotations

from parallel_core.data.tokenizer.base import MegatronTokenizer
from parallel_core.data.tokenizer.factory import TOKENIZER_TYPES, TokenizerSpec, build_tokenizer
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

__all__ = [
    "TOKENIZER_TYPES",
    "BertWordPieceTokenizer",
    "GPT2BPETokenizer",
    "GPTSentencePieceTokenizer",
    "HuggingFaceTokenizer",
    "Llama2Tokenizer",
    "MegatronTokenizer",
    "NullTokenizer",
    "PanguTokenizer",
    "SentencePieceTokenizer",
    "TokenizerSpec",
    "build_tokenizer",
]
