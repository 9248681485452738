"""From a checkpoint's directory to a rank's part of its model, and its tokenizer; nothing is repeated by the user."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Tensor

from parallel_core.checkpoint import TensorSource, find_checkpoint, load_shards, open_checkpoint
from parallel_core.checkpoint.huggingface.tokenizer import tokenizer_settings
from parallel_core.checkpoint.loading import VOCABULARY_TENSORS
from parallel_core.checkpoint.opening import require_intact_source
from parallel_core.config.model_keys import model_of_settings
from parallel_core.config.schema import AllConfig, ModelParallelConfig, TransformerConfig
from parallel_core.context import ParallelContext
from parallel_core.data.chat import FORMATS, ChatTemplate, chat_template, tokenizer_folders
from parallel_core.data.tokenizer import MegatronTokenizer, TokenizerSpec
from parallel_core.errors import ConfigError, ParallelCoreError
from parallel_core.generate.cache import KeyValueCache
from parallel_core.generate.layout import Layout, check_layout
from parallel_core.generate.stage import build_cached_model
from parallel_core.layout.shard import shard_of
from parallel_core.training.model import get_model
from parallel_core.training.runtime import supported_precision
from parallel_core.transformer import GPTModel


@dataclass(frozen=True)
class Described:
    """What a checkpoint says of its model.

    Attributes:
        path: the checkpoint's own directory.
        source: its tensors.
        model: the model's settings; the vocabulary is not padded.
        longest: tokens of a sequence that the model was made for.
        tokenizer: of its texts; None where the checkpoint knows of none.
        why_no_tokenizer: why there is none.
        noop_layers: numbers of layers that do nothing.
    """

    path: Path
    source: TensorSource
    model: TransformerConfig
    longest: int
    tokenizer: MegatronTokenizer | None
    why_no_tokenizer: str
    noop_layers: tuple[int, ...] = ()

    @property
    def tokenizer_folders(self) -> list[str]:
        """Where the files of its tokenizer are, and what lies beside them; the checkpoint's own directory first."""
        settings = tokenizer_settings(self.source.common)
        return [str(self.path), *tokenizer_folders(settings.get("tokenizer_model"), settings.get("vocab_file"))]


def template_of(described: Described, named: str = "default") -> ChatTemplate | None:
    """Return how a model's conversations are written; None where nothing says so.

    Args:
        described: the model.
        named: a name of `FORMATS` or a file; default: as the model was trained, else as its tokenizer says.

    Raises:
        ConfigError: the template cannot be read.
    """
    if described.tokenizer is None:
        return None
    data = _section(described.source.common, "dataset_config")
    trained = data if data.get("sft") else {}
    if named != "default":
        trained = {"sft_tokenizer_prompt_format": named} if named in FORMATS else {"chat_template": named}
    return chat_template(
        described.tokenizer,
        described.tokenizer_folders,
        str(trained.get("sft_tokenizer_prompt_format") or "default"),
        str(trained.get("chat_template") or ""),
    )


def describe(load: str | Path, step: int | None = None, base: str = "") -> Described:
    """Return what the checkpoint in a directory says; nothing of its tensors is read.

    Args:
        load: a run's directory of checkpoints or one checkpoint's own, native or Megatron's, or a Hugging Face model.
        step: the iteration to take; None: the latest.
        base: of adapters, the base model's directory, over the one that they name.

    Raises:
        CheckpointError: there is no checkpoint, or it cannot be read.
        ConfigError: it does not say what model it holds, or of one that cannot be continued.
    """
    path = Path(find_checkpoint(str(load), step, check=False))
    source = open_checkpoint(path, base=base)
    settings = source.common.get("model_config")
    if not isinstance(settings, Mapping) or not settings:
        raise ConfigError(f"{path}: does not say what model it holds; convert it with tools.convert_megatron first")
    rows = source.info(VOCABULARY_TENSORS[0]).shape[0]
    settings = {**settings, "vocab_size": settings.get("vocab_size") or rows}
    model = replace(model_of_settings(settings), attention_dropout_rate=0.0, hidden_dropout_rate=0.0)
    if model.bert.is_encoder:
        raise ConfigError(f"{path}: bert_head={model.bert.bert_head}: an encoder continues no text")
    longest = model.max_position_embeddings or model.seq_length
    if model.rope_dynamic_factor != 1.0:
        # Beyond it the angles of all positions change with every token, and kept keys would be of others.
        longest = min(longest, model.rope_original_max_position_embeddings)
    tokenizer, why = _tokenizer(source, path)
    parallel = _section(source.common, "parallel_config")
    noop = tuple(n for n in parallel.get("noop_layers") or () if isinstance(n, int))
    return Described(path, source, model, longest, tokenizer, why, noop)


def _section(common: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    tree = common.get("config")
    section = tree.get(name) if isinstance(tree, Mapping) else None
    return section if isinstance(section, Mapping) else {}


def _tokenizer(source: TensorSource, path: Path) -> tuple[MegatronTokenizer | None, str]:
    try:
        spec = _pangu_tokenizer(path) if source.format in ("pangu-alpha", "hugging face") else None
        if spec is None and source.format != "pangu-alpha":
            beside = source.format.partition(",")[0] in ("hugging face", "mindformers")
            spec = _tokenizer_beside(path) if beside else _trained_tokenizer(source)
        return (None, f"{path} knows of no tokenizer") if spec is None else (spec.build(), "")
    except (ParallelCoreError, OSError) as error:
        return None, str(error)


def _tokenizer_beside(path: Path) -> TokenizerSpec | None:
    if (path / "tokenizer.json").exists():
        return TokenizerSpec(
            "HuggingFaceTokenizer", tokenizer_model=str(path), tokenizer_hf_include_special_tokens=True
        )
    if (path / "vocab.json").exists() and (path / "merges.txt").exists():
        return TokenizerSpec(
            "GPT2BPETokenizer", vocab_file=str(path / "vocab.json"), merge_file=str(path / "merges.txt")
        )
    if (path / "tokenizer.model").exists():
        return TokenizerSpec("SentencePieceTokenizer", tokenizer_model=str(path / "tokenizer.model"))
    return None


def _pangu_tokenizer(path: Path) -> TokenizerSpec | None:
    file = path / "vocab.model"
    return TokenizerSpec("PanguTokenizer", tokenizer_model=str(file)) if file.exists() else None


def _trained_tokenizer(source: TensorSource) -> TokenizerSpec | None:
    settings = tokenizer_settings(source.common)
    return TokenizerSpec(**settings) if settings.get("tokenizer_type") else None


def checked_length(described: Described, asked: int | None) -> int:
    """Return how many tokens a sequence may have.

    Raises:
        ConfigError: if the model cannot have as many.
    """
    if asked is None:
        return described.longest
    learned = described.model.position_embedding_type == "learned_absolute" or described.model.rope_dynamic_factor != 1
    if asked < 1 or (learned and asked > described.longest):
        raise ConfigError(f"max_length={asked}: give 1 to {described.longest}, the positions that the model has")
    return asked


def build_config(described: Described, layout: Layout) -> AllConfig:
    """Return a run's configuration for the model in a layout: what the model's parts are built from.

    Raises:
        ConfigError: if the model cannot be cut that way.
    """
    model, tp, pp = described.model, layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    check_layout(model, layout)
    per_stage, more = divmod(model.num_layers, pp)
    counts = tuple((per_stage + (stage < more),) for stage in range(pp))
    config = AllConfig(
        model_config=replace(model, vocab_size=-(-model.vocab_size // tp) * tp),
        parallel_config=ModelParallelConfig(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            num_layer_list=counts if pp > 1 else (),
            noop_layers=described.noop_layers,
            distributed_timeout_minutes=layout.distributed_timeout_minutes,
        ),
    )
    return supported_precision(config)[0]


def load_model(described: Described, config: AllConfig, context: ParallelContext, cache: KeyValueCache) -> GPTModel:
    """Return this rank's stage with its weights.

    Raises:
        CheckpointError: if the checkpoint is damaged, or its tensors are not those of the model.
    """
    if context.rank == 0:
        require_intact_source(described.source)
    rank_model = get_model(lambda stage, **_: build_cached_model(stage, cache), config, context)
    model: Any = rank_model.chunks[0]
    parameters = list(model.get_parameters())
    wanted = {shard_of(p).name: shard_of(p) for p in parameters}
    known = {key for keys in context.world.all_gather_object(list(wanted)) for key in keys}
    known.update(key for key in described.source.keys() if "@" in key)  # noqa: SIM118 - a method of TensorSource
    for i, parameter in enumerate(parameters):
        name = shard_of(parameter).name
        # One at a time: the first values are given back before the next weights are read.
        arrays, _ = load_shards(described.source, {name: wanted[name]}, all_keys=None if i else known)
        parameter.set_data(Tensor.from_numpy(np.ascontiguousarray(arrays.pop(name))))
    _give_back_freed_memory()
    return model


def _give_back_freed_memory() -> None:
    """Return to the system what loading has freed, which the allocator keeps for steps of training."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return  # another C library: only more memory
