"""MindFormers' `pipeline`: texts in, texts out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Tensor

from parallel_core.api.auto import AutoModel, AutoTokenizer
from parallel_core.api.models import BertForQuestionAnswering, PreTrainedModel
from parallel_core.api.register import MindFormerRegister
from parallel_core.api.tokenizers import PreTrainedTokenizer
from parallel_core.autograd import no_grad
from parallel_core.data.tokenizer.wordpiece import BertWordPieceTokenizer
from parallel_core.errors import ConfigError
from parallel_core.question_answering.answerer import Answerer, split_input

TASKS = ("text_generation", "question_answering", "text_classification")
_WITHOUT_EFFECT = ("batch_size", "use_past")
"""Settings that change nothing: texts have the batches that fit, and a cache is always kept."""


@dataclasses.dataclass
class TextGenerationPipeline:
    """Continues texts: a list of {"text_generation_text": [prompt and continuation]}.

    Attributes:
        model: what continues them.
        tokenizer: of the texts.
        settings: of generation, where a call says nothing; see `PreTrainedModel.generate`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizer
    settings: dict[str, Any]

    def __call__(
        self, inputs: str | Mapping[str, str] | Sequence[str | Mapping[str, str]], **settings: Any
    ) -> list[dict[str, list[str]]]:
        """Return the continuation of a text or {"text": ...}, or of each of several.

        `keys={"src_language": name}` names the entry of a dictionary, `add_special_tokens=False` leaves out what the
        tokenizer puts around texts.
        """
        how = {"eos_token_id": self.tokenizer.eos_token_id, **self.settings, **settings}
        entry = (how.pop("keys", None) or {}).get("src_language", "text")
        around = how.pop("add_special_tokens", True)
        each = [inputs] if isinstance(inputs, (str, Mapping)) else list(inputs)
        texts = [one if isinstance(one, str) else one[entry] for one in each]
        prompts = [self.tokenizer.encode(text, around) for text in texts]
        rows = self.model.generate(prompts, **how)
        return [{"text_generation_text": [str(self.tokenizer.decode(row))]} for row in rows]


class QuestionAnsweringPipeline:
    """Answers questions: {"text", "score", "start", "end"} with text == context[start:end], the best first.

    Args:
        model: an encoder with a head for answers.
        tokenizer: WordPiece.
        top_k: answers to each question.
        settings: seq_length, doc_stride, max_query_length, batch_size of windows.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizer, top_k: int = 1, **settings: Any
    ) -> None:
        if not isinstance(model, BertForQuestionAnswering) or model.heads != ("question_answering",):
            raise ConfigError(f"question_answering: {type(model).__name__} has no head for answers")
        if not isinstance(tokenizer.tokenizer, BertWordPieceTokenizer):
            raise ConfigError(f"question_answering: {type(tokenizer).__name__} is no WordPiece")
        self.top_k, self._answerer = top_k, Answerer(model.network, tokenizer.tokenizer, **settings)

    def __call__(
        self, inputs: str | Mapping[str, str] | Sequence[str | Mapping[str, str]], top_k: int | None = None
    ) -> list[Any]:
        """Return the answers to "context - question" or {"context", "question"}, or a list for each of several."""
        single = isinstance(inputs, (str, Mapping))
        asked = [inputs] if single else list(inputs)
        answers = self._answerer.answer([split_input(one) for one in asked])  # type: ignore[arg-type]
        found = [[one.as_dict() for one in of_one[: top_k or self.top_k]] for of_one in answers]
        return found[0] if single else found


class TextClassificationPipeline:
    """Says which class a text is of: {"label", "score"} of the likeliest ones.

    Args:
        model: a model with a head for texts.
        tokenizer: of the texts, which are cut to the model's positions.
        top_k: classes of each text; None: all.
        labels: the classes' names by number; None: LABEL_0, LABEL_1, ...
        batch_size: texts at once.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizer, top_k: int | None = 1,
        labels: Sequence[str] | None = None, batch_size: int = 8,
    ) -> None:  # fmt: skip
        if not type(model).labels:
            raise ConfigError(f"text_classification: {type(model).__name__} has no head for texts")
        count = model.network.config.num_labels
        self.model, self.tokenizer, self.top_k, self.batch_size = model, tokenizer, top_k, batch_size
        self.names = [f"LABEL_{i}" for i in range(count)] if labels is None else list(labels)
        if len(self.names) != count:
            raise ConfigError(f"labels: {len(self.names)} names, and the model has {count} classes")

    def __call__(self, inputs: str | Sequence[str], top_k: int | None = None) -> list[list[dict[str, Any]]]:
        """Return for each text its classes, the likeliest first."""
        texts = [inputs] if isinstance(inputs, str) else list(inputs)
        found = []
        for scores in self.scores([self.tokenizer.encode(text) for text in texts]):
            weights = np.exp(scores - scores.max())
            order = np.argsort(-scores, kind="stable")[: top_k or self.top_k or len(scores)]
            found.append([{"label": self.names[i], "score": float(weights[i] / weights.sum())} for i in order])
        return found

    def labels(self, texts: Sequence[Sequence[int]]) -> list[int]:
        """Return the number of the likeliest class of each text, given by its ids."""
        return [int(scores.argmax()) for scores in self.scores(texts)]

    def scores(self, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Return float64 [num_labels] of each text, given by its ids."""
        longest = self.model.network.config.max_position_embeddings
        rows = [list(ids)[:longest] or [self.tokenizer.eos_token_id] for ids in texts]
        found: list[np.ndarray] = []
        for begin in range(0, len(rows), self.batch_size):
            batch = rows[begin : begin + self.batch_size]
            width = max(map(len, batch))
            ids = np.array([row + [self.tokenizer.pad_token_id] * (width - len(row)) for row in batch], np.int32)
            seen = np.array([[int(at < len(row)) for at in range(width)] for row in batch], np.int32)
            with no_grad():
                found += list(self.model(Tensor(ids), Tensor(seen)).asnumpy().astype(np.float64))
        return found


def pipeline(
    task: str,
    model: str | Path | PreTrainedModel,
    tokenizer: str | Path | PreTrainedTokenizer | None = None,
    **settings: Any,
) -> Any:
    """Return what does a task.

    Args:
        task: text_generation, question_answering, text_classification, or a registered one.
        model: a directory or a name (`PreTrainedModel.from_pretrained`), or a model, which keeps its weights.
        tokenizer: a tokenizer or its directory; None: the model's directory.
        settings: of the task, where a call says nothing.

    Raises:
        ConfigError: the task is another, or a model is given without a tokenizer.
        CheckpointError: a directory is missing or has not what is asked for.
    """
    registered = MindFormerRegister.is_exist("pipeline", task)
    if task not in TASKS and not registered:
        raise ConfigError(f"task={task!r}: give one of {', '.join(TASKS)}, or register it")
    if tokenizer is None and isinstance(model, PreTrainedModel):
        raise ConfigError(f"task={task!r}: a model that is given needs its tokenizer; give tokenizer")
    words = tokenizer if isinstance(tokenizer, PreTrainedTokenizer) else AutoTokenizer.from_pretrained(
        str(model) if tokenizer is None else tokenizer
    )  # fmt: skip
    made = model if isinstance(model, PreTrainedModel) else AutoModel.from_pretrained(model)
    if registered:
        return MindFormerRegister.get_cls("pipeline", task)(made, tokenizer=words, **settings)
    if task == "question_answering":
        return QuestionAnsweringPipeline(made, words, **settings)
    if task == "text_classification":
        return TextClassificationPipeline(made, words, **settings)
    return TextGenerationPipeline(made, words, {k: v for k, v in settings.items() if k not in _WITHOUT_EFFECT})
