"""MindFormers' `pipeline`: texts in, texts out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from parallel_core.api.auto import AutoModel, AutoTokenizer
from parallel_core.api.models import BertForQuestionAnswering, PreTrainedModel
from parallel_core.api.tokenizers import PreTrainedTokenizer
from parallel_core.data.tokenizer.wordpiece import BertWordPieceTokenizer
from parallel_core.errors import ConfigError
from parallel_core.question_answering.answerer import Answerer, split_input

TASKS = ("text_generation", "question_answering")


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

    def __call__(self, inputs: str | Sequence[str], **settings: Any) -> list[dict[str, list[str]]]:
        """Return the continuation of a text, or of each of several."""
        how = {"eos_token_id": self.tokenizer.eos_token_id, **self.settings, **settings}
        texts = [inputs] if isinstance(inputs, str) else list(inputs)
        prompts = [self.tokenizer.encode(text) for text in texts]
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


def pipeline(
    task: str,
    model: str | Path | PreTrainedModel,
    tokenizer: str | Path | PreTrainedTokenizer | None = None,
    **settings: Any,
) -> TextGenerationPipeline | QuestionAnsweringPipeline:
    """Return what does a task.

    Args:
        task: text_generation or question_answering.
        model: a directory or a name (`PreTrainedModel.from_pretrained`), or a model, which keeps its weights.
        tokenizer: a tokenizer or its directory; None: the model's directory.
        settings: of the task, where a call says nothing.

    Raises:
        ConfigError: the task is another, or a model is given without a tokenizer.
        CheckpointError: a directory is missing or has not what is asked for.
    """
    if task not in TASKS:
        raise ConfigError(f"task={task!r}: give one of {', '.join(TASKS)}")
    if tokenizer is None and isinstance(model, PreTrainedModel):
        raise ConfigError(f"task={task!r}: a model that is given needs its tokenizer; give tokenizer")
    words = tokenizer if isinstance(tokenizer, PreTrainedTokenizer) else AutoTokenizer.from_pretrained(
        str(model) if tokenizer is None else tokenizer
    )  # fmt: skip
    made = model if isinstance(model, PreTrainedModel) else AutoModel.from_pretrained(model)
    if task == "question_answering":
        return QuestionAnsweringPipeline(made, words, **settings)
    return TextGenerationPipeline(made, words, settings)
