"""Base class of user-defined models."""

from __future__ import annotations

from typing import Any

from mindspore import Parameter, Tensor, nn

from parallel_core.compat.mindspeed.stage import current_stage
from parallel_core.config.schema import TransformerConfig
from parallel_core.errors import ConfigError


class Module(nn.Cell):
    """A model, or the part of one that a pipeline stage holds.

    A subclass sets `pre_process`, `post_process` and `language_model`, and calls `initialize_word_embeddings()` if its
    output layer uses the embedding's weight.

    Args:
        config: the model's configuration.
        share_embeddings_and_output_weights: the output layer may use the embedding's weight.
    """

    pre_process: bool = True
    post_process: bool = True

    def __init__(self, config: TransformerConfig, share_embeddings_and_output_weights: bool = True) -> None:
        super().__init__(auto_prefix=True)
        self.config = config
        self.share_embeddings_and_output_weights = share_embeddings_and_output_weights
        self.word_embeddings_copy: Parameter | None = None

    def set_input_tensor(self, input_tensor: Tensor | None) -> None:
        """Give the hidden states from the previous stage to the next call."""
        self._language_model().set_input_tensor(input_tensor)

    def initialize_word_embeddings(self) -> None:
        """Share the word embedding between the first and the last pipeline stage.

        On one stage there is nothing to do. Otherwise the last stage gets a copy, which starts equal because initial
        values go by name, and the gradients of the two are summed in every iteration.

        Raises:
            ConfigError: if the configuration has untied weights.
        """
        if not self._is_tied():
            raise ConfigError(
                "initialize_word_embeddings: untie_embeddings_and_output_weights is set, so there is nothing to share"
            )
        if self.pre_process == self.post_process:
            return  # the only stage, or one between
        stage = current_stage(self.config, self.pre_process, self.post_process)
        self.word_embeddings_copy = stage.share_word_embeddings(self._embedding_weight() if self.pre_process else None)

    def shared_embedding_or_output_weight(self) -> Parameter:
        """Return the [V / tp, H] weight of the output layer that is tied to the embedding, on the first or last stage.

        Raises:
            ConfigError: on a stage between, or if `initialize_word_embeddings` was not called on the last one.
        """
        if self.word_embeddings_copy is not None:
            return self.word_embeddings_copy
        if self.pre_process:
            return self._embedding_weight()
        raise ConfigError(
            "shared_embedding_or_output_weight: this stage holds no embedding; on the last stage call "
            "initialize_word_embeddings() in the model's __init__"
        )

    def _is_tied(self) -> bool:
        return self.share_embeddings_and_output_weights and not self.config.untie_embeddings_and_output_weights

    def _language_model(self) -> Any:
        model = getattr(self, "language_model", None)
        if model is None:
            raise ConfigError(f"{type(self).__name__} has no language_model; set it in __init__")
        return model

    def _embedding_weight(self) -> Parameter:
        return self._language_model().embedding.word_embeddings.weight
