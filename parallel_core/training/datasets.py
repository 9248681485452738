"""What a run's datasets are made from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from parallel_core.config.schema import AllConfig
from parallel_core.data import (
    GPTDatasetConfig,
    MaskedWordsConfig,
    MegatronTokenizer,
    blends_from_arguments,
    build_tokenizer,
    build_train_valid_test_datasets,
    bundled_tokenizer,
    parse_blend,
    prepare_bundled_corpus,
)
from parallel_core.data.chat import HOW_TO_NAME_ONE, ChatTemplate, chat_template, tokenizer_folders
from parallel_core.data.classified import ClassifiedDataset, classified_rows
from parallel_core.data.squad import DEV, SpanDataset, features_of, read_squad
from parallel_core.data.tokenizer.wordpiece import BertWordPieceTokenizer
from parallel_core.errors import ConfigError, DataError


def gpt_dataset_config(config: AllConfig) -> GPTDatasetConfig:
    """Return the datasets' configuration; without any data source it is the bundled corpus with its tokenizer.

    An encoder's is a `MaskedWordsConfig`.
    """
    data = config.dataset_config
    per_split = (data.train_data_path, data.valid_data_path, data.test_data_path)
    encoder = config.model_config.bert.is_encoder
    bundled = not (data.data_path or any(per_split) or data.data_args_path or data.mock_data)
    if bundled and data.tokenizer_type == "NullTokenizer":
        raise ConfigError("there is no data: give --data-path, or --mock-data (the bundled text has other ids than "
                          "NullTokenizer's)")
    kind, files = bundled_tokenizer(encoder)
    blend = parse_blend((prepare_bundled_corpus(data.data_cache_path or None, encoder),)) if bundled else None
    blends: tuple[Any, Any] = (blend, None)
    if not bundled and not data.mock_data:
        blends = blends_from_arguments(
            data_path=data.data_path or None,
            train_data_path=data.train_data_path or None,
            valid_data_path=data.valid_data_path or None,
            test_data_path=data.test_data_path or None,
            data_args_path=data.data_args_path or None,
        )
    named: dict[str, Any] = {"tokenizer_model": data.tokenizer_model or None, "vocab_file": data.vocab_file or None}
    own = bundled and not data.tokenizer_type
    tokenizer = build_tokenizer(
        kind if own else data.tokenizer_type or "NullTokenizer",
        **({**named, **files} if own else named),
        merge_file=data.merge_file or None,
        vocab_extra_ids=data.vocab_extra_ids,
        legacy_tokenizer=data.legacy_tokenizer,
        vocab_size=data.unpadded_vocab_size or config.model_config.vocab_size - 1,
    )
    masked: dict[str, Any] = {
        "masking_probability": data.mask_prob,
        "short_sequence_probability": data.short_seq_prob,
        "classification_head": config.model_config.bert.bert_head == "pretraining",
    }
    return (MaskedWordsConfig if encoder else GPTDatasetConfig)(
        **(masked if encoder else {}),
        random_seed=config.training_config.seed,
        sequence_length=config.model_config.seq_length,
        tokenizer=tokenizer,
        blend=blends[0],
        blend_per_split=blends[1],
        split=None if blends[1] else data.split,
        mock=data.mock_data,
        path_to_cache=data.data_cache_path or None,
        mmap_bin_files=data.mmap_bin_files,
        reset_position_ids=data.reset_position_ids,
        reset_attention_mask=data.reset_attention_mask,
        eod_mask_loss=data.eod_mask_loss,
        eos_token_id=None if data.eos_token_id < 0 else data.eos_token_id,
        padding_id=None if data.pad_token_id < 0 else data.pad_token_id,
        chat=_chat(config, tokenizer) if data.sft else None,
    )


def _chat(config: AllConfig, tokenizer: MegatronTokenizer) -> ChatTemplate:
    data = config.dataset_config
    folders = tokenizer_folders(data.tokenizer_model, data.vocab_file)
    template = chat_template(tokenizer, folders, data.sft_tokenizer_prompt_format, data.chat_template)
    if template is None:
        raise ConfigError(f"sft: there is no chat template in {', '.join(folders)}; {HOW_TO_NAME_ONE}")
    return template


def default_datasets_provider(config: AllConfig) -> Callable[[tuple[int, int, int]], tuple[Any, Any, Any]]:
    """Return a `train_valid_test_datasets_provider(num_samples)` that builds the datasets of GPTs and encoders."""
    if config.model_config.bert.bert_head == "question_answering":
        return lambda num_samples: question_answering_datasets(config, num_samples)
    if config.model_config.num_labels:
        return lambda num_samples: classified_datasets(config, num_samples)

    def provide(num_samples: tuple[int, int, int]) -> tuple[Any, Any, Any]:
        return build_train_valid_test_datasets(gpt_dataset_config(config), num_samples)

    return provide


def question_answering_datasets(
    config: AllConfig, num_samples: tuple[int, int, int]
) -> tuple[SpanDataset | None, SpanDataset | None, SpanDataset | None]:
    """Return the windows over the contexts of SQuAD v1.1's files; None where a split has no file.

    `data_path` is a folder with train-v1.1.json, and perhaps dev-v1.1.json for validation.
    """
    data, model = config.dataset_config, config.model_config
    tokenizer = build_tokenizer(data.tokenizer_type, vocab_file=data.vocab_file or None)
    if not isinstance(tokenizer, BertWordPieceTokenizer):
        raise ConfigError(f"tokenizer_type={data.tokenizer_type}: questions are of WordPiece")
    folder = data.data_path[0] if data.data_path else ""
    dev = str(Path(folder) / DEV) if folder and (Path(folder) / DEV).is_file() else ""
    files = [next(iter(given), usual) for given, usual in (
        (data.train_data_path, folder), (data.valid_data_path, dev), (data.test_data_path, ""))]  # fmt: skip
    built: list[SpanDataset | None] = []
    for file, samples in zip(files, num_samples):
        features = features_of(
            read_squad(file),
            tokenizer,
            seq_length=model.seq_length,
            doc_stride=data.doc_stride,
            max_query_length=data.max_query_length,
            training=True,
        ) if file else []  # fmt: skip
        if file and not features:
            raise DataError(f"{file}: no answer stands where it should in its context")
        pad = int(tokenizer.pad or 0)
        seed = config.training_config.seed
        built.append(SpanDataset(features, samples, model.seq_length, pad, seed) if file else None)
    return built[0], built[1], built[2]


def classified_datasets(
    config: AllConfig, num_samples: tuple[int, int, int]
) -> tuple[ClassifiedDataset | None, ClassifiedDataset | None, ClassifiedDataset | None]:
    """Return texts with classes of `train_data_path`, `valid_data_path` and `test_data_path`; `data_path` is the first.

    Classes have the numbers that they have in the training data (`classified.label_names`).

    Raises:
        ConfigError: there are no files, or more classes than the head has.
        DataError: a file cannot be read, or has classes that the training data has not.
    """
    data, model = config.dataset_config, config.model_config
    first = data.train_data_path or data.data_path
    if not first:
        raise ConfigError("num_labels: texts with classes are read from files; give data_path or train_data_path")
    tokenizer = build_tokenizer(
        data.tokenizer_type, tokenizer_model=data.tokenizer_model or None, vocab_file=data.vocab_file or None,
        merge_file=data.merge_file or None, vocab_size=data.unpadded_vocab_size or model.vocab_size - 1,
    )  # fmt: skip
    pad = tokenizer.eod if tokenizer.pad is None else tokenizer.pad
    names: list[str] | None = None
    built: list[ClassifiedDataset | None] = []
    for files, samples in zip((first, data.valid_data_path, data.test_data_path), num_samples):
        rows, names = classified_rows(files[0], tokenizer.tokenize, names) if files else ([], names)
        if names is not None and len(names) > model.num_labels:
            raise ConfigError(f"num_labels={model.num_labels}: {first[0]} has {len(names)} classes: {', '.join(names)}")
        built.append(
            ClassifiedDataset(rows, samples, model.seq_length, pad, config.training_config.seed) if files else None
        )
    return built[0], built[1], built[2]
