"""MindFormers' directories: a `.ckpt` file, whole or in slices of ranks, and a `.yaml` that says what it holds.

GPT-2, LLaMA and BERT; PanGu-alpha has files of its own (`pangu`). The `.yaml` is that of `save_pretrained`, or of a
run: its `model.model_config` is read. What is no weight (optimizer state, counters, caches) is left out, and adapters
beside the weights are added to them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from parallel_core.checkpoint.huggingface.tensors import (
    FINAL_NORM,
    OUTPUT,
    OUTPUT_BIAS,
    POSITIONS,
    SCORE,
    TOKENTYPES,
    WORD_EMBEDDINGS,
    Part,
    TensorTable,
    our_shapes,
)
from parallel_core.checkpoint.huggingface.tokenizer import write_tokenizer
from parallel_core.checkpoint.huggingface.writer import check_names, model_of_source
from parallel_core.checkpoint.layout_files import os_errors_named, write_durably
from parallel_core.checkpoint.mindspore.adapters import StoredAdapters
from parallel_core.checkpoint.mindspore.pangu import NO_WEIGHT, rank_files, stored_slices
from parallel_core.checkpoint.mindspore.slices import Whole, placed, whole_parameters
from parallel_core.checkpoint.mindspore.writer import write_ckpt_file
from parallel_core.checkpoint.source import PieceSource, TensorSource
from parallel_core.config.mindformers import with_base_files
from parallel_core.config.mindformers.models import BERT, GPT2, LLAMA, Family, number_or_word
from parallel_core.config.model_keys import DEFINING, NAME_OF, has_effect, model_settings, value_of
from parallel_core.config.schema import TransformerConfig
from parallel_core.config.yaml_tree import read_leaves
from parallel_core.errors import CheckpointError, ConfigError, bullet_list
from parallel_core.layout.shard import Range
from parallel_core.records import show

CLASSES = "classes"
"""The head of `num_labels`, beside those that `bert_head` names."""
FORMAT = "mindformers"
NAME = "mindspore_model"
"""Of the two files, as `save_pretrained` calls them."""
_TOLD = ("model", "model_config")
_OF_COMPUTATION = ("param_init_type", "compute_dtype", "softmax_compute_type")
"""Keywords that say in which types a model is computed, not what it is."""


def _norm(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.weight": f"{theirs}.gamma", f"{ours}.bias": f"{theirs}.beta"}


def _linear(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.{kind}": f"{theirs}.{kind}" for kind in ("weight", "bias")}


_MATRICES = {
    "self_attention.linear_qkv": ("attention.dense1", "attention.dense2", "attention.dense3"),
    "self_attention.linear_proj": ("attention.projection",),
    "mlp.linear_fc1": ("output.mapping",),
    "mlp.linear_fc2": ("output.projection",),
}
"""Of the layers that GPT-2 and BERT share there."""
_WORDS = ("mlmloss.", "nsploss.", "bert.mlmloss.")
"""The heads of pretraining; the last as their converter from `transformers` calls it, which they load nowhere."""
_TURNED = frozenset({"self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"})


@dataclass(frozen=True)
class Dialect:
    """How a family's tensors are called and stored.

    Attributes:
        family: the family.
        table: their names; norms in layers by their module.
        architecture: our head -> what `arch.type` is.
        turned: our modules whose matrices are stored [in, out].
        left_out: their tensors that a head has no use for.
    """

    family: Family
    table: TensorTable
    architecture: Mapping[str, str]
    turned: frozenset[str] = frozenset()
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def model(self, values: Mapping[str, Any], head: str) -> TransformerConfig:
        """Return the model of keywords and a head.

        Raises:
            ConfigError: a value cannot be.
        """
        model = self.family.model(values)
        return replace(model, num_labels=values.get("num_labels", 2)) if head == CLASSES else model

    def sources(self, model: TransformerConfig) -> dict[str, list[Part]]:
        """Return which rows of theirs each of our tensors consists of."""
        found = {}
        for name, parts in self.table.parts(model).items():
            module = name.removeprefix("decoder.layers.").partition(".")[2].rpartition(".")[0]
            in_layer, norm = name.startswith("decoder.layers."), name.rpartition(".")[0].endswith("layernorm")
            turned = in_layer and module in self.turned and name.endswith(".weight")
            renamed = partial(_gamma_and_beta, norm and in_layer and self.family.name != "LlamaConfig")
            found[name] = [Part(renamed(p.name), p.ours, p.theirs, p.rows, turned) for p in parts]
        return found


def _gamma_and_beta(norm: bool, name: str) -> str:
    head, _, kind = name.rpartition(".")
    return f"{head}.{ {'weight': 'gamma', 'bias': 'beta'}[kind] }" if norm else name


DIALECTS = {
    dialect.family.name: dialect
    for dialect in (
        Dialect(
            GPT2,
            TensorTable(
                "backbone.",
                {
                    WORD_EMBEDDINGS: "backbone.embedding.word_embedding.embedding_table",
                    POSITIONS: "backbone.embedding.position_embedding.embedding_table",
                    **_norm(FINAL_NORM, "backbone.layernorm"), SCORE: "score.weight",
                },
                "blocks.{}",
                {
                    "input_layernorm": ("layernorm1",), "pre_mlp_layernorm": ("layernorm2",),
                    **_MATRICES,
                },
            ),
            {"none": "GPT2LMHeadModel", CLASSES: "GPT2ForSequenceClassification"},
            _TURNED,
        ),
        Dialect(
            LLAMA,
            TensorTable(
                "model.",
                {
                    WORD_EMBEDDINGS: "model.tok_embeddings.embedding_weight",
                    f"{FINAL_NORM}.weight": "model.norm_out.weight", OUTPUT: "lm_head.weight",
                },
                "layers.{}",
                {
                    "input_layernorm": ("attention_norm",), "pre_mlp_layernorm": ("ffn_norm",),
                    "self_attention.linear_qkv": ("attention.wq", "attention.wk", "attention.wv"),
                    "self_attention.linear_proj": ("attention.wo",),
                    "mlp.linear_fc1": ("feed_forward.w1", "feed_forward.w3"), "mlp.linear_fc2": ("feed_forward.w2",),
                },
            ),
            {"none": "LlamaForCausalLM"},
        ),
        Dialect(
            BERT,
            TensorTable(
                "bert.bert_encoder.encoder.",
                {
                    WORD_EMBEDDINGS: "bert.word_embedding.embedding_table",
                    POSITIONS: "bert.embedding_postprocessor.full_position_embedding.embedding_table",
                    TOKENTYPES: "bert.embedding_postprocessor.token_type_embedding.embedding_table",
                    **_norm("embedding.layernorm", "bert.embedding_postprocessor.layernorm"),
                    **_linear("pooler.dense", "bert.dense"), **_linear("qa_outputs", "qa_outputs"),
                    **_linear("lm_head.dense", "mlmloss.dense"), **_norm("lm_head.layernorm", "mlmloss.layernorm"),
                    OUTPUT_BIAS: "mlmloss.output_bias", **_linear("binary_head", "nsploss.dense"),
                },
                "blocks.{}",
                {
                    # Their first norm stands behind the MLP, the second behind attention.
                    "post_attention_layernorm": ("layernorm2",), "post_mlp_layernorm": ("layernorm1",),
                    **_MATRICES,
                },
            ),
            {
                "question_answering": "BertForQuestionAnswering", "encoder": "BertModel",
                "pretraining": "BertForPreTraining",
            },
            _TURNED,
            {
                "question_answering": ("bert.dense.", *_WORDS), "encoder": (*_WORDS, "qa_outputs."),
                "pretraining": ("qa_outputs.",),
            },
        ),
    )
}  # fmt: skip


def is_mindformers_directory(path: Path) -> bool:
    """Tell whether a directory holds MindSpore `.ckpt` files and the `.yaml` of a model that is read here."""
    return path.is_dir() and bool(rank_files(path)) and _described(path)[1] in DIALECTS


class MindFormersCheckpoint(PieceSource):
    """A model of MindFormers as global tensors; iteration 0, no optimizer state."""

    def __init__(self, path: str | Path) -> None:
        """Read where the tensors are.

        Raises:
            CheckpointError: a file is damaged, the `.yaml` is of another model, a slice or a tensor is missing, or a
                tensor has no known place.
        """
        path = Path(path)
        with os_errors_named(path):
            stored = whole_parameters(*stored_slices(path), str(path))
            file, kind, head, values, adapters = _described(path)
        dialect = DIALECTS[kind]
        found = {name: whole for name, whole in stored.items() if NO_WEIGHT.match(name) is None}
        try:
            model = dialect.model(values, head)
        except (ConfigError, TypeError) as error:
            raise CheckpointError(f"{file}: model.model_config: {error}") from None
        _check_sizes(file, model, found)
        shapes, sources = our_shapes(model), dialect.sources(model)
        self._adapters = StoredAdapters(path, found, adapters, shapes, sources)
        known = {part.name for parts in sources.values() for part in parts} | self._adapters.names
        unused = dialect.left_out.get(model.bert.bert_head, ())
        strange = [show(name) for name in found if name not in known and not name.startswith(unused)]
        if strange:
            raise CheckpointError(f"{path}: {len(strange)} tensors of no known place:\n{bullet_list(strange, 20)}")
        common = {
            "iteration": 0,
            "consumed_train_samples": 0,
            "consumed_valid_samples": 0,
            "model_config": {**model_settings(model), "vocab_size": model.vocab_size},
        }
        kind = f"{FORMAT}, adapters added" if self._adapters.names else FORMAT
        super().__init__(path, kind, placed(path, shapes, sources, found), common)

    def read_into(self, key: str, ranges: Sequence[Range], out: np.ndarray) -> int:
        """Fill `out` with a rectangle of `key`, adapters added; return the number of pieces of weights read."""
        count = super().read_into(key, ranges, out)
        self._adapters.add_to(key, self.info(key).dtype, ranges, out)
        return count


def _described(path: Path) -> tuple[Path, str, str, dict[str, Any], dict[str, Any]]:
    """Return the file that says what model it is, its family, head and keywords, and those of its adapters.

    Without a file that says it there is no family.

    Raises:
        CheckpointError: several files say it, or one cannot be read.
    """
    found: list[tuple[Path, str, str, dict[str, Any], dict[str, Any]]] = []
    for file in sorted((*path.glob("*.yaml"), *path.glob("*.yml"))):
        try:
            leaves, _ = with_base_files(read_leaves(str(file), {})[0], str(file))
        except ConfigError as error:
            raise CheckpointError(str(error)) from None
        told = {leaf.path[2]: leaf.value for leaf in leaves if leaf.path[:2] == _TOLD and len(leaf.path) == 3}
        kind = str(told.pop("type", ""))
        if kind:
            head = next((leaf.value for leaf in leaves if leaf.path == ("model", "arch", "type")), None)
            adapters = {leaf.path[3]: number_or_word(leaf.value) for leaf in leaves
                        if leaf.path[:3] == (*_TOLD, "pet_config") and len(leaf.path) == 4}  # fmt: skip
            found.append((file, kind, *_keywords(kind, told, head), adapters))
    if len(found) > 1:
        names = ", ".join(file.name for file, *_ in found)
        raise CheckpointError(f"{path}: {names} each say what model it is; leave one")
    return found[0] if found else (path, "", "", {}, {})


def _keywords(kind: str, told: Mapping[str, Any], named: object) -> tuple[str, dict[str, Any]]:
    """Return the head of a model and its family's keywords with their values, numbers as numbers."""
    dialect = DIALECTS.get(kind)
    if dialect is None:
        return "", {}
    family = dialect.family
    spelled = {family.aliases.get(name, name): value for name, value in told.items()}
    values = {name: number_or_word(value) for name, value in spelled.items() if name in family.settings}
    known = {**family.architectures, **{theirs: ours for ours, theirs in dialect.architecture.items()}}
    usual = str(values.get("head") or next(iter(dialect.architecture)))
    if named is not None and str(named) not in known:
        raise CheckpointError(f"model.arch.type {show(named)} is not read; {', '.join(known)} are")
    head = usual if named is None else known[str(named)]
    if "head" in family.settings:
        values["head"] = head
    return head, {name: value for name, value in values.items() if value is not None}


def _check_sizes(file: Path, model: TransformerConfig, found: Mapping[str, Whole]) -> None:
    """Refuse sizes that no stored tensor can have, before anything is laid out by them."""
    longest = max((max(whole.shape, default=0) for whole in found.values()), default=0)
    if model.num_layers > len(found):
        raise CheckpointError(f"{file} says {model.num_layers} layers, the files hold {len(found)} tensors")
    positions = () if model.is_rotary else ("max_position_embeddings",)
    sizes = ("vocab_size", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "num_labels")
    for name in (*sizes, *positions):
        if getattr(model, name) > longest:
            raise CheckpointError(f"{file} says {name} {getattr(model, name)}; the longest stored dim is {longest}")
    if model.num_attention_heads % model.num_query_groups:
        groups = f"{model.num_query_groups} key heads"
        raise CheckpointError(f"{file} says {groups}, of which {model.num_attention_heads} heads are no multiple")


# ---- writing --------------------------------------------------------------------------------------------------------
def write_mindformers(source: TensorSource, path: Path, progress: Callable[[int], None]) -> list[str]:
    """Write a model's parameters as one `.ckpt` file with MindFormers' names and a `.yaml`, as `write_pangu` does.

    Raises:
        CheckpointError: MindFormers has no such model; the settings are named.
    """
    model = model_of_source(source)
    dialect, values = _chosen(source, model)
    check_names(source, {key for key in source.keys() if "@" not in key}, model)  # noqa: SIM118 - of the protocol
    shapes = our_shapes(model)

    def as_it_is(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
        return name, array

    write_ckpt_file(path / f"{NAME}.ckpt", source, shapes, dialect.sources(model), as_it_is, progress)
    told = {"model_config": {"type": dialect.family.name, **values},
            "arch": {"type": dialect.architecture[_head(model)]}}  # fmt: skip
    write_durably(path / f"{NAME}.yaml", yaml.safe_dump({"model": told}, sort_keys=False))
    return write_tokenizer(source, path)[1]


def _chosen(source: TensorSource, model: TransformerConfig) -> tuple[Dialect, dict[str, Any]]:
    """Return the dialect that has a model, and the keywords that say what it is."""
    refusals: list[list[str]] = []
    for dialect in DIALECTS.values():
        if _head(model) not in dialect.architecture:
            continue
        values = _values(dialect.family, model)
        try:
            seen = dialect.model(values, _head(model))
        except ConfigError as error:
            refusals.append([f"{error} ({dialect.family.name})"])
            continue
        wrong = [
            f"{NAME_OF[name]}={value_of(model, name)!r}, {value_of(seen, name)!r} in {dialect.family.name}"
            for name in DEFINING
            if has_effect(model, name) and value_of(model, name) != value_of(seen, name)
        ]
        if not wrong:
            return dialect, values
        refusals.append(wrong)
    nearest = min(refusals, key=len, default=[f"a head for {_head(model)} has no names there"])
    raise CheckpointError(f"{source.path}: MindFormers has no such model:\n{bullet_list(nearest, 20)}")


def _head(model: TransformerConfig) -> str:
    return CLASSES if model.num_labels else model.bert.bert_head


def _values(family: Family, model: TransformerConfig) -> dict[str, Any]:
    """Return the keywords of a model; those that say nothing are left out."""
    values = {
        name: setting.back(getattr(model, setting.fields[0]))
        for name, setting in family.settings.items()
        if setting.fields and name not in _OF_COMPUTATION
    }
    if "expand_ratio" in family.settings and not model.ffn_hidden_size % model.hidden_size:
        values["expand_ratio"] = model.ffn_hidden_size // model.hidden_size
    if "embedding_dropout_prob" in family.settings:
        values["embedding_dropout_prob"] = values["hidden_dropout_rate"]
    if model.num_labels:
        values["num_labels"] = model.num_labels
    if "head" in family.settings:
        values.update(head=model.bert.bert_head, type_vocab_size=model.bert.num_tokentypes)
    return values
