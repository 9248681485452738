"""MindFormers' model classes over this project's models: made from a configuration or from a directory's weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from parallel_core import ops
from parallel_core.api.configs import BertConfig, GPT2Config, LlamaConfig, PanguAlphaConfig, PretrainedConfig
from parallel_core.checkpoint import TensorShard, find_checkpoint, load_shards, open_checkpoint
from parallel_core.checkpoint.huggingface.writer import write_hugging_face
from parallel_core.checkpoint.opening import require_intact_source
from parallel_core.checkpoint.source import TensorInfo
from parallel_core.config.mindformers.sampling import mindformers_before_0_8, mindformers_since_0_8
from parallel_core.config.model_keys import model_settings
from parallel_core.config.schema import AllConfig, TransformerConfig
from parallel_core.errors import CheckpointError, ConfigError
from parallel_core.generate.generator import Generator
from parallel_core.generate.loading import Described
from parallel_core.generate.requests import SamplingParams
from parallel_core.layout.shard import Range, shard_of
from parallel_core.training.classification import class_losses
from parallel_core.training.runtime import start_runtime, supported_precision
from parallel_core.transformer import ModelStage
from parallel_core.transformer.models import make_model

DOWNLOADS = Path("checkpoint_download")
"""Where MindFormers keeps what it has downloaded, by family and name."""


def weights_folder(name: str | Path) -> Path:
    """Return the directory that a name means: itself, or what MindFormers has downloaded under that name.

    Raises:
        CheckpointError: there is none; both folders are named.
    """
    family = str(name).split("_", maxsplit=1)[0]
    for folder in (Path(name), DOWNLOADS / family / str(name)):
        if folder.is_dir():
            return folder
    raise CheckpointError(
        f"there are no weights of {str(name)!r}: neither {Path(name).resolve()} nor "
        f"{(DOWNLOADS / family / str(name)).resolve()} is a folder. Nothing is downloaded: put a checkpoint there, or "
        "make a model with first values from its configuration"
    )


class LiveWeights:
    """A model in memory, read as a checkpoint is (`checkpoint.TensorSource`)."""

    format = "memory"

    def __init__(self, model: PreTrainedModel) -> None:
        self.path = Path(type(model).__name__)
        self._parameters = {shard_of(p).name: p for p in model.network.get_parameters()}
        described = model.network.config
        self.common: dict[str, Any] = {
            "iteration": 0, "model_config": {**model_settings(described), "vocab_size": described.vocab_size},
        }  # fmt: skip

    def keys(self) -> list[str]:
        """Return the parameters' names."""
        return list(self._parameters)

    def info(self, key: str) -> TensorInfo:
        """Return a parameter's shape and dtype."""
        return TensorInfo(tuple(self._parameters[key].shape), str(self._parameters[key].dtype).lower())

    def read_into(self, key: str, ranges: Sequence[Range], out: np.ndarray) -> int:
        """Fill `out` with a rectangle of a parameter, as it is now."""
        values = self._parameters[key].asnumpy()[tuple(slice(*span) for span in ranges)]
        out[...] = values if out.dtype == values.dtype else values.view(out.dtype)
        return 1


class PreTrainedModel(nn.Cell):
    """A model, with first values; `from_pretrained` makes one with a directory's weights.

    It is whole on a process. In a job of several ranks a `Trainer` cuts it over them, so it is made on a rank only when
    that is asked for it. A class of one's own has this project's model if its `config_class` has `settings`, else the
    cells that it makes, and a `construct` that returns the loss of ids [B, S + 1] in training and logits otherwise.

    Args:
        config: its settings; None: the class's defaults. With `checkpoint_name_or_path` the weights come from there.
        auto_prefix: how MindSpore names the parameters of cells of one's own.

    Raises:
        ConfigError: the settings are of another model.
        CheckpointError: the weights are not where the configuration says.
    """

    config_class: ClassVar[type[PretrainedConfig]] = PretrainedConfig
    heads: ClassVar[tuple[str, ...]] = ("none",)
    labels: ClassVar[bool] = False
    models: ClassVar[list[type[PreTrainedModel]]] = []
    _support_list: ClassVar[list[str]] = []

    def __init_subclass__(cls) -> None:
        PreTrainedModel.models.append(cls)
        cls._support_list = cls.config_class.get_support_list()

    def __init__(self, config: PretrainedConfig | None = None, auto_prefix: bool = False) -> None:
        super().__init__(auto_prefix=auto_prefix)
        self.config = self.config_class() if config is None else config
        if not isinstance(self.config, self.config_class):
            raise ConfigError(
                f"{type(self).__name__} takes a {self.config_class.__name__}, not a {type(self.config).__name__}"
            )
        self._net: nn.Cell | None = None
        self.weights: Path | None = None
        if self.config.checkpoint_name_or_path:
            self.weights = weights_folder(self.config.checkpoint_name_or_path)
        if self.is_built_in:
            self._check(self.described())
        if start_runtime()[1] == 1 and self.is_built_in:
            self._build()

    @property
    def is_built_in(self) -> bool:
        """Whether the model is one of this project's; else its cells are its class's own."""
        return bool(self.config.settings)

    def described(self) -> TransformerConfig:
        """Return what the model is here."""
        return self.config.model_config()

    def _check(self, model: TransformerConfig) -> None:
        if model.bert.bert_head not in self.heads:
            raise ConfigError(f"{type(self).__name__} has head {' or '.join(self.heads)}, not {model.bert.bert_head}")

    def _build(self) -> nn.Cell:
        ops.use_kernels("auto")
        still = dataclasses.replace(self.described(), attention_dropout_rate=0.0, hidden_dropout_rate=0.0)
        self._net = make_model(ModelStage(supported_precision(AllConfig(model_config=still))[0].model_config))
        if self.weights is not None:
            self.load(self.weights)
        return self._net

    @property
    def network(self) -> Any:
        """The model itself, whole on this process; in a job of several ranks it is made when somebody asks for it."""
        if not self.is_built_in:
            return self
        return self._build() if self._net is None else self._net

    @property
    def is_untouched(self) -> bool:
        """Whether nobody has made the model's parameters yet: they are what `weights` and the configuration say."""
        return self.is_built_in and self._net is None

    @classmethod
    def get_support_list(cls) -> list[str]:
        """Return the names of the presets of its configuration."""
        return list(cls._support_list)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_dir: str | Path) -> PreTrainedModel:
        """Return the model of a directory, with its weights.

        Raises:
            CheckpointError: there is no such directory, or a tensor is missing; the folder is named.
            ConfigError: it holds another model.
        """
        folder = weights_folder(pretrained_model_name_or_dir)
        model = cls(cls.config_class.from_pretrained(folder))
        model.load(folder)
        return model

    def load(self, folder: str | Path) -> None:
        """Take the weights of a directory.

        Raises:
            CheckpointError: as `from_pretrained`.
        """
        source = open_checkpoint(find_checkpoint(str(weights_folder(folder)), check=False))
        if self.is_untouched and start_runtime()[1] > 1:
            self.weights = weights_folder(folder)
            return
        require_intact_source(source)
        parameters = {shard_of(p).name: p for p in self.network.get_parameters()}
        wanted = {name: TensorShard.full(name, p.shape, "float32") for name, p in parameters.items()}
        known = [*wanted, *(key for key in source.keys() if "@" in key)]  # noqa: SIM118 - a method of TensorSource
        arrays, _ = load_shards(source, wanted, all_keys=known)
        for name, parameter in parameters.items():
            parameter.set_data(Tensor.from_numpy(np.ascontiguousarray(arrays[name])).astype(parameter.dtype))

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write a Hugging Face directory of the weights as they are now.

        Raises:
            CheckpointError: no architecture of Hugging Face has the model, or the folder is not empty.
        """
        if not self.is_built_in:
            raise CheckpointError(f"{type(self).__name__} has cells of its own, which no architecture there has; a "
                                  "Trainer's checkpoint holds them")  # fmt: skip
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise CheckpointError(f"{folder} is not empty; name another folder")
        write_hugging_face(LiveWeights(self), folder, lambda _: None)

    def construct(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Return float32 logits [B, S, V], or with labels the mean loss of every next token.

        Args:
            input_ids: int32 [B, S].
            attention_mask: int32 [B, S], 0 where there is padding, which must be on the right; it is not in the loss.
            labels: int32 [B, S], shifted here; negative ones are not in the loss.

        Raises:
            ConfigError: padding is on the left.
        """
        seen = None if attention_mask is None else attention_mask.asnumpy() != 0
        if seen is not None and (np.diff(seen.astype(np.int8), axis=1) > 0).any():
            raise ConfigError("attention_mask: padding must be on the right, where a causal model does not see it")
        logits = self.network(ops.cast(input_ids, ms.int32))
        if labels is None:
            return ops.cast(logits, ms.float32)
        wanted = labels.asnumpy()[:, 1:].astype(np.int32)
        wanted = np.where((wanted >= 0) & (True if seen is None else seen[:, 1:]), wanted, -1)
        shifted = Tensor(np.ascontiguousarray(wanted))
        losses = self.network.loss_of(logits[:, :-1].transpose(1, 0, 2).contiguous(), shifted)
        return losses.sum() / max(int((wanted >= 0).sum()), 1)

    def generate(
        self, input_ids: Any, *, streamer: Any = None, max_length: int | None = None,
        max_new_tokens: int | None = None, seed: int | None = None, counts: bool = False, **changes: Any,
    ) -> list[np.ndarray]:  # fmt: skip
        """Return int32 arrays of the prompts with their continuations.

        Args:
            input_ids: int [B, S] or [S], or a list of prompts of any lengths.
            streamer: has `put`, which is given the prompt and then each token, and `end`; one prompt.
            max_length: tokens of prompt and continuation; None: the configuration's, else the model's positions.
            max_new_tokens: tokens of the continuation, in place of `max_length`.
            seed: equal seeds give equal texts; None: 0, as in MindFormers.
            counts: penalties count what was generated, and `top_p` stands over `top_k`: the rules of MindFormers before
                0.8 (`config.mindformers.sampling`); else they are `transformers`', as since then.
            changes: do_sample, top_k, top_p, temperature, repetition_penalty, eos_token_id, pad_token_id; where
                nothing is said, the configuration's.

        Raises:
            ConfigError: a setting is unknown or out of range, or a prompt leaves no room.
        """
        if not self.is_built_in:
            raise ConfigError(f"{type(self).__name__} has cells of its own, of which generation knows nothing")
        how = {name: changes.pop(name, getattr(self.config, name)) for name in GENERATED}
        if changes:
            raise ConfigError(f"{', '.join(changes)}: no such setting of generation; there are {', '.join(GENERATED)}")
        if not isinstance(how["do_sample"], bool):
            raise ConfigError(f"do_sample={how['do_sample']!r}: give True or False")
        prompts = _prompts(input_ids, how["pad_token_id"])
        if streamer is not None and len(prompts) != 1:
            raise ConfigError(f"a streamer takes one prompt, not {len(prompts)}")
        positions = self.network.config.max_position_embeddings
        total = min(positions, (self.config.max_decode_length or positions) if max_length is None else max_length)
        rules = (mindformers_before_0_8 if counts else mindformers_since_0_8)(
            **{name: how[name] for name in GENERATED if not name.endswith("_id")}
        )
        params = []
        for prompt in prompts:
            room = max_new_tokens if max_new_tokens is not None else total - len(prompt)
            if room < 1:
                raise ConfigError(f"a prompt of {len(prompt)} tokens leaves max_length={total} no room")
            params.append(
                SamplingParams(
                    max_new_tokens=room,
                    stop_token_ids=() if how["eos_token_id"] is None else (int(how["eos_token_id"]),),
                    seed=seed or 0,
                    **rules,
                )
            )
        return self._continued(prompts, params, streamer)

    def _continued(
        self, prompts: list[list[int]], params: list[SamplingParams], streamer: Any
    ) -> list[np.ndarray]:
        it = self._fresh_generator()
        shown = 0

        def tell(completion: Any) -> None:
            nonlocal shown
            for token in completion.tokens[shown:]:
                streamer.put(np.array([token], np.int32))
            shown = len(completion.tokens)

        try:
            if streamer is not None:
                streamer.put(np.array(prompts[0], np.int32))
            done = it.generate(prompts, params, on_change=None if streamer is None else tell)
        finally:
            if streamer is not None:  # after an error too, so that nobody waits for more
                streamer.end()
        return [np.array([*prompt, *one.tokens], np.int32) for prompt, one in zip(prompts, done)]

    def _fresh_generator(self) -> Generator:
        """Return the engine over this model's weights as they are now."""
        source = LiveWeights(self)
        model = self.network.config
        if model.bert.is_encoder:
            raise ConfigError(f"{type(self).__name__}: an encoder continues no text")
        longest = model.max_position_embeddings
        described = Described(source.path, source, model, longest, None, "the model is given without one")
        return Generator(described, max_batch_size=8)


GENERATED = ("do_sample", "top_k", "top_p", "temperature", "repetition_penalty", "eos_token_id", "pad_token_id")
"""Settings of generation that a configuration has and a call may change."""


def _prompts(input_ids: Any, pad: int | None) -> list[list[int]]:
    """Return prompts as lists of ids, without the padding on their right."""
    if isinstance(input_ids, Tensor):
        input_ids = input_ids.asnumpy()
    rows = np.asarray(input_ids, object) if isinstance(input_ids, list) else input_ids
    if isinstance(input_ids, list) and input_ids and isinstance(input_ids[0], (list, tuple, np.ndarray)):
        many = [list(map(int, row)) for row in input_ids]
    else:
        many = np.atleast_2d(np.asarray(rows, np.int64)).tolist()
    for row in many:
        while pad is not None and len(row) > 1 and row[-1] == pad:
            row.pop()
    if not many or not all(many):
        raise ConfigError("a prompt has no tokens")
    return many


class GPT2LMHeadModel(PreTrainedModel):
    """GPT-2."""

    config_class = GPT2Config


class GPT2ForSequenceClassification(PreTrainedModel):
    """GPT-2 with scores of `num_labels` classes at a text's last token."""

    config_class = GPT2Config
    labels = True

    def described(self) -> TransformerConfig:
        """Return what the model is here."""
        return dataclasses.replace(self.config.model_config(), num_labels=vars(self.config)["num_labels"])

    def construct(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        """Return float32 scores [B, num_labels], or with labels their mean cross entropy.

        Args:
            input_ids: int32 [B, S].
            attention_mask: int32 [B, S], 0 where there is padding, on the right; None: no padding.
            labels: int32 [B].

        Raises:
            ConfigError: padding is on the left, or a text has no token.
        """
        seen = np.ones(input_ids.shape, np.int32) if attention_mask is None else attention_mask.asnumpy() != 0
        if (np.diff(seen.astype(np.int8), axis=1) > 0).any() or not seen[:, 0].all():
            raise ConfigError("attention_mask: padding must be on the right, after one token at least")
        lengths = Tensor(seen.sum(1).astype(np.int32))
        scores = self.network(ops.cast(input_ids, ms.int32), lengths)
        return scores if labels is None else class_losses(scores, ops.cast(labels, ms.int32)).mean()


class LlamaForCausalLM(PreTrainedModel):
    """LLaMA."""

    config_class = LlamaConfig


class PanguAlphaHeadModel(PreTrainedModel):
    """PanGu-alpha."""

    config_class = PanguAlphaConfig


class BertForQuestionAnswering(PreTrainedModel):
    """BERT with begin and end logits for every position."""

    config_class = BertConfig
    heads: ClassVar[tuple[str, ...]] = ("question_answering",)

    def construct(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Return float32 [B, S, 2]; see `transformer.models.BertModel`."""
        return self.network(input_ids, attention_mask, token_type_ids)


class BertForPreTraining(BertForQuestionAnswering):
    """BERT with logits of words, and of the order of segments."""

    heads = ("masked_lm", "pretraining")

    def construct(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return logits [B, S, V], and [B, 2] or None; see `transformer.models.BertModel`."""
        return self.network(input_ids, attention_mask, token_type_ids)


class BertModel(BertForQuestionAnswering):
    """BERT's hidden states [B, S, H] and the pooled first one [B, H]."""

    heads = ("encoder",)


def model_class_of(config: PretrainedConfig, labels: bool | None = None) -> type[PreTrainedModel]:
    """Return the class of a configuration's model.

    Args:
        config: the settings.
        labels: whether the model classifies texts; None: as the checkpoint does that the settings are of.

    Raises:
        ConfigError: there is none.
    """
    model = config.model_config()
    labels = bool(model.num_labels) if labels is None else labels
    for kind in PreTrainedModel.models:
        if type(config) is kind.config_class and model.bert.bert_head in kind.heads and kind.labels == labels:
            return kind
    raise ConfigError(f"{type(config).__name__} has no model {'with a head for texts' if labels else 'here'}")


__all__ = [
    "BertForPreTraining", "BertForQuestionAnswering", "BertModel", "GPT2ForSequenceClassification", "GPT2LMHeadModel",
    "LlamaForCausalLM", "PanguAlphaHeadModel", "PreTrainedModel", "model_class_of", "weights_folder",
]  # fmt: skip
