"""A trained encoder that answers questions, on one process or on ranks that share the questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Tensor

from parallel_core.autograd import no_grad
from parallel_core.checkpoint import TensorSource, find_checkpoint, load_shards, open_checkpoint
from parallel_core.checkpoint.huggingface.tokenizer import tokenizer_settings
from parallel_core.checkpoint.huggingface.values import read_json
from parallel_core.comm.objects import shared_out
from parallel_core.config.model_keys import model_of_settings
from parallel_core.config.schema import ModelParallelConfig
from parallel_core.context import ParallelContext
from parallel_core.data.squad import Feature, Question, as_arrays, features_of
from parallel_core.data.tokenizer import TokenizerSpec
from parallel_core.data.tokenizer.wordpiece import BertWordPieceTokenizer
from parallel_core.errors import CheckpointError, ConfigError
from parallel_core.layout.shard import shard_of
from parallel_core.ops import use_kernels
from parallel_core.question_answering.answers import Answer, best_answers
from parallel_core.training.runtime import start_runtime
from parallel_core.transformer import ModelStage
from parallel_core.transformer.models import BertModel


class Answerer:
    """Answers questions by a model in memory; `load` makes one of a checkpoint.

    Args:
        model: an encoder with a head for answers, whole on this process, without dropout.
        tokenizer: of questions and contexts.
        seq_length: positions of a window; None: those that the model has, at most 384.
        doc_stride: pieces between the beginnings of two windows; None: a third of the positions.
        max_query_length: pieces of a question that are kept; None: a sixth of the positions.
        batch_size: windows that are computed at once.
        context: the ranks: those of `dp` share the questions, those of `tp` the layers of `model`; None: this process.

    Raises:
        ConfigError: the model has not as many positions.
    """

    def __init__(
        self,
        model: BertModel,
        tokenizer: BertWordPieceTokenizer,
        *,
        seq_length: int | None = None,
        doc_stride: int | None = None,
        max_query_length: int | None = None,
        batch_size: int = 8,
        context: ParallelContext | None = None,
    ) -> None:
        self.context = context or ParallelContext.solo()
        positions = model.config.max_position_embeddings
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.seq_length = seq_length or min(384, positions)
        self.doc_stride = doc_stride or max(1, self.seq_length // 3)
        self.max_query_length = max_query_length or max(1, self.seq_length // 6)
        if self.seq_length > positions:
            raise ConfigError(f"seq_length={self.seq_length}: the model has {positions} positions")

    @classmethod
    def load(
        cls, load: str | Path, step: int | None = None, tensor_model_parallel_size: int = 1, **settings: Any
    ) -> Answerer:
        """Return one with the model and the tokenizer of a checkpoint.

        Args:
            load: a run's directory of checkpoints, one checkpoint's own, or a Hugging Face directory.
            step: the iteration to take; None: the latest.
            tensor_model_parallel_size: ranks of the job that share the layers; the others share the questions.
            settings: the class's further arguments.

        Raises:
            CheckpointError: there is no checkpoint, or it cannot be read; the folder is named.
            ConfigError: it holds no model that answers questions, or knows of no tokenizer.
        """
        path = Path(find_checkpoint(str(load), step))
        source = open_checkpoint(path)
        stored = source.common.get("model_config")
        head = stored.get("bert_head", "none") if isinstance(stored, Mapping) else "none"
        if not isinstance(stored, Mapping) or head != "question_answering":
            raise ConfigError(f"{path}: bert_head={head}: only an encoder with a head for answers gives any")
        tokenizer = _tokenizer(source, path)
        layout = ModelParallelConfig(tensor_model_parallel_size=tensor_model_parallel_size)
        context = ParallelContext.create(layout, *start_runtime())
        use_kernels("auto")
        rows = source.info("embedding.word_embeddings.weight").shape[0]
        padded = rows + -rows % context.tp.size  # each rank has as many rows of the word embedding
        model = model_of_settings({**stored, "padded_vocab_size": padded})
        still = {"attention_dropout_rate": 0.0, "hidden_dropout_rate": 0.0, "params_dtype": "float32"}
        config = replace(model, **still, compute_dtype="float32")  # type: ignore[arg-type]
        made = BertModel(ModelStage(config, context.tp))
        parameters = list(made.get_parameters())
        wanted = {shard_of(p).name: shard_of(p) for p in parameters}
        known = [*wanted, *(key for key in source.keys() if "@" in key)]  # noqa: SIM118 - a method of TensorSource
        arrays, _ = load_shards(source, wanted, all_keys=known)
        for parameter in parameters:
            parameter.set_data(Tensor.from_numpy(np.ascontiguousarray(arrays[shard_of(parameter).name])))
        return cls(made, tokenizer, context=context, **settings)

    def answer(self, questions: Sequence[Question], **options: Any) -> list[list[Answer]]:
        """Return the likeliest answers of each question, on every rank; see `best_answers` for the options."""
        def told(part: Sequence[Question]) -> list[Any]:
            found = self._answer(part, **options)
            return [[(a.text, a.probability, a.start, a.end) for a in one] for one in found]

        return [[Answer(*values) for values in one] for one in shared_out(self.context.dp, questions, told)]

    def _answer(self, questions: Sequence[Question], **options: Any) -> list[list[Answer]]:
        features = features_of(
            questions,
            self.tokenizer,
            seq_length=self.seq_length,
            doc_stride=self.doc_stride,
            max_query_length=self.max_query_length,
        )
        logits = self._logits(features)
        found = []
        for number, question in enumerate(questions):
            mine = [i for i, feature in enumerate(features) if feature.question == number]
            of_windows = [features[i] for i in mine], [logits[i] for i in mine]
            found.append(best_answers(question, *of_windows, self.tokenizer, **options))
        return found

    def _logits(self, features: Sequence[Feature]) -> list[np.ndarray]:
        """Return float32 [S, 2] of each window."""
        logits: list[np.ndarray] = []
        for begin in range(0, len(features), self.batch_size):
            batch = as_arrays(features[begin : begin + self.batch_size], self.seq_length, int(self.tokenizer.pad or 0))
            inputs = (Tensor(batch[name]) for name in ("tokens", "attention_mask", "tokentype_ids"))
            with no_grad():
                logits += list(self.model(*inputs).asnumpy())
        return logits


def split_input(text: str | Mapping[str, str]) -> Question:
    """Return a question from `{"context": ..., "question": ...}` or "context - question", cut at the last " - ".

    Raises:
        ConfigError: it has neither form.
    """
    if isinstance(text, Mapping):
        if not {"context", "question"} <= text.keys():
            raise ConfigError(f"{sorted(text)} is no question; give context and question")
        return Question("", text["question"], text["context"])
    context, mark, question = text.rpartition(" - ")
    if not mark or not context.strip() or not question.strip():
        raise ConfigError(f'{text[:60]!r} has no " - " between a context and a question')
    return Question("", question.strip(), context)


def _tokenizer(source: TensorSource, path: Path) -> BertWordPieceTokenizer:
    if source.format == "hugging face":
        file, told = path / "vocab.txt", path / "tokenizer_config.json"
        if not file.is_file():
            raise CheckpointError(f"{path} has no vocab.txt, which says what the model's words are")
        lower = read_json(told).get("do_lower_case", True) if told.is_file() else True
        return BertWordPieceTokenizer(str(file), bool(lower))
    settings = tokenizer_settings(source.common)
    tokenizer = TokenizerSpec(**settings).build() if settings.get("tokenizer_type") else None
    if not isinstance(tokenizer, BertWordPieceTokenizer):
        raise ConfigError(f"{path} knows of no WordPiece tokenizer; convert it with its vocab.txt")
    return tokenizer
