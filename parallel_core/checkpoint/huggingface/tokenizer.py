"""Tokenizer files and special ids that go along with an exported model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sentencepiece

from parallel_core.checkpoint.layout_files import write_durably
from parallel_core.checkpoint.source import TensorSource
from parallel_core.config.vocabulary import DATA_SOURCES
from parallel_core.data.bundled import bundled_tokenizer_model
from parallel_core.data.tokenizer.base import MegatronTokenizer
from parallel_core.data.tokenizer.factory import TokenizerSpec
from parallel_core.data.tokenizer.wordpiece import BertWordPieceTokenizer
from parallel_core.errors import ParallelCoreError

_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "vocab.json", "merges.txt",
    "vocab.model", "vocab.txt", "added_tokens.json", "chat_template.jinja", "chat_template.json",
    "generation_config.json",
)  # fmt: skip
_SENTENCE_PIECE = ("SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer")


def write_tokenizer(source: TensorSource, path: Path) -> tuple[dict[str, int], list[str]]:
    """Write the tokenizer that a checkpoint knows of beside its exported weights.

    Args:
        source: the checkpoint: a Hugging Face directory, or one of a run that says what it tokenized with.
        path: the directory that is being written.

    Returns:
        Special ids for config.json, and a sentence where files are not there.
    """
    if source.format.partition(",")[0] in ("hugging face", "pangu-alpha", "mindformers"):
        _copy(source.path, path)
        return {}, []
    settings = tokenizer_settings(source.common)
    kind = settings.get("tokenizer_type")
    if not kind:
        return {}, ["no tokenizer is written: the checkpoint knows of none"]
    try:
        tokenizer = TokenizerSpec(**settings).build()
        _write_files(str(kind), settings, tokenizer, path)
    except (ParallelCoreError, OSError) as error:
        return {}, [f"no tokenizer is written: {error}"]
    ids = {"eos_token_id": tokenizer.eod}
    if tokenizer.pad is not None and tokenizer.pad != tokenizer.eod:
        ids["pad_token_id"] = tokenizer.pad
    return ids, []


def tokenizer_settings(common: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tokenizer's arguments, from Megatron's or from the tree this program writes."""
    args, tree = common.get("megatron_args"), common.get("config")
    names = ("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file", "vocab_extra_ids", "vocab_size",
             "legacy_tokenizer")  # fmt: skip
    if isinstance(args, Mapping):
        found = {name: args.get(name) for name in names}
    else:
        data = tree.get("dataset_config") if isinstance(tree, Mapping) else None
        data = data if isinstance(data, Mapping) else {}
        if data and not any(data.get(name) for name in ("tokenizer_type", *DATA_SOURCES)):
            return {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": bundled_tokenizer_model()}
        found = {name: data.get("unpadded_vocab_size" if name == "vocab_size" else name) for name in names}
    return {name: value for name, value in found.items() if value}


def _write_files(kind: str, settings: Mapping[str, Any], tokenizer: MegatronTokenizer, path: Path) -> None:
    if kind == "HuggingFaceTokenizer":
        model = Path(str(settings["tokenizer_model"]))
        _copy(model if model.is_dir() else model.parent, path)
    elif kind in _SENTENCE_PIECE:
        shutil.copyfile(str(settings["tokenizer_model"]), path / "tokenizer.model")
        begins = kind == "Llama2Tokenizer" and bool(settings.get("legacy_tokenizer"))
        _write_sentence_piece_words(tokenizer, path, begins)
    elif kind == "PanguTokenizer":
        shutil.copyfile(str(settings["tokenizer_model"]), path / "vocab.model")
    elif isinstance(tokenizer, BertWordPieceTokenizer):
        shutil.copyfile(str(settings["vocab_file"]), path / "vocab.txt")
        folded = {"tokenizer_class": "BertTokenizer", "do_lower_case": tokenizer.lower_case}
        write_durably(path / "tokenizer_config.json", json.dumps(folded, indent=2))
    elif kind == "GPT2BPETokenizer":
        shutil.copyfile(str(settings["vocab_file"]), path / "vocab.json")
        shutil.copyfile(str(settings["merge_file"]), path / "merges.txt")
        words = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
        config = {"tokenizer_class": "GPT2Tokenizer", **words}
        write_durably(path / "tokenizer_config.json", json.dumps(config, indent=2))


def _write_sentence_piece_words(tokenizer: MegatronTokenizer, path: Path, begins: bool) -> None:
    """Write what `tokenizer.model` alone does not say: added tokens, what ends a document, what begins a text."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
    pieces = model.get_piece_size()
    added = {tokenizer.detokenize([token]): token for token in range(pieces, tokenizer.vocab_size)}
    if added:
        write_durably(path / "added_tokens.json", json.dumps(added, indent=2))
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": begins,
        "add_eos_token": False,
        "eos_token": {token: word for word, token in added.items()}.get(tokenizer.eod)
        or model.id_to_piece(tokenizer.eod),
    }
    write_durably(path / "tokenizer_config.json", json.dumps(config, indent=2))


def _copy(folder: Path, path: Path) -> None:
    for name in _FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, path / name)
