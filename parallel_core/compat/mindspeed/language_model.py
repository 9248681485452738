"""Embedding and transformer layers of one stage, and the output layer's logits."""

from __future__ import annotations

import dataclasses
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn

from parallel_core.compat.mindspeed.eos_mask import document_starts_of_mask
from parallel_core.compat.mindspeed.stage import current_stage
from parallel_core.config.schema import TransformerConfig
from parallel_core.errors import ConfigError
from parallel_core.layout.shard import mark
from parallel_core.ops.documents import remember
from parallel_core.tensor_parallel.linear import ColumnParallelLinear
from parallel_core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from parallel_core.transformer.block import TransformerBlock
from parallel_core.transformer.embedding import LanguageModelEmbedding


def get_language_model(
    config: TransformerConfig,
    num_tokentypes: int = 0,
    add_pooler: bool = False,
    encoder_attn_mask_type: Any = None,
    add_encoder: bool = True,
    add_decoder: bool = False,
    decoder_attn_mask_type: Any = None,
    pre_process: bool = True,
    post_process: bool = True,
) -> tuple[TransformerLanguageModel, str]:
    """Return the language model of the stage that is being built, and its name in checkpoints, "language_model".

    Args:
        config: the model's configuration.
        num_tokentypes: 0.
        add_pooler: False.
        encoder_attn_mask_type: None or an enum member named causal.
        add_encoder: True.
        add_decoder: False.
        decoder_attn_mask_type: None or causal.
        pre_process: the stage embeds tokens.
        post_process: the stage ends with the final norm (and, where the weights are not tied, has the output layer's).

    Raises:
        ConfigError: for what only encoders, decoders with cross attention or token types need.
    """
    for name, value, only in (
        ("num_tokentypes", num_tokentypes, 0),
        ("add_pooler", add_pooler, False),
        ("add_encoder", add_encoder, True),
        ("add_decoder", add_decoder, False),
    ):
        if value != only:
            raise ConfigError(f"get_language_model: {name}={value!r} is not built; use {only!r}")
    for kind in (encoder_attn_mask_type, decoder_attn_mask_type):
        if kind is not None and getattr(kind, "name", kind) != "causal":
            raise ConfigError(f"get_language_model: attention mask type {kind!r} is not built; use causal")
    return TransformerLanguageModel(config, pre_process=pre_process, post_process=post_process), "language_model"


class TransformerLanguageModel(nn.Cell):
    """Embedding (first stage), transformer layers, final norm (last stage).

    Args:
        config: the model's configuration.
        pre_process: this stage embeds tokens; otherwise it is given hidden states by `set_input_tensor`.
        post_process: this stage ends with the final norm.
    """

    def __init__(self, config: TransformerConfig, *, pre_process: bool = True, post_process: bool = True) -> None:
        super().__init__(auto_prefix=True)
        stage = current_stage(config, pre_process, post_process)
        self._input_tensor: Tensor | None = None
        self.embedding = LanguageModelEmbedding(stage) if pre_process else None
        self.encoder = TransformerBlock(stage, post_layer_norm=post_process)
        self.output_layer: ColumnParallelLinear | None = None
        if post_process and config.untie_embeddings_and_output_weights:
            self.output_layer = ColumnParallelLinear(
                config.hidden_size,
                config.vocab_size,
                tp_group=stage.tp_group,
                init_method=stage.init("output_layer.weight"),
                bias=False,
                params_dtype=config.params_dtype,
                name="output_layer",
            )
            mark(self.output_layer.weight, is_embedding_or_output=True)

    def set_input_tensor(self, input_tensor: Tensor | None) -> None:
        """Give the hidden states from the previous stage to the next call; they are used once."""
        self._input_tensor = input_tensor

    def construct(
        self,
        tokens: Tensor | None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **not_built: Any,
    ) -> Tensor:
        """Return hidden states [S, B, H], or [S / tp, B, H] with sequence parallelism.

        Args:
            tokens: int32 [B, S]; used on the first stage.
            position_ids: int32 [B, S]; None: 0..S-1.
            attention_mask: None: causal; int32 [B, S]: the first position that each position may see; [B, S, S] or
                [B, 1, S, S]: 1 where attention is forbidden, causal within documents.
            not_built: the arguments of token types, retrievers and inference, all None.

        Raises:
            ConfigError: if one of these is given, or a later stage was given no hidden states.
        """
        given = sorted(name for name, value in not_built.items() if value is not None)
        if given:
            raise ConfigError(f"language_model: {', '.join(given)}: not built; leave it None")
        if self.embedding is not None:
            hidden: Tensor | None = self.embedding(tokens, position_ids)
        else:
            hidden, self._input_tensor = self._input_tensor, None
        if hidden is None:
            raise ConfigError("this pipeline stage has no embedding: call set_input_tensor(hidden) before each call")
        if attention_mask is not None and attention_mask.ndim > 2:
            starts = document_starts_of_mask(attention_mask.asnumpy()).astype(np.int32)
            attention_mask = remember(Tensor(starts, ms.int32), starts)
        return self.encoder(hidden, attention_mask)


class ParallelLMLogits(nn.Cell):
    """Logits of hidden states and a weight whose vocabulary is cut over the tensor parallel group.

    Args:
        config: the model's configuration.
        bias: add a bias of its own.
        compute_dtype: of the product, by name or as a MindSpore type; None: the configuration's.
    """

    def __init__(self, config: TransformerConfig, bias: bool = False, compute_dtype: Any = None) -> None:
        super().__init__(auto_prefix=True)
        if compute_dtype is not None:
            config = dataclasses.replace(config, compute_dtype=_dtype_name(compute_dtype))
        stage = current_stage(config)
        self.tp_group, self.compute_dtype = stage.tp_group, stage.compute_dtype
        self.linear = ColumnParallelLinear(
            config.hidden_size,
            config.vocab_size,
            tp_group=stage.tp_group,
            init_method=stage.init("output_layer.weight"),
            bias=bias,
            sequence_parallel=stage.sequence_parallel,
            params_dtype=config.params_dtype,
            name="output_layer",
            skip_weight_param_allocation=True,
        )

    def construct(
        self, input_: Tensor, weight: Parameter, parallel_output: bool = True, bias: Tensor | None = None
    ) -> Tensor:
        """Return logits [S, B, V / tp], or all of V without `parallel_output`.

        Args:
            input_: [S, B, H], or [S / tp, B, H] with sequence parallelism.
            weight: [V / tp, H].
            parallel_output: return this rank's part of the vocabulary.
            bias: [V / tp], added to the product.
        """
        logits, _ = self.linear(input_.astype(self.compute_dtype), weight)
        if bias is not None:
            logits = logits + bias.astype(logits.dtype)
        return logits if parallel_output else gather_from_tensor_model_parallel_region(logits, self.tp_group)


def _dtype_name(dtype: Any) -> str:
    name = str(dtype).lower()
    if name not in ("float32", "float16", "bfloat16"):
        raise ConfigError(f"compute_dtype={dtype!r}: use float32, float16 or bfloat16")
    return name
