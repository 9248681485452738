"""MindFormers' configuration objects: its keyword names, its presets, and the model that they mean here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml

from parallel_core.api.register import MindFormerRegister
from parallel_core.checkpoint import find_checkpoint, open_checkpoint
from parallel_core.checkpoint.huggingface.tensors import WORD_EMBEDDINGS
from parallel_core.config.mindformers.models import (
    BERT,
    GENERATION,
    GPT2,
    IGNORED,
    LLAMA,
    PANGU_ALPHA,
    Family,
    Setting,
)
from parallel_core.config.model_keys import model_of_settings
from parallel_core.config.schema import TransformerConfig
from parallel_core.data.files import read_text
from parallel_core.errors import ConfigError


class PretrainedConfig:
    """A model's settings by MindFormers' names, as attributes.

    `from_pretrained` takes a preset's name, a directory of a checkpoint (Hugging Face, this project's or Megatron's),
    or a MindFormers `.yaml` with `model.model_config`.

    Args:
        settings: values by name; the others have their defaults.

    Raises:
        ConfigError: a name is unknown, or a value cannot be.
    """

    family: ClassVar[Family] = Family("PretrainedConfig", {})
    settings: ClassVar[Mapping[str, Setting]] = {}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    families: ClassVar[dict[str, type[PretrainedConfig]]] = {}

    _support_list: ClassVar[list[str]] = []
    checkpoint_name_or_path: str
    max_decode_length: int | None

    def __init_subclass__(cls) -> None:
        PretrainedConfig.families[cls.__name__] = cls
        cls.settings = cls.family.settings
        cls._support_list = list(cls.presets)

    def __init__(self, **settings: Any) -> None:
        known = {name: setting.default for name, setting in self.settings.items()}
        known.update({**GENERATION, "checkpoint_name_or_path": ""})
        unknown = sorted(set(settings) - known.keys() - IGNORED - self.family.ignored)
        if unknown and self.settings:  # a class of one's own without a table has what it says
            raise ConfigError(f"{type(self).__name__}: {', '.join(unknown)}: no such setting; there are "
                              f"{', '.join(known)}")  # fmt: skip
        self.__dict__.update({**known, **settings})
        self._base: TransformerConfig | None = None
        self._read: dict[str, Any] = {}

    @classmethod
    def get_support_list(cls) -> list[str]:
        """Return the names of the presets."""
        return list(cls._support_list)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path) -> PretrainedConfig:
        """Return the settings of a preset, a directory or a `.yaml`.

        Raises:
            ConfigError: it is none of them, or of another model.
            CheckpointError: the directory cannot be read.
        """
        name = str(pretrained_model_name_or_path)
        if name.endswith((".yaml", ".yml")):
            return cls._of_yaml(Path(name))
        if Path(name).is_dir():
            source = open_checkpoint(find_checkpoint(name, check=False))
            stored = source.common.get("model_config") or {}
            rows = stored.get("vocab_size") or source.info(WORD_EMBEDDINGS).shape[0]
            model = model_of_settings({**stored, "padded_vocab_size": rows})
            return config_class_of(model, cls).of_model(model)
        owners = [one for one in PretrainedConfig.families.values() if issubclass(one, cls) and name in one.presets]
        if not owners:
            theirs = [one for one in PretrainedConfig.families.values() if issubclass(one, cls)]
            known = ", ".join(preset for one in theirs for preset in one.presets)
            raise ConfigError(f"{name!r} is no folder, no .yaml and no preset of {cls.__name__}; presets: {known}")
        return owners[0](**owners[0].presets[name])

    @classmethod
    def _of_yaml(cls, path: Path) -> PretrainedConfig:
        tree = yaml.safe_load(read_text(str(path)))
        try:
            found = dict(tree["model"]["model_config"])
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{path}: has no model.model_config with a type ({error})") from None
        return cls.of_settings(found, str(path))

    @classmethod
    def of_settings(cls, settings: Mapping[str, Any], where: str) -> PretrainedConfig:
        """Return the settings of a YAML entry with `type`.

        Raises:
            ConfigError: the type is missing, unknown or of another model.
        """
        found = {name: value for name, value in settings.items() if name != "type"}
        if "type" not in settings:
            raise ConfigError(f"{where}: has no model.model_config with a type ('type')")
        name = str(settings["type"])
        kind = PretrainedConfig.families.get(name)
        if kind is None:
            own: PretrainedConfig = MindFormerRegister.get_instance("config", name, **found)
            return own
        if not issubclass(kind, cls):
            raise ConfigError(f"{where}: type {kind.__name__}, not {cls.__name__}")
        return kind(**found)

    @classmethod
    def of_model(cls, model: TransformerConfig) -> PretrainedConfig:
        """Return the settings of a model here, which `model_config` gives back to the letter."""
        values = {}
        for name, setting in cls.settings.items():
            if setting.fields:
                values[name] = setting.back(getattr(model, setting.fields[0]))
        made = cls(**values)
        made._base = model
        made._read = {name: getattr(made, name) for name in cls.settings}
        return made

    def model_config(self) -> TransformerConfig:
        """Return the model that the settings mean.

        Raises:
            ConfigError: a value cannot be, or sizes do not fit one another.
        """
        if not self.settings:
            return self._sizes()
        if self._base is None:
            return self.family.model({name: getattr(self, name) for name in self.settings})
        values: dict[str, Any] = {}
        for name, setting in self.settings.items():
            value = getattr(self, name)
            if value != self._read[name] and value is not None:
                values.update(dict.fromkeys(setting.fields, setting.read(value)))
        return dataclasses.replace(self._base, **values)

    def _sizes(self) -> TransformerConfig:
        """Return what a run has to know of a model of one's own: its ids, its positions, and how large it is."""
        values: dict[str, Any] = {"num_layers": 1, "hidden_size": 1, **vars(self)}
        missing = [name for name in ("vocab_size", "seq_length") if name not in values]
        if missing:
            raise ConfigError(f"{type(self).__name__}: {', '.join(missing)}: not said; a run has to know")
        return TransformerConfig(
            num_layers=values["num_layers"], hidden_size=values["hidden_size"], num_attention_heads=1,
            vocab_size=values["vocab_size"], seq_length=values["seq_length"],
        )  # fmt: skip

    def __repr__(self) -> str:
        shown = {name: getattr(self, name) for name in self.settings}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


class GPT2Config(PretrainedConfig):
    """GPT-2; their dropout after the embedding is that of the residual stream. `num_labels` is of a head for texts."""

    family = GPT2
    presets = {
        "gpt2": {}, "gpt2_txtcls": {},
        "gpt2_xl": {"hidden_size": 1600, "num_layers": 48, "num_heads": 25},
        "gpt2_13b": {"hidden_size": 5120, "num_layers": 40, "num_heads": 40, "seq_length": 2048},
        "gpt2_52b": {"hidden_size": 8192, "num_layers": 64, "num_heads": 32, "seq_length": 2048,
                     "hidden_act": "fast_gelu"},
    }  # fmt: skip

    @classmethod
    def of_model(cls, model: TransformerConfig) -> PretrainedConfig:
        """Return the settings of a model here."""
        made = super().of_model(model)
        labels = {"num_labels": model.num_labels} if model.num_labels else {}
        made.__dict__.update(labels)
        made._read.update(labels)
        return made


class PanguAlphaConfig(PretrainedConfig):
    """PanGu-alpha; num_layers counts the query layer."""

    family = PANGU_ALPHA
    presets = {
        "pangualpha_2_6b": {},
        "pangualpha_13b": {"hidden_size": 5120, "num_layers": 40, "num_heads": 40},
    }


class LlamaConfig(PretrainedConfig):
    """LLaMA: rotary positions, RMSNorm, gated SiLU, no biases."""

    family = LLAMA
    presets = {
        "llama_7b": {}, "llama_13b": {"hidden_size": 5120, "num_layers": 40, "num_heads": 40},
        "llama2_7b": {"seq_length": 4096},
        "llama2_13b": {"hidden_size": 5120, "num_layers": 40, "num_heads": 40, "seq_length": 4096},
    }  # fmt: skip


class BertConfig(PretrainedConfig):
    """BERT with the head of a task: question_answering, masked_lm, pretraining or encoder."""

    family = BERT
    presets = {
        "bert_base_uncased": {}, "qa_bert_base_uncased": {"head": "question_answering"},
        "qa_bert_base_uncased_squad": {"head": "question_answering"},
    }  # fmt: skip

    @classmethod
    def of_model(cls, model: TransformerConfig) -> PretrainedConfig:
        """Return the settings of an encoder here."""
        made = super().of_model(model)
        of_head = {"head": model.bert.bert_head, "type_vocab_size": model.bert.num_tokentypes}
        made.__dict__.update(of_head)
        made._read.update(of_head)
        return made


def config_class_of(model: TransformerConfig, wanted: type[PretrainedConfig]) -> type[PretrainedConfig]:
    """Return the class whose models `model` is one of.

    Raises:
        ConfigError: no class has such models, or it is another than `wanted`.
    """
    kind: type[PretrainedConfig] = GPT2Config
    if model.bert.is_encoder:
        kind = BertConfig
    elif model.top_query_layer != "none":
        kind = PanguAlphaConfig
    elif model.is_rotary:
        kind = LlamaConfig
    if not issubclass(kind, wanted):
        raise ConfigError(f"the checkpoint holds a model of {kind.__name__}, not of {wanted.__name__}")
    return kind
