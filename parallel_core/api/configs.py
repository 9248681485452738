"""MindFormers' configuration objects: its keyword names, its presets, and the model that they mean here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml

from parallel_core.api.register import MindFormerRegister
from parallel_core.checkpoint import find_checkpoint, open_checkpoint
from parallel_core.checkpoint.huggingface.tensors import WORD_EMBEDDINGS
from parallel_core.config.bert import BertConfig as BertSection
from parallel_core.config.model_keys import model_of_settings
from parallel_core.config.schema import TransformerConfig
from parallel_core.data.files import read_text
from parallel_core.errors import ConfigError

_ACTIVATIONS = {"gelu": "gelu_tanh", "gelu_erf": "gelu", "fast_gelu": "fast_gelu", "relu": "relu", "silu": "silu"}
"""Theirs -> ours; their gelu is the tanh form."""
GENERATION: dict[str, Any] = {
    "do_sample": True, "top_k": 5, "top_p": 1.0, "temperature": 1.0, "repetition_penalty": 1.0,
    "max_decode_length": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
"""How a model continues texts where a call does not say, with their defaults."""
_IGNORED = {"batch_size", "use_past", "layernorm_compute_type", "bos_token_id", "unk_token_id", "is_dynamic", "offset"}
"""Accepted and without effect: batches have the size they come in, a cache is always kept, norms are of float32."""


def _same(value: Any) -> Any:
    return value


def _activation(value: str) -> str:
    if value not in _ACTIVATIONS:
        raise ConfigError(f"hidden_act={value!r}: give one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[value]


def _dtype(value: Any) -> str:
    word = str(value).lower().replace("mindspore.", "")
    if word not in ("float32", "float16", "bfloat16"):
        raise ConfigError(f"{value!r} is no type of parameters; give float32, float16 or bfloat16")
    return word


@dataclasses.dataclass(frozen=True)
class Setting:
    """A keyword of theirs: its default, the fields of ours that it sets, and how its value is read."""

    default: Any
    fields: tuple[str, ...] = ()
    read: Callable[[Any], Any] = _same
    back: Callable[[Any], Any] = _same


def _act(default: str) -> Setting:
    words = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    return Setting(default, ("hidden_act",), _activation, lambda value: words.get(value, value))


_SIZES = {
    "num_layers": Setting(12, ("num_layers",)),
    "hidden_size": Setting(768, ("hidden_size",)),
    "num_heads": Setting(12, ("num_attention_heads",)),
    "seq_length": Setting(1024, ("seq_length", "max_position_embeddings")),
    "param_init_type": Setting("float32", ("params_dtype",), _dtype),
    "compute_dtype": Setting("float32", ("compute_dtype",), _dtype),
}
_DROPOUT = {
    "hidden_dropout_rate": Setting(0.1, ("hidden_dropout_rate",)),
    "attention_dropout_rate": Setting(0.1, ("attention_dropout_rate",)),
    "softmax_compute_type": Setting(
        "float32", ("attention_softmax_in_fp32",), lambda value: _dtype(value) == "float32",
        lambda value: "float32" if value else "float16",
    ),
}  # fmt: skip


class PretrainedConfig:
    """A model's settings by MindFormers' names, as attributes.

    `from_pretrained` takes a preset's name, a directory of a checkpoint (Hugging Face, this project's or Megatron's),
    or a MindFormers `.yaml` with `model.model_config`.

    Args:
        settings: values by name; the others have their defaults.

    Raises:
        ConfigError: a name is unknown, or a value cannot be.
    """

    settings: ClassVar[Mapping[str, Setting]] = {}
    fixed: ClassVar[Mapping[str, Any]] = {}
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    families: ClassVar[dict[str, type[PretrainedConfig]]] = {}

    _support_list: ClassVar[list[str]] = []
    checkpoint_name_or_path: str
    max_decode_length: int | None

    def __init_subclass__(cls) -> None:
        PretrainedConfig.families[cls.__name__] = cls
        cls._support_list = list(cls.presets)

    def __init__(self, **settings: Any) -> None:
        known = {name: setting.default for name, setting in self.settings.items()}
        known.update({**GENERATION, "checkpoint_name_or_path": ""})
        unknown = sorted(set(settings) - known.keys() - _IGNORED)
        if unknown:
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
            name = str(found.pop("type"))
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{path}: has no model.model_config with a type ({error})") from None
        kind = PretrainedConfig.families.get(name)
        if kind is None:
            own: PretrainedConfig = MindFormerRegister.get_instance("config", name, **found)
            return own
        if not issubclass(kind, cls):
            raise ConfigError(f"{path}: type {kind.__name__}, not {cls.__name__}")
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
        changed = {name for name in self.settings if self._base is None or getattr(self, name) != self._read[name]}
        values: dict[str, Any] = {}
        for name in changed:
            setting = self.settings[name]
            value = getattr(self, name)
            if value is not None or self._base is None:
                values.update(dict.fromkeys(setting.fields, setting.read(value)))
        if self._base is not None:
            return dataclasses.replace(self._base, **values)
        values.update(self.fixed)
        values.update(self.derived())
        if values["hidden_size"] % values["num_attention_heads"]:
            raise ConfigError(
                f"hidden_size={values['hidden_size']} is not a multiple of num_heads={values['num_attention_heads']}"
            )
        return TransformerConfig(**{name: value for name, value in values.items() if value is not None})

    def derived(self) -> dict[str, Any]:
        """Return fields that follow from several settings."""
        return {}

    def __repr__(self) -> str:
        shown = {name: getattr(self, name) for name in self.settings}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


class GPT2Config(PretrainedConfig):
    """GPT-2; their dropout after the embedding is that of the residual stream."""

    settings = {
        **_SIZES, **_DROPOUT, "vocab_size": Setting(50257, ("vocab_size",)), "hidden_act": _act("gelu"),
        "expand_ratio": Setting(4), "embedding_dropout_prob": Setting(0.1),
    }  # fmt: skip
    fixed = {"normalization": "LayerNorm", "position_embedding_type": "learned_absolute"}
    presets = {
        "gpt2": {},
        "gpt2_xl": {"hidden_size": 1600, "num_layers": 48, "num_heads": 25},
        "gpt2_13b": {"hidden_size": 5120, "num_layers": 40, "num_heads": 40, "seq_length": 2048},
        "gpt2_52b": {"hidden_size": 8192, "num_layers": 64, "num_heads": 32, "seq_length": 2048,
                     "hidden_act": "fast_gelu"},
    }  # fmt: skip

    def derived(self) -> dict[str, Any]:
        """Return the width of the MLP; refuse a dropout of the embedding's own."""
        values = vars(self)
        if values["embedding_dropout_prob"] != values["hidden_dropout_rate"]:
            raise ConfigError(
                f"embedding_dropout_prob={values['embedding_dropout_prob']} is another than hidden_dropout_rate="
                f"{values['hidden_dropout_rate']}; there is one rate for both, give them alike"
            )
        return {"ffn_hidden_size": values["expand_ratio"] * values["hidden_size"]}


class PanguAlphaConfig(PretrainedConfig):
    """PanGu-alpha; num_layers counts the query layer."""

    settings = {
        **_SIZES, **_DROPOUT, "vocab_size": Setting(40000, ("vocab_size",)), "hidden_act": _act("fast_gelu"),
        "hidden_size": Setting(2560, ("hidden_size",)), "num_layers": Setting(32, ("num_layers",)),
        "num_heads": Setting(32, ("num_attention_heads",)), "ffn_hidden_size": Setting(None, ("ffn_hidden_size",)),
    }  # fmt: skip
    fixed = {"top_query_layer": "norm_before"}
    presets = {
        "pangualpha_2_6b": {},
        "pangualpha_13b": {"hidden_size": 5120, "num_layers": 40, "num_heads": 40},
    }


class LlamaConfig(PretrainedConfig):
    """LLaMA: rotary positions, RMSNorm, gated SiLU, no biases."""

    settings = {
        **_SIZES, "seq_length": Setting(2048, ("seq_length", "max_position_embeddings")),
        "hidden_size": Setting(4096, ("hidden_size",)), "num_layers": Setting(32, ("num_layers",)),
        "num_heads": Setting(32, ("num_attention_heads",)), "vocab_size": Setting(32000, ("vocab_size",)),
        "n_kv_heads": Setting(None, ("num_query_groups",)), "rms_norm_eps": Setting(1e-5, ("norm_epsilon",)),
        "multiple_of": Setting(256), "ffn_dim_multiplier": Setting(None), "theta": Setting(10000.0, ("rotary_base",)),
        "intermediate_size": Setting(None, ("ffn_hidden_size",)),
    }  # fmt: skip
    fixed = {
        "normalization": "RMSNorm", "position_embedding_type": "rope", "hidden_act": "swiglu", "add_bias_linear": False,
        "qkv_has_bias": False, "out_proj_has_bias": False, "untie_embeddings_and_output_weights": True,
        "hidden_dropout_rate": 0.0, "attention_dropout_rate": 0.0,
    }  # fmt: skip
    presets = {
        "llama_7b": {}, "llama_13b": {"hidden_size": 5120, "num_layers": 40, "num_heads": 40},
        "llama2_7b": {"seq_length": 4096},
        "llama2_13b": {"hidden_size": 5120, "num_layers": 40, "num_heads": 40, "seq_length": 4096},
    }  # fmt: skip

    def derived(self) -> dict[str, Any]:
        """Return the width of the MLP, two thirds of four widths rounded up, and the groups."""
        values = vars(self)
        heads, groups = values["num_heads"], values["n_kv_heads"] or values["num_heads"]
        base, more = 4 * values["hidden_size"], values["ffn_dim_multiplier"]
        width = int(2 * (int((more + 0.01) * base) if more else base) / 3)  # their rounding
        rounded = -(-width // values["multiple_of"]) * values["multiple_of"]
        return {
            "ffn_hidden_size": values["intermediate_size"] or rounded,
            "num_query_groups": groups, "group_query_attention": groups != heads,
        }  # fmt: skip


class BertConfig(PretrainedConfig):
    """BERT with the head of a task: question_answering, masked_lm, pretraining or encoder."""

    settings = {
        **_SIZES, **_DROPOUT, "vocab_size": Setting(30522, ("vocab_size",)),
        "seq_length": Setting(512, ("seq_length", "max_position_embeddings")),
        "hidden_act": Setting("gelu", ("hidden_act",)), "intermediate_size": Setting(None, ("ffn_hidden_size",)),
        "layernorm_epsilon": Setting(1e-12, ("norm_epsilon",)), "type_vocab_size": Setting(2),
        "head": Setting("encoder"),
    }  # fmt: skip
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

    def derived(self) -> dict[str, Any]:
        """Return the head and its segments."""
        values = vars(self)
        return {"bert": BertSection(bert_head=values["head"], num_tokentypes=values["type_vocab_size"])}


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
