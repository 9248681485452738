"""The size of a vocabulary that the user did not write down: asked of the tokenizer's own files."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from parallel_core.config.model_keys import model_settings
from parallel_core.config.schema import AllConfig, DatasetConfig
from parallel_core.errors import ConfigError, ParallelCoreError

DATA_SOURCES = ("data_path", "train_data_path", "valid_data_path", "test_data_path", "data_args_path", "mock_data")
"""Where data may come from; with none of them, and no tokenizer, both are the bundled ones."""


def tokenizer_vocab_size(values: Mapping[str, object]) -> int | None:
    """Return the number of tokens of the tokenizer that `values` (Megatron names) describe, or None without one.

    With neither a tokenizer nor data, that is the bundled tokenizer.

    Raises:
        ConfigError: The tokenizer's files are missing or unreadable; the message names them.
    """
    kind = values.get("tokenizer_type")
    has_data = any(values.get(name) for name in DATA_SOURCES)
    if kind is None and (has_data or values.get("tokenizer_model")):
        return None
    from parallel_core.data.bundled import bundled_tokenizer  # Tokenizers load only when one is needed.
    from parallel_core.data.tokenizer.factory import build_tokenizer

    try:
        if kind is None:
            kind, files = bundled_tokenizer(values.get("bert_head") not in (None, "none"))
            tokenizer = build_tokenizer(kind, **files)  # type: ignore[arg-type]
        else:
            tokenizer = build_tokenizer(
                str(kind),
                tokenizer_model=_path(values, "tokenizer_model"),
                vocab_file=_path(values, "vocab_file"),
                merge_file=_path(values, "merge_file"),
                vocab_extra_ids=_count(values, "vocab_extra_ids"),
                legacy_tokenizer=bool(values.get("legacy_tokenizer")),
            )
    except ConfigError:
        raise
    except ParallelCoreError as error:
        raise ConfigError(
            f"tokenizer_type={kind}: {error}; give padded_vocab_size to describe the model without its tokenizer"
        ) from None
    return tokenizer.vocab_size


@lru_cache(maxsize=1)
def known_vocabulary(data: DatasetConfig, bert_head: str = "none") -> int | None:
    """Return the number of tokens of a run's tokenizer; None where its files, or a tokenizer, are not there."""
    values = {
        name: getattr(data, name) or None
        for name in ("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file", "vocab_extra_ids",
                     "legacy_tokenizer", *DATA_SOURCES)
    }  # fmt: skip
    values["bert_head"] = bert_head
    if values["tokenizer_type"] == "NullTokenizer":
        return None
    try:
        return tokenizer_vocab_size(values)
    except ConfigError:
        return None


def _count(values: Mapping[str, object], name: str) -> int:
    value = values.get(name)
    return value if isinstance(value, int) else 0


def _path(values: Mapping[str, object], name: str) -> str | None:
    value = values.get(name)
    return None if value is None else str(value)


def stored_settings(config: AllConfig) -> dict[str, Any]:
    """Return the settings that define the model as a checkpoint keeps them, with the vocabulary's true size."""
    data = config.dataset_config
    true_size = data.unpadded_vocab_size or known_vocabulary(data, config.model_config.bert.bert_head)
    if true_size and data.tokenizer_type == "NullTokenizer":
        true_size += 1  # its end-of-document token comes after the vocabulary
    return {**model_settings(config.model_config), "vocab_size": true_size}
