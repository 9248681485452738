"""The GPT model of these scripts: hidden states, or on the last stage the masked mean loss."""

from __future__ import annotations

import enum
from typing import Any

import mindspore as ms
from mindspore import Parameter, Tensor

from parallel_core.compat.mindspeed.eos_mask import EosMask
from parallel_core.compat.mindspeed.language_model import ParallelLMLogits, get_language_model
from parallel_core.compat.mindspeed.loss import LossWithMask, VocabParallelCrossEntropy
from parallel_core.compat.mindspeed.module import Module
from parallel_core.compat.mindspeed.stage import run_of
from parallel_core.config.schema import TransformerConfig
from parallel_core.errors import ConfigError


class AttnMaskType(enum.Enum):
    """What attention may see; causal is built."""

    padding = 1
    causal = 2
    no_mask = 3
    padding_causal = 4


class GPTModel(Module):
    """A GPT model, or the part of one that the pipeline stage being built holds.

    Args:
        config: the model's configuration.
        num_tokentypes: 0.
        parallel_output: return this rank's part of the logits' vocabulary, where logits are asked for.
        pre_process: this stage embeds tokens.
        post_process: this stage ends in logits or a loss.
        eod: end-of-document token (0 is one); positions and masks that are not given are then made from it.
        reset_position_ids: see `EosMask`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        num_tokentypes: int = 0,
        parallel_output: bool = True,
        pre_process: bool = True,
        post_process: bool = True,
        *,
        eod: int | None = None,
        reset_position_ids: bool = False,
    ) -> None:
        super().__init__(config)
        if config.mtp.mtp_num_layers:
            raise ConfigError(
                f"mtp_num_layers={config.mtp.mtp_num_layers}: this class predicts the next token alone; leave it out, "
                "or use parallel_core.transformer.GPTModel"
            )
        self.parallel_output, self.pre_process, self.post_process = parallel_output, pre_process, post_process
        self.eos_mask: EosMask | None = None
        if eod is not None:
            batch_size = run_of(config).dataset_config.batch_size
            self.eos_mask = EosMask(batch_size, config.seq_length, eod, reset_position_ids)
        self.language_model, _ = get_language_model(
            config,
            num_tokentypes,
            encoder_attn_mask_type=AttnMaskType.causal,
            pre_process=pre_process,
            post_process=post_process,
        )
        if post_process:
            self.parallel_lm_logits = ParallelLMLogits(config)
            self.loss = LossWithMask(VocabParallelCrossEntropy(config.label_smoothing))
        if not config.untie_embeddings_and_output_weights:
            self.initialize_word_embeddings()

    def construct(
        self,
        tokens: Tensor | None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        loss_mask: Tensor | None = None,
        retriever_input_ids: Tensor | None = None,
        retriever_position_ids: Tensor | None = None,
        retriever_attn_mask: Tensor | None = None,
        labels: Tensor | None = None,
        tokentype_ids: Tensor | None = None,
        inference_params: Any = None,
    ) -> Tensor:
        """Run this stage.

        Args:
            tokens: int32 [B, S].
            position_ids: int32 [B, S]; None: 0..S-1, or from the end-of-document tokens.
            attention_mask: see `TransformerLanguageModel`.
            loss_mask: float32 [B, S]; with labels.
            retriever_input_ids: None.
            retriever_position_ids: None.
            retriever_attn_mask: None.
            labels: int32 [B, S]; None: return logits.
            tokentype_ids: None.
            inference_params: None.

        Returns:
            Hidden states [S, B, H] before the last stage; on it the mean loss, a float32 scalar, or logits
            [B, S, V / tp].
        """
        if self.eos_mask is not None and (position_ids is None or attention_mask is None):
            position_ids, attention_mask = self.eos_mask(tokens)
        lm_output = self.language_model(
            tokens,
            position_ids,
            attention_mask,
            tokentype_ids=tokentype_ids,
            retriever_input_ids=retriever_input_ids,
            retriever_position_ids=retriever_position_ids,
            retriever_attn_mask=retriever_attn_mask,
            inference_params=inference_params,
        )
        if not self.post_process:
            return lm_output
        return post_language_model_processing(
            self.parallel_lm_logits,
            self.loss,
            lm_output,
            labels,
            self._output_weight(),
            self.parallel_output,
            self.config.fp16_lm_cross_entropy,
            loss_mask,
        )

    def _output_weight(self) -> Parameter:
        layer = self.language_model.output_layer
        if layer is not None and layer.weight is not None:
            return layer.weight
        return self.shared_embedding_or_output_weight()


def post_language_model_processing(
    parallel_lm_logits: ParallelLMLogits,
    loss_fn: LossWithMask,
    lm_output: Tensor,
    labels: Tensor | None,
    logit_weights: Parameter,
    parallel_output: bool,
    fp16_lm_cross_entropy: bool,
    loss_mask: Tensor | None,
) -> Tensor:
    """Return the masked mean loss of hidden states, or without labels their logits.

    Args:
        parallel_lm_logits: makes logits.
        loss_fn: makes a loss of them.
        lm_output: hidden states [S, B, H].
        labels: int32 [B, S] or None.
        logit_weights: [V / tp, H].
        parallel_output: keep the vocabulary cut over the tensor parallel group; a loss needs it cut.
        fp16_lm_cross_entropy: leave float16 logits as they are.
        loss_mask: float32 [B, S]; needed with labels.

    Raises:
        ConfigError: if `loss_mask` is missing, or the logits are not float16 where they must be.
    """
    cut = parallel_output or labels is not None
    output = parallel_lm_logits(lm_output, logit_weights, cut).swapaxes(0, 1)
    if labels is None:
        return output
    if loss_mask is None:
        raise ConfigError("GPTModel: labels are given, but no loss_mask; the loss is the mean over what it marks")
    if not fp16_lm_cross_entropy:
        return loss_fn(output.astype(ms.float32), labels, loss_mask)
    if output.dtype != ms.float16:
        raise ConfigError(f"fp16_lm_cross_entropy needs float16 logits, got {output.dtype}; set --fp16 or leave it out")
    return loss_fn(output, labels, loss_mask)
